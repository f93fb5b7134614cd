"""``fastdecode run-batch -i IN.jsonl -o OUT.jsonl --model DIR``: a file of OpenAI requests, a file of responses."""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

import fastdecode
from fastdecode.api.config_file import add_config_flags
from fastdecode.api.model_names import default_names
from fastdecode.batch.identity import as_begun, decided_by, identify, versions, weight_files
from fastdecode.batch.journal import Journal, OutputLost, check_kind
from fastdecode.batch.result import BatchResult
from fastdecode.batch.source import kept
from fastdecode.batch.survey import Survey, survey
from fastdecode.commands.engine_flags import add_engine_flags, engine_options, read_template, run_on_s_worker
from fastdecode.engine.config import EngineConfig
from fastdecode.errors import FastDecodeError, RWorkerError
from fastdecode.signals import exit_code, ignore_more

_MAX_NUM_WAITING = 1024  # unless the flag says otherwise: memory is not to grow with the file
_LARGE_BYTES = 1 << 30  # of weights, that take a while to look at
_LINE_EVERY_S = 10.0  # of progress, where there is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for flags, text in (
        (("-i", "--input-file"), "a request per line, OpenAI's batch format; gzip and pipes (-: stdin) are read, too"),
        (("-o", "--output-file"), "a result per line, in the order they end"),
    ):
        parser.add_argument(*flags, required=True, metavar="FILE", help=text)
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face model directory")
    parser.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        default=None,
        help="what lines may call the model (default: its path, and the last part of it)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with an output that an earlier run has begun")
    parser.add_argument(
        "--resume-anyway",
        action="store_true",
        help="go on although weights, settings or versions are not those that the output was begun with; the manifest "
        "notes what was and is",
    )
    parser.add_argument("--retry-errors", action="store_true", help="with --resume: do lines that failed again")
    parser.add_argument("--seed", type=int, default=0, help="of the draws of lines without a seed")
    parser.add_argument(
        "--request-timeout-s", type=float, default=None, metavar="SECONDS", help="of one line, from its turn to its end"
    )
    parser.add_argument(
        "--chat-template", default=None, metavar="FILE", help="instead of the one that the model's tokenizer has; Jinja"
    )
    add_engine_flags(parser)
    add_config_flags(parser)


