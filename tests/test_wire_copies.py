"""What is copied between the model's tensors and the wire, counted; and that o stays whole where nothing is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.wire_copies import count, make_model
from gpu_sworker.staging import HostStaging
from transport import Attended, Codec
from transport.arena import ReadArena, WriteArena, align


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = str(tmp_path_factory.mktemp("llama"))
    make_model(directory)
    return directory


@pytest.mark.parametrize("linear_kernel", ["plain", "onednn"])
@pytest.mark.parametrize(
    ("transport", "num_r_workers"), [("inproc", 1), ("inproc", 2), ("shm", 1), ("shm", 2), ("ipc", 2)]
)
def test_copies(transport: str, num_r_workers: int, linear_kernel: str, model: str) -> None:
    """q, k, v: into shared memory and nowhere else; o: once at most, and not where one R-worker has made it all."""
    for counted in count(model, transport, num_r_workers, linear_kernel):
        assert counted.sends_own_memory and counted.bytes_sent > 500_000
        is_of_one = num_r_workers == 1 and counted.step == "decode" and linear_kernel == "plain"  # without padding
        assert counted.reads_in_place == is_of_one
        assert counted.per_byte_read <= (0 if is_of_one else 1), counted
        if transport == "ipc":
            assert counted.copied_to_send.keys() <= {"zmq, small frames"}
        else:
            assert counted.copied_to_send == ({"arena": counted.bytes_sent} if transport == "shm" else {})


def parts(dtype: torch.dtype) -> tuple[torch.Tensor, list[np.ndarray]]:
    """o [7, 2, 8] and rows 0..3, 3..5 as R-workers send them: the second part is not for writing."""
    o = torch.arange(7 * 16).reshape(7, 2, 8).to(dtype)
    of_r_workers = [HostStaging().to_host([o[rows]]).wait()[0] for rows in (slice(0, 3), slice(3, 5))]
    of_r_workers[1].flags.writeable = False
    return o, of_r_workers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.filterwarnings("error")
def test_rows_are_put_together(dtype: torch.dtype) -> None:
    """Of R-workers, then of prompts, then padding; in the model's dtype."""
    o, of_r_workers = parts(dtype)
    for wanted in (dtype, torch.float32, torch.bfloat16):
        gathering = HostStaging().gather((9, 2, 8), wanted)
        gathering.put(slice(0, 3), of_r_workers[0])
        gathering.put(slice(3, 5), of_r_workers[1])
        out = gathering.finish([(slice(5, 6), o[5:6]), (slice(6, 7), o[6:7])])
        assert out.dtype == wanted and torch.equal(out[:7], o.to(wanted)) and not out[7:].any()


def test_rows_that_nobody_puts_are_noticed() -> None:
    """They would be whatever lay in that memory."""
    _, of_r_workers = parts(torch.float32)
    gathering = HostStaging().gather((7, 2, 8), torch.float32)
    gathering.put(slice(3, 5), of_r_workers[1])
    with pytest.raises(AssertionError, match="nobody puts"):
        gathering.finish([])


def test_padding_alone_is_zero() -> None:
    assert torch.equal(HostStaging().gather((3, 2, 8), torch.float16).finish([]), torch.zeros(3, 2, 8).half())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [64, 65], ids=["all rows", "a part"])
def test_shared_memory_stays_while_o_is_looked_at(rows: int, dtype: str) -> None:
    """The tensor alone holds it; the writer has it back when the tensor has gone, or has its rows from elsewhere."""
    writer = WriteArena(1 << 16)
    reader = ReadArena(writer.fd, 1 << 20)
    wanted = getattr(torch, dtype)
    for fill in range(1, 40):
        sent = torch.full((64, 2, 16), fill, dtype=wanted)
        frames = Codec().encode(1, Attended(0, 0, 0, HostStaging().to_host([sent]).wait()[0]))
        position = writer.place(align(len(frames[1])))
        assert position is not None
        writer.write(position, np.frombuffer(frames[1], np.uint8))
        message = Codec().decode([frames[0], reader.view(position, len(frames[1]))]).message
        assert isinstance(message, Attended)
        gathering = HostStaging().gather((rows, 2, 16), wanted)
        gathering.put(slice(0, 64), message.o)
        del message
        o = gathering.finish([])[None]  # a view, as the model makes them
        del gathering
        reader.give_back()
        assert writer.is_empty == (rows == 65)
        while (free := writer.place(4096)) is not None:  # all the room that there is now
            writer.write(free, np.full(4096, 255, np.uint8))
        assert torch.equal(o[0, :64], sent)
        del o
        reader.pass_over(writer.end)
        reader.give_back()
        assert writer.is_empty
    writer.close()
