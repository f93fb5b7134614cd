"""Whoever serves a benchmark's requests, behind one contract: this runtime, transformers, vLLM, llama.cpp."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import fastdecode
from cpu_attention import available_cores
from fastdecode.benchmark.llamacpp import batched_bench, convert
from fastdecode.benchmark.workload import BenchRequest
from fastdecode.engine.config import EngineConfig
from fastdecode.errors import ConfigError

BACKENDS = ("fastdecode", "hf", "vllm", "llamacpp")

_PEERS = Path(__file__).with_name("peers.py")
_TIMEOUT_S = 3600.0  # of one run of a peer


@dataclass(frozen=True)
class Run:
    """All requests served once."""

    seconds: float
    prefill_seconds: float  # of the same prompts with one new token each
    token_ids: list[list[int]] | None = None  # of each request; None: not told


class BenchEngine(Protocol):
    name: str
    settings: dict[str, Any]  # what a reader of the record has to know to run it again

    def run(self, requests: Sequence[BenchRequest]) -> Run: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class PeerPlaces:
    """Where other engines are."""

    hf_python: str = sys.executable
    vllm_python: str | None = None
    llamacpp_binary: str | None = None
    llamacpp_weights: Sequence[str] = ("f32", "f16")


class FastDecodeEngine:
    def __init__(self, options: dict[str, Any]) -> None:
        """options: of EngineConfig.  Raises FastDecodeError."""
        self.name = "fastdecode"
        defaults = EngineConfig.from_options({"model": options["model"]})
        shown = {k: v for k, v in options.items() if v != getattr(defaults, k) and k != "model"}
        self.settings: dict[str, Any] = {
            "model": Path(options["model"]).name,
            "version": fastdecode.__version__,
            **shown,
        }
        self._llm = fastdecode.LLM(**options, skip_tokenizer_init=True)

    def run(self, requests: Sequence[BenchRequest]) -> Run:
        prefill_seconds, _ = self._generate([BenchRequest(request.prompt_token_ids, 1) for request in requests])
        seconds, token_ids = self._generate(requests)
        return Run(seconds, prefill_seconds, token_ids)

    def close(self) -> None:
        self._llm.close()

    def _generate(self, requests: Sequence[BenchRequest]) -> tuple[float, list[list[int]]]:
        prompts = [{"prompt_token_ids": list(request.prompt_token_ids)} for request in requests]
        params = [fastdecode.SamplingParams(temperature=0, max_tokens=r.output_len, ignore_eos=True) for r in requests]
        began = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        refused = next((output.error for output in outputs if output.error), None)
        if refused:
            raise ConfigError(f"a request was refused: {refused.message}")
        return seconds, [output.outputs[0].token_ids for output in outputs]


class PeerEngine:
    """An engine of `peers.py`, in a process of its own, which stands still while others are measured."""

    def __init__(self, name: str, python: str, settings: dict[str, Any]) -> None:
        """Raises ConfigError if it does not come up."""
        self.name, self._failed, self._is_asked = name, False, False
        self._log = tempfile.NamedTemporaryFile(prefix=f"{name}-", suffix=".log", delete=False)  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [python, str(_PEERS), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
            )
        except OSError as error:
            self._log.close()
            os.unlink(self._log.name)
            raise ConfigError(f"{name}: cannot run {python}: {error}") from error
        try:
            told = {"model": Path(settings["model"]).name, "version": self._ask(settings)["version"]}
            self.settings = settings | told
        except BaseException:
            self.close()
            raise

    def run(self, requests: Sequence[BenchRequest]) -> Run:
        prompts = [request.prompt_token_ids for request in requests]
        first = self._ask({"prompts": prompts, "output_lens": [1] * len(prompts)})
        whole = self._ask({"prompts": prompts, "output_lens": [request.output_len for request in requests]})
        return Run(whole["seconds"], first["seconds"], whole["token_ids"])

    def close(self) -> None:
        if self._is_asked:  # it would first find the answer, which nobody reads
            self._process.terminate()
        self._process.send_signal(signal.SIGCONT)
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                stream.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        if not self._failed:
            os.unlink(self._log.name)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._is_asked = True
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it had to say is in its log; the read below tells
        answer = dict(json.loads(self._read_line() or b"{}"))
        self._is_asked = False
        self._process.send_signal(signal.SIGSTOP)
        if "error" in answer or not answer:
            self._failed = True
            raise ConfigError(f"{self.name}: {answer.get('error', 'its process ended')} (its log is {self._log.name})")
        return answer

    def _read_line(self) -> bytes:
        """Empty if the process has ended.  Raises ConfigError if nothing comes in time."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(_TIMEOUT_S):
                raise ConfigError(f"{self.name} did not answer within {_TIMEOUT_S:g} s")
        return self._process.stdout.readline()  # an answer is written whole


