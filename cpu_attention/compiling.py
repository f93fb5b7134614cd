"""numba functions that are compiled when they are first called, and kept on disk where that can be done.

A cache is a convenience.  Nothing is looked for or written at import; a place that is missing, full, not writable or
somebody else's is passed over, a torn file is compiled anew, and what cannot be kept is used all the same.  numba's
own cache refuses the import where it finds no place, fails where it cannot write, and lets two processes that
compile different signatures at the same time give a number to both: the next one loads a kernel of other types.
Here each kernel is a file of its own, named by all that it depends on, written whole or not at all.

LLVM asks for what was kept, and hands over what it has emitted, by calling Python from C, where an exception is lost.
It comes from there after seconds without Python, so that a signal meanwhile would be handled just there: lost, with
the kernel that was emitted; or with the one that was kept, whose addresses were then 0.  So signals wait there.

What is kept is numba's own form of a compiled function, a pickle, and machine code in any case: it is read only from
files of this user, of root, or of whoever owns this code.  They may lie in any of these places, and a new one goes to
the first that takes it:

    NUMBA_CACHE_DIR                  where it is set, else
    __pycache__ beside this file     as Python's own, and
    ~/.cache/fastdecode              (XDG_CACHE_HOME)
    /tmp/fastdecode-kernels-UID      for this user alone
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import llvmlite
import numba
from llvmlite.binding import ExecutionEngine
from numba.core import compiler, config
from numba.core.caching import NullCache
from numba.core.serialize import dumps, loads

logger = logging.getLogger(__name__)

SUFFIX = ".kernel"
MAX_FILES = 512  # in a place; the oldest go first.  Each has some tens of KiB
_DIGEST_BYTES = hashlib.sha256().digest_size
_CALLED_BY_LLVM = (
    ExecutionEngine._raw_object_cache_notify.__code__,
    ExecutionEngine._raw_object_cache_getbuffer.__code__,
)


def compiled(function: Callable[..., Any]) -> Any:
    """`function` as machine code that releases the GIL, one version for each kind of arguments."""
    dispatcher = numba.njit(nogil=True)(function)
    if not config.DISABLE_JIT:
        dispatcher._cache = DiskCache(function)  # what `enable_caching` does with numba's own
        compile_or_load = dispatcher.compile

        @functools.wraps(compile_or_load)
        def compile_whole(sig: Any) -> Any:
            with _signals_after_llvm():
                return compile_or_load(sig)

        dispatcher.compile = compile_whole
    return dispatcher


class Place(NamedTuple):
    directory: Path
    is_shared: bool  # others may write there, so that it has to be this user's own


def places() -> list[Place]:
    """In the order in which they are tried.  The environment is read when it is needed, as numba does."""
    if config.CACHE_DIR:
        usual = [Place(Path(config.CACHE_DIR) / "fastdecode", False)]
    else:
        usual = [Place(Path(__file__).parent / "__pycache__", False)]
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        if os.path.isabs(home):  # without a home nothing is expanded
            usual.append(Place(Path(home) / "fastdecode", False))
    with contextlib.suppress(OSError):  # no temporary directory at all
        usual.append(Place(Path(tempfile.gettempdir()) / f"fastdecode-kernels-{os.geteuid()}", True))
    return usual


class DiskCache(NullCache):
    """Of one function; numba's dispatcher asks it for each kind of arguments."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """None: it has to be compiled."""
        target_context.refresh()
        try:
            name = self._file_name(sig, target_context.codegen())
            for place in places():
                if (payload := _read(place, name)) is not None:
                    return compiler.CompileResult._rebuild(target_context, *loads(payload))
        except Exception:  # whatever a broken file, another numba or a strange machine brings about
            logger.debug("a kernel that was kept cannot be used and is compiled anew", exc_info=True)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            if data.lifted or data.library.has_dynamic_globals:  # holds addresses of this process
                return
            name, payload = self._file_name(sig, data.codegen), dumps(data._reduce())
        except Exception:  # nothing that another directory would mend
            logger.warning("a compiled kernel cannot be kept; each start compiles it again", exc_info=True)
            return
        _write(name, _digest(name, payload) + payload)

    def _file_name(self, sig: Any, codegen: Any) -> str:
        cells = tuple(cell.cell_contents for cell in self._function.__closure__ or ())
        code = self._function.__code__
        versions = (sys.version, numba.__version__, llvmlite.__version__, config.BOUNDSCHECK, repr(config.OPT))
        key = (versions, _sources(), code.co_firstlineno, code.co_code, dumps(cells), repr(sig), codegen.magic_tuple())
        return f"{self._function.__name__}-{hashlib.sha256(dumps(key)).hexdigest()[:32]}{SUFFIX}"


