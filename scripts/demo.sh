#!/usr/bin/env bash
# Completes real Python with the model that ships in scripts/demo_model, its KV cache in two R-worker processes.
# Needs Python 3.11 or 3.12 and nothing else.  Further flags go to `fastdecode generate`.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
use_environment
export HF_HUB_OFFLINE=1
exec fastdecode generate scripts/demo_model \
    --transport shm --num-r-workers 2 --kv-cache-dtype float16 --max-tokens 64 \
    --prompt $'def read_lines(path):\n    """Return the lines of a file."""\n    with open(' \
    --prompt $'class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):' \
    --prompt $'def main():\n    parser = argparse.ArgumentParser(' \
    "$@"
