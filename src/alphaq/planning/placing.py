"""A plan for a machine with a card: the budget is lowered until both memories hold their share.

Experts lie on the card layer by layer, so up to a layer of it stays empty, and which is known of a plan alone. So is
what every token reads, all of which has to lie there: the more bytes there are, the more of them it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from alphaq.checkpoint.pruned import without_experts
from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.profiles import profile
from alphaq.errors import BudgetError
from alphaq.nouns.plan import Plan
from alphaq.nouns.serving import Memory
from alphaq.nouns.settings import Budget, PlanConfig

TRIES = 8
SLOPE = 1.5  # what every token reads shrinks more slowly than the rest of a plan


def placed_plan(
    checkpoint: Checkpoint, config: PlanConfig, memory: Memory, plan_of: Callable[[PlanConfig], Plan]
) -> Plan:
    """The plan of a memory, with where its weights go if there is a card. plan_of: makes a plan of a config.

    Raises BudgetError where no budget that was tried leaves both memories room.
    """
    if memory.serving.vram_bytes is None:
        plan = plan_of(config.model_copy(update={"budget": Budget(size_bytes=memory.weights)}))
        return plan.model_copy(update={"memory": memory})
    engine = profile(config.engine)
    hosting = engine.writer.hosting
    assert hosting is not None  # else nobody knows the memory
    budget = smallest = memory.weights
    crowded = 0
    for _ in range(TRIES):
        try:
            plan = plan_of(config.model_copy(update={"budget": Budget(size_bytes=budget)}))
        except BudgetError:
            if not crowded:
                raise
            budget = (budget + smallest) // 2
            continue
        gone = {} if plan.dropped is None else plan.dropped.experts
        left = without_experts(checkpoint, gone, engine.uneven)
        layout = engine.writer.laid_out(left, plan.every_choice(), config.split_bytes)
        placement = hosting.placed(left, layout, memory)
        # Headers and the tokenizer are read by the processor.
        host = (
            placement.host_bytes
            + layout.size_bytes
            - sum(place.nbytes for entry in layout.entries for place in entry.places)
        )
        crowded = placement.card_bytes if placement.card_bytes > memory.card else 0
        if host <= memory.host and not crowded:
            known = placement.model_copy(update={"host_bytes": host})
            return plan.model_copy(update={"memory": memory.model_copy(update={"placement": known})})
        smallest = layout.size_bytes
        share = 1 - memory.card / crowded if crowded else 0.0
        budget = max(1, smallest - max(host - memory.host, math.ceil(SLOPE * share * smallest)))
    if crowded:
        raise BudgetError(
            f"{memory.serving.vram_bytes:,} bytes of --vram leave {memory.card:,} beside cache, buffers and the "
            f"driver, and what every token reads takes {crowded:,} in the smallest plan that was tried. State more "
            "--vram, less --context, fewer --attention-bits, or drop --vram."
        )
    raise BudgetError(
        f"No plan was found that parts its experts between {memory.host:,} bytes of memory and {memory.card:,} of the "
        "card: layers are too large for what is left of either. State more --memory or --vram."
    )
