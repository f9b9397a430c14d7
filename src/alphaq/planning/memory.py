"""What memory to run in leaves for weights."""

from __future__ import annotations

from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.profiles import profile
from alphaq.errors import BudgetError, PlanError
from alphaq.nouns.serving import CARD_BYTES, Memory, Serving


def memory_of(checkpoint: Checkpoint, engine: str, serving: Serving) -> Memory:
    """What is kept beside the weights, asked of the engine. Raises BudgetError if nothing is left, PlanError if the
    engine cannot tell."""
    hosting = profile(engine).writer.hosting
    if hosting is None:
        raise PlanError(f"What {engine} keeps beside the weights is not known. State the size of the weight files.")
    memory = Memory(serving=serving, kept=hosting.kept(checkpoint, serving))
    if serving.vram_bytes is not None and memory.card <= 0:
        raise BudgetError(
            f"{serving.vram_bytes:,} bytes of --vram leave nothing for weights: the card holds "
            f"{memory.kept.cache_bytes:,} for {serving.cells:,} tokens of cache in {serving.kv_type}, "
            f"{memory.kept.buffer_bytes:,} to compute in and {CARD_BYTES:,} for its driver. State more --vram or none, "
            "ask for less --context, fewer --parallel or a smaller --kv-type such as q8_0."
        )
    if serving.vram_bytes is not None and memory.host > 0:
        return memory  # whether the card has room for its share is known of a layout
    if memory.weights <= 0:
        raise BudgetError(
            f"{serving.memory_bytes:,} bytes of memory leave nothing for weights: {engine} keeps "
            f"{memory.kept.cache_bytes:,} for {serving.cells:,} tokens of cache in {serving.kv_type}, "
            f"{memory.kept.buffer_bytes:,} to compute in and {memory.kept.engine_bytes:,} of its own. Ask for less "
            "--context, fewer --parallel, a smaller --kv-type such as q8_0, or more --memory."
        )
    return memory
