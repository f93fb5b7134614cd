"""What compiled code needs to work without the interpreter: memory and functions by address, atomic counters, sleep.

A compiled *entry* has the signature  entry(job, share)  of two integers, the first one the address of a `Job`.  It is
called by its address, in numba's own convention: what it raises comes back as a code and the address of what numba
knows of the exception, both 0 if nothing went wrong.

Threads sleep on a 32-bit word until another one changes it and wakes them, by Linux's futex (Drepper, Futexes Are
Tricky): a system call only where somebody has to sleep or may be asleep.
"""

from __future__ import annotations

import ctypes
import platform
from typing import Any, NamedTuple

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cpu_attention.emit import I8, I32, I64

_ENTRY = (types.int64, types.int64)
_WAIT, _WAKE = 128, 129  # of this process's own words
# The system call's number: older processors have tables of their own, all others the common one.
_FUTEX = {"x86_64": 202, "ppc64le": 221, "s390x": 238}.get(platform.machine(), 98)
_syscall = types.ExternalFunction("syscall", types.int64(*[types.int64] * 7))  # found among the process's symbols
ALL = 2**31 - 1  # sleepers


class Entry(NamedTuple):
    """A compiled function of two integers, and where it lies as long as somebody holds it."""

    function: Any
    address: int


def entry_of(function: Any) -> Entry:
    """Compiles `function`, or loads it."""
    function.compile(_ENTRY)
    result = function.overloads[_ENTRY]
    return Entry(function, result.library.get_pointer_to_function(result.fndesc.llvm_func_name))


@numba.njit
def sleep(word, expected, timespec):  # type: ignore[no-untyped-def]
    """Until somebody wakes the sleepers of `word`, unless it is not `expected` any more; timespec: address of seconds
    and nanoseconds, or 0: for ever.  Returns 0 if it was woken; it may also end by itself."""
    return _syscall(_FUTEX, word, _WAIT, expected, timespec, 0, 0)


@numba.njit
def wake(word, most):  # type: ignore[no-untyped-def]
    """At most so many of the sleepers of `word`."""
    _syscall(_FUTEX, word, _WAKE, most, 0, 0, 0)


def wake_all(word: int) -> None:
    """`wake` for Python."""
    ctypes.CDLL(None).syscall(*map(ctypes.c_long, (_FUTEX, word, _WAKE, ALL, 0, 0, 0)))


@intrinsic
def pointer(typing_context, address):  # type: ignore[no-untyped-def]
    """For `carray`."""

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        return b.inttoptr(arguments[0], I8.as_pointer())

    return types.voidptr(types.int64), generate


@intrinsic
def fetch_add(typing_context, word, value):  # type: ignore[no-untyped-def]
    """Adds to the 32-bit word at this address; returns what was there.  Orders all other memory, like what follows."""

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        return b.atomic_rmw("add", b.inttoptr(arguments[0], I32.as_pointer()), arguments[1], "seq_cst")

    return types.int32(types.int64, types.int32), generate


@intrinsic
def load(typing_context, word):  # type: ignore[no-untyped-def]
    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        return b.load_atomic(b.inttoptr(arguments[0], I32.as_pointer()), "seq_cst", 4)

    return types.int32(types.int64), generate


@intrinsic
def store(typing_context, word, value):  # type: ignore[no-untyped-def]
    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        b.store_atomic(arguments[1], b.inttoptr(arguments[0], I32.as_pointer()), "seq_cst", 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int32), generate


@intrinsic
def call(typing_context, entry, job, share):  # type: ignore[no-untyped-def]
    """Calls the entry at this address.  Returns its code and exception, for `fail`."""

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        kind = context.call_conv.get_function_type(types.none, _ENTRY)
        function = b.inttoptr(arguments[0], kind.as_pointer())
        status, _ = context.call_conv.call_function(b, function, types.none, _ENTRY, arguments[1:])
        # Unless it failed, the exception is whatever was there before.
        raised = b.select(status.is_ok, I64(0), b.ptrtoint(status.excinfoptr, I64))
        return context.make_tuple(b, signature.return_type, [b.sext(status.code, I64), raised])

    return types.UniTuple(types.int64, 2)(types.int64, *_ENTRY), generate


@intrinsic
def fail(typing_context, code, raised):  # type: ignore[no-untyped-def]
    """Raises in the function that calls this what `call` has brought back, if anything."""

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        with b.if_then(b.icmp_signed("!=", arguments[0], I64(0)), likely=False):
            place = context.call_conv._get_excinfo_argument(b.function)
            b.store(b.inttoptr(arguments[1], place.type.pointee), place)
            b.ret(b.trunc(arguments[0], ir.IntType(32)))
            b.position_at_end(b.append_basic_block("never"))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate
