"""The code of attention over one block and one KV head, emitted for one shape: what `vector.py` compiles.

Per block and KV head, for as many of its query heads as registers allow:

    scores[g, t] = scale · Σ_d q[g, d] · K[d, t]      tokens in the lanes; a K number is loaded and widened once for
                                                      all query heads, the accumulators stay in registers
    softmax step   maximum, exponentials, sum         (online, Milakov & Gimelshein 2018)
    out[g, d]    = out[g, d] · shrink[g] + Σ_t p[g, t] · V[t, d]       channels in the lanes

Meanwhile the cache lines of the next head are asked for, one for each that is read: blocks lie anywhere in memory,
so the processor's own prefetching stops at the end of each.

Scales of quantised numbers stay out of the inner loops: K's multiply sums over a group of channels, V's multiply
the weights p beforehand; a minimum contributes its product with Σ q of the group, or with Σ p of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from llvmlite import ir

from cpu_attention import emit
from cpu_attention.emit import FLOAT, I32, I64, Sums
from cpu_attention.layout import LANES, HeadFormat, Part

MASKED = -1e30  # a score that counts for nothing, and still subtracts without becoming NaN
_ACCUMULATORS = 16  # that are live in one loop, of 32 vector registers; FMAs need 8 to be in flight
_HEADS_AT_ONCE = 8  # query heads that share one pass over K and V


@dataclass(frozen=True)
class Shape:
    """What one compilation is for."""

    dtype: str
    head_dim: int  # as stored: a multiple of LANES
    block_tokens: int
    group: int  # query heads per KV head
    is_capped: bool  # whether scores go through softcap · tanh(score / softcap)

    @cached_property
    def head(self) -> HeadFormat:
        return HeadFormat(self.dtype, self.head_dim, self.block_tokens)

    @property
    def of_any_group(self) -> Shape:
        """For code that is told the group as it runs."""
        return replace(self, group=1)

    @property
    def num_query_sums(self) -> int:
        """Of a query head: Σ q of each group of K's channels, which K's minima are multiplied with."""
        return self.head.k.num_groups if self.head.k.has_minima else 0

    @property
    def heads_at_once(self) -> int:
        passes = -(-self.group // _HEADS_AT_ONCE)
        return -(-self.group // passes)


class HeadCode:
    """Emits it.  Everything that is called `at` counts bytes.

    scratch: [count, block_tokens] scores, then weights; [count] shrinks; for quantised storage also [count, groups]
    sums of weight · minimum and [count, groups, block_tokens] weights · scales.
    """

    is_full = False  # whether all tokens of the block are live

    def __init__(self, b: Any, shape: Shape, count: int, values: dict[str, Any]) -> None:
        self.b, self.count, self.is_capped, self.block = b, count, shape.is_capped, shape.block_tokens
        self.k, self.v = shape.head.k, shape.head.v
        self.values = values
        self.data, self.unit, self.ahead, self.scratch = (values[n] for n in ("data", "unit", "ahead", "scratch"))
        self.head_bytes = shape.head_dim * 4  # of q and out
        self.q_at = self._times(values["head"], self.head_bytes)
        self.out_at = self._times(values["out_head"], self.head_bytes)
        self.state_at = self._times(values["out_head"], 4)
        self.num_query_sums = shape.num_query_sums
        self.query_sums_at = self._times(values["head"], self.num_query_sums * 4)
        self.shrinks_at = count * self.block * 4
        self.biases_at = self.shrinks_at + count * 4
        self.folded_at = self.biases_at + count * self.v.num_groups * 4
        # The live tokens of the block, in vectors.
        self.first = b.sdiv(values["low"], I64(LANES))
        self.end = b.sdiv(self._plus(values["high"], LANES - 1), I64(LANES))

    def emit(self) -> None:
        emit.prefetch(self.b, self.data, self.ahead, self.k.scales_bytes)
        self._for(self.first, self.end, 1, self._scores)
        self._for(I64(0), I64(self.count), 1, self._softmax_step)
        emit.prefetch(self.b, self.data, self._plus(self.ahead, self.v.begin), self.v.scales_bytes)
        if self.v.is_quantised:
            self._for(I64(0), I64(self.count), 1, self._fold_scales)
        self._values()

    def _scores(self, tile: Any) -> None:
        """q · K of the tile-th vector of tokens, for each query head."""
        b, f = self.b, self.k
        row_bytes = LANES * f.itemsize
        # An FMA takes four cycles and two start in each, so fewer query heads sum the channels in several parts.
        parts = max(1, _ACCUMULATORS // 2 // self.count)
        rows = max(4, parts)  # of K in one turn
        tile_at = self._plus(self._times(tile, f.stored_dim // f.packed * row_bytes), f.numbers)
        places = [self._plus(self._times(tile, LANES * 4), g * self.block * 4) for g in range(self.count)]

        def products(first_row: Any, end_row: Any) -> list[Any]:
            def body(row: Any, sums: Sums) -> Sums:
                at = b.add(tile_at, self._times(row, row_bytes))
                emit.prefetch(b, self.data, b.add(self.ahead, at), rows * row_bytes)
                for r in range(rows):
                    keys = emit.load_numbers(b, self.data, b.add(self.unit, self._plus(at, r * row_bytes)), f.dtype)
                    for half, key in enumerate(keys):
                        channel_at = self._times(self._plus(self._times(self._plus(row, r), f.packed), half), 4)
                        for g in range(self.count):
                            at_q = b.add(self.q_at, self._plus(channel_at, g * self.head_bytes))
                            query = emit.splat(b, emit.load(b, self.values["q"], at_q, FLOAT))
                            part = (r * f.packed + half) % parts
                            sums[g][part] = emit.fma(b, query, key, sums[g][part])
                return sums

            zeros = [[emit.constant(0.0) for _ in range(parts)] for _ in range(self.count)]
            sums = emit.loop(b, first_row, end_row, rows, zeros, body)
            return [emit.combine(b, parts_of_head, emit.add) for parts_of_head in sums]

        if not f.is_quantised:
            for product, place in zip(products(I64(0), I64(f.stored_dim)), places, strict=True):
                emit.store(b, product, self.scratch, place)
            return

        def add_group(group: Any) -> None:
            first = self._times(group, f.group // f.packed)
            end, most = self._plus(first, f.group // f.packed), I64(f.stored_dim // f.packed)
            sums = products(first, b.select(b.icmp_signed("<", end, most), end, most))
            scales = self._scale(f, 0, group, tile)
            minima = self._scale(f, 1, group, tile) if f.has_minima else None
            for g in range(self.count):
                total = emit.load(b, self.scratch, places[g])
                if f.has_minima:
                    at = b.add(self.query_sums_at, self._plus(self._times(group, 4), g * self.num_query_sums * 4))
                    query_sum = emit.splat(b, emit.load(b, self.values["query_sums"], at, FLOAT))
                    total = emit.fma(b, query_sum, minima, total)
                emit.store(b, emit.fma(b, sums[g], scales, total), self.scratch, places[g])

        for place in places:
            emit.store(b, emit.constant(0.0), self.scratch, place)
        self._for(I64(0), I64(f.num_groups), 1, add_group)

    def _softmax_step(self, g: Any) -> None:
        """Scores of one query head become weights; its maximum, sum and shrink are brought up to date."""
        b, block = self.b, self.block
        row_at = self._times(g, block * 4)
        # Several vectors in one turn, so that one's long chain of instructions hides the others'.  That may take in
        # vectors beyond the live ones, which hold anything: all that is not live is replaced, not computed with.
        step = next(step for step in (4, 3, 2, 1) if block // LANES % step == 0)
        first = self._times(b.sdiv(self.first, I64(step)), step)
        numbers = ir.VectorType(I64, LANES)

        def places(tile: Any) -> list[Any]:
            return [b.add(row_at, self._times(self._plus(tile, x), LANES * 4)) for x in range(step)]

        def find_largest(tile: Any, largest: Sums) -> Sums:
            for x, place in enumerate(places(tile)):
                score = b.fmul(emit.load(b, self.scratch, place), emit.splat(b, self.values["scale"]))
                if self.is_capped:
                    cap = emit.splat(b, self.values["softcap"])
                    score = b.fmul(cap, emit.tanh(b, b.fdiv(score, cap)))
                if not self.is_full:
                    first_token = emit.splat(b, self._times(self._plus(tile, x), LANES))
                    token = b.add(first_token, ir.Constant(numbers, list(range(LANES))))
                    is_live = b.and_(
                        b.icmp_signed(">=", token, emit.splat(b, self.values["low"])),
                        b.icmp_signed("<", token, emit.splat(b, self.values["high"])),
                    )
                    score = b.select(is_live, score, emit.constant(MASKED))
                emit.store(b, score, self.scratch, place)
                largest[0][x] = emit.maximum(b, score, largest[0][x])
            return largest

        start = [[emit.constant(MASKED)] * step]
        [largest] = emit.loop(b, first, self.end, step, start, find_largest)
        state_at = b.add(self.state_at, self._times(g, 4))
        old = emit.load(b, self.values["maxima"], state_at, FLOAT)
        new = emit.maximum(b, emit.reduce(b, emit.combine(b, largest, emit.maximum), emit.maximum), old)
        emit.store(b, new, self.values["maxima"], state_at)

        def weigh(tile: Any, totals: Sums) -> Sums:
            for x, place in enumerate(places(tile)):
                weight = emit.exp(b, b.fsub(emit.load(b, self.scratch, place), emit.splat(b, new)))
                emit.store(b, weight, self.scratch, place)
                totals[0][x] = b.fadd(totals[0][x], weight)
            return totals

        [totals] = emit.loop(b, first, self.end, step, [[emit.constant(0.0)] * step], weigh)
        shrink = b.extract_element(emit.exp(b, emit.splat(b, b.fsub(old, new))), I32(0))
        emit.store(b, shrink, self.scratch, self._plus(self._times(g, 4), self.shrinks_at))
        total = emit.reduce(b, emit.combine(b, totals, emit.add), emit.add)
        before = emit.load(b, self.values["sums"], state_at, FLOAT)
        emit.store(b, emit.fma(b, before, shrink, total), self.values["sums"], state_at)

    def _fold_scales(self, g: Any) -> None:
        """One query head's weights times V's scales, per group of channels; the sums of weights times minima."""
        b, f = self.b, self.v
        row_at = self._times(g, self.block * 4)

        def fold(tile: Any, biases: Sums) -> Sums:
            tile_at = self._times(tile, LANES * 4)
            weight = emit.load(b, self.scratch, b.add(row_at, tile_at))
            for group in range(f.num_groups):
                folded = b.fmul(weight, self._scale(f, 0, I64(group), tile))
                at = b.add(self._times(row_at, f.num_groups), self._plus(tile_at, group * self.block * 4))
                emit.store(b, folded, self.scratch, self._plus(at, self.folded_at))
                if f.has_minima:
                    minimum = self._scale(f, 1, I64(group), tile)
                    biases[group] = [emit.fma(b, weight, minimum, biases[group][0])]
            return biases

        start = [[emit.constant(0.0)] for _ in range(f.num_groups)] if f.has_minima else []
        for group, [bias] in enumerate(emit.loop(b, self.first, self.end, 1, start, fold)):
            at = self._plus(self._times(g, f.num_groups * 4), self.biases_at + group * 4)
            emit.store(b, emit.reduce(b, bias, emit.add), self.scratch, at)

    def _values(self) -> None:
        """out = out · shrink + Σ_t weight · V[t], a few vectors of channels at a time."""
        b, f = self.b, self.v
        row_bytes = f.stored_dim * f.itemsize
        most = min(8, max(1, _ACCUMULATORS // self.count))
        first_row = b.sdiv(self.values["low"], I64(f.packed))
        end_row = b.sdiv(self._plus(self.values["high"], f.packed - 1), I64(f.packed))

        for first in range(0, f.stored_dim // LANES, most):
            vectors = range(first, min(first + most, f.stored_dim // LANES))
            groups = [x * LANES // f.group for x in vectors]
            places = [[self._plus(self.out_at, (g * f.stored_dim + x * LANES) * 4) for x in vectors]
                      for g in range(self.count)]  # fmt: skip

            def body(row: Any, sums: Sums, vectors: range = vectors, groups: list[int] = groups) -> Sums:
                at = self._plus(self._times(row, row_bytes), f.numbers + vectors[0] * LANES * f.itemsize)
                emit.prefetch(b, self.data, b.add(self.ahead, at), len(vectors) * LANES * f.itemsize)
                here = b.add(self.unit, at)
                values = [
                    emit.load_numbers(b, self.data, self._plus(here, x * LANES * f.itemsize), f.dtype)
                    for x in range(len(vectors))
                ]
                for half in range(f.packed):
                    token_at = self._times(self._plus(self._times(row, f.packed), half), 4)
                    for g in range(self.count):
                        weights = {group: self._weight(g, group, token_at) for group in sorted(set(groups))}
                        sums[g] = [
                            emit.fma(b, weights[group], value[half], total)
                            for group, value, total in zip(groups, values, sums[g], strict=True)
                        ]
                return sums

            zeros = [[emit.constant(0.0) for _ in vectors] for _ in range(self.count)]
            sums = emit.loop(b, first_row, end_row, 1, zeros, body)
            # A block is summed by itself first: over long sequences rounding errors then grow far less.
            for g in range(self.count):
                shrink = emit.splat(b, emit.load(b, self.scratch, self.shrinks_at + g * 4, FLOAT))
                for value, place, group in zip(sums[g], places[g], groups, strict=True):
                    if f.has_minima:
                        bias_at = self.biases_at + (g * f.num_groups + group) * 4
                        value = b.fadd(value, emit.splat(b, emit.load(b, self.scratch, bias_at, FLOAT)))
                    before = emit.load(b, self.values["out"], place)
                    emit.store(b, emit.fma(b, before, shrink, value), self.values["out"], place)

    def _weight(self, g: int, group: int, token_at: Any) -> Any:
        """A token's weight in all lanes, its scale of the group included."""
        block_bytes = self.block * 4
        at = g * block_bytes
        if self.v.is_quantised:
            at = self.folded_at + (g * self.v.num_groups + group) * block_bytes
        return emit.splat(self.b, emit.load(self.b, self.scratch, self._plus(token_at, at), FLOAT))

    def _scale(self, part: Part, which: int, group: Any, tile: Any) -> Any:
        """Scales (0) or minima (1) of the tile-th vector of tokens."""
        at = self._times(self.b.add(self._times(group, self.block), self._times(tile, LANES)), 2)
        begin = part.begin + which * part.num_groups * self.block * 2
        return emit.load_halves(self.b, self.data, self.b.add(self.unit, self._plus(at, begin)))

    def _for(self, begin: Any, end: Any, step: int, body: Callable[[Any], None]) -> None:
        def call(i: Any, nothing: Sums) -> Sums:
            body(i)
            return nothing

        emit.loop(self.b, begin, end, step, [], call)

    def _times(self, value: Any, factor: int) -> Any:
        return self.b.mul(value, I64(factor))

    def _plus(self, value: Any, term: int) -> Any:
        return self.b.add(value, I64(term))
