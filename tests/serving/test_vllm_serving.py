"""vLLM serves native checkpoints from packed blocks as it serves the matrices that they stand for.

Run by `make test-vllm` in an environment of its own; skipped wherever vLLM is not installed. Every vLLM is a process of
its own: this one imports none of it.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alphaq import pipeline
from alphaq.calibration.stream import model_class
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.nouns.matrix import Role
from alphaq.nouns.plan import Plan
from families import plain_copy, random_family, save_layout

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make test-vllm)")

HEADS = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=32)
LATENT = dict(
    num_attention_heads=2, num_key_value_heads=2, head_dim=64,
    kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_moe": HEADS,
    "qwen3_moe": HEADS,
    "mixtral": HEADS,
    "olmoe": HEADS,
    "dots1": HEADS,
    "hunyuan_v1_moe": HEADS,
    "exaone_moe": HEADS,
    "granitemoe": dict(num_attention_heads=2, num_key_value_heads=1),
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT | dict(topk_method="noaux_tc"),
}
OTHERWISE = {"deepseek_v2", "deepseek_v3"}
"""Families whose unquantized random models vLLM runs otherwise than transformers does."""

EXPERT_CHOICES = ("2g32", "3g64", "16", "t2.25", "4g128", "1g32", "t3", "8g128s")
OTHER_CHOICES = ("4g128", "16", "t4", "4g32", "8g64s")
PROMPTS = [list(range(3, 20)), [7, 9, 11, 100, 55, 20, 31]]
COUNT = 12
TEXTS = ["def main", "The history of", "import os\n", "class "]
ENVIRONMENT = dict(
    VLLM_CPU_KVCACHE_SPACE="1", OMP_WAIT_POLICY="PASSIVE", VLLM_NO_USAGE_STATS="1", VLLM_CPU_OMP_THREADS_BIND="nobind"
)


def quantized(source: Path, out: Path, vocabulary: Mapping[Role, str] = MappingProxyType({})) -> Path:
    """Every matrix at another choice than its neighbours, some kept, so that merged layers are mixed.

    vocabulary: choices of embedding and head, which are kept else.
    """
    checkpoint = open_checkpoint(source)
    experts, others = itertools.cycle(EXPERT_CHOICES), itertools.cycle(OTHER_CHOICES)
    choices = {
        matrix.name: next(experts) if matrix.role is Role.EXPERT else next(others)
        for matrix in checkpoint.matrices
        if matrix.role in (Role.EXPERT, Role.SHARED_EXPERT, Role.ATTENTION, Role.DENSE_MLP)
    }
    choices |= {one.name: vocabulary[one.role] for one in checkpoint.matrices if one.role in vocabulary}
    pipeline.quantize(checkpoint, Plan(engine="native", choices=choices), out)
    return out


def run_vllm(folder: Path, workers: int = 1, **arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `run_vllm.py`; one process does everything if there is one worker."""
    given = dict(prompts=PROMPTS, count=COUNT, arguments=dict(dtype="float32", enforce_eager=True) | arguments)
    script = Path(__file__).with_name("run_vllm.py")
    environment = ENVIRONMENT | dict(VLLM_ENABLE_V1_MULTIPROCESSING=str(int(workers > 1)))
    return subprocess.run(
        [sys.executable, str(script), str(folder), json.dumps(given)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


def answers_of(folder: Path, **arguments: object) -> dict[str, Any]:
    ran = run_vllm(folder, **arguments)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-8000:]
    answers: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return answers


def transformers_of(folder: Path) -> dict[str, Any]:
    """What `run_vllm.py` gives, from transformers."""
    from transformers import AutoConfig

    model = model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32).eval()
    answers: dict[str, Any] = {"tokens": [], "logprobs": []}
    for prompt in PROMPTS:
        row = list(prompt)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
            answers["logprobs"].append([float(logits[place, token]) for place, token in enumerate(row[1:])])
            for _ in range(COUNT):
                row.append(int(model(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
        answers["tokens"].append(row[len(prompt) :])
    return answers


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["tokens"] == expected["tokens"]
    for ours, theirs in zip(found["logprobs"], expected["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Of a family: a native checkpoint, and one of the matrices that it stands for."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(family: str) -> tuple[Path, Path]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model = random_family(family, **FAMILIES[family])
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim >= 2:
                        parameter.mul_(2)  # so that every part of it matters
            save_layout(model, folder / "source", published=True)
            out = quantized(folder / "source", folder / "out")
            made[family] = out, plain_copy(open_checkpoint(folder / "source"), out, folder / "plain")
        return made[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_family_runs_as_its_restored_matrices_do(folders: Callable[[str], tuple[Path, Path]], family: str) -> None:
    out, plain = folders(family)
    assert_same(answers_of(out), answers_of(plain) if family in OTHERWISE else transformers_of(plain))


@pytest.mark.parametrize(("family", "tied"), [("qwen2_moe", False), ("qwen2_moe", True), ("mixtral", False)])
def test_quantized_embedding_and_head_run_as_their_restored_matrices_do(
    tmp_path: Path, family: str, tied: bool
) -> None:
    source = save_layout(random_family(family, tie_word_embeddings=tied, **HEADS), tmp_path / "source", True)
    out = quantized(source, tmp_path / "out", {Role.EMBEDDING: "4g32", Role.HEAD: "6g64s"})
    assert_same(answers_of(out), transformers_of(plain_copy(open_checkpoint(source), out, tmp_path / "plain")))


def test_experts_take_the_bytes_that_the_files_hold(folders: Callable[[str], tuple[Path, Path]]) -> None:
    out, _ = folders("qwen2_moe")
    stored = {
        name: tensor.nbytes
        for path in out.glob("*.safetensors")
        for name, tensor in load_file(path).items()
        if re.search(r"\.experts\.\d+\.", name)
    }
    held = {name: size for name, size in answers_of(out)["held"].items() if ".experts." in name}
    tables = sum(size for name, size in held.items() if "table" in name)
    assert sum(held.values()) - tables == sum(stored.values())
    assert tables <= 2 * 32 * len(stored)


def test_bfloat16_differs_by_rounding_only(folders: Callable[[str], tuple[Path, Path]]) -> None:
    out, plain = folders("mixtral")
    found, expected = (answers_of(folder, dtype="bfloat16")["logprobs"] for folder in (out, plain))
    differences = torch.cat([torch.tensor(one) - torch.tensor(two) for one, two in zip(found, expected, strict=True)])
    assert differences.abs().median() < 0.03  # of a random model; single tokens may go to another expert


def test_missing_block_is_named(folders: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(folders("qwen2_moe")[0], tmp_path / "damaged"))
    names = ("model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.0.self_attn.k_proj.weight")
    for missing in names:
        for path in damaged.glob("*.safetensors"):
            tensors = load_file(path)
            if tensors.pop(missing, None) is not None:
                save_file(tensors, path, {"format": "pt"})
    errors = run_vllm(damaged).stderr
    assert re.search(rf"CheckpointError: {re.escape(names[1])} is not in the checkpoint.*alphaq verify", errors)


def test_newer_format_is_refused(folders: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    newer = Path(shutil.copytree(folders("qwen2_moe")[0], tmp_path / "newer"))
    config = json.loads((newer / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (newer / "config.json").write_text(json.dumps(config))
    ran = run_vllm(newer)
    assert "native format 99; this alphaq reads" in ran.stdout + ran.stderr


def test_tensor_parallelism_is_refused(folders: Callable[[str], tuple[Path, Path]]) -> None:
    ran = run_vllm(folders("qwen2_moe")[0], workers=2, tensor_parallel_size=2)
    assert ran.returncode != 0
    assert "Native checkpoints cannot be split over 2 devices" in ran.stdout + ran.stderr


@contextmanager
def server(folder: Path, *options: str) -> Iterator[str]:
    """A `vllm serve` of a folder; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # What `vllm serve` runs; vllm-cpu's own `vllm` asks for the version of a package that is named vllm.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    settings = ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    settings += ["--dtype", "float32", "--max-model-len", "128"]
    log = folder.with_suffix(".log")
    with log.open("w") as lines:
        process = subprocess.Popen(
            [*command, *settings, *options], stdout=lines, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"The server has ended: {log.read_text()[-8000:]}")
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def completions(address: str, prompt: str | list[str]) -> list[str]:
    """Greedy texts of OpenAI's protocol."""
    body = json.dumps(dict(model="tiny", prompt=prompt, max_tokens=24, temperature=0)).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return [choice["text"] for choice in json.load(answer)["choices"]]


@pytest.fixture(scope="module")
def bundled(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The bundled model, quantized on the command line, and what transformers writes with its restored matrices."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("bundled")
    command = [sys.executable, "-m", "alphaq", "quantize", str(tiny), "-o", str(folder / "out")]
    subprocess.run([*command, "--bits", "2.5", "--choices", "1,2,3,4,16"], check=True)
    plain = plain_copy(open_checkpoint(tiny), folder / "out", folder / "plain")
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    texts = []
    for text in TEXTS:
        inputs = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            row = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]
        texts.append(tokenizer.decode(row[inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return folder / "out", texts


@pytest.mark.parametrize("options", [["--enforce-eager"], []], ids=["eager", "compiled"])
def test_server_writes_what_transformers_writes(bundled: tuple[Path, list[str]], options: list[str]) -> None:
    folder, texts = bundled
    with server(folder, *options) as address:
        assert [completions(address, text)[0] for text in TEXTS] == texts
        assert completions(address, TEXTS) == texts


def test_expert_parallelism_is_refused(bundled: tuple[Path, list[str]]) -> None:
    options = ("--data-parallel-size", "2", "--enable-expert-parallel", "--enforce-eager")
    with pytest.raises(RuntimeError, match="has ended"), server(bundled[0], *options):
        pass
    assert (
        "experts of a native checkpoint cannot be spread over processes" in bundled[0].with_suffix(".log").read_text()
    )
