"""Bytes copied on the S-worker's side for each byte that goes to the R-workers and each byte of o: counted, not timed.

    python bench/wire_copies.py [--out bench/results/wire_copies.json] [--label after] [--model-type phi3]

    sent       q, k, v from the model's tensors to what the operating system, or the R-worker, is given
    received   o from where it arrived to the tensor that the model reads: rows of R-workers, of prompts, and padding

One S-worker with a small random model and real R-workers behind each transport run a decode step, a decode step beside
two prompts, and a step of prompts alone.  Whatever copies is counted where it does: torch by its dispatcher, numpy and
the transports by their few functions that do.  Copies of the operating system (of a socket, of packets under 8 KiB)
are not in it.  Beside the counts stands where things lie, from addresses alone: whether the arrays that were sent are
the tensors' own memory, and whether the model reads o where it arrived.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import fastdecode  # noqa: F401 (before torch, see there)

# isort: split
import numpy as np
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import gpu_sworker.staging
import gpu_sworker.sworker
import transport.codec
import transport.zeromq
from fastdecode.engine.capacity import completed
from fastdecode.engine.config import EngineConfig
from fastdecode.engine.pipeline import Pipeline
from fastdecode.engine.runtime import Runtime, open_runtime
from fastdecode.observe.timeline import NoTimeline
from fastdecode.scheduling.plan import Admission, Segment, Step
from transport.arena import WriteArena
from transport.multipart import COPY_BELOW_BYTES

TRANSPORTS = ("inproc", "shm", "ipc", "tcp")
STEPS = ("decode", "decode + prompts", "prompts")
SEQUENCES, CONTEXT, PROMPT = 97, 3, 24  # how many decode (padded to 98 by oneDNN), over how much; a new prompt's tokens
HEADS, KV_HEADS, HEAD_DIM, LAYERS = 8, 2, 64, 2
OUT = Path(__file__).parent / "results" / "wire_copies.json"

_COPY_NOTHING = {"empty", "zero_"}


@dataclass
class Counted:
    """Of one step, all layers."""

    transport: str
    num_r_workers: int
    step: str
    linear_kernel: str
    bytes_sent: int = 0
    bytes_received: int = 0  # of R-workers
    bytes_read: int = 0  # o as the model reads it: of R-workers, of prompts, padding
    copied_to_send: dict[str, int] = field(default_factory=dict)  # what copied -> bytes
    copied_of_o: dict[str, int] = field(default_factory=dict)
    sends_own_memory: bool = True  # all arrays handed to the transport lie in the tensors
    reads_in_place: bool = True  # all of o lies in what arrived

    @property
    def per_byte_sent(self) -> float:
        return sum(self.copied_to_send.values()) / max(1, self.bytes_sent)

    @property
    def per_byte_read(self) -> float:
        return sum(self.copied_of_o.values()) / max(1, self.bytes_read)


class _Dispatched(TorchDispatchMode):
    def __init__(self, note: Callable[[str, int], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, given = func.overloadpacket.__name__, [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        if name == "copy_":
            self._note("torch.copy_", given[0].nbytes)
        elif isinstance(out, torch.Tensor) and name not in _COPY_NOTHING and _storage(out) not in map(_storage, given):
            self._note(f"torch.{name}", out.nbytes)  # no view
        return out


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Counting:
    """Wraps whatever copies between the model's tensors and the wire, in this thread."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline, self._thread = pipeline, threading.get_ident()
        self.counted: Counted | None = None  # what is filled now
        self._way: dict[str, int] | None = None  # copies belong to it; None: to neither way
        self._arrived: list[np.ndarray] = []  # frames of the layer at hand
        self._tensors: list[torch.Tensor] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        pipeline = self._pipeline
        with ExitStack() as stack:
            for name, is_sending in (("_stage", True), ("_send", True), ("_collect", False)):
                within = self._within(getattr(pipeline, name), is_sending)
                stack.enter_context(mock.patch.object(pipeline, name, within))
            forward = self._forward(pipeline._sworker.forward)
            stack.enter_context(mock.patch.object(pipeline._sworker, "forward", forward))
            for worker in pipeline._rpool._workers.values():
                link = worker.channel._link
                stack.enter_context(mock.patch.object(link, "send_frames", self._send_frames(link.send_frames)))
                stack.enter_context(mock.patch.object(link, "recv_frames", self._recv_frames(link.recv_frames)))
            for name in ("concatenate", "copyto", "ascontiguousarray", "array", "stack"):
                stack.enter_context(mock.patch.object(np, name, self._numpy(name, getattr(np, name))))
            stack.enter_context(mock.patch.object(WriteArena, "write", self._arena(WriteArena.write)))
            stack.enter_context(mock.patch.object(transport.codec, "bytearray", self._bytearray, create=True))
            stack.enter_context(mock.patch.object(transport.zeromq, "send", self._zmq(transport.zeromq.send)))
            as_tensor, pad = gpu_sworker.staging.as_tensor, gpu_sworker.sworker.pad
            stack.enter_context(mock.patch.object(gpu_sworker.staging, "as_tensor", self._numpy("copy", as_tensor)))
            stack.enter_context(mock.patch.object(gpu_sworker.sworker, "pad", self._pad(pad)))
            yield

    def _note(self, what: str, num_bytes: int) -> None:
        if self._way is not None and threading.get_ident() == self._thread and num_bytes:
            self._way[what] = self._way.get(what, 0) + num_bytes

    def _within(self, function: Callable[..., Any], is_sending: bool) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            assert self.counted
            self._way = self.counted.copied_to_send if is_sending else self.counted.copied_of_o
            try:
                with _Dispatched(self._note):
                    return function(*args)
            finally:
                self._way = None

        return run

    def _forward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any) -> Generator[Any, torch.Tensor, torch.Tensor]:
            inner, o = function(*args), None
            while True:
                try:
                    call = inner.send(o)
                except StopIteration as end:
                    return cast(torch.Tensor, end.value)
                self._arrived, self._tensors = [], [call.q, call.k, call.v]
                o = yield call
                assert self.counted
                self.counted.bytes_read += o.nbytes
                self.counted.reads_in_place &= any(_lies_in(_span(o), _span(frame)) for frame in self._arrived)

        return forward

    def _send_frames(self, function: Callable[..., None]) -> Callable[..., None]:
        def send_frames(frames: Sequence[Any], timeout_s: float) -> None:
            if self._way is not None and self.counted:
                for frame in frames[1:]:
                    array = np.frombuffer(frame, np.uint8) if len(frame) else np.empty(0, np.uint8)
                    self.counted.bytes_sent += array.nbytes
                    own = not len(array) or any(_lies_in(_span(array), _span(tensor)) for tensor in self._tensors)
                    self.counted.sends_own_memory &= own
            function(frames, timeout_s)

        return send_frames

    def _recv_frames(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def recv_frames(timeout_s: float) -> Any:
            frames = function(timeout_s)
            if self._way is not None and self.counted:
                self._arrived += [np.frombuffer(frame, np.uint8) for frame in frames[1:] if len(frame)]
                self.counted.bytes_received += sum(len(frame) for frame in frames[1:])
            return frames

        return recv_frames

    def _numpy(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(first: Any, *args: Any, **kwargs: Any) -> Any:
            out = function(first, *args, **kwargs)
            if name == "copyto":
                self._note("np.copyto", first.nbytes)
            elif not (isinstance(first, np.ndarray) and _lies_in(_span(out), _span(first))):
                self._note(f"np.{name}", out.nbytes)
            return out

        return run

    def _arena(self, function: Callable[..., int]) -> Callable[..., int]:
        def write(arena: WriteArena, position: int, frame: np.ndarray) -> int:
            self._note("arena", len(frame))
            return function(arena, position, frame)

        return write

    def _bytearray(self, buffer: Any) -> bytearray:
        self._note("codec", len(buffer))
        return bytearray(buffer)

    def _zmq(self, function: Callable[..., None]) -> Callable[..., None]:
        def send(over: Any, frames: Sequence[Any]) -> None:
            sizes = [memoryview(frame).nbytes for frame in frames[1:]]
            self._note("zmq, small frames", sum(size for size in sizes if 8 < size < COPY_BELOW_BYTES))
            function(over, frames)

        return send

    def _pad(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def pad(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
            out = function(tensor, *args)
            if self.counted:
                self.counted.copied_of_o["pad"] = self.counted.copied_of_o.get("pad", 0) + out.nbytes
            return out

        return pad


def _span(array: np.ndarray | torch.Tensor) -> tuple[int, int]:
    """Addresses of its first byte and of the one behind its last."""
    if isinstance(array, torch.Tensor):
        last = sum((size - 1) * stride for size, stride in zip(array.shape, array.stride(), strict=True))
        return array.data_ptr(), array.data_ptr() + ((last + 1) * array.element_size() if array.numel() else 0)
    begin = array.__array_interface__["data"][0]
    return begin, begin + array.nbytes


def _lies_in(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def make_model(directory: str, model_type: str = "llama") -> None:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](
        vocab_size=256, hidden_size=HEADS * HEAD_DIM, intermediate_size=256, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, max_position_embeddings=512,
        eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def count(
    directory: str, transport: str, num_r_workers: int, linear_kernel: str = "plain", sequences: int = SEQUENCES
) -> list[Counted]:
    """Each kind of step.  sequences: that decode."""
    config = EngineConfig(
        model=directory, transport=transport, num_r_workers=num_r_workers, kv_cache_memory=64 << 20, r_worker_threads=1,
        linear_kernel=linear_kernel, dtype="float32", skip_tokenizer_init=True,
    )  # fmt: skip
    runtime = open_runtime(completed(config))
    try:
        pipeline = Pipeline(runtime.sworker, runtime.rpool, NoTimeline())
        counting, counts = Counting(pipeline), []
        with counting.installed():
            for number, (kind, step) in enumerate(_steps(runtime, sequences)):
                counting.counted = Counted(transport, num_r_workers, kind, linear_kernel)
                pipeline.begin(Step.of(step, number))
                pipeline.run()
                counts.append(counting.counted)
        return counts
    finally:
        runtime.close()


def _steps(runtime: Runtime, sequences: int) -> Iterator[tuple[str, list[Segment]]]:
    places = [seq_id % len(runtime.welcomes) for seq_id in range(sequences + 2)]
    runtime.rpool.admit([Admission(seq_id, place, 64) for seq_id, place in enumerate(places)])
    prompt = tuple(range(1, CONTEXT + 1))
    old, new = range(sequences), range(sequences, sequences + 2)
    yield "prompts", [Segment(i, places[i], 0, prompt, CONTEXT) for i in old]
    yield "decode", [Segment(i, places[i], CONTEXT, (7,), 0) for i in old]
    decodes = [Segment(i, places[i], CONTEXT + 1, (8,), 0) for i in old]
    yield "decode + prompts", [*decodes, *(Segment(i, places[i], 0, (5,) * PROMPT, PROMPT) for i in new)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", default="now", help="of the record; others in the file are kept and shown beside it")
    parser.add_argument("--model-type", default="llama")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"{OUT} is the one in the repository")
    args = parser.parse_args()

    transformers.utils.logging.disable_progress_bar()
    records = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    print(f"{'copies per byte':50} {'sent':>6} {'of o':>6}   own memory sent, o read in place")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        make_model(directory, args.model_type)
        for transport in TRANSPORTS:
            for num_r_workers in (1, 2):
                for kernel in ("plain", "onednn"):
                    for c in count(directory, transport, num_r_workers, kernel):
                        ratios = {"per_byte_sent": c.per_byte_sent, "per_byte_of_o": c.per_byte_read}
                        rows.append(asdict(c) | {name: round(ratio, 3) for name, ratio in ratios.items()})
                        name = f"{transport}, {num_r_workers} R-workers, {c.step}, {kernel}"
                        print(
                            f"{name:50} {c.per_byte_sent:6.3f} {c.per_byte_read:6.3f}   {c.sends_own_memory!s:5} "
                            f"{c.reads_in_place!s:5}  {c.copied_to_send} {c.copied_of_o}"
                        )
    records[args.label] = rows
    if args.out:
        of_labels = [
            f"{json.dumps(label)}: [\n" + ",\n".join(map(json.dumps, of)) + "\n]" for label, of in records.items()
        ]
        args.out.write_text("{" + ",\n".join(of_labels) + "}\n")  # a line for each


if __name__ == "__main__":
    main()
