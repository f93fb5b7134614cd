"""Where sequences lay, as chains of tokens that others may begin with.  Pure.

    a sequence in parts     [ tokens 0 … 31,999 ] on R-worker 1     a chain of its salt
                            [ 32,000 … ] on R-worker 0              a chain of its salt and the 32,000 tokens before

So a part is found by those that have the same tokens before it, and lie there, too.  That they do is what `Layouts` are
for: they remember the parts of the latest sequences that were divided.
"""

from __future__ import annotations

from collections import OrderedDict, abc
from typing import NamedTuple

from fastdecode.scheduling.chains import Scope, Tokens
from fastdecode.scheduling.parts import Part

_MOST = 32  # that are compared with whoever waits


class Place(NamedTuple):
    """Tokens of a sequence on an R-worker."""

    r_worker: int
    scope: Scope
    begin: int
    end: int | None  # None: all that come

    def length(self, num_tokens: int) -> int:
        """How many there are of a sequence's first so many."""
        return max(0, (num_tokens if self.end is None else min(num_tokens, self.end)) - self.begin)

    def of(self, tokens: Tokens, block_tokens: int) -> Tokens:
        """A sequence's tokens that are there."""
        return tokens.part(self.begin // block_tokens, None if self.end is None else self.end // block_tokens)


class Layout(NamedTuple):
    """Parts that a sequence would find something in."""

    parts: tuple[Part, ...]
    num_used: abc.Mapping[int, int]  # R-worker -> blocks of them that running sequences have


class _After(NamedTuple):
    """Scope of a part: chains that have the same tokens before them."""

    scope: Scope
    before: bytes


def places_of(
    scope: Scope, parts: tuple[Part, ...], tokens: Tokens, num_tokens: int, block_tokens: int
) -> tuple[Place, ...]:
    """Of a sequence, those that so many tokens come to: what comes before others is not known as yet."""
    if len(parts) == 1:
        return (Place(parts[0].r_worker, scope, 0, None),)
    ends = [*(part.first_token for part in parts[1:]), None]
    return tuple(
        Place(r_worker, _After(scope, tokens.before(begin // block_tokens)) if begin else scope, begin, end)
        for (r_worker, begin), end in zip(parts, ends, strict=True)
        if begin < num_tokens
    )


class Layouts:
    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        # By scope and parts, what comes before the last part; the latest one last.
        self._before: OrderedDict[tuple[Scope, tuple[Part, ...]], bytes] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._before)

    def remember(self, scope: Scope, parts: tuple[Part, ...], tokens: Tokens) -> None:
        self._before.pop((scope, parts), None)
        self._before[scope, parts] = self._before_last(parts, tokens)
        if len(self._before) > _MOST:
            self._before.popitem(last=False)

    def alike(self, scope: Scope, tokens: Tokens) -> list[tuple[Part, ...]]:
        """Those of sequences that begin with the same tokens, up to their last parts."""
        return [
            parts
            for (of, parts), before in self._before.items()
            if of == scope and self._before_last(parts, tokens) == before
        ]

    def lose(self, r_worker: int) -> None:
        """Nothing lies there any more."""
        for scope, parts in list(self._before):
            if any(part.r_worker == r_worker for part in parts):
                del self._before[scope, parts]

    def _before_last(self, parts: tuple[Part, ...], tokens: Tokens) -> bytes:
        return tokens.before(parts[-1].first_token // self._block_tokens)
