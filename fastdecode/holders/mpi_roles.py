"""Which rank of an mpirun is what, and which cores it gets: the one place that knows.

every rank    how it was started, where it runs ─► one Allgather ─► the claims of all, the same on every rank
every rank    claims ─► Roles.of: one S-worker, the others R-workers      (pure: nobody asks again)
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from cpu_attention import (
    NumaNode,
    available_cores,
    available_memory_bytes,
    format_bytes,
    format_cores,
    numa_nodes,
    share_of_cores,
)
from fastdecode.errors import ConfigError
from transport import import_mpi


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank tells all others."""

    rank: int
    is_r_worker: bool  # by the command it was started with; otherwise it may become either
    s_worker_rank: int | None  # who is to be the S-worker, as far as this rank was told
    first_on_host: int  # the lowest rank of those that it shares memory with
    host: str
    pid: int
    cores: tuple[int, ...]  # that it may use
    nodes: tuple[NumaNode, ...]  # of its host
    memory_bytes: int  # free


@dataclass(frozen=True)
class Roles:
    claims: tuple[Claim, ...]  # by rank
    s_worker_rank: int

    @classmethod
    def of(cls, claims: Sequence[Claim]) -> Roles:
        """Raises ConfigError, the same on every rank."""
        return cls(tuple(claims), _choose_s_worker(claims))

    @property
    def r_worker_ranks(self) -> tuple[int, ...]:
        return tuple(claim.rank for claim in self.claims if claim.rank != self.s_worker_rank)

    def r_workers_beside(self, rank: int) -> tuple[int, ...]:
        """The ranks of all R-workers on the host of `rank`."""
        host = self.claims[rank].first_on_host
        return tuple(other for other in self.r_worker_ranks if self.claims[other].first_on_host == host)

    def cores(self, rank: int) -> tuple[int, ...]:
        """Of an R-worker; none if they do not go round.

        R-workers of one host that may use the same cores share them, a NUMA node each where there is one for all.
        What mpirun, srun or --cores has bound to cores of its own stays there.
        """
        own = self.claims[rank]
        sharing = [other for other in self.r_workers_beside(rank) if self.claims[other].cores == own.cores]
        return share_of_cores(sharing.index(rank), len(sharing), own.cores, own.nodes)

    def table(self) -> Iterator[str]:
        """Lines: who does what, where."""
        yield f"{'rank':>4}  {'role':8}  {'host':20}  {'pid':>8}  {'cores':>9}  free memory"
        for claim in self.claims:
            is_s_worker = claim.rank == self.s_worker_rank
            cores = format_cores(() if is_s_worker else self.cores(claim.rank)) or format_cores(claim.cores)
            yield (
                f"{claim.rank:>4}  {'S-worker' if is_s_worker else 'R-worker':8}  {claim.host:20}  {claim.pid:>8}  "
                f"{cores:>9}  {format_bytes(claim.memory_bytes)}"
            )


def _choose_s_worker(claims: Sequence[Claim]) -> int:
    """The rank that was asked for; otherwise the one that was not started as an R-worker, or 0 where none was."""
    asked = {claim.s_worker_rank: claim.rank for claim in reversed(claims) if claim.s_worker_rank is not None}
    able = [claim.rank for claim in claims if not claim.is_r_worker]
    everyone = _name([claim.rank for claim in claims])
    if not able:
        raise ConfigError(
            f"no rank runs the S-worker: {everyone} started as R-worker; start one with a command that has "
            "--transport mpi, like fastdecode serve"
        )
    if len(asked) > 1:
        said = ", ".join(f"{chosen} on rank {rank}" for chosen, rank in sorted(asked.items()))
        raise ConfigError(f"s_worker_rank is one rank for the whole mpirun, and was given as {said}")
    for chosen in asked:
        if not 0 <= chosen < len(claims):
            raise ConfigError(f"s_worker_rank: there is no rank {chosen}; this mpirun has {everyone}")
        if chosen not in able:
            raise ConfigError(f"s_worker_rank: rank {chosen} started as R-worker; the S-worker can be {_name(able)}")
        return chosen
    if 1 < len(able) < len(claims):
        raise ConfigError(
            f"{_name(able)} would each be the S-worker, of which there is one: start all but one as R-workers, with "
            "fastdecode rworker --bind mpi://, or choose by --s-worker-rank"
        )
    return able[0]


def exchange_claims(comm: Any, *, is_r_worker: bool, s_worker_rank: int | None) -> list[Claim]:
    """Of all ranks of `comm`, by rank.  Every rank calls it, and waits for all."""
    first = np.array([comm.Get_rank()], np.int32)
    beside = comm.Split_type(import_mpi().COMM_TYPE_SHARED, comm.Get_rank())
    beside.Bcast(first, root=0)
    beside.Free()
    own = msgspec.json.encode(
        Claim(
            rank=comm.Get_rank(),
            is_r_worker=is_r_worker,
            s_worker_rank=s_worker_rank,
            first_on_host=int(first[0]),
            host=platform.node(),
            pid=os.getpid(),
            cores=available_cores(),
            nodes=numa_nodes(),
            memory_bytes=available_memory_bytes(),
        )
    )
    sizes = np.empty(comm.Get_size(), np.int32)
    comm.Allgather(np.array([len(own)], np.int32), sizes)
    received = np.empty(sizes.sum(), np.uint8)
    comm.Allgatherv(np.frombuffer(own, np.uint8), [received, sizes])
    rows = np.split(received, np.cumsum(sizes)[:-1])
    return [msgspec.json.decode(row.tobytes(), type=Claim) for row in rows]


def _name(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {format_cores(ranks)}"
