"""Steps of the cheapest path through states that are windows of a stream of bits (Viterbi's algorithm).

A state's low bits are its newest. With k new bits the states x, x + G, x + 2·G, … of G = states / 2^k groups lead to
the same 2^k states 2^k·x, 2^k·x + 1, …: the cheapest of the former is found once for all of the latter, in sixteen
groups at a time. Which one it was is kept as the outcomes of a knock-out: the first round compares neighbours, the next
their winners. Costs are sums of float32 in a fixed order, so every processor finds the same path.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from alphaq.simd.vectors import LANES

_I16, _I32, _I64 = (ir.IntType(width) for width in (16, 32, 64))
_VECTOR = ir.VectorType(ir.FloatType(), LANES)


class _Step:
    """What one step's instructions are written with."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        self._fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")

    def place(self, base: Any, offset: Any, kind: Any) -> Any:
        return self.builder.inttoptr(self.builder.add(base, offset), kind.as_pointer())

    def load(self, base: Any, offset: Any) -> Any:
        value = self.builder.load(self.place(base, offset, _VECTOR))
        value.align = 4
        return value

    def shuffled(self, value: Any, lanes: list[int]) -> Any:
        order = ir.Constant(ir.VectorType(_I32, LANES), lanes)
        return self.builder.shuffle_vector(value, ir.Constant(_VECTOR, ir.Undefined), order)

    def splat(self, number: Any) -> Any:
        empty = ir.Constant(_VECTOR, ir.Undefined)
        return self.shuffled(self.builder.insert_element(empty, number, _I32(0)), [0] * LANES)

    def fma(self, *operands: Any) -> Any:
        return self.builder.call(self._fma, operands)


def _step(new_bits: int) -> Any:
    """The intrinsic of a step with so many new bits."""
    ways = 1 << new_bits

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        costs, next_costs, levels, outcomes, group, groups, root, target = args
        step = _Step(builder)
        at, between = builder.mul(group, _I64(4)), builder.mul(groups, _I64(4))
        contest = builder.add(outcomes, builder.udiv(group, _I64(8)))
        apart = builder.udiv(groups, _I64(8))
        running = [step.load(costs, builder.add(at, builder.mul(between, _I64(way)))) for way in range(ways)]
        number = 0
        while len(running) > 1:
            winners = []
            for first, second in zip(running[::2], running[1::2], strict=True):
                won = builder.fcmp_ordered("<", second, first)
                place = step.place(contest, builder.mul(apart, _I64(number)), _I16)
                builder.store(builder.bitcast(won, _I16), place, align=2)
                winners.append(builder.select(won, second, first))
                number += 1
            running = winners
        slope, start = builder.fsub(ir.Constant(_VECTOR, [-0.0] * LANES), step.splat(root)), step.splat(target)
        for part in range(ways):
            cheapest = step.shuffled(running[0], [(LANES * part + lane) >> new_bits for lane in range(LANES)])
            offset = builder.add(builder.mul(at, _I64(ways)), _I64(4 * LANES * part))
            miss = step.fma(slope, step.load(levels, offset), start)
            cost = step.fma(miss, miss, cheapest)
            builder.store(cost, step.place(next_costs, offset, _VECTOR), align=4)
        return context.get_dummy_value()

    def typed(typing: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any) -> Any:
        return types.void(*[types.int64] * 6, types.float32, types.float32), code

    return intrinsic(typed)


step_1, step_2, step_3, step_4 = (_step(new_bits) for new_bits in (1, 2, 3, 4))
"""step_k(costs, next costs, levels, outcomes, group, groups, root, target): addresses of float32 [states] (costs, to be
filled, levels), and of the step's outcomes, (2^k − 1)·groups bits, to be filled; the first of sixteen groups and the
number of all, a multiple of 16; a state then costs (target − root·level)² more than the cheapest way to it."""
