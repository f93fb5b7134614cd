"""Sequences that lie in parts, and what others that begin like them find of each part."""

from __future__ import annotations

from typing import Any

from scheduler_world import BLOCK_TOKENS, OTHER, World, create_scheduler, siblings

from fastdecode.scheduling.parts import Part
from fastdecode.scheduling.request import Sequence

FIRST = tuple(range(100, 200))  # tokens, that fit on no R-worker


def a_world(capacity: tuple[int, ...] = (20, 20), **options: Any) -> World:
    scheduler = create_scheduler(capacity_blocks=capacity, sharing="prompts", **options)
    return World(scheduler, 64, capacity)


def after(world: World, tokens: tuple[int, ...], output: int = 4, **options: Any) -> Sequence:
    """That asks for the next tokens after these."""
    [sequence] = siblings(len(world.sequences), prompt=len(tokens), output=output, first=tokens, **options)
    world.add(sequence)
    return sequence


def begun(world: World, sequence: Sequence) -> tuple[Part, ...]:
    """Where it lies."""
    while not sequence.is_known:
        assert world.step()
    return sequence.parts


def kept(world: World) -> list[int]:
    """Tokens of ended sequences, by R-worker."""
    return [sum(len(t) for (w, _), t in world.stored.items() if w == worker) for worker in range(len(world.stores))]


def test_the_next_turn_computes_what_is_new() -> None:
    world = a_world()
    one = after(world, FIRST, output=8)
    parts = begun(world, one)
    assert len(parts) == 2
    world.run()
    assert sum(kept(world)) == len(FIRST) + 7
    turn = (*FIRST, *(OTHER,) * 8, 7, 7, 7, 7, 7)
    two = after(world, turn)
    assert begun(world, two) == parts and two.num_found == len(FIRST) + 7
    world.run()
    assert sum(step.num_prompt_tokens for step in world.steps) == len(FIRST) + 6
    assert len(two.output_token_ids) == 4


def test_a_turn_that_outgrows_the_last_part_gets_one_more() -> None:
    """Where there is room for it, and what is there stays where it is."""
    world = a_world(capacity=(14, 14, 14))
    begun(world, after(world, tuple(range(900, 940)), output=12))  # one of them is taken for a while
    parts = begun(world, after(world, FIRST))
    world.run()
    turn = (*FIRST, *(OTHER,) * 4, *range(500, 530))
    two = after(world, turn)
    more = begun(world, two)
    assert len(parts) == 2 and more[:2] == parts and len(more) == 3 and two.num_found >= len(FIRST)
    world.run()
    three = after(world, (*turn, 8))
    assert begun(world, three) == more and three.num_found > len(FIRST) + 20
    world.run()


def test_those_that_run_together_hold_it_once() -> None:
    """Each alone would take more than half of all that there is."""
    world = a_world(capacity=(20, 20))
    alike = [after(world, (*FIRST, 300 + i)) for i in range(3)]
    alone = begun(world, alike[0])
    held = []
    while world.step():
        held.append(sum(store.num_blocks - store.num_free_blocks for store in world.stores.values()))
    assert all(len(one.output_token_ids) == 4 for one in alike)
    assert max(map(len, (step.decodes for step in world.steps))) == 3, "they ran at once"
    assert max(held) <= len(FIRST) // BLOCK_TOKENS + 3 * 3 + 2, "and what they begin with was there once"
    assert sum(step.num_prompt_tokens for step in world.steps) == len(FIRST) + 3 and len(alone) == 2


def test_what_comes_before_is_to_be_the_same() -> None:
    world = a_world()
    begun(world, after(world, FIRST))
    world.run()
    for tokens, salt in (((99, *FIRST[1:]), None), (FIRST, "another")):
        other = after(world, tokens, salt=salt)
        begun(world, other)
        assert other.num_found == 0
        world.run()


def test_a_part_that_was_come_to_by_decoding_is_found() -> None:
    world = a_world()
    one = after(world, FIRST[:44], output=60)
    first_tokens = [part.first_token for part in begun(world, one)]
    assert first_tokens[-1] > 44, "its prompt ends before the last part"
    world.run()
    two = after(world, (*FIRST[:44], *(OTHER,) * 60, 7))
    begun(world, two)
    assert two.num_found == 44 + 59
    world.run()


def test_a_hole_is_filled() -> None:
    """What is left of the first part ends before the second one begins, and that is there still."""
    world = a_world()
    parts = begun(world, after(world, FIRST))
    world.run()
    before = kept(world)
    few = after(world, tuple(range(500, 560)))  # needs room where one of the parts is
    [(lies, _)] = begun(world, few)
    world.run()
    assert lies == parts[0].r_worker and kept(world)[lies] - few.num_kv_tokens < before[lies]
    num_before = sum(step.num_prompt_tokens for step in world.steps)
    two = after(world, (*FIRST, 9))
    assert begun(world, two) == parts and 0 < two.num_found < len(FIRST)
    world.run()
    chunks = [(s.start, s.end) for step in world.steps for s in step.prompts if s.seq_id == two.seq_id]
    assert chunks[0][1] == parts[1].first_token < chunks[-1][0], "what is between them is there"
    assert sum(step.num_prompt_tokens for step in world.steps) - num_before == len(FIRST) + 1 - two.num_found


def test_an_r_worker_is_lost_with_a_part() -> None:
    world = a_world(capacity=(20, 20, 20))
    parts = begun(world, after(world, FIRST))
    world.run()
    lost = parts[0].r_worker
    world.scheduler.lose(lost)
    world.stored = {key: tokens for key, tokens in world.stored.items() if key[0] != lost}
    two = after(world, FIRST)
    assert {part.r_worker for part in begun(world, two)} == {0, 1, 2} - {lost}
    world.run()
    assert len(two.output_token_ids) == 4


def test_what_does_not_go_with_its_place_is_freed() -> None:
    """One that lay in parts comes again, and lies whole where one of them is still."""
    world = a_world(capacity=(40, 40), min_part_tokens=8, kv_policy="greedy", start_policy="eager")
    one = after(world, FIRST, output=30, rank=1)
    assert len(begun(world, one)) == 2
    for _ in range(4):
        world.step()
    others = [after(world, tuple(range(1000 * i, 1000 * i + 100)), output=10 + 15 * i) for i in (1, 2)]
    world.run()
    assert one.num_preemptions == 1 and len(one.output_token_ids) == 30 and all(o.finish_reason for o in others)
    again = next(step for step in world.steps if one.seq_id in step.seq_ids and step.prompts and step.number > 9)
    [admission] = again.admissions
    assert again.cut[admission.r_worker][one.seq_id] == 0 and not one.num_found
