"""``fastdecode COMMAND``.  Imports a command's file only when that command is asked for, so that help is instant."""

from __future__ import annotations

import argparse
import codecs
import importlib
import io
import sys
from collections.abc import Sequence

from fastdecode import __version__
from fastdecode.api.config_file import parse_arguments
from fastdecode.errors import ConfigError
from fastdecode.signals import run_program

COMMANDS = {
    "generate": "complete prompts with a model whose KV cache lives on R-workers",
    "run-batch": "serve a file of OpenAI requests, a result per line; what is interrupted goes on with --resume",
    "serve": "serve OpenAI's API over HTTP",
    "rworker": "run one R-worker that S-workers can connect to",
    "keygen": "make the key that lets workers on several machines trust each other",
    "calibrate": "measure a model's S-Part and R-Part here, for the performance model",
    "bench": "measure throughput, also beside transformers, vLLM and llama.cpp",
    "simulate": "run the scheduler on a workload in virtual time: load, throughput, latency, plots",
    "plan-memory": "tell what of a model fits on a device, and what KV on R-workers, from its config.json",
    "doctor": "show what this machine offers: cores, memory, bandwidth, MPI, GPU, versions",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code.  argv: None: that of this program, of which it is all."""
    return run_program(lambda: _run(argv), is_last=argv is None)


def _run(argv: Sequence[str] | None) -> int:
    _write_any_text()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        _main_parser().parse_args(arguments or ["--help"])  # help, version or a complaint: ends by itself
    name, *rest = arguments
    command = importlib.import_module(f"fastdecode.commands.{name.replace('-', '_')}")

    def make_parser(kind: type[argparse.ArgumentParser]) -> argparse.ArgumentParser:
        formatter = argparse.ArgumentDefaultsHelpFormatter
        parser = kind(prog=f"fastdecode {name}", description=COMMANDS[name], formatter_class=formatter)
        command.add_arguments(parser)
        return parser

    try:
        return int(command.run(parse_arguments(make_parser, rest)))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _write_any_text() -> None:
    """A model's words are no reason to fail, whatever the locale: ASCII's (LANG=C) says nothing about who reads, so
    it is UTF-8 then; what another encoding does not have is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            is_ascii = codecs.lookup(stream.encoding).name == "ascii"
            stream.reconfigure(encoding="utf-8" if is_ascii else None, errors="backslashreplace")


def _main_parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="fastdecode",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"Decode large language models with the KV cache on CPUs.\n\ncommands:\n{listing}",
        epilog="'fastdecode COMMAND --help' shows a command's options.",
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("--version", action="version", version=f"fastdecode {__version__}")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
