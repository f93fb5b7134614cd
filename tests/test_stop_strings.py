"""Stop strings and the clean-up of spaces: whatever the parts of a text, the result is that of the whole."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from fastdecode.text.detokenize import StopStrings
from fastdecode.text.detokenize.stop_strings import StopMatch, StopScan
from fastdecode.text.detokenize.streams import SpaceCleaner

LETTERS = st.text("ab\u20ac", max_size=12)
CLEAN_UP = ByT5Tokenizer(extra_ids=0).clean_up_tokenization
STOPS = st.lists(st.text("ab\u20ac", min_size=1, max_size=5), min_size=1, max_size=4)


def first_complete(text: str, stops: list[str]) -> StopMatch | None:
    """By its definition: the earliest end, and of those that end there the longest."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            longest = max(found, key=len)
            return StopMatch(end - len(longest), longest)
    return None


@settings(max_examples=300)
@given(parts=st.lists(LETTERS, max_size=5), stops=STOPS)
def test_the_first_that_is_complete(parts: list[str], stops: list[str]) -> None:
    scan, told, text = StopScan(StopStrings(stops)), "", ""
    for part in parts:
        before, text = text, text + part
        match = scan.push(part)
        assert match == first_complete(text, stops)
        if match:
            assert told == text[: len(told)] and len(told) <= match.position, "what was told is not in the stop string"
            return
        told = text[: len(text) - scan.num_uncertain]
        held = text[len(told) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops), "nothing is held for nothing"
        assert len(told) >= len(before) - max(map(len, stops)) + 1


def test_a_text_goes_on_behind_one_that_is_ignored() -> None:
    scan = StopScan(StopStrings(["ab", "bcd"]))
    assert scan.push("xab") == StopMatch(1, "ab") and scan.num_uncertain == 1
    assert scan.push("cd") == StopMatch(2, "bcd") and scan.num_uncertain == 0


def test_many_and_long_ones() -> None:
    """The work is a step for each character: no copy of the text, and none of a stop string."""
    stops = StopStrings(["a" * 20_000 + "b", *(f"stop {i}" for i in range(256))])
    scan = StopScan(stops)
    for _ in range(100):
        assert scan.push("stop ") is None and scan.num_uncertain == 5
    assert scan.push("255") == StopMatch(500 - 5, "stop 2")


@settings(max_examples=300)
@given(parts=st.lists(st.text(" '.,?!nmtsver\u0e01", max_size=8), max_size=8))
def test_spaces_are_cleaned_up_as_in_the_whole(parts: list[str]) -> None:
    cleaner = SpaceCleaner(CLEAN_UP)
    assert "".join([*map(cleaner.push, parts), cleaner.flush()]) == CLEAN_UP("".join(parts))
