"""Micro-batches: nothing lost, in order, and equal in work."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastdecode.scheduling.compose import micro_batches
from fastdecode.scheduling.plan import Segment

decode_lists = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3000)), max_size=40)
prompt_lists = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 400)), max_size=8)


def segments(decodes: list[tuple[int, int]], prompts: list[tuple[int, int]]) -> tuple[list[Segment], list[Segment]]:
    return (
        [Segment(i, worker, start, (1,), 0) for i, (worker, start) in enumerate(decodes)],
        [Segment(100 + i, worker, 0, tuple(range(size)), size) for i, (worker, size) in enumerate(prompts)],
    )


@given(decode_lists, prompt_lists, st.integers(1, 5))
def test_nothing_is_lost(decodes: list[tuple[int, int]], prompts: list[tuple[int, int]], number: int) -> None:
    """Every decode once; of every prompt all tokens, in the order of the micro-batches."""
    made = micro_batches(*segments(decodes, prompts), number)
    assert len(made) <= number and [batch.index for batch in made] == list(range(len(made)))
    seen: dict[int, list[int]] = {}
    for batch in made:
        for segment in batch.segments:
            if segment.is_prompt:
                assert segment.start == len(seen.setdefault(segment.seq_id, []))
            seen.setdefault(segment.seq_id, []).extend(segment.token_ids)
    expected = {i: [1] for i in range(len(decodes))}
    expected |= {100 + i: list(range(size)) for i, (_, size) in enumerate(prompts)}
    assert seen == expected


@given(decode_lists, prompt_lists, st.integers(2, 4))
def test_equal_work(decodes: list[tuple[int, int]], prompts: list[tuple[int, int]], number: int) -> None:
    """Tokens, as far as cuts of 16 and more go; decodes of each R-worker to one; their KV to the longest of them."""
    made = micro_batches(*segments(decodes, prompts), number)
    total = len(decodes) + sum(size for _, size in prompts)
    if len(made) == number:
        assert max(batch.num_tokens for batch in made) <= total / number + 16 * number
    for worker in range(4):
        parts = [[s for s in b.segments if s.r_worker == worker and not s.is_prompt] for b in made]
        counts = [len(part) for part in parts] + [0] * (number - len(made))
        if sum(counts) >= number:
            assert max(counts) - min(counts) <= 1
        kv = [sum(s.end for s in part) for part in parts]
        own = [start + 1 for place, start in decodes if place == worker]
        if len(made) == number and own:
            assert max(kv) - min(kv) <= max(own)


def test_one_long_prompt_is_shared() -> None:
    [first, second] = micro_batches(*segments([(0, 10)] * 4, [(1, 300)]), 2)
    assert (first.num_tokens, second.num_tokens) == (152, 152)
    assert [s.end for s in first.segments if s.is_prompt] == [150] and second.sampled[-1].end == 300
