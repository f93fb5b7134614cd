"""The job: lines in as there is room for them, results out as they end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fastdecode.batch.journal import Journal
from fastdecode.batch.result import BatchResult
from fastdecode.batch.survey import Line, Survey, lines
from fastdecode.errors import ConfigError, RequestError
from fastdecode.llm import LLM
from fastdecode.model_names import is_called
from fastdecode.openai_api import ReadRequest, completion_body, error_body, make_echo, read_line, status_of
from fastdecode.outputs import OutputError, RequestOutput
from fastdecode.prompts import Prompt
from fastdecode.sampling_params import SamplingParams
from fastdecode.text import Tokenizer
from gpu_sworker import derive_seed

logger = logging.getLogger(__name__)


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
    RWorkerError, ConfigError (the input changed), OSError (the disk is full); every result until then is in the
    journal.
    """
    is_done = np.isin(found.ids, journal.recorded.ids)
    result = BatchResult(found.num_lines, int(is_done.sum()), journal.recorded.num_errors)
    in_flight: dict[int, tuple[Line, ReadRequest]] = {}

    def record(line: Line, response: dict[str, Any], error: OutputError | None) -> None:
        journal.append({
            "id": f"batch_req_{line.number}",
            "custom_id": line.custom_id,
            "response": response,
            "error": error and {"code": error.code, "message": error.message},
        })  # fmt: skip
        result.num_done += 1
        result.num_errors += error is not None
        on_progress(result)

    def refuse(line: Line, error: OutputError) -> None:
        record(line, _response(line, status_of(error), error_body(error)), error)

    def requests() -> Iterator[tuple[Prompt, SamplingParams]]:
        place = 0
        for line in lines(found.path, found.nameless):
            if line.index >= found.num_lines:
                raise ConfigError(f"{found.name} has become longer while it was read; let it be finished first")
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

    on_progress(result)
    for place, output in llm.stream(requests(), timeout_s=timeout_s):
        line, request = in_flight.pop(place)
        if output.error:
            refuse(line, output.error)
        else:
            result.num_new_tokens += sum(len(completion.token_ids) for completion in output.outputs)
            record(line, _response(line, 200, _body(line, request, output, model_names[0], llm.tokenizer)), None)
    return result


def _read(line: Line, llm: LLM, model_names: Sequence[str], chat_template: str | None) -> ReadRequest:
    """Raises RequestError."""
    if line.error:
        raise RequestError("invalid_request", line.error)
    request = read_line(line.url, line.body, llm.get_default_sampling_params(), chat_template)
    if request.is_echoed and llm.tokenizer is None:
        raise RequestError("invalid_request", "echo needs the tokenizer that skip_tokenizer_init left out", "echo")
    if request.model is not None and not is_called(request.model, model_names, llm.config.model):
        names = " or ".join(map(repr, model_names))
        raise RequestError("model_not_found", f"model {request.model!r} is not served here, but {names}", "model")
    return request


def _response(line: Line, status: int, body: dict[str, Any]) -> dict[str, Any]:
    return {"status_code": status, "request_id": f"req_{line.number}", "body": body}


def _body(
    line: Line, request: ReadRequest, output: RequestOutput, model: str, tokenizer: Tokenizer | None
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
        body_id=f"{'chatcmpl' if request.is_chat else 'cmpl'}-{line.number}",
        model=request.model or model,
        created=int(time.time()),
        num_logprobs=request.params.logprobs,
        num_prompt_logprobs=request.num_prompt_logprobs,
        echoes=echoes,
    )