@dataclass
class LlamaCppEngine:
    """llama-batched-bench over one type of weights; the better of its two attentions, found in the first run."""

    binary: str
    model: Path
    weights: str
    threads: int
    name: str = field(init=False)
    settings: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.name = f"llamacpp-{self.weights}"
        self.settings = {"model": self.model.name, "weights": self.weights, "kv_cache_dtype": "f16"}
        self._directory = tempfile.TemporaryDirectory(prefix="fastdecode-gguf-")
        self._path = Path(self._directory.name) / f"{self.weights}.gguf"
        self._flash_attention: bool | None = None
        convert(self.model, self._path, self.weights)

    def run(self, requests: Sequence[BenchRequest]) -> Run:
        shapes = {(len(request.prompt_token_ids), request.output_len) for request in requests}
        if len(shapes) != 1:
            raise ConfigError("llama-batched-bench takes requests of equal lengths only; leave llamacpp out")
        ((input_len, output_len),) = shapes
        tried: dict[bool, Run] = {}
        for flash in (True, False) if self._flash_attention is None else (self._flash_attention,):
            record = batched_bench(
                self.binary,
                self._path,
                input_len=input_len,
                # Its prefill samples nothing, so the first token is a decode step, too.
                output_len=max(1, output_len - 1),
                num_prompts=len(requests),
                threads=self.threads,
                flash_attention=flash,
            )
            tried[flash] = Run(record["t_pp"] + record["t_tg"], record["t_pp"])
        best = min(tried, key=lambda flash: tried[flash].seconds)
        self._flash_attention = self.settings["flash_attention"] = best
        return tried[best]

    def close(self) -> None:
        self._directory.cleanup()


def open_engines(
    backends: Sequence[str], options: dict[str, Any], requests: Sequence[BenchRequest], places: PeerPlaces
) -> list[BenchEngine]:
    """options: of EngineConfig; peers take model, dtype and max_num_seqs from them.  Raises FastDecodeError."""
    if not Path(options["model"]).is_dir():
        raise ConfigError(f"{options['model']} is no directory; give a Hugging Face model directory")
    threads = len(available_cores())
    settings = {
        "model": str(options["model"]),
        "dtype": options.get("dtype") if options.get("dtype") not in (None, "auto") else "float32",
        "max_num_seqs": options["max_num_seqs"],
        "max_model_len": max(len(request.prompt_token_ids) + request.output_len for request in requests),
        "threads": threads,
    }
    engines: list[BenchEngine] = []
    try:
        for backend in backends:
            match backend:
                case "fastdecode":
                    engines.append(FastDecodeEngine(options))
                case "hf":
                    engines.append(PeerEngine("hf", places.hf_python, settings))
                case "vllm":
                    if not places.vllm_python:
                        raise ConfigError("vllm needs --vllm-python, an interpreter that has it")
                    engines.append(PeerEngine("vllm", places.vllm_python, settings))
                case "llamacpp":
                    if not places.llamacpp_binary:
                        raise ConfigError("llamacpp needs --llamacpp-binary, a llama-batched-bench")
                    for weights in places.llamacpp_weights:
                        engines.append(LlamaCppEngine(places.llamacpp_binary, Path(options["model"]), weights, threads))
    except BaseException:
        close_engines(engines)
        raise
    return engines


def close_engines(engines: Sequence[BenchEngine]) -> None:
    for engine in engines:
        engine.close()
