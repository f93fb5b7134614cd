"""Run under ``mpirun -n 2``: rank 1 echoes, rank 0 checks."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import transport
from transport.testing import CHECKS, serve_echo

if transport.import_mpi().COMM_WORLD.Get_rank() == 1:
    with transport.listen("mpi://") as listener:
        serve_echo(listener)
else:
    with transport.connect("mpi://1") as channel:
        try:  # a second channel to one rank would take the first one's answers
            transport.connect("mpi://1")
            raise SystemExit("a second channel was not refused")
        except transport.AddressError as error:
            assert "already" in str(error)
        for check in CHECKS:
            check(channel)
    print(f"{len(CHECKS)} checks passed")
