"""Under a limit on their memory workers live: an R-worker filled to the brim, an S-worker with more requests than ever.

The limit is RLIMIT_DATA, on what a process may write: an allocation beyond it fails, as it would not where memory is
overcommitted and the kernel kills later.  It counts what is mapped, not what is touched, so glibc's arenas and what
`keep_freed_memory` asks for ahead (64 MiB at a time) are in it; memory shared with a peer is not, but is in VmHWM.
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import quiet

from fastdecode import LLM, SamplingParams
from fastdecode.scheduling.prefix_tree import Change
from fastdecode.scheduling.request import Sequence
from models import make_model
from transport import (
    Admit,
    Attend,
    Attended,
    Channel,
    Failure,
    Hello,
    LayerSpec,
    Message,
    PeerLost,
    Ping,
    Pong,
    Release,
    Rows,
    Welcome,
    connect,
)

ROOT = Path(__file__).parents[1]
KV_MIB = 256
# Kernels (85 MiB if they are compiled now, 50 from the disk), and messages of 16 MiB with their copies.
STAGING_MIB = 192
SPEC = LayerSpec(8, 8, 128, 0.1)
NUM_LAYERS, PROMPT = 4, 2048
ROOMY = KV_MIB << 20


@dataclass
class Worker:
    process: subprocess.Popen[str]
    address: str

    def mib(self, what: str) -> int:
        found = re.search(rf"{what}:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        assert found
        return int(found[1]) >> 10

    def may_take(self, mib: int) -> None:
        """From now on."""
        limit = (self.mib("VmData") + mib) << 20
        resource.prlimit(self.process.pid, resource.RLIMIT_DATA, (limit, limit))


@pytest.fixture(params=["shm", "ipc", "tcp"])
def worker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Worker]:
    """It has to be alive at the end."""
    address = "tcp://127.0.0.1:0" if request.param == "tcp" else f"{request.param}://{tmp_path}/w"
    command = [
        sys.executable, "-m", "cpu_attention", "--bind", address, "--threads", "2", "--log-level", "error",
        "--kv-cache-memory", f"{KV_MIB}MiB", "--exit-with-parent",
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdin
        yield Worker(process, process.stdout.readline().removeprefix("listening on ").strip())
        assert process.poll() is None, f"it ended with {process.returncode}"
        process.stdin.close()


def ask(channel: Channel, message: Message) -> Message:
    channel.send(message, timeout_s=60)
    return channel.recv(timeout_s=60)


def begin(channel: Channel, seq_id: int, start: int, num_tokens: int, num_queries: int, *, step: int) -> None:
    columns = (np.array([number], np.int32) for number in (start, num_tokens, num_queries))
    channel.send(Rows(step, 0, np.array([seq_id]), *columns), timeout_s=60)


def attend(num_tokens: int, num_queries: int, layer: int, step: int, dtype: type = np.float32) -> Attend:
    k = np.ones((num_tokens, SPEC.num_kv_heads, SPEC.head_dim), dtype)
    return Attend(step, 0, layer, np.ones((num_queries, SPEC.num_q_heads, SPEC.head_dim), dtype), k, k)


def admit(channel: Channel, seq_ids: list[int], max_tokens: int) -> None:
    channel.send(Admit(np.array(seq_ids), np.full(len(seq_ids), max_tokens, np.int32)), timeout_s=60)


def fill(channel: Channel, first_step: int) -> tuple[int, Failure]:
    """Prompts until there is room for no other: how many, and what was said to the last."""
    for number in range(10_000):
        admit(channel, [number], PROMPT + 100)
        begin(channel, number, 0, PROMPT, 1, step=first_step + number)
        for layer in range(NUM_LAYERS):
            reply = ask(channel, attend(PROMPT, 1, layer, first_step + number))
            if isinstance(reply, Failure):
                return number, reply
            assert isinstance(reply, Attended) and (reply.o == 1).all()
    raise AssertionError("it never ends")


def test_filled_to_the_brim(worker: Worker) -> None:
    """Every block of the budget is used, more is refused, and no more memory is taken than was said; twice."""
    before = worker.mib("VmHWM")
    worker.may_take(KV_MIB + STAGING_MIB)
    with connect(worker.address) as channel:
        welcome = ask(channel, Hello((SPEC,) * NUM_LAYERS, "float16", 64, 1 << 40))
        assert isinstance(welcome, Welcome)
        num_blocks = welcome.num_blocks
        assert num_blocks * welcome.block_bytes == KV_MIB << 20
        for life in range(2):
            count, refusal = fill(channel, first_step=1000 * life)
            assert count == num_blocks * 64 // PROMPT and refusal.kind == "KVBudgetExceeded", refusal
            begin(channel, 0, PROMPT, 1, 1, step=900)
            full = ask(channel, attend(1, 1, 0, 900))
            assert isinstance(full, Failure) and "0 of 256 are free" in full.text
            admit(channel, [10**6], num_blocks * 64 + 1)  # could not be held even alone
            begin(channel, 10**6, 0, num_blocks * 64 + 1, 0, step=901)
            assert isinstance(ask(channel, attend(1, 1, 0, 901)), Failure)
            admit(channel, list(range(2000, 2000 + num_blocks)), 1)  # no block for each
            assert isinstance(ask(channel, attend(1, 1, 0, 902)), Failure)
            channel.send(Release(np.arange(count + 1)), timeout_s=60)
            assert ask(channel, Ping(life)) == Pong(life)
    grown = worker.mib("VmHWM") - before
    assert KV_MIB < grown <= KV_MIB + STAGING_MIB, f"{grown} MiB over the start"


@pytest.mark.parametrize(
    "worker", ["shm", *(pytest.param(scheme, marks=pytest.mark.slow) for scheme in ("ipc", "tcp"))], indirect=True
)
def test_greedy_engine_on_a_full_worker(worker: Worker, tmp_path: Path) -> None:
    """More sequences than fit, long prompts, nobody counts ahead: thrown out, computed again, and none is lost."""
    model = make_model("llama", tmp_path / "model", head_dim=256, num_key_value_heads=4)  # 24 KiB per token
    prompts = np.random.default_rng(0).integers(3, 250, (28, 440)).tolist()
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    before = worker.mib("VmHWM")
    worker.may_take(KV_MIB + STAGING_MIB)
    with LLM(
        model, r_worker_addresses=[worker.address], skip_tokenizer_init=True, kv_policy="greedy", start_policy="eager",
        kv_cache_memory="256MiB", kv_cache_dtype="float32",
    ) as llm:  # fmt: skip
        preempted = _note_preemptions(llm)
        outputs = quiet(llm, prompts, params)
    grown = worker.mib("VmHWM") - before
    assert 0.9 * KV_MIB < grown <= KV_MIB + STAGING_MIB, f"{grown} MiB over the start"
    assert preempted, "it was full"
    with LLM(model, skip_tokenizer_init=True, kv_cache_memory="1GiB") as llm:
        expected = quiet(llm, prompts, params)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]


def _note_preemptions(llm: LLM) -> list[int]:
    """Grows by each sequence that is thrown out."""
    scheduler, found = llm._engine._scheduler, list[int]()
    put_back = scheduler._put_back

    def noted(sequence: Sequence, *, may_stay: bool) -> tuple[list[tuple[int, Change]], list[int]]:
        found.append(sequence.seq_id)
        return put_back(sequence, may_stay=may_stay)

    scheduler._put_back = noted  # type: ignore[method-assign]
    return found


def test_no_memory_for_a_message(worker: Worker) -> None:
    """Something fails, and whoever asked is told; the R-worker lives and does what there is memory for."""
    with connect(worker.address) as channel:
        assert isinstance(ask(channel, Hello((SPEC,) * NUM_LAYERS, "float16", 64)), Welcome)
        admit(channel, [1], 16_384)
        begin(channel, 1, 0, 16_384, 16_384, step=1)
        worker.may_take(24)
        try:
            reply = ask(channel, attend(16_384, 16_384, 0, 1, np.float32))  # 3 x 64 MiB, and o
            assert isinstance(reply, Failure) and "allocate" in reply.text, reply
        except PeerLost:
            pass  # ZeroMQ had no memory to read it, and hangs up
    with connect(worker.address) as channel:
        assert isinstance(ask(channel, Hello((SPEC,), "float16", 64, 1 << 22)), Welcome)
        admit(channel, [1], 20)
        begin(channel, 1, 0, 5, 5, step=1)
        reply = ask(channel, attend(5, 5, 0, 1))
        assert isinstance(reply, Attended) and (reply.o == 1).all()


_MANY_REQUESTS = """
import re, resource, sys
from pathlib import Path
from fastdecode import LLM, SamplingParams
def mib(what):
    return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) >> 10
params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
options = dict(transport=sys.argv[2], skip_tokenizer_init=True, kv_cache_memory="4MiB", max_num_waiting=16)
with LLM(sys.argv[1], **options) as llm:
    def requests():
        for i in range(3000):
            yield [3 + i % 200] * (1 + i % 60), params
    for count, (place, output) in enumerate(llm.stream(requests()), 1):
        assert not output.error and len(output.outputs[0].token_ids) == 2
        if count == 1000:
            before, limit = mib("VmHWM"), (mib("VmData") + 24) << 20
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
print(count, mib("VmHWM") - before)
"""


@pytest.mark.parametrize(
    "transport", ["inproc", *(pytest.param(name, marks=pytest.mark.slow) for name in ("shm", "ipc"))]
)
def test_many_requests_through_a_small_queue(transport: str, tmp_path: Path) -> None:
    """After the first 1000 the S-worker takes no more memory, however many come, and may not either."""
    model = make_model("llama", tmp_path / "model")
    command = [sys.executable, "-c", _MANY_REQUESTS, str(model), transport]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert out.returncode == 0, out.stderr[-3000:]
    count, grown = map(int, out.stdout.split())
    assert count == 3000 and grown <= 8, f"{grown} MiB"
