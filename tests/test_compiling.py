"""A cache of compiled kernels is a convenience: whatever is wrong with it, the program runs and says what to set."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Case

from cpu_attention import compiling
from cpu_attention.compiling import SUFFIX, Place, compiled

ROOT = Path(__file__).parents[1]
NUMBERS = np.arange(5, dtype=np.int64)


def total_of() -> Any:
    """A fresh dispatcher of the same function, as another process has it."""

    @compiled
    def total(values):  # type: ignore[no-untyped-def]
        result = values[0]
        for index in range(1, values.size):
            result += values[index]
        return result

    return total


def num_loaded(function: Any) -> int:
    return sum(function.stats.cache_hits.values())


@pytest.fixture(autouse=True)
def nothing_was_told() -> Iterator[None]:
    compiling._tell_once.cache_clear()
    yield
    compiling._tell_once.cache_clear()


def use(monkeypatch: pytest.MonkeyPatch, *directories: Path, is_shared: bool = False) -> None:
    monkeypatch.setattr(compiling, "places", lambda: [Place(directory, is_shared) for directory in directories])


def test_a_kernel_is_kept_and_a_broken_one_is_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, tmp_path / "kernels")
    first = total_of()
    assert first(NUMBERS) == 10 and num_loaded(first) == 0
    (kept,) = (tmp_path / "kernels").iterdir()
    whole = kept.read_bytes()
    again = total_of()
    assert again(NUMBERS) == 10 and num_loaded(again) == 1
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for broken in (b"", whole[:20], whole[:-1], bytes(flipped), b"\x80garbage" * 99):
        kept.write_bytes(broken)
        function = total_of()
        assert function(NUMBERS) == 10 and num_loaded(function) == 0
        assert kept.read_bytes()[:32] != broken[:32] or len(kept.read_bytes()) != len(broken)
    mended = total_of()
    assert mended(NUMBERS) == 10 and num_loaded(mended) == 1
    assert [path.name for path in (tmp_path / "kernels").iterdir()] == [kept.name]


def test_each_kind_of_arguments_has_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, tmp_path)
    assert total_of()(NUMBERS) == 10 and total_of()(NUMBERS + 0.5) == 12.5
    assert len(list(tmp_path.iterdir())) == 2
    both = total_of()
    assert both(NUMBERS + 0.5) == 12.5 and both(NUMBERS) == 10 and num_loaded(both) == 2


def test_a_place_that_cannot_be_written_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    use(monkeypatch, tmp_path / "file" / "kernels", Path("/proc/none/kernels"), tmp_path / "kernels")
    for _ in range(2):
        assert total_of()(NUMBERS) == 10
        for kept in (tmp_path / "kernels").iterdir():
            kept.unlink()
    (told,) = caplog.messages
    assert all(word in told for word in ("file/kernels", "/proc/none", "are kept in", "NUMBA_CACHE_DIR"))


@pytest.mark.parametrize("call", ["write", "mkstemp", "replace"])
def test_a_full_disk_loses_no_kernel(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    use(monkeypatch, tmp_path)
    if call == "write":
        monkeypatch.setattr(compiling, "open", full, raising=False)
    else:
        monkeypatch.setattr(compiling.tempfile if call == "mkstemp" else compiling.os, call, full)
    function = total_of()
    assert function(NUMBERS) == 10 and function(NUMBERS + 0.5) == 12.5
    (told,) = caplog.messages
    assert str(tmp_path) in told and "No space left" in told and "NUMBA_CACHE_DIR" in told
    assert not list(tmp_path.iterdir())


def test_nothing_is_loaded_from_a_directory_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is loaded is run: in a temporary place the directory has to be this user's own, and no link."""
    own = tmp_path / "own"
    use(monkeypatch, own, is_shared=True)
    assert total_of()(NUMBERS) == 10
    assert own.stat().st_mode & 0o777 == 0o700 and len(list(own.iterdir())) == 1
    (tmp_path / "link").symlink_to(own)
    use(monkeypatch, tmp_path / "link", is_shared=True)
    by_link = total_of()
    assert by_link(NUMBERS) == 10 and num_loaded(by_link) == 0
    own.chmod(0o777)
    use(monkeypatch, own, is_shared=True)
    open_to_all = total_of()
    assert open_to_all(NUMBERS) == 10 and num_loaded(open_to_all) == 0


def test_a_place_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, tmp_path)
    monkeypatch.setattr(compiling, "MAX_FILES", 3)
    for age in range(6):
        (tmp_path / f"old{age}{SUFFIX}").touch()
        os.utime(tmp_path / f"old{age}{SUFFIX}", (1000 - age, 1000 - age))
    (tmp_path / "other").touch()
    assert total_of()(NUMBERS) == 10
    names = {path.name for path in tmp_path.iterdir()}
    assert {f"old0{SUFFIX}", f"old1{SUFFIX}", "other"} < names and len(names) == 4


