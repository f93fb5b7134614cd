# Sourced by demo.sh and test.sh: makes .venv with this project and what it needs, once per change of requirements.
#
#   use_environment [EXTRA]     e.g. use_environment test; afterwards python, fastdecode and pytest are .venv's

use_environment() {
    local extra=${1:-} root python stamp wanted
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    cd "$root"
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "error: $python is missing or older than 3.11; install Python 3.11 or 3.12, or set PYTHON=/path/to/it" >&2
        return 2
    fi
    stamp=.venv/installed-${extra:-alone}
    wanted=$(cat setup.py constraints.txt | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "making .venv with $("$python" --version) and installing FastDecode${extra:+[$extra]}; the first time takes minutes" >&2
        "$python" -m venv .venv
        # torch first and pinned: anything else that wants it would take the newest, with gigabytes of CUDA.
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extra:+[$extra]}"
        echo "$wanted" > "$stamp"
    fi
    export PATH="$root/.venv/bin:$PATH"
}
