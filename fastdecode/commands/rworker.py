"""``fastdecode rworker``: the same process as ``python -m cpu_attention``."""

from __future__ import annotations

import argparse

from cpu_attention import add_process_arguments, run_process


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_process_arguments(parser)


def run(args: argparse.Namespace) -> int:
    return run_process(args)
