"""OpenAI's routes: completions, chat, models."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from fastdecode.errors import RequestError
from fastdecode.openai_api import ChatBody, CompletionBody, Echo, ReadRequest, make_echo, read_request
from fastdecode.openai_api.requests import CHAT_URL, COMPLETIONS_URL
from fastdecode.server.answers import Answer, StreamedAnswer, WholeAnswer
from fastdecode.server.errors import JSONBody
from fastdecode.server.life import Life
from fastdecode.server.openapi import takes
from fastdecode.server.options import ServerOptions
from fastdecode.server.service import Service
from fastdecode.server.stream import Stream

_LARGE_BYTES = 1 << 18  # bodies that are read beside the event loop


def openai_router(life: Life, options: ServerOptions) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.post("/completions", openapi_extra=takes(CompletionBody))
    async def completions(request: Request) -> Response:
        return await answer(COMPLETIONS_URL, request)

    @router.post("/chat/completions", openapi_extra=takes(ChatBody))
    async def chat_completions(request: Request) -> Response:
        return await answer(CHAT_URL, request)

    @router.get("/models")
    async def models() -> Response:
        return JSONBody({"object": "list", "data": [_model(life, name) for name in life.names]})

    @router.get("/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONBody(_model(life, life.check_model(name)))

    async def answer(url: str, request: Request) -> Answer:
        service = life.service
        read = await read_body(url, request, service)
        name = life.check_model(read.model)
        streams = await submit(read)
        echoes = await show(read, streams) if read.is_echoed else None
        return (StreamedAnswer if read.is_streamed else WholeAnswer)(read, name, streams, echoes)

    async def read_body(url: str, request: Request, service: Service) -> ReadRequest:
        body, defaults = await request.body(), service.opened.default_params

        def read() -> ReadRequest:
            trust = options.trust_request_chat_template
            return read_request(url, read_json(body), defaults, options.chat_template, trust_chat_template=trust)

        return await asyncio.to_thread(read) if len(body) > _LARGE_BYTES else read()

    async def submit(read: ReadRequest) -> list[Stream]:
        """A stream per prompt: all or none."""
        num_sequences = len(read.prompts) * read.params.n
        if len(read.prompts) > 1 and num_sequences > options.max_queue:
            told = f"{len(read.prompts)} prompts x n = {read.params.n} are {num_sequences} sequences"
            raise RequestError(
                "invalid_request", f"prompt: {told}; a list has to fit in the queue, of {options.max_queue}", "prompt"
            )
        return await life.service.submit_all(
            read.prompts,
            read.params,
            places=read.places,
            priority=read.priority,
            timeout_s=options.timeout_s,
            stream=read.is_streamed,
        )

    async def show(read: ReadRequest, streams: Sequence[Stream]) -> list[Echo]:
        """The prompts as the answer is to show them; made while they are computed."""
        params = read.params
        make = partial(make_echo, skip_special_tokens=params.skip_special_tokens, is_all=params.max_tokens == 0)
        try:
            return [
                await life.service.with_tokenizer(partial(make, prompt=prompt, token_ids=stream.prompt_token_ids))
                for prompt, stream in zip(read.prompts, streams, strict=True)
            ]
        except BaseException:
            for stream in streams:
                stream.abort()
            raise

    return router


def read_json(body: bytes) -> Any:
    """Raises RequestError."""
    try:
        return msgspec.json.decode(body.removeprefix(codecs.BOM_UTF8))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError("invalid_request", f"body is no JSON: {error}") from error
    except RecursionError as error:
        raise RequestError("invalid_request", "body is nested too deeply") from error


def _model(life: Life, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": life.since,
        "owned_by": "fastdecode",
        "root": life.model,
        "parent": None,
        "max_model_len": life.service.opened.max_model_len,
    }
