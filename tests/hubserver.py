"""A Hugging Face hub on this machine's loopback that serves one folder as one model, and counts what it gave.

And a plain web server that does the same.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A running server. served: bytes given of each file. asked: paths of all requests."""

    folder: Path
    url: str = ""
    served: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    _server: Any = None

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def tree(self, top: str, deep: bool) -> list[dict[str, Any]]:
        """What the API tells of a folder."""
        start = self.folder / top
        paths = start.rglob("*") if deep else start.iterdir()
        return [self.entry(path) for path in sorted(paths)]

    def entry(self, path: Path) -> dict[str, Any]:
        name = path.relative_to(self.folder).as_posix()
        oid = hashlib.sha1(name.encode()).hexdigest()
        kind = "directory" if path.is_dir() else "file"
        return {"type": kind, "oid": oid, "size": 0 if path.is_dir() else path.stat().st_size, "path": name}

    def stop(self) -> None:
        self._server.shutdown()


def start_plain(folder: Path) -> Hub:
    """A web server that lists a folder and serves ranges, as any does."""
    hub = Hub(folder)

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def send_head(self) -> Any:
            path = hub.folder / unquote(self.path).lstrip("/")
            if self.command != "GET" or not path.is_file():
                return super().send_head()
            data, code, more = path.read_bytes(), 200, ""
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
                code, more = 206, f"bytes {first}-{last}/{len(data)}"
                data = data[first : last + 1]
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Range", more)
            self.end_headers()
            hub.served[path.name] = hub.served.get(path.name, 0) + len(data)
            return BytesIO(data)

    return _serve(hub, partial(Handler, directory=str(folder)))


@contextmanager
def the_hub(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server that huggingface_hub takes for the hub; what it fetches lands in `cache`."""
    from huggingface_hub import HfFileSystem, constants

    started = start(folder)
    monkeypatch.setattr(constants, "ENDPOINT", started.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", started.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    HfFileSystem.clear_instance_cache()
    yield started
    started.stop()


def start(folder: Path) -> Hub:
    """Start a server on a free port."""
    hub = Hub(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._file(body=False)

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            path = unquote(parts.path)
            hub.asked.append(path)
            if match := re.fullmatch(r"/api/models/[^/]+/[^/]+/tree/[^/]+/?(.*)", path):
                return self._json(hub.tree(match[1], "recursive=true" in parts.query.lower()))
            if re.fullmatch(r"/api/models/org/model(/revision/[^/]+)?", path):
                files = [{"rfilename": name} for name in hub.files()]
                return self._json({"id": "org/model", "sha": COMMIT, "siblings": files, "private": False})
            if "/resolve/" in path:
                return self._file(body=True)
            return self._json({"error": "Repository not found"}, 404)

        def _json(self, data: Any, code: int = 200) -> None:
            raw = json.dumps(data).encode()
            self._begin(code, len(raw), {"Content-Type": "application/json"})
            self.wfile.write(raw)

        def _file(self, body: bool) -> None:
            name = unquote(urlsplit(self.path).path).split("/resolve/")[1].split("/", 1)[1]
            path = hub.folder / name
            if not path.is_file():
                self._begin(404, 0, {"X-Error-Code": "EntryNotFound"})
                return
            data = path.read_bytes()
            code, extra = 200, {"ETag": f'"{hub.entry(path)["oid"]}"', "X-Repo-Commit": COMMIT}
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
                code, extra["Content-Range"] = 206, f"bytes {first}-{last}/{len(data)}"
                data = data[first : last + 1]
            self._begin(code, len(data), extra)
            if body:
                hub.served[name] = hub.served.get(name, 0) + len(data)
                self.wfile.write(data)

        def _begin(self, code: int, nbytes: int, headers: dict[str, str]) -> None:
            self.send_response(code)
            for key, value in {**headers, "Content-Length": str(nbytes)}.items():
                self.send_header(key, value)
            self.end_headers()

    return _serve(hub, Handler)


def _serve(hub: Hub, handler: Any) -> Hub:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url, hub._server = f"http://127.0.0.1:{server.server_port}", server
    return hub
