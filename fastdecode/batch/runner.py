"""The job: lines in as there is room for them, results out as they end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

from fastdecode.api.model_names import is_called
from fastdecode.api.outputs import OutputError, RequestOutput
from fastdecode.api.sampling_params import SamplingParams
from fastdecode.batch.identity import kind_of
from fastdecode.batch.journal import Journal
from fastdecode.batch.result import BatchResult
from fastdecode.batch.survey import Digest, Line, Survey, hash_id, lines
from fastdecode.errors import ConfigError, RequestError
from fastdecode.llm import LLM
from fastdecode.openai_api import ReadRequest, completion_body, error_body, make_echo, read_line, status_of
from fastdecode.text.prompts import Prompt
from fastdecode.text.tokenizer import Tokenizer
from gpu_sworker import derive_seed

logger = logging.getLogger(__name__)

_LONGEST_MESSAGE = 1000  # characters


def run_batch(
    llm: LLM,
    found: Survey,
    journal: Journal,
    *,
    model_names: Sequence[str],
    seed: int,
    chat_template: str | None = None,
    timeout_s: float | None = None,
    on_progress: Callable[[BatchResult], None] = lambda result: None,
) -> BatchResult:
    """Serves every line that has no result yet; memory is bounded by the requests in flight.

    model_names: what a line may call the model.  chat_template: None: the tokenizer's.  seed: a line without a seed
    draws by this and its own place, so that a run that goes on gives what an uninterrupted one would.  Raises
    RWorkerError, ConfigError (the input or the output changed; the output was begun by another model), OSError (the
    disk is full); every result until then is in the journal.
    """
    journal.settle(settled_by(llm))
    journal.start()
    is_done, result = journal.is_done(), journal.progress()
    in_flight: dict[int, tuple[Line, ReadRequest]] = {}

    def name_of(line: Line) -> str:
        return f"{journal.run_id}-{line.number}"

    def record(line: Line, status: int, body: dict[str, Any], error: OutputError | None) -> None:
        name = name_of(line)
        journal.append({
            "id": f"batch_req_{name}",
            "custom_id": line.custom_id,
            "response": {"status_code": status, "request_id": f"req_{name}", "body": body},
            "error": error and {"code": error.code, "message": error.message},
        })  # fmt: skip
        result.num_done += 1
        result.num_errors += error is not None
        on_progress(result)

    def refuse(line: Line, error: OutputError) -> None:
        error = replace(error, message=_cut(error.message))
        record(line, status_of(error), error_body(error), error)

    def requests() -> Iterator[tuple[Prompt, SamplingParams]]:
        place, digest, num_read = 0, Digest(), 0
        for line in lines(found.path, found.nameless, found.contested, digest):
            if line.index >= found.num_lines:
                raise ConfigError(f"{found.name} has become longer while it was read; let it be finished first")
            if found.ids[line.index] != hash_id(line.custom_id):
                raise ConfigError(f"{found.name} has changed while it was read: line {line.number} is another one now")
            num_read += 1
            if is_done[line.index]:
                continue
            try:
                request = _read(line, llm, model_names, chat_template)
            except RequestError as error:
                refuse(line, OutputError(error.code, str(error), error.param, error.numbers))
                continue
            except Exception as error:  # a fault of ours; the line is not to end this run, and each that goes on
                logger.exception("line %d cannot be read", line.number)
                refuse(line, OutputError("internal_error", f"a fault of this program: {type(error).__name__}: {error}"))
                continue
            params = request.params
            if params.seed is None:
                params = replace(params, seed=derive_seed(seed, line.index + 1))
            in_flight[place] = line, request
            place += 1
            yield request.prompt, params
        if num_read < found.num_lines:
            raise ConfigError(
                f"{found.name} has become shorter while it was read: {num_read} lines are left of {found.num_lines}"
            )
        if digest.hexdigest() != found.sha256:
            raise ConfigError(
                f"{found.name} has changed while it was read: results may be those of lines that are not in it now"
            )

    on_progress(result)
    for place, output in llm.stream(requests(), timeout_s=timeout_s):
        line, request = in_flight.pop(place)
        if output.error:
            refuse(line, output.error)
        else:
            result.num_new_tokens += sum(len(completion.token_ids) for completion in output.outputs)
            record(line, 200, _body(name_of(line), request, output, model_names[0], llm.tokenizer), None)
    journal.check()
    return result


def settled_by(llm: LLM) -> dict[str, Any]:
    """What decides results and is known of a loaded model alone: what `auto` came to, and what its lines do not say."""
    facts, defaults = llm.facts, llm.get_default_sampling_params()
    changed = {field.name: getattr(defaults, field.name) for field in fields(defaults)}
    return {
        "device": kind_of(facts.device),
        "dtype": facts.dtype,
        "kv_cache_dtype": facts.dtype if llm.config.kv_cache_dtype == "auto" else llm.config.kv_cache_dtype,
        "linear_kernel": facts.linear_kernel,
        "max_model_len": llm.max_model_len,
        "sampling_defaults": {name: repr(value) for name, value in changed.items() if value is not None},
    }


def _cut(message: str) -> str:
    """What is quoted in it may be as long as a line."""
    return message if len(message) <= _LONGEST_MESSAGE else message[:_LONGEST_MESSAGE] + "..."


def _read(line: Line, llm: LLM, model_names: Sequence[str], chat_template: str | None) -> ReadRequest:
    """Raises RequestError."""
    if line.error:
        raise RequestError("invalid_request", line.error)
    request = read_line(line.url, line.body, llm.get_default_sampling_params(), chat_template)
    if request.is_echoed and llm.tokenizer is None:
        raise RequestError("invalid_request", "echo needs the tokenizer that skip_tokenizer_init left out", "echo")
    if request.model is not None and not is_called(request.model, model_names, llm.config.model):
        names = " or ".join(map(repr, model_names))
        raise RequestError("model_not_found", f"model {request.model[:100]!r} is not served here, but {names}", "model")
    return request


def _body(
    name: str, request: ReadRequest, output: RequestOutput, model: str, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    echoes = None
    if request.is_echoed:
        assert tokenizer is not None, "looked at before"
        echo = make_echo(
            tokenizer,
            request.prompt,
            output.prompt_token_ids,
            skip_special_tokens=request.params.skip_special_tokens,
            is_all=request.params.max_tokens == 0,
        )
        echoes = [echo]
    return completion_body(
        [output],
        is_chat=request.is_chat,
        body_id=f"{'chatcmpl' if request.is_chat else 'cmpl'}-{name}",
        model=request.model or model,
        created=int(time.time()),
        num_logprobs=request.params.logprobs,
        num_prompt_logprobs=request.num_prompt_logprobs,
        echoes=echoes,
    )
