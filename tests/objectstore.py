"""An S3-compatible server (moto) on this machine's loopback, whose answers are counted."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass
class Counter:
    """What a server was asked for, and what it gave."""

    requests: list[tuple[str, str]] = field(default_factory=list)
    served: int = 0
    failing: Any = None
    """(method, path) → whether to answer with an error."""

    def reset(self) -> None:
        self.requests.clear()
        self.served = 0
        self.failing = None


class Counted:
    """A WSGI application that counts the bytes of another's answers to GET."""

    def __init__(self, app: Any, counter: Counter) -> None:
        self.app, self.counter = app, counter

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        asked = environ["REQUEST_METHOD"], f"{environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}".rstrip("?")
        self.counter.requests.append(asked)
        if self.counter.failing is not None and self.counter.failing(*asked):
            start_response("403 Forbidden", [("Content-Type", "text/plain")])
            return [b"refused"]
        return self._counting(self.app(environ, start_response), asked[0] == "GET")

    def _counting(self, pieces: Iterable[bytes], counts: bool) -> Iterator[bytes]:
        for piece in pieces:
            if counts:
                self.counter.served += len(piece)
            yield piece


@dataclass
class Server:
    """A running server."""

    url: str
    counter: Counter
    _server: Any

    def environment(self) -> dict[str, str]:
        """What a process needs to know to use it."""
        return {**KEYS, "AWS_ENDPOINT_URL": self.url, "AWS_EC2_METADATA_DISABLED": "true"}

    def system(self) -> Any:
        """A client of its own."""
        import s3fs

        return s3fs.S3FileSystem(
            key=KEYS["AWS_ACCESS_KEY_ID"],
            secret=KEYS["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=self.url,
            skip_instance_cache=True,
            use_listings_cache=False,
        )

    def upload(self, folder: Path, bucket: str, name: str) -> str:
        """Put a folder's files into a bucket; returns its address."""
        system = self.system()
        if not system.exists(bucket):
            system.mkdir(bucket)
        for path in folder.iterdir():
            if path.is_file():
                system.pipe_file(f"{bucket}/{name}/{path.name}", path.read_bytes())
        return f"s3://{bucket}/{name}"

    def stop(self) -> None:
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/moto-api/reset", method="POST"), timeout=10).read()
        self._server.shutdown()


def start() -> Server:
    """Start a server on a free port."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept, as real stores do

        def log(self, type: str, message: str, *args: Any) -> None:
            pass

    counter = Counter()
    app = Counted(DomainDispatcherApplication(create_backend_app), counter)
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return Server(f"http://127.0.0.1:{server.server_port}", counter, server)


def put_json(system: Any, path: str, data: Any) -> None:
    """Store a JSON file."""
    system.pipe_file(path, json.dumps(data).encode())
