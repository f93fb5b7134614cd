"""A step's tokens dealt to its micro-batches, so that each has as much work for S and for R as the others.  Pure.

S-work is the number of tokens.  R-work is the KV they read, per R-worker: the slowest one sets the pace.

    decodes   per R-worker, longest first, dealt 0 1 1 0 0 1 1 0 …   equal in number and in KV
    prompts   behind one another, cut where a micro-batch is full    equal in tokens
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from fastdecode.scheduling.plan import MicroBatch, Segment

_LEAST_PIECE = 16  # tokens; a prompt is not cut in two for less


def micro_batches(decodes: Iterable[Segment], prompts: Sequence[Segment], number: int) -> tuple[MicroBatch, ...]:
    """At most `number` of them; none is empty."""
    hands: list[list[Segment]] = [[] for _ in range(number)]
    by_worker = groupby(sorted(decodes, key=lambda s: (s.r_worker, -s.start)), key=lambda s: s.r_worker)
    for _, segments in by_worker:
        order = sorted(range(number), key=lambda i: len(hands[i]))
        for i, segment in enumerate(segments):
            lap, place = divmod(i, number)
            hands[order[place if lap % 2 == 0 else number - 1 - place]].append(segment)
    _deal_prompts(hands, prompts)
    filled = [sorted(hand, key=lambda s: (s.r_worker, s.prompt_tokens > 0)) for hand in hands if hand]
    return tuple(MicroBatch(index, tuple(hand)) for index, hand in enumerate(filled))


def _deal_prompts(hands: list[list[Segment]], prompts: Sequence[Segment]) -> None:
    """In order, each hand up to its share of all tokens: what is cut goes on in a later hand."""
    total = sum(map(len, hands)) + sum(segment.num_tokens for segment in prompts)
    goals = [(i + 1) * total // len(hands) - i * total // len(hands) for i in range(len(hands))]
    rooms = [goal - len(hand) for goal, hand in zip(goals, hands, strict=True)]
    i = 0
    for segment in prompts:
        while segment.num_tokens > rooms[i] and i < len(hands) - 1:
            if min(rooms[i], segment.num_tokens - rooms[i]) >= _LEAST_PIECE:
                piece, segment = _cut(segment, rooms[i])
                hands[i].append(piece)
            elif rooms[i] > segment.num_tokens // 2:
                break  # nearly all of it fits
            i += 1
        hands[i].append(segment)
        rooms[i] -= segment.num_tokens


def _cut(segment: Segment, num_tokens: int) -> tuple[Segment, Segment]:
    ids = segment.token_ids
    return (
        segment._replace(token_ids=ids[:num_tokens]),
        segment._replace(start=segment.start + num_tokens, token_ids=ids[num_tokens:]),
    )