def run(args: argparse.Namespace) -> int:
    """0: every line succeeded.  1: some did not.  2: it could not start or go on.  130, 143, 129: interrupted."""
    return run_on_s_worker(args, lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    """Returns what `run` does.  Raises FastDecodeError."""
    try:
        return _survey_and_serve(args)
    except OSError as error:
        print(f"error: cannot write {args.output_file}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        ignore_more()
        print("interrupted before the first line", file=sys.stderr)
        return exit_code(stop)


def _survey_and_serve(args: argparse.Namespace) -> int:
    template, options = None if args.chat_template is None else read_template(Path(args.chat_template)), _options(args)
    settings: dict[str, Any] = {"seed": args.seed, **decided_by(options), "versions": versions()}
    settings["chat_template_sha256"] = template and hashlib.sha256(template.encode()).hexdigest()
    given, out = Path(args.input_file), Path(args.output_file)
    if args.input_file == "-" and not given.exists():
        given = Path("/dev/stdin")
    if args.output_file == "-" and not out.exists():
        out = Path("/dev/stdout")
    check_kind(out)  # before a pipe is waited for, or kept beside it
    resume = args.resume or args.resume_anyway
    with kept(given, out) as source:
        found = survey(source, args.input_file)
        with Journal(
            out, found, settings, resume=resume, retry_errors=args.retry_errors and resume, is_forced=args.resume_anyway
        ) as journal:
            return _serve(args, options, found, journal, template)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Of the engine."""
    options = engine_options(args)
    options["max_num_waiting"] = options["max_num_waiting"] or _MAX_NUM_WAITING
    EngineConfig.from_options({"model": args.model, **options})  # what cannot be is told before the input is read
    return options


def _identify(args: argparse.Namespace, journal: Journal) -> None:
    """Raises ConfigError: it was begun with another model."""
    model, tokenizer = Path(args.model), Path(args.tokenizer or args.model)
    if not model.is_dir() or not tokenizer.is_dir():
        return  # loading it tells
    num_bytes = sum(path.stat().st_size for path in weight_files(model))
    is_shown = sys.stderr.isatty() and num_bytes > _LARGE_BYTES
    with tqdm(desc="weights looked at", unit="B", unit_scale=True, disable=not is_shown, leave=False) as bar:
        journal.settle(identify(model, tokenizer, bar.update))


def _serve(
    args: argparse.Namespace, options: dict[str, Any], found: Survey, journal: Journal, chat_template: str | None
) -> int:
    progress = _Progress(journal.progress())
    try:
        _identify(args, journal)
        if journal.progress().is_complete:
            journal.start()
            return progress.end()
        begun = as_begun(options, journal.manifest.settings)
        if begun:
            print("goes on as it was begun:", ", ".join(f"{k}={v}" for k, v in begun.items()), file=sys.stderr)
        with fastdecode.LLM(args.model, **options | begun) as llm:
            for line in llm.kv_places:
                print(line, file=sys.stderr)
            fastdecode.run_batch(
                llm, found, journal, model_names=args.served_model_name or default_names(args.model), seed=args.seed,
                chat_template=chat_template, timeout_s=args.request_timeout_s, on_progress=progress.show,
            )  # fmt: skip
    except OutputLost as error:
        progress.close()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FastDecodeError as error:
        progress.close()
        print(
            f"error: {error}\n{progress.how_to_go_on(is_to_mend=not isinstance(error, RWorkerError))}", file=sys.stderr
        )
        return 2
    except OSError as error:
        progress.close()
        print(f"error: cannot write {args.output_file}: {error}\n{progress.how_to_go_on()}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        ignore_more()
        progress.close()
        # Where a rank has died mpirun ends this one; it says which it was, if it still says anything.
        why = " (a rank may have ended; MPI has no recovery)" if args.transport == "mpi" else ""
        print(f"interrupted{why}; {progress.how_to_go_on()}", file=sys.stderr)
        return exit_code(stop)
    return progress.end()


class _Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, result: BatchResult) -> None:
        """result: of earlier runs."""
        self._result, self._done_before = result, result.num_done
        self._began = self._told = time.monotonic()
        self._bar = tqdm(total=result.num_lines, unit="line", initial=result.num_done, disable=not sys.stderr.isatty())
        self._is_first = True

    def show(self, result: BatchResult) -> None:
        self._result, now = result, time.monotonic()
        if self._is_first:  # the model is loaded
            self._is_first, self._began = False, now
        self._bar.update(result.num_done - self._bar.n)
        if self._bar.disable and now - self._told >= _LINE_EVERY_S:
            self._told = now
            print(self.summary(), file=sys.stderr)

    def close(self) -> None:
        self._bar.close()

    def end(self) -> int:
        """Exit code, told why."""
        self.close()
        print(self.summary(), file=sys.stderr)
        return 1 if self._result.num_errors or not self._result.is_complete else 0

    def summary(self) -> str:
        result, seconds = self._result, max(1e-9, time.monotonic() - self._began)
        done_now = result.num_done - self._done_before
        text = f"{result.num_done} of {result.num_lines} lines, {result.num_errors} errors"
        text += f", {result.num_new_tokens / seconds:.0f} new tokens/s"
        left = result.num_lines - result.num_done
        return text + (f", about {left * seconds / done_now:.0f} s left" if left and done_now else "")

    def how_to_go_on(self, *, is_to_mend: bool = False) -> str:
        """is_to_mend: the same command would fail again."""
        result = self._result
        then = "when that is mended, the same command" if is_to_mend else "the same command"
        return (
            f"{result.num_done} of {result.num_lines} lines are done and written: {then} with --resume does the others"
        )
