"""What llama.cpp keeps in memory beside the weights, as llama.cpp itself lays it out.

It is asked, not calculated: caches of keys and values, latents, windows and states differ from architecture to
architecture and from version to version. A file with the model's header and a hole for its data is opened without
reading any of it, and a context is laid out for it without taking the memory (`no_alloc`); llama.cpp says how much
that would be. What it takes for its vocabulary, its lists of tensors and the cells of the cache is the memory of that
process. What its threads convert activations in is not laid out beforehand, so that is calculated.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.export import Layout
from alphaq.engines.gguf import library
from alphaq.engines.gguf.apart import Apart
from alphaq.errors import AlphaQError, BudgetError
from alphaq.formats.ggml import GGML_TYPES
from alphaq.nouns.matrix import Role
from alphaq.nouns.serving import Kept, Memory, Placement, Serving

MIB = 2**20
INFO = 2
UBATCH = 512  # tokens that llama.cpp computes at a time, its default
WORK_BYTES = 2  # of a converted activation: at most those of half precision; quantized ones take less
_CACHE = re.compile(r"^llama_\w+: (?:.*, )?size = +([\d.]+) MiB")  # of keys and values, of states
_BUFFER = re.compile(r" (?:compute|output) buffer size = +([\d.]+) MiB")
PROGRAM_BYTES = 46 * MIB  # code, threads and what they begin with; measured by benchmarks/memory.py
READ_NOTHING = 0  # llama.cpp's way to load (`load_mode`) that does not map the file


def kept_beside(layout: Layout, work_bytes: int, serving: Serving) -> Kept:
    """What llama.cpp keeps beside the weights of files that are laid out so.

    Raises LlamaError where llama.cpp cannot run the model so, and MissingEngineError without it.
    """
    with TemporaryDirectory(prefix="alphaq-") as folder:
        for name, (header, nbytes) in layout.files.items():
            with (Path(folder) / name).open("wb") as file:
                file.write(header)
                file.truncate(nbytes)  # a hole: takes no room
        first = Path(folder) / min(layout.files)
        with Apart(first) as apart:
            apart.hold(_simulated, first, serving)
            found: Kept = apart.ask(_itself)
    return found.model_copy(update={"buffer_bytes": found.buffer_bytes + work_bytes})


def work_bytes(checkpoint: Checkpoint, experts_used: int, experts: int) -> int:
    """What activations are converted in before they meet quantized weights, for the widest matrix product."""
    widest = max(
        (
            matrix.shape[1] * (max(1, experts_used) if matrix.role is Role.EXPERT else 1)
            for matrix in checkpoint.matrices
        ),
        default=0,
    )
    return UBATCH * (WORK_BYTES * widest + 8 * experts)  # and which token goes to which expert


def flags(memory: Memory) -> str:
    """Options of llama-server under which it keeps that much, and no more.

    Weights that are laid out anew for speed, prompts of earlier requests and snapshots of states take memory of
    their own, so they are switched off.
    """
    serving, card = memory.serving, memory.placement
    types = "" if serving.kv_type == "f16" else f" -ctk {serving.kv_type} -ctv {serving.kv_type}"
    split = "" if card is None else f" -ngl 999 --n-cpu-moe {card.host_layers}"
    return f"-c {serving.cells} -np {serving.parallel}{types}{split} --no-repack --cache-ram 0 --ctx-checkpoints 0"


def placed(checkpoint: Checkpoint, layout: Layout, memory: Memory) -> Placement:
    """What goes to the card under `-ngl 999 --n-cpu-moe N`, with the least N that the card has room for.

    llama.cpp reads the embedding on the processor; a head that is tied to it lies on the card once more. Experts stay
    in the machine's memory layer by layer, from the first: all of them where all else is more than the card has room
    for. Raises BudgetError where there are no experts.
    """
    experts, embedding, rest = _shares(checkpoint, layout)
    if not experts:
        raise BudgetError(f"--vram parts experts from all else, and {checkpoint.name} has none. State --memory alone.")
    tied = 0 if checkpoint.with_role(Role.HEAD) else embedding
    layers = sorted(experts)
    on_card = [rest + tied + sum(experts[layer] for layer in layers[stay:]) for stay in range(len(layers) + 1)]
    stay = next((number for number, nbytes in enumerate(on_card) if nbytes <= memory.card), len(layers))
    host = embedding + sum(experts[layer] for layer in layers[:stay])
    return Placement(card_bytes=on_card[stay], host_bytes=host, host_layers=layers[stay - 1] + 1 if stay else 0)


def _shares(checkpoint: Checkpoint, layout: Layout) -> tuple[dict[int, int], int, int]:
    """Bytes of the experts by layer, of the embedding, and of all else."""
    of_tensor = {matrix.tensor: matrix for matrix in checkpoint.matrices}
    experts, embedding, rest = Counter[int](), 0, 0
    for entry in layout.entries:
        matrix = of_tensor.get(entry.source) if isinstance(entry.source, str) else entry.source
        nbytes = sum(place.nbytes for place in entry.places)
        if matrix is not None and matrix.role is Role.EXPERT:
            experts[matrix.layer or 0] += nbytes
        elif matrix is not None and matrix.role is Role.EMBEDDING:
            embedding += nbytes
        else:
            rest += nbytes
    return dict(experts), embedding, rest


# -- in the process of its own ----------------------------------------------------------------------


def _itself(kept: Kept) -> Kept:
    return kept


def _simulated(path: Path, serving: Serving) -> Kept:
    said: list[str] = []

    @ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    def listen(level: int, text: bytes, _: int | None) -> None:
        if level >= INFO:
            said.append(text.decode(errors="replace").strip())

    llama = library.opened()
    llama.llama_log_set(listen, None)
    before = _private_bytes()
    model = llama.llama_model_load_from_file(str(path).encode(), _model_params(llama))
    context = llama.llama_init_from_model(model, _context_params(llama, serving)) if model else None
    own = _private_bytes() - before
    llama.llama_log_set(library.listen, None)
    if not context:
        raise library.LlamaError("\n  ".join((f"llama.cpp cannot lay out {serving.cells:,} tokens:", *said[-5:])))
    cache, buffers = _sum(_CACHE.match, said), _sum(_BUFFER.search, said)
    if not cache or not buffers:
        raise _unusual("does not say what it keeps")
    return Kept(cache_bytes=cache, buffer_bytes=buffers, engine_bytes=PROGRAM_BYTES + max(0, own))


def _model_params(llama: ctypes.CDLL) -> ctypes.Structure:
    params: ctypes.Structure = llama.llama_model_default_params()
    if found := library.changed(params, library.REPACKING):
        raise _unusual(f"cannot lay out a model without reading it ({found})")
    for name, value in dict(n_gpu_layers=0, load_mode=READ_NOTHING, no_alloc=True, use_extra_bufts=False).items():
        setattr(params, name, value)
    return params


def _context_params(llama: ctypes.CDLL, serving: Serving) -> ctypes.Structure:
    params: ctypes.Structure = llama.llama_context_default_params()
    if found := library.changed(params, library.WINDOWED):
        raise _unusual(f"cannot be told what of a window it is to keep ({found})")
    number = GGML_TYPES[serving.kv_type.upper()].number
    wanted = dict(n_ctx=serving.cells, n_seq_max=serving.parallel, type_k=number, type_v=number, swa_full=False)
    for name, value in wanted.items():
        setattr(params, name, value)
    return params


def _unusual(fault: str) -> library.LlamaError:
    return library.LlamaError(
        f"This build of llama.cpp {fault}. Install another version of xllamacpp, or state --size."
    )


def _sum(found: Callable[[str], re.Match[str] | None], lines: list[str]) -> int:
    """Bytes of what is said in MiB with two digits behind the point, rounded up."""
    matches = [match for line in lines if (match := found(line))]
    return round(sum(float(match[1]) + 0.005 for match in matches) * MIB)


def _private_bytes() -> int:
    """Memory of this process that is no file's."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon:"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        raise AlphaQError("What llama.cpp keeps is not measured on Windows. State --size instead.") from None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
