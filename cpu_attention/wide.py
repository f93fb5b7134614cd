"""The code of attention over one block and one KV head for many query heads, emitted: what `joint.py` compiles.

Two things make it worth more than the passes of `block.py`, once there are several: K and V are widened to float32 but
once for all heads, scales and all, and then multiplied like matrices:

    stored ──► [K | V] float32, as a block of that holds them ──► scores of all heads ──► weights ──► sums of values

A pass is `count` query heads.  A piece of K or V that the first level of cache holds is used by all passes, then the
next one; in a pass each load of a query, or of a weight, is for several vectors of tokens, or of channels.  Processors
without 32 vector registers of LANES floats have room for less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from cpu_attention import emit
from cpu_attention.block import HeadCode, Shape
from cpu_attention.emit import FLOAT, I64, Sums
from cpu_attention.layout import LANES, Part

_STEPS = 2  # rows of K, or of V, in a turn of a loop
_LINE = 64  # bytes of a cache line


class Tiles(NamedTuple):
    """What one turn of a loop multiplies."""

    heads: int  # of a pass, at most
    tokens: int  # vectors of them, that a load of a query is for
    channels: int  # vectors of them, that a load of a weight is for

    @classmethod
    def of(cls, block_tokens: int) -> Tiles:
        if not emit.has_wide_registers():
            return cls(4, 1, 1)
        return cls(8, next(tokens for tokens in (2, 3, 1) if block_tokens // LANES % tokens == 0), 2)


def num_turns(shape: Shape) -> int:
    """Of the loops of a pass."""
    tiles, vectors = Tiles.of(shape.block_tokens), shape.head_dim // LANES
    scores = shape.block_tokens // LANES // tiles.tokens * shape.head_dim
    return (scores + -(-vectors // tiles.channels) * shape.block_tokens) // _STEPS


class WideCode(HeadCode):
    """A full block in float32, for `num_passes` passes of `count` query heads each.

    scratch: of each pass [count, block_tokens] scores, then weights, and [count] shrinks.  Of the block behind it, in
    `source`, `stride` bytes are asked for in each turn of a loop.
    """

    is_full = True

    def __init__(self, b: Any, shape: Shape, source: Shape, count: int, values: dict[str, Any]) -> None:
        whole = {"low": I64(0), "high": I64(shape.block_tokens), "out_head": values["head"]}
        super().__init__(b, shape, count, values | whole)
        self.dim, self.tiles = shape.head_dim, Tiles.of(shape.block_tokens)
        self.vectors_of_tokens = self.block // LANES
        # Where two passes or more bring the next block; a turn may ask for some lines again.
        self.lines = -(-source.head.nbytes // (2 * num_turns(shape) * _LINE))
        self.begins = self.q_at, self.state_at, self.scratch

    def emit(self) -> None:
        whole, rest = divmod(self.dim // LANES, self.tiles.channels)
        self._for(I64(0), I64(self.vectors_of_tokens // self.tiles.tokens), 1, self._scores_of_tile)
        self._for_each_pass(lambda number: self._for(I64(0), I64(self.count), 1, self._softmax_step))
        if whole:
            self._for(I64(0), I64(whole), 1, lambda tile: self._values_of_tile(tile, self.tiles.channels))
        if rest:
            self._values_of_tile(I64(whole), rest)

    def _for_each_pass(self, body: Callable[[Any], None]) -> None:
        b, (q_at, state_at, scratch) = self.b, self.begins

        def one(number: Any) -> None:
            self.q_at = self.out_at = b.add(q_at, self._times(number, self.count * self.head_bytes))
            self.state_at = b.add(state_at, self._times(number, self.count * 4))
            self.scratch = b.gep(scratch, [self._times(number, self.count * (self.block + 1) * 4)])
            body(number)

        self._for(I64(0), self.values["num_passes"], 1, one)

    def _scores_of_tile(self, tile: Any) -> None:
        b, size, vector_bytes = self.b, self.tiles.tokens, LANES * 4
        tile_at = b.add(self.unit, self._times(tile, size * self.dim * vector_bytes))
        passes_before = b.mul(tile, self.values["num_passes"])

        def scores(number: Any) -> None:
            first_turn = self._times(b.add(passes_before, number), self.dim // _STEPS)

            def body(channel: Any, sums: Sums) -> Sums:
                self._ask(b.add(first_turn, b.sdiv(channel, I64(_STEPS))))
                for step in range(_STEPS):
                    at = b.add(tile_at, self._times(self._plus(channel, step), vector_bytes))
                    keys = [emit.load(b, self.data, self._plus(at, x * self.dim * vector_bytes)) for x in range(size)]
                    at_q = b.add(self.q_at, self._times(self._plus(channel, step), 4))
                    for g in range(self.count):
                        place = self._plus(at_q, g * self.head_bytes)
                        query = emit.splat(b, emit.load(b, self.values["q"], place, FLOAT))
                        sums[g] = [emit.fma(b, query, key, total) for key, total in zip(keys, sums[g], strict=True)]
                return sums

            zeros = [[emit.constant(0.0)] * size for _ in range(self.count)]
            for g, totals in enumerate(emit.loop(b, I64(0), I64(self.dim), _STEPS, zeros, body)):
                for x, total in enumerate(totals):
                    place = self._plus(self._times(tile, size * vector_bytes), (g * self.block + x * LANES) * 4)
                    emit.store(b, total, self.scratch, place)

        self._for_each_pass(scores)

    def _values_of_tile(self, tile: Any, size: int) -> None:
        b, vector_bytes = self.b, LANES * 4
        channels_at = self._times(tile, self.tiles.channels * vector_bytes)
        tile_at = b.add(self.unit, self._plus(channels_at, self.v.numbers))
        passes_before = b.mul(tile, self.values["num_passes"])
        turns_of_scores = self.vectors_of_tokens // self.tiles.tokens * self.dim // _STEPS
        turns_before = self._times(self.values["num_passes"], turns_of_scores)

        def values(number: Any) -> None:
            passes = b.add(passes_before, number)
            first_turn = b.add(turns_before, self._times(passes, self.block // _STEPS))

            def body(token: Any, sums: Sums) -> Sums:
                self._ask(b.add(first_turn, b.sdiv(token, I64(_STEPS))))
                for step in range(_STEPS):
                    at = b.add(tile_at, self._times(self._plus(token, step), self.dim * 4))
                    items = [emit.load(b, self.data, self._plus(at, x * vector_bytes)) for x in range(size)]
                    for g in range(self.count):
                        place = self._plus(self._times(self._plus(token, step), 4), g * self.block * 4)
                        weight = emit.splat(b, emit.load(b, self.scratch, place, FLOAT))
                        sums[g] = [emit.fma(b, weight, item, total) for item, total in zip(items, sums[g], strict=True)]
                return sums

            zeros = [[emit.constant(0.0)] * size for _ in range(self.count)]
            for g, totals in enumerate(emit.loop(b, I64(0), I64(self.block), _STEPS, zeros, body)):
                shrink = emit.splat(b, emit.load(b, self.scratch, I64(self.shrinks_at + g * 4), FLOAT))
                for x, total in enumerate(totals):
                    place = b.add(self.out_at, self._plus(channels_at, g * self.head_bytes + x * vector_bytes))
                    before = emit.load(b, self.values["out"], place)
                    emit.store(b, emit.fma(b, before, shrink, total), self.values["out"], place)

        self._for_each_pass(values)

    def _ask(self, turn: Any) -> None:
        place = self.b.add(self.ahead, self.b.mul(turn, self.values["stride"]))
        emit.prefetch(self.b, self.values["source"], place, self.lines * _LINE)


class Widening:
    """Emits it: K and V of the KV head at byte `unit` of data, to float32 as a block of that holds them.

    scales: [scales and minima, groups, block_tokens] float32, room for V's.
    """

    def __init__(self, b: Any, shape: Shape, data: Any, unit: Any, wide: Any, scales: Any) -> None:
        self.b, self.head, self.data, self.unit, self.wide, self.scales = b, shape.head, data, unit, wide, scales
        self.dim, self.block = shape.head_dim, shape.block_tokens

    def emit(self) -> None:
        self._for(self.block // LANES, self._keys)
        if self.head.v.is_quantised:
            self._for(self.block // LANES, self._widen_scales)
        self._for(self.block // self.head.v.packed, self._values)

    def _keys(self, tile: Any) -> None:
        """Of one vector of tokens."""
        b, f = self.b, self.head.k
        num_rows = self.dim // f.packed
        group = f.group // f.packed if f.is_quantised else num_rows  # rows of items that share a scale
        first_row = b.mul(tile, I64(num_rows))
        for first in range(0, num_rows, group):
            scale, minimum = self._scales_of(f, first // group, tile)

            def body(row: Any, nothing: Sums, scale: Any = scale, minimum: Any = minimum) -> Sums:
                for step in range(_STEPS):
                    item = b.add(first_row, self._plus(row, step))
                    at = self._plus(b.mul(item, I64(LANES * f.itemsize)), f.numbers)
                    vectors = emit.load_numbers(b, self.data, b.add(self.unit, at), f.dtype)
                    for half, vector in enumerate(vectors):
                        channel = self._plus(b.mul(item, I64(f.packed)), half)
                        number = _dequantised(b, vector, scale, minimum)
                        emit.store(b, number, self.wide, b.mul(channel, I64(LANES * 4)))
                return nothing

            emit.loop(b, I64(first), I64(min(first + group, num_rows)), _STEPS, [], body)

    def _widen_scales(self, tile: Any) -> None:
        """V's, of one vector of tokens."""
        b, f = self.b, self.head.v
        for group in range(f.num_groups):
            for which, value in enumerate(self._scales_of(f, group, tile)):
                if value is not None:
                    at = (which * f.num_groups + group) * self.block * 4
                    emit.store(b, value, self.scales, self._plus(b.mul(tile, I64(LANES * 4)), at))

    def _values(self, row: Any) -> None:
        """Of one token, or of the two whose numbers share items."""
        b, f = self.b, self.head.v
        at = b.add(self.unit, self._plus(b.mul(row, I64(self.dim * f.itemsize)), f.numbers))
        tokens = [self._plus(b.mul(row, I64(f.packed)), half) for half in range(f.packed)]

        def scale(which: int, group: int, half: int) -> Any:
            place = self._plus(b.mul(tokens[half], I64(4)), (which * f.num_groups + group) * self.block * 4)
            return emit.splat(b, emit.load(b, self.scales, place, FLOAT))

        begin = self.dim * self.block * 4
        for x in range(self.dim // LANES):
            items = emit.load_numbers(b, self.data, self._plus(at, x * LANES * f.itemsize), f.dtype)
            group = x * LANES // f.group
            for half, (token, vector) in enumerate(zip(tokens, items, strict=True)):
                by = scale(0, group, half) if f.is_quantised else None
                plus = scale(1, group, half) if f.has_minima else None
                to = self._plus(b.mul(token, I64(self.dim * 4)), begin + x * LANES * 4)
                emit.store(b, _dequantised(b, vector, by, plus), self.wide, to)

    def _scales_of(self, f: Part, group: int, tile: Any) -> tuple[Any, Any]:
        """Scales and minima of one vector of tokens, where there are any."""

        def load(which: int) -> Any:
            begin = f.begin + (which * f.num_groups + group) * self.block * 2
            at = self._plus(self.b.mul(tile, I64(LANES * 2)), begin)
            return emit.load_halves(self.b, self.data, self.b.add(self.unit, at))

        return load(0) if f.is_quantised else None, load(1) if f.has_minima else None

    def _plus(self, value: Any, term: int) -> Any:
        return self.b.add(value, I64(term))

    def _for(self, end: int, body: Callable[[Any], None]) -> None:
        def call(i: Any, nothing: Sums) -> Sums:
            body(i)
            return nothing

        emit.loop(self.b, I64(0), I64(end), 1, [], call)


def _dequantised(b: Any, vector: Any, scale: Any, minimum: Any) -> Any:
    if scale is None:
        return vector
    return b.fmul(vector, scale) if minimum is None else emit.fma(b, vector, scale, minimum)