STOPPED = """
import signal, sys
from llvmlite.binding import ExecutionEngine
from cpu_attention.compiling import compiled
class Stopped(BaseException):
    pass
def stop(number, frame):
    raise Stopped
def find(engine, pointer, find=ExecutionEngine._find_module_ptr):
    module = find(engine, pointer)
    if module.name == "twice" and sys._getframe(1).f_code.co_name == "_raw_object_cache_" + sys.argv[1]:
        print("signal")
        signal.raise_signal(signal.SIGTERM)
    return module
signal.signal(signal.SIGTERM, stop)
ExecutionEngine._find_module_ptr = find
@compiled
def twice(number):
    return 2 * number
try:
    twice(4)
except Stopped:
    print("stopped")
assert signal.getsignal(signal.SIGTERM) is stop
assert twice(4) == 8
print("loaded" if twice.stats.cache_hits else "compiled")
"""


def test_a_signal_while_llvm_calls_python_loses_neither_the_kernel_nor_itself(tmp_path: Path) -> None:
    """Python drops what is raised there: the kernel was not kept; or it was called at address 0."""

    def run(when: str) -> list[str]:
        out = subprocess.run(
            [sys.executable, "-c", STOPPED, when], env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}, cwd=ROOT,
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert out.returncode == 0 and not out.stderr, out.stderr[-2000:]
        return out.stdout.split()

    assert run("notify") == ["signal", "stopped", "compiled"]
    assert run("getbuffer") == ["signal", "stopped", "loaded"]
    assert run("never") == ["loaded"]


def test_other_signals_stop_a_compilation_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def signal_instead(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on")

    use(monkeypatch, tmp_path)
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        patched.setattr(compiling.DiskCache, "load_overload", signal_instead)
        with pytest.raises(KeyboardInterrupt):
            total_of()(NUMBERS)
    assert signal.getsignal(signal.SIGINT) is before and not list(tmp_path.iterdir())
    assert total_of()(NUMBERS) == 10


def test_where_kernels_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiling.tempfile, "tempdir", "/t")
    temporary = Place(Path(f"/t/fastdecode-kernels-{os.geteuid()}"), True)
    assert compiling.places() == [Place(tmp_path / "fastdecode", False), temporary]
    monkeypatch.setattr(compiling.config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    beside, own, last = compiling.places()
    assert beside.directory == ROOT / "cpu_attention" / "__pycache__" and own == (Path("/x/fastdecode"), False)
    assert last == temporary


IMPORT = """
import os, sys
def refuse_writes(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        raise SystemExit(f"{arguments[0]!r} is written at import")
sys.addaudithook(refuse_writes)
import cpu_attention, cpu_attention.process, fastdecode.cli
from cpu_attention.vector import make_attend
from cpu_attention.roofs import _sum
assert not _sum.signatures, "compiled at import"
"""


def test_nothing_is_compiled_or_written_at_import() -> None:
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "HOME": "/proc/none", "NUMBA_CACHE_DIR": "/proc/none"}
    out = subprocess.run(
        [sys.executable, "-c", IMPORT], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert out.returncode == 0 and not out.stderr, out.stderr[-2000:]


GENERATE = """
import json, sys
from numba.core import event
from cpu_attention.compiling import DiskCache
from fastdecode import LLM, SamplingParams
prompts, num_kept, keep = json.loads(sys.argv[2]), [0], DiskCache.save_overload
def count(self, *arguments):
    num_kept[0] += 1
    keep(self, *arguments)
DiskCache.save_overload = count
print("ready", flush=True)
sys.stdin.readline()
with event.install_recorder("numba:compile") as compilations:
    llm = LLM(sys.argv[1], kv_cache_memory="32MiB", linear_kernel="plain", skip_tokenizer_init=True)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)
    llm.close()
print(json.dumps([[output.outputs[0].token_ids for output in outputs], num_kept[0], len(compilations.buffer)]))
"""


@pytest.mark.parametrize("num_processes", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_several_processes_begin_at_once_with_no_kernels(num_processes: int, llama: Case, tmp_path: Path) -> None:
    """All give the right tokens, whoever keeps a kernel first; the next one compiles nothing."""
    prompts, expected = llama.prompts[:4], [tokens[:8] for tokens in llama.reference[:4]]

    def run(how_many: int) -> list[tuple[int, int]]:
        """Kernels kept, and numba's compilations, of each process."""
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", GENERATE, str(llama.directory), json.dumps(prompts)],
                env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}, cwd=ROOT, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for _ in range(how_many)
        ]  # fmt: skip
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        counts = []
        for process in processes:
            out, said = process.communicate(timeout=200)
            assert process.returncode == 0 and "kernel" not in said, said
            tokens, num_kept, num_compiled = json.loads(out)
            assert tokens == expected
            counts.append((num_kept, num_compiled))
        return counts

    first = run(num_processes)
    assert max(first)[0] > 0 and max(first)[1] > 0
    assert run(1) == [(0, 0)]
    names = [path.name for path in (tmp_path / "fastdecode").iterdir()]
    assert len(names) >= max(first)[0] and all(re.fullmatch(rf"\w+-[0-9a-f]{{32}}{SUFFIX}", name) for name in names)
