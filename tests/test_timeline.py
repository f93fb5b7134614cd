"""The timeline: spans that do not overlap, shares that add up, a file that trace viewers take."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from conftest import Case

from fastdecode import LLM, SamplingParams
from fastdecode.errors import ConfigError
from fastdecode.holders.rejoin import RWorkerHandle
from fastdecode.holders.rpool import RPool
from fastdecode.observe.timeline import S_DEVICE, S_WORKER, NoTimeline, Timeline
from fastdecode.scheduling.plan import Segment, Step
from transport import Attend, Attended, Channel


def test_shares_add_up() -> None:
    timeline = Timeline()
    for begin, end, name in ((0, 30, "S-block"), (30, 50, "wait"), (60, 100, "S-block")):
        timeline.add(S_WORKER, name, begin, end)
    timeline.add("R-worker 0", "attention", 40, 45)
    assert timeline.shares() == {"S-block": 0.7, "wait": 0.2, "other": 0.1}
    assert timeline.shares("R-worker 0") == {"attention": 1.0, "other": 0.0}
    assert timeline.shares("R-worker 7") == {}


def test_shares_of_a_device_that_works_by_itself() -> None:
    """Its S-blocks, then what the thread did while it was idle; what the thread did beside it does not count."""
    timeline = Timeline()
    for begin, end, name in (
        (0, 10, "launch"),
        (10, 40, "send"),
        (40, 60, "wait"),
        (60, 70, "launch"),
        (90, 100, "send"),
    ):
        timeline.add(S_WORKER, name, begin, end)
    timeline.add(S_DEVICE, "S-block", 5, 35)
    timeline.add(S_DEVICE, "S-block", 50, 95)
    shares = timeline.shares()
    assert shares == {"S-block": 0.75, "wait": 0.1, "launch": 0.05, "send": 0.1, "other": 0.0}
    assert sum(shares.values()) == 1


def test_the_ring_keeps_the_end() -> None:
    timeline = Timeline(capacity=3)
    for number in range(10):
        timeline.add(S_WORKER, str(number), number, number + 1)
        timeline.count("KV", number)
    assert [span.name for span in timeline.spans] == ["7", "8", "9"]
    assert [count.value for count in timeline.counts] == [7, 8, 9]


def test_a_span_is_kept_however_it_ends() -> None:
    timeline, nothing = Timeline(), NoTimeline()
    with pytest.raises(ValueError), timeline.span("S-block", 1, 2), nothing.span("S-block", 1, 2):
        raise ValueError
    (span,) = timeline.spans
    assert span[:2] == (S_WORKER, "S-block") and span[4:] == (1, 2) and span.begin_ns <= span.end_ns
    nothing.add(S_WORKER, "wait", 0, 1)
    nothing.count("KV", 1)
    assert not nothing.spans and not nothing.counts


class OtherClock(Channel):
    """An R-worker that answers at once and whose clock began at another time."""

    def __init__(self, began_ns: int, ended_ns: int) -> None:
        self._times, self._asked = (began_ns, ended_ns), []  # type: ignore[var-annotated]

    def send(self, message: object, *, timeout_s: float) -> None:
        self._asked.append(message)

    def recv(self, *, timeout_s: float) -> Attended:
        attend = next(message for message in reversed(self._asked) if isinstance(message, Attend))
        return Attended(attend.step, attend.micro_batch, attend.layer, attend.q, *self._times)


def test_spans_of_another_clock_end_with_the_answer() -> None:
    timeline = Timeline()
    rpool = RPool([RWorkerHandle("far", OtherClock(7_000, 9_000))], 1.0, timeline)
    ticket = rpool.begin(Step.of([Segment(0, 0, 5, (1,), 0)]))
    rows = np.zeros((1, 2, 8), np.float32)
    rpool.submit(ticket, rows, rows, rows)
    rpool.collect(ticket, lambda _, o: None)
    attention, wait, receive = timeline.spans
    assert (attention.name, wait.name, receive.name) == ("attention", "wait", "receive")
    assert attention.end_ns - attention.begin_ns == 2_000 and attention.end_ns == receive.end_ns
    assert wait.begin_ns <= wait.end_ns == receive.begin_ns <= receive.end_ns


@pytest.mark.parametrize(
    "options", [{}, {"num_r_workers": 2, "micro_batches": 2}, {"transport": "shm"}, {"num_r_workers": 0}]
)
def test_trace_of_a_run(options: dict[str, object], llama: Case, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with LLM(llama.directory, skip_tokenizer_init=True, trace=path, **options) as llm:
        outputs = llm.generate(llama.prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    assert all(o.outputs[0].token_ids == r[:8] for o, r in zip(outputs, llama.reference, strict=True))
    events = json.loads(path.read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert set(names.values()) == {
        S_WORKER,
        *(f"R-worker {i}" for i in range(int(str(options.get("num_r_workers", 1))))),
    }
    tracks: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            tracks[names[event["tid"]]].append((event["ts"], event["ts"] + event["dur"], event["name"]))
    kinds = {name for _, _, name in tracks[S_WORKER]}
    of_layers = {"S-block", "stage", "send", "wait", "receive", "prompt attention"}
    assert kinds == {"sample", "schedule", "commit"} | ({"forward"} if options == {"num_r_workers": 0} else of_layers)
    for track, spans in tracks.items():
        assert track == S_WORKER or {name for _, _, name in spans} == {"attention"}
        for (_, end, _), (begin, _, _) in zip(sorted(spans), sorted(spans)[1:], strict=False):
            assert begin >= end - 1e-3, "spans of a track do not overlap"
    loads = [event["args"]["live KV tokens"] for event in events if event["ph"] == "C"]
    assert len(loads) > 3 and max(loads) <= sum(map(len, llama.prompts)) + 8 * len(llama.prompts)


def test_a_trace_that_cannot_be_written_is_told_before_the_run(llama: Case) -> None:
    with pytest.raises(ConfigError, match="cannot write the trace"):
        LLM(llama.directory, trace="/no/such/directory/trace.json")
