"""Links that lose, double, damage and swap messages; workers killed and stopped beside them.  No token may change."""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import pytest
from conftest import Case, quiet

from bench.chaos import KILLED
from bench.chaos import serve as serve_in_chaos
from bench.near_ties import assert_same_tokens
from cpu_attention import RWorker, serve
from fastdecode import LLM, SamplingParams
from models import VOCAB
from transport import Goodbye, connect, listen
from transport.bad_link import HARMS, BadLink

GREEDY = SamplingParams(temperature=0, max_tokens=32)


@pytest.fixture
def ports() -> Iterator[list[int]]:
    """Of two R-workers behind tcp://, as threads."""
    with ExitStack() as cleanup:
        found = []
        for _ in range(2):
            worker, listener = RWorker(kv_cache_bytes=1 << 24), listen("tcp://127.0.0.1:0")
            cleanup.callback(listener.close)
            thread = threading.Thread(target=partial(serve, listener, worker, dismissable=True))
            thread.start()
            cleanup.callback(thread.join, 10)
            channel = cleanup.enter_context(connect(listener.address))
            cleanup.callback(channel.send, Goodbye(dismiss=True), timeout_s=10)
            found.append(int(listener.address.rpartition(":")[2]))
        yield found


@pytest.mark.parametrize("harm", HARMS)
def test_a_bad_link(harm: str, llama: Case, ports: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """At six moments of a batch, both ways; the worker comes back each time, or was never lost."""
    monkeypatch.setattr("fastdecode.holders.rejoin._LONGEST_PAUSE_S", 0.1)
    link = BadLink("127.0.0.1", ports[0], seed=len(harm))
    addresses = [link.address, f"tcp://127.0.0.1:{ports[1]}"]
    try:
        with LLM(llama.directory, r_worker_addresses=addresses, skip_tokenizer_init=True, micro_batches=2) as llm:
            rpool = llm._engine._rpool
            quiet(llm, llama.prompts, GREEDY)
            for after in (0, 1, 5, 40, 41, 333):
                link.strike(harm, after)
                deadline = time.monotonic() + 20
                while link.is_pending or rpool.alive != (0, 1):
                    outputs = quiet(llm, llama.prompts, GREEDY)
                    assert [output.outputs[0].token_ids for output in outputs] == llama.reference, after
                    assert 1 in rpool.alive and time.monotonic() < deadline
    finally:
        link.close()


@pytest.mark.parametrize(
    "memory, kv_policy, output_len",
    [("256MiB", "reserve-dynamic", 250), ("360KiB", "greedy", 150)],
    ids=["roomy", "preempting"],
)
def test_chaos(memory: str, kv_policy: str, output_len: int, llama: Case) -> None:
    """One killed, one stopped, one behind a bad link, in turn, while prompts begin with KV of one another.

    Sequence 0 is sampled, and its draw of token 114 lies 2e-7 beside a border: processors, kernels and numbers
    of rows differ in which token that is.
    """
    args = argparse.Namespace(vocab=VOCAB, requests=60, sequences=16, output_len=output_len, blows=4)
    args.kv_cache_memory, args.kv_policy = memory, kv_policy
    plain = serve_in_chaos(args, str(llama.directory), None)
    run = serve_in_chaos(args, str(llama.directory), 1)
    assert_same_tokens(llama.directory, run.prompts, run.params, run.outputs, plain.outputs)
    assert len(run.blows) > 1 and all(blow.noticed for blow in run.blows[:-1] if blow.worker == KILLED)