@contextlib.contextmanager
def _signals_after_llvm() -> Iterator[None]:
    """A signal that comes while LLVM calls Python is handled at the end, when the kernel is kept; others at once."""
    if threading.current_thread() is not threading.main_thread():  # no other one handles signals
        yield
        return
    usual = {number: signal.getsignal(number) for number in signal.valid_signals()}
    waiting: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if _is_called_by_llvm(frame):
            waiting.append(number)
        else:
            usual[number](number, frame)  # type: ignore[index, operator, misc]

    try:
        for number, handler in usual.items():
            if callable(handler):  # in Python
                signal.signal(number, handle)
        yield
    finally:
        for number, handler in usual.items():
            if signal.getsignal(number) is handle:  # what was handled may have set another one
                signal.signal(number, handler)
        for waiting_number in waiting:
            signal.raise_signal(waiting_number)


def _is_called_by_llvm(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code not in _CALLED_BY_LLVM:
        frame = frame.f_back
    return frame is not None


@functools.cache
def _sources() -> bytes:
    """A hash of this room's files: kernels are emitted by several of them."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).digest()


def _read(place: Place, name: str) -> bytes | None:
    """What was kept; None if it is not there, torn, or written by somebody who may not decide what runs here."""
    try:
        _check_own(place)
        descriptor = os.open(place.directory / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            trusted = (0, os.geteuid(), os.stat(__file__).st_uid)
            if not stat.S_ISREG(found.st_mode) or found.st_uid not in trusted:
                return None
            content = file.read()
    except OSError:
        return None
    digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return payload if _digest(name, payload) == digest else None


def _digest(name: str, payload: bytes) -> bytes:
    """With the name: a kernel under another one would be given arguments of other types."""
    return hashlib.sha256(name.encode() + payload).digest()


def _write(name: str, content: bytes) -> None:
    """To the first place that takes it; says once where none does, or the temporary one alone."""
    refused = []
    for place in places():
        try:
            _make(place)
            with _whole(place.directory / name) as file:
                file.write(content)
            _prune(place.directory)
        except OSError as error:
            refused.append(f"{place.directory} ({error.strerror or error})")
            continue
        if refused:
            causes = "; ".join(refused)
            _tell_once(f"compiled kernels are kept in {place.directory}, since others cannot be written: {causes}")
        return
    causes = "; ".join(refused) or "no temporary directory"
    _tell_once(f"compiled kernels are not kept, so each start takes seconds more: {causes}")


def _make(place: Place) -> None:
    """Raises OSError."""
    place.directory.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        place.directory.mkdir(mode=0o700 if place.is_shared else 0o777)
    _check_own(place)


def _check_own(place: Place) -> None:
    """Raises OSError: in a directory of somebody else, what is loaded would be code of theirs."""
    if not place.is_shared:
        return
    found = os.lstat(place.directory)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError("not this user's own")


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Any]:
    """Nobody reads half of it.  Raises OSError."""
    descriptor, beside = tempfile.mkstemp(prefix=path.stem, suffix=SUFFIX, dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o644)  # users may share what root or the owner of the code has compiled
            yield file
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def _prune(directory: Path) -> None:
    """Each version of the code leaves kernels behind."""
    files = list(directory.glob(f"*{SUFFIX}"))
    if len(files) <= MAX_FILES:
        return
    with contextlib.suppress(OSError):  # another process prunes, too
        files.sort(key=lambda file: file.stat().st_mtime)
        for file in files[: len(files) - MAX_FILES]:
            file.unlink(missing_ok=True)


@functools.cache
def _tell_once(text: str) -> None:
    logger.warning("%s. Set NUMBA_CACHE_DIR to a directory that this user can write", text)
