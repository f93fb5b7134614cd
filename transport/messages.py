"""The whole protocol between S-workers and R-workers, on one page.

This file knows no sockets, no kernels and no models; it says what may be said and refuses the rest.
Every message checks itself when it is made *and* when it is decoded, so what arrives has the stated
shapes.  T = tokens of this R-worker in the micro-batch, A = queries that attend on the R-worker, mostly of some of
these tokens, Hq/Hkv = query/KV heads, D = head_dim, n = sequences.

    S-worker                                   R-worker
    Hello(layers, dtype, budget)        ─────►  builds its KV store
                                        ◄─────  Welcome(num_blocks, ...)   or Failure
    Admit(seq_ids, max_tokens)          ─────►  knows the sequences from now on          (no answer)
    Fork(children, parents, num_tokens) ─────►  they begin with tokens of others         (no answer)
    Rows(seq_ids, starts, num_tokens)   ─────►  once per step and micro-batch            (no answer)
    Attend(layer 0; q, k, v)            ─────►  appends k, v; then attends q
                                        ◄─────  Attended(layer 0; o)       exactly one answer per Attend with queries;
                                                                           without, one after the last layer
    Attend(layer 1; ...)                ─────►  ...
    Rewind(seq_ids, num_tokens)         ─────►  forgets what came after; a step is redone  (no answer)
    Release(seq_ids)                    ─────►  frees blocks                             (no answer)
    Ping(token)                         ─────►  forgets a failure not yet told
                                        ◄─────  Pong(token)
    Goodbye(dismiss)                    ─────►  drops the session and all its KV

Messages between two workers keep their order.  Anything that goes wrong on the R-worker comes back as a
Failure in place of the answer it prevents, and the R-worker lives on.  What has no answer of its own fails at
the next Attend that has one: so there are as many answers as are due, whatever happens.
"""

from __future__ import annotations

from typing import Annotated

import ml_dtypes
import msgspec
import numpy as np
from msgspec import Meta

PROTOCOL_VERSION = 6

# What may travel, little-endian; looked up by value, because a dtype's `name` is computed anew at every use.
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOAT_DTYPES = ("float32", "float16", "bfloat16")
KV_DTYPE_NAMES = (*FLOAT_DTYPES, "int8", "k8v4", "int4")  # in an R-worker's store

Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Bytes = Annotated[int, Meta(ge=0, le=2**62)]
Token = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Text = Annotated[str, Meta(max_length=4096)]


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """Base of all messages.  Immutable; arrays are not copied and belong to the message until it is answered."""


class LayerSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one layer's attention is, for the whole session."""

    num_q_heads: Annotated[int, Meta(ge=1, le=4096)]
    num_kv_heads: Annotated[int, Meta(ge=1, le=4096)]
    head_dim: Annotated[int, Meta(ge=1, le=1024)]  # compiling takes time with it
    scale: float
    window: Positive | None = None  # keys a query sees, itself included; None: all of them
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    sinks: Annotated[tuple[float, ...], Meta(max_length=4096)] | None = (
        None  # one logit per query head that takes weight but has no value
    )

    def __post_init__(self) -> None:
        _require(
            self.num_q_heads % self.num_kv_heads == 0,
            f"{self.num_q_heads} query heads are not a multiple of {self.num_kv_heads} KV heads",
        )
        _require(np.isfinite(self.scale), "scale must be finite")
        _require(self.softcap is None or (np.isfinite(self.softcap) and self.softcap > 0), "softcap must be > 0")
        _require(self.sinks is None or len(self.sinks) == self.num_q_heads, "one sink per query head")
        _require(self.sinks is None or np.isfinite(self.sinks).all(), "sinks must be finite")


class Hello(Message, frozen=True):
    """Opens a session; what an earlier session of the same peer left is dropped."""

    layers: Annotated[tuple[LayerSpec, ...], Meta(min_length=1, max_length=4096)]
    kv_dtype: Annotated[str, Meta(max_length=32)]  # how K and V are stored
    block_tokens: Annotated[int, Meta(ge=1, le=4096)]
    kv_cache_bytes: Bytes | None = None  # None: whatever the R-worker was started with

    def __post_init__(self) -> None:
        _require(self.kv_dtype in KV_DTYPE_NAMES, f"kv_dtype {self.kv_dtype!r} is none of {', '.join(KV_DTYPE_NAMES)}")


class Welcome(Message, frozen=True):
    num_blocks: Positive
    block_tokens: Positive
    block_bytes: Bytes  # of one block over all layers
    host: Text
    pid: Positive
    num_threads: Positive


class Admit(Message, frozen=True):
    seq_ids: np.ndarray  # [n] int64
    max_tokens: np.ndarray  # [n] int32, the most KV tokens each will ever hold

    def __post_init__(self) -> None:
        _require_columns(seq_ids=(self.seq_ids, "int64"), max_tokens=(self.max_tokens, "int32"))


class Fork(Message, frozen=True):
    """Sequences that were admitted, and hold nothing yet, begin with the tokens of others.  Full blocks are shared."""

    children: np.ndarray  # [n] int64
    parents: np.ndarray  # [n] int64
    num_tokens: np.ndarray  # [n] int32, of the parent's first ones

    def __post_init__(self) -> None:
        _require_columns(
            children=(self.children, "int64"), parents=(self.parents, "int64"), num_tokens=(self.num_tokens, "int32")
        )


