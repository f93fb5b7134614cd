#!/usr/bin/env bash
# The test suite: style, types, tests.  Needs Python 3.11 or 3.12 and nothing else.
# --all runs the full matrices and the long runs, too (`-m slow`).  Other arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
use_environment test
export HF_HUB_OFFLINE=1
if [ $# -eq 0 ] || [ "$*" = --all ]; then
    ruff check .
    ruff format --check .
    mypy
    # Three at a time on two cores, for they often wait for processes and deadlines.  One thread of torch's for each:
    # more would wait for one another.
    OMP_NUM_THREADS=1 python -m pytest -n 3 --dist loadfile -m "not alone and not slow"
    # Those that hold a time, or count processes, alone.
    python -m pytest -m "alone and not slow"
    [ $# -eq 0 ] || python -m pytest -n 2 --dist load -m slow
    exit
fi
exec python -m pytest "$@"
