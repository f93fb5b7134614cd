"""Where MPI begins: who started this process is looked at first, because MPI's own start leaves things behind.

no launcher                         refused; Open MPI would leave 16 MiB in /dev/shm for a process alone
a launcher that this MPI is deaf to refused: each process would believe that it is alone
another                             MPI starts when mpi4py's module is imported
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from transport.errors import AddressError

_HOW = "start it with, for example, mpirun -n 3 fastdecode generate MODEL --transport mpi"
_PROBE_TIMEOUT_S = 60.0


class Launcher(NamedTuple):
    name: str
    num_ranks: int | None  # None: it does not say
    speaks_pmix: bool  # the one language of Open MPI from version 5 on


class _Sign(NamedTuple):
    rank: str  # the variable that each of its processes has
    size: str  # the one with their number
    name: str


_SIGNS = (  # the first that fits; those of srun are beside the others'
    _Sign("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "Open MPI's mpirun"),
    _Sign("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "jsrun"),
    _Sign("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MVAPICH's mpirun"),
    _Sign("PALS_RANKID", "PMI_SIZE", "Cray's mpiexec"),
    _Sign("ALPS_APP_PE", "PMI_SIZE", "aprun"),
    _Sign("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "flux"),
    _Sign("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "srun"),
    _Sign("PMI_RANK", "PMI_SIZE", "the mpiexec of MPICH, Intel MPI or their kin"),
    _Sign("PMI_FD", "PMI_SIZE", "the mpiexec of MPICH, Intel MPI or their kin"),
    _Sign("PMI_PORT", "PMI_SIZE", "the mpiexec of MPICH, Intel MPI or their kin"),
    _Sign("MPI_LOCALRANKID", "PMI_SIZE", "Intel MPI's mpiexec"),
    _Sign("PMIX_RANK", "", "a launcher that speaks PMIx"),
)


def find_launcher(environment: Mapping[str, str]) -> Launcher | None:
    """Who started a process with this environment as one of many; None: nobody that is known."""
    for sign in _SIGNS:
        if sign.rank in environment:
            size = environment.get(sign.size, "")
            return Launcher(sign.name, int(size) if size.isdecimal() else None, "PMIX_RANK" in environment)
    return None


def import_mpi() -> Any:
    """mpi4py's MPI module.  Importing it initialises MPI, so only who asks for ``mpi://`` does it.

    Raises AddressError: without MPI, and where this process is not one of several that know of each other.
    """
    started = sys.modules.get("mpi4py.MPI")
    if started is not None:
        return started
    try:
        import mpi4py  # noqa: F401  (which starts nothing yet)

        launcher = find_launcher(os.environ)
        if launcher is None:
            raise AddressError(
                "transport 'mpi' wants one rank for the S-worker and one or more for R-workers, and no mpirun, mpiexec "
                f"or srun has started this process: {_HOW}"
            )
        if not launcher.speaks_pmix and launcher.num_ranks != 1 and is_deaf_without_pmix(version := _library_version()):
            raise AddressError(_not_understood(launcher, version))
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise AddressError(
            f"mpi:// needs mpi4py and an MPI library ({error}); install them with: pip install 'fastdecode[mpi]'"
        ) from error
    if MPI.COMM_WORLD.Get_size() == 1 and (launcher.num_ranks or 1) > 1:
        raise AddressError(_not_understood(launcher, MPI.Get_library_version()))
    return MPI


def is_deaf_without_pmix(library_version: str) -> bool:
    """Open MPI from version 5 on."""
    name, _, rest = library_version.partition(" v")
    major = rest.partition(".")[0]
    return name == "Open MPI" and major.isdecimal() and int(major) >= 5


def _not_understood(launcher: Launcher, version: str) -> str:
    ranks = f"{launcher.num_ranks} processes" if launcher.num_ranks else "processes"
    name = version.partition(",")[0].strip()
    advice = "srun --mpi=pmix, if srun --mpi=list has it, or " if launcher.name == "srun" else ""
    return (
        f"{launcher.name} has started {ranks}, and mpi4py was built for {name}, which does not understand it, so each "
        f"is alone: use {advice}the mpirun of {name.partition(' v')[0]} (doctor shows what is found), or an mpi4py for "
        "the MPI of that launcher"
    )


def _library_version() -> str:
    """Which MPI mpi4py uses; empty if it does not tell.  Asked in another process, for in this one it would start."""
    code = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    try:
        asked = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout.strip()
