"""The codec under fire, in this process: whatever comes is a message or a ProtocolError.

As a script (``python bench/fuzz_codec.py ... CORPUS``, with libFuzzer's flags) it looks for its inputs by coverage of
`transport`; that needs atheris.
"""

from __future__ import annotations

import importlib
import itertools
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

try:
    import atheris
except ImportError:
    atheris = None

# isort: split
if atheris and __name__ == "__main__":
    with atheris.instrument_imports(include=["transport.codec", "transport.messages"]):
        importlib.import_module("transport")
import numpy as np

from bench.fuzz_messages import Frames, Maker
from transport import DTYPES, Codec, ProtocolError

IS_GUIDED = atheris is not None
_POOL = 200  # valid messages that a batch is made from
_BATCH = 10_000


def feed(codec: Codec, frames: Frames) -> bool:
    """Whether it was a message.  Raises whatever the codec should not, AssertionError for an unsound message."""
    try:
        envelope = codec.decode(frames)
    except ProtocolError:
        return False
    total = sum(map(len, frames))
    for name in envelope.message.__struct_fields__:
        value = getattr(envelope.message, name)
        if isinstance(value, np.ndarray):
            assert value.nbytes <= total and value.flags.aligned and value.dtype in DTYPES.values(), (name, value.shape)
            assert value.dtype.kind != "i" or value.flags.writeable, "whole numbers are copied"
    codec.encode(envelope.session, envelope.message)  # what may be said can be said again
    return True


def mutate(num_frames: int, seed: int, first_batch: int = 0) -> dict[str, Any]:
    """Valid messages, damaged.  A record of what came of it; `failure` says how to repeat it."""
    codec, valid, done, began = Codec(), 0, 0, time.perf_counter()
    for batch in itertools.count(first_batch):
        maker = Maker(("codec", seed, batch))
        pool = [maker.frames(maker.message()) for _ in range(_POOL)]
        for _ in range(min(_BATCH, num_frames - done)):
            frames = maker.damage(maker.random.choice(pool))
            done += 1
            try:
                valid += feed(codec, frames)
            except Exception as error:
                return _record(done, began, valid) | {
                    "failure": f"{type(error).__name__}: {error}; --seed {seed} --first-batch {batch}",
                    "frames_hex": [frame[:4096].hex() for frame in frames],
                }
        if done >= num_frames:
            return _record(done, began, valid)
    raise AssertionError("the batches never end")


def guided(num_frames: int, seed: int) -> dict[str, Any]:
    """The same by libFuzzer, in a process of its own: it ends the one it runs in."""
    with tempfile.TemporaryDirectory() as name:
        corpus, maker = Path(name) / "corpus", Maker(("corpus", seed))
        corpus.mkdir()
        for number in range(_POOL):
            (corpus / str(number)).write_bytes(pack(maker.frames(maker.message())))
        command = [
            sys.executable, __file__, f"-runs={num_frames}", f"-seed={seed + 1}", "-max_len=4096", "-rss_limit_mb=2048",
            "-timeout=20", f"-artifact_prefix={name}/", str(corpus),
        ]  # fmt: skip
        began = time.perf_counter()
        said = subprocess.run(command, capture_output=True, text=True, errors="replace")
        seconds = time.perf_counter() - began
        crashes = [path.read_bytes().hex() for path in Path(name).glob("*-*")]
    text = said.stderr + said.stdout
    done = [int(found) for found in re.findall(r"^(?:Done |#)(\d+)", text, re.MULTILINE)]
    coverage = [int(found) for found in re.findall(r"cov: (\d+)", text)]
    memory = [int(found) for found in re.findall(r"rss: (\d+)Mb", text)]
    record = {
        "frames": max(done, default=0), "seconds": seconds, "coverage": max(coverage, default=0),
        "memory_over_start_mib": max(memory) - memory[0] if memory else None,
    }  # fmt: skip
    if said.returncode or record["frames"] < num_frames or not record["coverage"]:
        record |= {"failure": f"exit code {said.returncode}; --seed {seed}: {text[-2000:]}", "frames_hex": crashes}
    return record


def pack(frames: Frames) -> bytes:
    """One input of libFuzzer: num_frames, the length of each in two bytes, the frames."""
    lengths = b"".join(len(frame).to_bytes(2, "little") for frame in frames)
    return bytes([len(frames)]) + lengths + b"".join(frames)


def unpack(data: bytes) -> Frames:
    """Of any bytes: the last frame takes what is left."""
    num_frames = data[0] % 16 if data else 0
    at, frames = 1 + 2 * num_frames, []
    for i in range(num_frames):
        length = int.from_bytes(data[1 + 2 * i : 3 + 2 * i], "little")
        frames.append(data[at : at + length])
        at += length
    return frames


def _record(done: int, began: float, valid: int) -> dict[str, Any]:
    return {"frames": done, "seconds": time.perf_counter() - began, "valid": valid}


def main() -> None:
    codec = Codec()
    atheris.Setup(sys.argv, lambda data: feed(codec, unpack(data)) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
