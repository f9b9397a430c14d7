"""Steps of the cheapest path through states that are windows of a stream of bits (Viterbi's algorithm).

A state's low bits are its newest. With k new bits the states x, x + G, x + 2·G, … of G = states / 2^k groups lead to
the same 2^k states 2^k·x, 2^k·x + 1, …: the cheapest of the former is found once for all of the latter, in sixteen
groups at a time. Which one it was is kept as the outcomes of a knock-out: the first round compares neighbours, the next
their winners. Costs are sums of float32 in a fixed order, or bytes, sixty-four at a time, which count from the least of
them and no further than 255, and whose summands are looked up: every processor finds the same path.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from alphaq.simd.vectors import LANES

_I8, _I32, _I64 = (ir.IntType(width) for width in (8, 32, 64))
_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_BYTES = ir.VectorType(_I8, 4 * LANES)


class _Step:
    """What one step's instructions are written with. kind: of costs."""

    def __init__(self, builder: Any, kind: Any, new_bits: int) -> None:
        self.builder, self.kind, self.new_bits = builder, kind, new_bits
        self.bytes = 4 if kind is _VECTOR else 1
        name = f"llvm.fma.v{LANES}f32" if kind is _VECTOR else f"llvm.uadd.sat.v{4 * LANES}i8"
        called = ir.FunctionType(kind, [kind] * (3 if kind is _VECTOR else 2))
        self._sum = cgutils.get_or_insert_function(builder.module, called, name)

    def place(self, base: Any, offset: Any, kind: Any) -> Any:
        return self.builder.inttoptr(self.builder.add(base, offset), kind.as_pointer())

    def load(self, base: Any, offset: Any) -> Any:
        value = self.builder.load(self.place(base, offset, self.kind))
        value.align = 4
        return value

    def store(self, value: Any, base: Any, offset: Any) -> None:
        self.builder.store(value, self.place(base, offset, self.kind), align=4)

    def shuffled(self, value: Any, lanes: list[int]) -> Any:
        order = ir.Constant(ir.VectorType(_I32, len(lanes)), lanes)
        return self.builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), order)

    def splat(self, number: Any) -> Any:
        empty = ir.Constant(self.kind, ir.Undefined)
        return self.shuffled(self.builder.insert_element(empty, number, _I32(0)), [0] * self.kind.count)

    def sum(self, *operands: Any) -> Any:
        """Of two bytes, at most 255; a · b + c of three floats."""
        return self.builder.call(self._sum, operands)

    def cheapest(self, costs: Any, outcomes: Any, group: Any, groups: Any) -> Any:
        """The least costs of as many groups as there are lanes, by a knock-out whose outcomes are kept."""
        builder = self.builder
        at, between = (builder.mul(one, _I64(self.bytes)) for one in (group, groups))
        ways = range(1 << self.new_bits)
        running = [self.load(costs, builder.add(at, builder.mul(between, _I64(way)))) for way in ways]
        contest, apart, number = builder.add(outcomes, builder.udiv(group, _I64(8))), builder.udiv(groups, _I64(8)), 0
        less = builder.fcmp_ordered if self.kind is _VECTOR else builder.icmp_unsigned
        bits = ir.IntType(self.kind.count)
        while len(running) > 1:
            winners = []
            for first, second in zip(running[::2], running[1::2], strict=True):
                won = less("<", second, first)
                place = self.place(contest, builder.mul(apart, _I64(number)), bits)
                builder.store(builder.bitcast(won, bits), place, align=2)
                winners.append(builder.select(won, second, first))
                number += 1
            running = winners
        return running[0]

    def parts(self, cheapest: Any, group: Any) -> Iterator[tuple[Any, Any]]:
        """The states that these groups lead to, as many at a time as there are lanes: the offset of their costs, and
        what the cheapest way to each has cost."""
        count = self.kind.count
        for part in range(1 << self.new_bits):
            lanes = [(count * part + lane) >> self.new_bits for lane in range(count)]
            first = self.builder.add(self.builder.shl(group, _I64(self.new_bits)), _I64(count * part))
            yield self.builder.mul(first, _I64(self.bytes)), self.shuffled(cheapest, lanes)


def _step(new_bits: int) -> Any:
    """The intrinsic of a step with so many new bits."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        costs, next_costs, levels, outcomes, group, groups, root, target = args
        step = _Step(builder, _VECTOR, new_bits)
        slope, start = builder.fsub(ir.Constant(_VECTOR, [-0.0] * LANES), step.splat(root)), step.splat(target)
        for offset, cost in step.parts(step.cheapest(costs, outcomes, group, groups), group):
            miss = step.sum(slope, step.load(levels, offset), start)
            step.store(step.sum(miss, miss, cost), next_costs, offset)
        return context.get_dummy_value()

    def typed(typing: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any) -> Any:
        return types.void(*[types.int64] * 6, types.float32, types.float32), code

    return intrinsic(typed)


def byte_step(new_bits: int, states: int) -> Any:
    """The intrinsic of a whole column with so many new bits, with costs of bytes.

    byte_step(costs, next costs, misses, outcomes): addresses of uint8 [states] (costs, to be filled, and what each
    state costs more than the cheapest way to it), outcomes as of `step_k`. Returns the least of the costs, which is
    taken from all of them before. Next costs above 255 are 255. states: at least 64 · 2^new_bits.
    """

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        costs, next_costs, misses, outcomes = args
        step, groups = _Step(builder, _BYTES, new_bits), states >> new_bits
        firsts = [_I64(first) for first in range(0, groups, _BYTES.count)]
        winners = [step.cheapest(costs, outcomes, first, _I64(groups)) for first in firsts]
        best = winners[0]
        for other in winners[1:]:
            best = builder.select(builder.icmp_unsigned("<", other, best), other, best)
        reduced = ir.FunctionType(_I8, [_BYTES])
        name = f"llvm.vector.reduce.umin.v{_BYTES.count}i8"
        least = builder.call(cgutils.get_or_insert_function(builder.module, reduced, name), [best])
        for first, winner in zip(firsts, winners, strict=True):
            for offset, cost in step.parts(builder.sub(winner, step.splat(least)), first):
                step.store(step.sum(cost, step.load(misses, offset)), next_costs, offset)
        return builder.zext(least, _I64)

    def typed(typing: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        return types.int64(*[types.int64] * 4), code

    return intrinsic(typed)


step_1, step_2, step_3, step_4 = (_step(new_bits) for new_bits in (1, 2, 3, 4))
"""step_k(costs, next costs, levels, outcomes, group, groups, root, target): addresses of float32 [states] (costs, to be
filled, levels), and of the step's outcomes, (2^k − 1)·groups bits, to be filled; the first of sixteen groups and the
number of all, a multiple of 16; a state then costs (target − root·level)² more than the cheapest way to it."""
