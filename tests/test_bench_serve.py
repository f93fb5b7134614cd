"""`fastdecode bench serve`: what a server did is what is reported, by a server that knows what it did."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdecode.benchmark.serving import (
    Outcome,
    due_times,
    format_serving,
    read_goodput,
    serving_record,
)
from fastdecode.cli import main
from fastdecode.errors import ConfigError

FIRST_S, NEXT_S = 0.15, 0.03  # of the server: to the first token, between tokens
SLACK_S = 0.5  # of a busy machine, for one hop


@dataclass
class FakeServer:
    """Speaks SSE; notes what it was sent, and when it sent what."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    num_now: int = 0
    num_most: int = 0
    tells_usage: bool = True
    fails: str = ""  # "status", "stream", "cut"
    fails_from: int = 10**9  # which request on


def usage(num_tokens: int) -> dict[str, Any]:
    """vLLM's servers say null where they are not to tell."""
    details = {"cached_tokens": 5} if num_tokens > 1 else None
    return {"prompt_tokens": 9, "completion_tokens": num_tokens, "prompt_tokens_details": details}


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    state, lock = FakeServer(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            began = time.perf_counter()
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                number = len(state.bodies)
                state.bodies.append(body)
                state.keys.append(self.headers["authorization"])
                state.num_now += 1
                state.num_most = max(state.num_most, state.num_now)
            fails = state.fails if number >= state.fails_from else ""
            if fails == "status":
                self.leave()
                text = b'{"error": {"message": "too many"}}'
                self.send_response(429)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)
            else:
                self.stream(body, began, fails)

        def leave(self) -> None:
            """Before the client can know: its next request may be here before this one is done with."""
            with lock:
                state.num_now -= 1

        def stream(self, body: dict[str, Any], began: float, fails: str) -> None:
            is_chat = "messages" in body
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("connection", "close")
            self.end_headers()
            if is_chat:
                self.say({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
            time.sleep(FIRST_S)
            first = time.perf_counter() - began
            for index in range(body["max_tokens"]):
                if index:
                    time.sleep(NEXT_S)
                text = "" if index == 1 else "x"  # the second is half a character
                choice = {"delta": {"content": text}} if is_chat else {"text": text}
                self.say({"choices": [{**choice, "finish_reason": None}]})
                if fails and index == 1:
                    self.leave()
                    if fails == "stream":
                        self.say({"error": {"message": "worker_lost"}})
                    return
            end = {"delta": {}} if is_chat else {"text": ""}
            self.say({"choices": [{**end, "finish_reason": "length"}]})
            with lock:
                state.first_s.append(first)
                state.whole_s.append(time.perf_counter() - began)
            if state.tells_usage:
                self.say({"choices": [], "usage": usage(body["max_tokens"])})
            self.leave()
            self.wfile.write(b"data: [DONE]\n\n")

        def say(self, event: dict[str, Any]) -> None:
            self.wfile.write(f": a comment\ndata: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def serve(fake: FakeServer, demo_model: Path, tmp_path: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    """Exit code and record."""
    fixed = ["bench", "serve", "--base-url", fake.url, "--model", "tiny", "--tokenizer", str(demo_model)]
    fixed += ["--num-prompts", "4", "--input-len", "9", "--output-len", "6", "--num-warmups", "0"]
    code = main([*fixed, "--save-result", "--result-dir", str(tmp_path), "--result-filename", "r.json", *flags])
    return code, json.loads((tmp_path / "r.json").read_text())


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_numbers_are_the_servers(
    endpoint: str, fake: FakeServer, demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    fake.tells_usage = endpoint == "/v1/completions"  # without, chunks are counted
    code, record = serve(
        fake, demo_model, tmp_path, "--endpoint", endpoint, "--max-concurrency", "2", "--ignore-eos", "--num-warmups",
        "1", "--goodput", "ttft:1e6", "tpot:0.001",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert code == 0 and len(fake.bodies) == 5 and fake.num_most == 2 and set(fake.keys) == {"Bearer sesame"}
    for body in fake.bodies:
        assert body["model"] == "tiny" and body["max_tokens"] == 6 and body["ignore_eos"] is True and body["stream"]
        assert body["temperature"] == 0 and body["stream_options"] == {"include_usage": True}
        if endpoint == "/v1/completions":
            assert len(body["prompt"]) == 9 and all(0 <= token < 4096 for token in body["prompt"])
        else:
            assert body["messages"][0]["role"] == "user" and body["messages"][0]["content"]
    assert record["completed"] == 4 and record["failed"] == 0 and record["total_output_tokens"] == 24
    assert record["total_input_tokens"] == 36 and record["max_concurrent_requests"] == 2
    first, whole = fake.first_s[1:], fake.whole_s[1:]  # without the warm-up
    assert np.mean(first) <= record["mean_ttft_ms"] / 1e3 < np.mean(first) + SLACK_S
    assert abs(record["mean_e2el_ms"] / 1e3 - np.mean(whole)) < SLACK_S
    assert 4 * (FIRST_S + 5 * NEXT_S) / 2 <= record["duration"] < sum(whole) / 2 + 2 * SLACK_S
    assert record["output_throughput"] == pytest.approx(24 / record["duration"])
    # Five gaps of each request: as many as tokens after the first, whatever text they brought.
    mean_next = (np.mean(whole) - np.mean(first)) / 5
    for name in ("tpot", "itl"):
        assert abs(record[f"mean_{name}_ms"] / 1e3 - mean_next) < SLACK_S / 5
    assert record["request_goodput"] == 0.0
    assert f"{'Successful requests:':<40} 4" in printed and "Request goodput (req/s):" in printed
    assert record["total_cached_tokens"] == (4 * 5 if fake.tells_usage else 0)
    assert ("Cached input tokens:                     20" in printed) == fake.tells_usage
    assert f"{'End-to-end Latency':-^50}" in printed and "Median TPOT (ms):" in printed


@pytest.mark.parametrize(
    "fails, why",
    [("status", "HTTP 429: .*too many"), ("stream", "in the stream: .*worker_lost"), ("cut", "ended before its end")],
)
def test_failures_are_told(
    fails: str, why: str, fake: FakeServer, demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that fails later; the others count.  One that fails at once is not measured at all."""
    fake.fails, fake.fails_from = fails, 3
    code, record = serve(fake, demo_model, tmp_path)
    assert code == 1 and (record["completed"], record["failed"]) == (3, 1) and record["total_output_tokens"] == 18
    fake.fails_from = 0
    capsys.readouterr()
    arguments = ["--base-url", fake.url, "--model", str(demo_model), "--num-prompts", "3"]
    assert main(["bench", "serve", *arguments]) == 2 and len(fake.bodies) == 5
    error = capsys.readouterr().err
    assert "the server does not serve" in error and re.search(why, error + str(record["errors"]))


def test_a_rate_is_kept(fake: FakeServer, demo_model: Path, tmp_path: Path) -> None:
    code, record = serve(
        fake, demo_model, tmp_path, "--request-rate", "10", "--burstiness", "1000", "--output-len", "1"
    )
    assert code == 0 and record["request_rate"] == 10 and 0.3 + FIRST_S - 0.05 < record["duration"] < 0.3 + FIRST_S + 1
    assert record["mean_tpot_ms"] is None and record["mean_itl_ms"] is None


@pytest.mark.parametrize(
    "flags, why",
    [
        (["--model", "gpt"], "give --tokenizer DIR of the model"),
        (["--model", "MODEL", "--goodput", "ttft:200", "itl:3"], "a name of ttft, tpot, e2el: 'itl:3'"),
        (["--model", "MODEL", "--base-url", "http://127.0.0.1:9"], "Cannot connect to host 127.0.0.1:9"),
        (["--model", "MODEL", "--base-url", "nowhere"], "does not serve"),
        (["--model", "MODEL", "--save-result", "--result-filename", "/dev/null/x"], "cannot write"),
    ],
)
def test_errors_are_one_line(flags: list[str], why: str, demo_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *[str(demo_model) if flag == "MODEL" else flag for flag in flags]]) == 2
    error = capsys.readouterr().err
    assert why in error and error.startswith("error: ") and len(error.splitlines()) == 1


def test_due_times() -> None:
    assert due_times(3, float("inf"), 1.0, 0) == [0.0] * 3
    poisson, even = (np.array(due_times(20_000, 50.0, burstiness, 3)) for burstiness in (1.0, 100.0))
    for times in (poisson, even):
        assert times[0] == 0 and times[-1] == pytest.approx(400, rel=0.03)
    assert np.diff(poisson).std() == pytest.approx(0.02, rel=0.05)
    assert np.diff(even).std() == pytest.approx(0.002, rel=0.05)
    assert due_times(9, 50.0, 1.0, 3) == due_times(9, 50.0, 1.0, 3) != due_times(9, 50.0, 1.0, 4)


def test_arithmetic() -> None:
    """By hand, of three requests and one that failed."""
    outcomes = [
        Outcome(10, 0.0, 0.1, [0.02, 0.04], 0.16, 3),
        Outcome(20, 0.0, 0.3, [0.05], 0.35, 2),
        Outcome(30, 1.0, 0.2, [], 0.2, 1),
        Outcome(40, 0.0, None, [], 0.0, 0, "HTTP 500"),
    ]
    settings = {"max_concurrency": None, "request_rate": "inf"}
    record = serving_record(outcomes, 2.0, read_goodput(["ttft:250", "tpot:40"]), settings)
    assert (record["completed"], record["failed"], record["errors"]) == (3, 1, ["HTTP 500"])
    assert (record["total_input_tokens"], record["total_output_tokens"]) == (60, 6)
    assert (record["request_throughput"], record["output_throughput"]) == (1.5, 3.0)
    assert record["total_token_throughput"] == 33.0 and record["max_concurrent_requests"] == 2
    assert record["request_goodput"] == 1.0  # the second is late; the third has one token alone
    assert record["mean_ttft_ms"] == pytest.approx(200) and record["median_ttft_ms"] == pytest.approx(200)
    assert record["mean_tpot_ms"] == pytest.approx((30 + 50) / 2)
    assert record["mean_itl_ms"] == pytest.approx((20 + 40 + 50) / 3) and record["median_itl_ms"] == pytest.approx(40)
    assert record["p99_e2el_ms"] == pytest.approx(np.percentile([160, 350, 200], 99))
    assert serving_record(outcomes, 2.0, {}, settings)["request_goodput"] is None
    assert "Median E2EL (ms):                        200.00" in format_serving(record)


@pytest.mark.parametrize("word", ["ttft", "ttft:", "ttft:-3", "ttft:nan", "wer:3"])
def test_goodput_words(word: str) -> None:
    with pytest.raises(ConfigError, match="NAME:MILLISECONDS"):
        read_goodput([word])