class Rows(Message, frozen=True):
    """Whose tokens the next Attend of every layer of this micro-batch carries, in row order.

    A query at position p sees the sequence's tokens up to p, as far as they are here, new ones included; the last
    `window` positions of them where the layer has a window.
    """

    step: Token
    micro_batch: Count
    seq_ids: np.ndarray  # [n] int64
    starts: np.ndarray  # [n] int32, position of the first token
    num_tokens: np.ndarray  # [n] int32, tokens whose K, V come; sum = T
    num_queries: np.ndarray  # [n] int32, how many attend here, of consecutive positions; sum = A
    query_starts: np.ndarray | None = None  # [n] int32, position of the first query; None: the last is the last token
    is_partial: bool = False  # o is without sinks, and its lse comes with it: to be merged with other tokens' state

    def __post_init__(self) -> None:
        more = {} if self.query_starts is None else {"query_starts": (self.query_starts, "int32")}
        _require_columns(
            seq_ids=(self.seq_ids, "int64"),
            starts=(self.starts, "int32"),
            num_tokens=(self.num_tokens, "int32"),
            num_queries=(self.num_queries, "int32"),
            **more,
        )


class Attend(Message, frozen=True):
    step: Token
    micro_batch: Count
    layer: Count
    q: np.ndarray  # [A, Hq, D] float
    k: np.ndarray  # [T, Hkv, D] float
    v: np.ndarray  # [T, Hkv, D] float

    def __post_init__(self) -> None:
        _require_floats("q", self.q)
        _require_floats("k", self.k)
        _require_floats("v", self.v)
        if self.k.shape != self.v.shape:
            raise ValueError(f"k is {self.k.shape}, v is {self.v.shape}")
        _require(self.q.shape[2] == self.k.shape[2], "q and k differ in head_dim")


class Attended(Message, frozen=True):
    step: Token
    micro_batch: Count
    layer: Count
    o: np.ndarray  # [A, Hq, D] float, of q's dtype
    began_ns: Token = 0  # on the R-worker's monotonic clock: when it took the Attend up
    ended_ns: Token = 0  # and when o was there
    # [A, Hq] float32, log of the sum of exp(score): where the Rows asked for it; -inf: no token is seen, and o is 0
    lse: np.ndarray | None = None

    def __post_init__(self) -> None:
        _require_floats("o", self.o)
        if self.lse is not None and (self.lse.shape != self.o.shape[:2] or self.lse.dtype != DTYPES["float32"]):
            raise ValueError(f"lse must be {self.o.shape[:2]} float32, not {self.lse.shape} {self.lse.dtype.str}")


class Release(Message, frozen=True):
    seq_ids: np.ndarray  # [n] int64

    def __post_init__(self) -> None:
        _require_columns(seq_ids=(self.seq_ids, "int64"))


class Rewind(Message, frozen=True):
    """These sequences go back to so many tokens, and what was begun of a step with them is void."""

    seq_ids: np.ndarray  # [n] int64
    num_tokens: np.ndarray  # [n] int32

    def __post_init__(self) -> None:
        _require_columns(seq_ids=(self.seq_ids, "int64"), num_tokens=(self.num_tokens, "int32"))


class Ping(Message, frozen=True):
    token: Token


class Pong(Message, frozen=True):
    token: Token


class Goodbye(Message, frozen=True):
    dismiss: bool = False  # the process may end, too; honoured where it was started for one job (MPI)


class Failure(Message, frozen=True):
    """Why the R-worker could not do what was asked."""

    kind: Annotated[str, Meta(max_length=64)]  # name of the error's class
    text: Text


ANY_MESSAGE = (
    Hello | Welcome | Admit | Fork | Rows | Attend | Attended | Release | Rewind | Ping | Pong | Goodbye | Failure
)


def _require(condition: object, text: str) -> None:
    if not condition:
        raise ValueError(text)


def _require_columns(**columns: tuple[np.ndarray, str]) -> None:
    """All one-dimensional, of the given dtypes and of equal length."""
    length = None
    for name, (column, dtype) in columns.items():
        # Some of each message: a text is made, and a dtype's name, only where it is needed.
        if not isinstance(column, np.ndarray):
            raise ValueError(f"{name} is no array")
        if column.ndim != 1 or (column.dtype != DTYPES[dtype] and column.dtype.name != dtype):
            raise ValueError(f"{name} must be [n] {dtype}, not {column.shape} {column.dtype.name}")
        length = len(column) if length is None else length
        if len(column) != length:
            raise ValueError(f"{name} has {len(column)} entries, not {length}")


def _require_floats(name: str, array: np.ndarray) -> None:
    # Once per array and layer: the text is made only where it is needed.
    _require(isinstance(array, np.ndarray), f"{name} is no array")
    if array.ndim != 3 or array.dtype not in _FLOATS:
        wanted = f"[rows, heads, head_dim] of {', '.join(FLOAT_DTYPES)}"
        raise ValueError(f"{name} must be {wanted}, not {array.shape} {array.dtype.str}")


_FLOATS = frozenset(DTYPES[name] for name in FLOAT_DTYPES)
