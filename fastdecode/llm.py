"""The public API for offline batches: ``LLM``, with vLLM's names.

with LLM("path/to/model", num_r_workers=2, transport="shm") as llm:
    for output in llm.generate(["def fib(n):"], SamplingParams(temperature=0, max_tokens=64)):
        print(output.outputs[0].text)
"""

from __future__ import annotations

import inspect
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from fastdecode.api.conversation import Conversation
from fastdecode.api.outputs import RequestOutput
from fastdecode.api.sampling_params import SamplingParams
from fastdecode.engine.config import EngineConfig
from fastdecode.engine.opening import open_engine
from fastdecode.engine.results import refused_output
from fastdecode.errors import ConfigError, RequestError
from fastdecode.holders.launch import find_r_worker, read_key_file
from fastdecode.text.prompts import Prompt, ReadPrompt, pair, read_prompt
from fastdecode.text.tokenizer import Tokenizer
from transport import AddressError


class LLM:
    """A model with its KV cache on R-workers.  Close it, or use it as a context manager."""

    def __init__(self, model: str | Path, **options: Any) -> None:
        """`options`: see `fastdecode.engine.config.EngineConfig`.

        Raises ConfigError (options), ModelError (the model directory), RWorkerError (a worker).
        """
        self.config = config = _with_order(EngineConfig.from_options({"model": model, **options}))
        self._last_run: Callable[[], _Run | None] = lambda: None  # if somebody still has it
        self._opened = opened = open_engine(config)
        self._engine, self._tokenizer, self._default_params = opened.engine, opened.tokenizer, opened.default_params
        self.facts, self.max_model_len, self.kv_places = opened.facts, opened.max_model_len, opened.kv_places

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., tqdm[Any]] = True,
    ) -> list[RequestOutput]:
        """Outputs in the order of `prompts`, which are strings, token-id lists or {"prompt_token_ids": ...}.

        A prompt that cannot be served has `error` set in its output; the others go on.  One `sampling_params` for
        all, or a list of the same length; None: the model's own defaults.  `use_tqdm`: a progress bar, or a
        function that makes one.  Raises ConfigError (lengths, types), RWorkerError (a worker was lost).
        """
        requests = self._pair(prompts, sampling_params)
        outputs: list[RequestOutput | None] = [None] * len(requests)
        make_bar = use_tqdm if callable(use_tqdm) else tqdm
        with make_bar(total=len(requests), desc="prompts", unit="prompt", disable=not use_tqdm) as bar:
            for index, output in self._run(requests):
                outputs[index] = output
                bar.update(1)
        return [output for output in outputs if output is not None]

    def generate_iter(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """Like `generate`, each output as it finishes; `request_id` counts up in the order of `prompts`.

        Leaving the loop early aborts what is left.
        """
        for _, output in self._run(self._pair(prompts, sampling_params)):
            yield output

    def stream(
        self, requests: Iterable[tuple[Prompt, SamplingParams]], *, timeout_s: float | None = None
    ) -> Iterator[tuple[int, RequestOutput]]:
        """(place among `requests`, output), each as it finishes, however many there are.

        Requests are taken as there is room for them, so memory is bounded by those in flight.  timeout_s: of one
        request, from when it was taken; then its output has the error ``timeout``.  Leaving the loop early aborts what
        is left.  Raises RWorkerError, and what `requests` raises.
        """
        yield from self._run(requests, timeout_s)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., tqdm[Any]] = True,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """One conversation or a list of them, through the chat template, whose text is the `prompt` of each output.

        A conversation is a list of {"role", "content"}; a content is a string or a list of text parts, as OpenAI has
        them.  One that cannot be served has `error` set in its output.  chat_template: Jinja, instead of the
        tokenizer's.  continue_final_message: the last message stays open, for the model to go on with.
        add_generation_prompt: a new message of the assistant is begun; None: unless the last one is continued.
        chat_template_kwargs: further variables of the template, like Qwen3's enable_thinking.  Raises like `generate`.
        """
        if self._tokenizer is None:
            raise ConfigError("chat needs the tokenizer that skip_tokenizer_init left out")
        if chat_template is None and not self._tokenizer.has_chat_template():
            raise ConfigError("this model's tokenizer has no chat template; pass chat_template=..., or use generate()")
        if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
            raise ConfigError("messages is a list of {'role': ..., 'content': ...}, or a list of such lists")
        is_one = bool(messages) and isinstance(messages[0], Mapping)
        begins = not continue_final_message if add_generation_prompt is None else add_generation_prompt
        try:
            first = Conversation([], chat_template, begins, continue_final_message, chat_template_kwargs or {})
        except RequestError as error:
            raise ConfigError(str(error)) from error
        conversations: Sequence[Any] = [messages] if is_one else messages
        prompts = [replace(first, messages=conversation) for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def reset_prefix_cache(self) -> bool:
        """Forgets KV of sequences that have ended; those that run keep theirs, and others may begin with it.

        True: nothing can be in the way.  Not to be called in another thread while this LLM generates.  Raises
        ConfigError if it is closed.
        """
        self._check_open()
        self._engine.reset_prefix_cache()
        return True

    def add_r_worker(self, address: str) -> None:
        """One more R-worker, which runs at `address` or will: it gets new sequences from when it answers on.

        Returns at once, and may be called while this LLM generates.  Raises ConfigError for an address that cannot be
        one.
        """
        keys = read_key_file(self.config.key_file)
        try:
            find_r_worker(0, address, keys).channel.close()  # whether it can be an address at all
        except AddressError as error:
            raise ConfigError(str(error)) from error
        self._engine.add_r_worker(lambda index: find_r_worker(index, address, keys))

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None if skip_tokenizer_init left it out."""
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json asks for; what `generate` takes without params."""
        return self._default_params

    def close(self) -> None:
        """Ends the R-workers started here and says goodbye to the others; can be called twice.

        An LLM that is garbage, or still there when the interpreter ends, is closed by that.
        """
        self._opened.close()

    @property
    def _closed(self) -> bool:
        return self._opened.ending.is_closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("this LLM is closed")

    def _pair(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[tuple[Prompt, SamplingParams]]:
        return pair(prompts, self._default_params if params is None else params)

    def _run(self, requests: Iterable[tuple[Prompt, SamplingParams]], timeout_s: float | None = None) -> _Run:
        """(place in `requests`, output) as they finish."""
        self._check_open()
        # The interpreter's own word for it cannot be wrong, wherever an interrupt came.
        last = self._last_run()
        if last is not None and inspect.getgeneratorstate(last) in (inspect.GEN_RUNNING, inspect.GEN_SUSPENDED):
            raise ConfigError("this LLM is generating already; finish or close that iteration first")
        run = self._serve(requests, timeout_s)
        self._last_run = weakref.ref(run)
        return run

    def _serve(self, requests: Iterable[tuple[Prompt, SamplingParams]], timeout_s: float | None) -> _Run:
        self._engine.abort_all()  # what was interrupted, and again before it could end what it had begun
        taken: dict[str, _Taken] = {}
        try:
            places = enumerate(requests)
            waiting = next(places, None)
            while (waiting or self._engine.has_work) and not self._closed:
                while waiting and self._engine.wants_more and self._engine.has_room(waiting[1][1]):
                    place, (prompt, params) = waiting
                    waiting = next(places, None)
                    request_id, read = self._engine.next_request_id(), ReadPrompt(None, [])
                    try:
                        read = read_prompt(prompt, self._tokenizer, self.max_model_len)
                        self._engine.add_request(
                            request_id, read.token_ids, params, prompt=read.text, cache_salt=read.cache_salt
                        )
                        taken[request_id] = _Taken(place, params.n, time.monotonic())
                    except RequestError as error:
                        yield place, refused_output(request_id, read.text, read.token_ids, error, params.n)
                for output in self._engine.step():
                    yield taken.pop(output.request_id).place, output
                yield from self._expired(taken, timeout_s)
            if taken or waiting:
                raise ConfigError("this LLM was closed while it was generating")
        finally:
            self._engine.abort_all()

    def _expired(self, taken: dict[str, _Taken], timeout_s: float | None) -> Iterator[tuple[int, RequestOutput]]:
        """Ends what has taken too long; the oldest come first in `taken`."""
        while timeout_s is not None and taken:
            request_id, oldest = next(iter(taken.items()))
            if time.monotonic() - oldest.since < timeout_s:
                return
            del taken[request_id]
            self._engine.abort([request_id])
            error = RequestError("timeout", f"not finished within {timeout_s:g} s")
            yield oldest.place, refused_output(request_id, None, [], error, oldest.num_samples)


def _with_order(config: EngineConfig) -> EngineConfig:
    """Prompts are there together, so those that begin alike may meet."""
    return config if config.order else replace(config, order="prefix")


_Run = Generator[tuple[int, RequestOutput], None, None]


@dataclass(frozen=True)
class _Taken:
    """A request in flight."""

    place: int
    num_samples: int
    since: float  # seconds of the monotonic clock
