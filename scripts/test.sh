#!/usr/bin/env bash
# The whole test suite: style, types, tests.  Needs Python 3.11 or 3.12 and nothing else.
# Further arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
use_environment test
export HF_HUB_OFFLINE=1
if [ $# -eq 0 ]; then
    ruff check .
    ruff format --check .
    mypy
    # Two at a time; those that hold a time, or count processes, alone.
    python -m pytest -n 2 --dist loadfile -m "not alone"
    exec python -m pytest -m alone
fi
exec python -m pytest "$@"
