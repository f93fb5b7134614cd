"""``fastdecode keygen``: the key that the workers of a job share over ``tcp://``."""

from __future__ import annotations

import argparse
import sys

from transport import KeyFileError, make_keys, write_keys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", nargs="?", default="fastdecode.key", metavar="PATH", help="a file that is not there yet"
    )


def run(args: argparse.Namespace) -> int:
    try:
        write_keys(args.path, make_keys())
    except KeyFileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{args.path} holds a new key; only you may read it.  Copy it to each machine of the job (scp -p {args.path} "
        f"HOST:) and give every worker its copy:\n"
        f"  fastdecode rworker --bind tcp://10.0.0.5:5555 --key-file {args.path}\n"
        f'  LLM(model, r_worker_addresses=["tcp://10.0.0.5:5555"], key_file="{args.path}")'
    )
    return 0
