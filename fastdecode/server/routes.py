"""OpenAI's routes: completions, chat, models."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from fastdecode.errors import RequestError
from fastdecode.openai_api import ChatBody, CompletionBody, ReadRequest, read_request
from fastdecode.server.answers import Answer, StreamedAnswer, WholeAnswer
from fastdecode.server.errors import JSONBody
from fastdecode.server.life import Life
from fastdecode.server.openapi import takes
from fastdecode.server.options import ServerOptions
from fastdecode.server.service import Stream


def openai_router(life: Life, options: ServerOptions) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.post("/completions", openapi_extra=takes(CompletionBody))
    async def completions(request: Request) -> Response:
        return await answer(request)

    @router.post("/chat/completions", openapi_extra=takes(ChatBody))
    async def chat_completions(request: Request) -> Response:
        return await answer(request)

    @router.get("/models")
    async def models() -> Response:
        return JSONBody({"object": "list", "data": [_model(life, name) for name in life.names]})

    @router.get("/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONBody(_model(life, life.check_model(name)))

    async def answer(request: Request) -> Answer:
        service = life.service
        read = read_request(request.url.path, read_json(await request.body()), service.opened.default_params)
        name = life.check_model(read.model)
        streams = await submit(read)
        return (StreamedAnswer if read.is_streamed else WholeAnswer)(read, name, streams)

    async def submit(read: ReadRequest) -> list[Stream]:
        """A stream per prompt: all or none."""
        num_sequences = len(read.prompts) * read.params.n
        if len(read.prompts) > 1 and num_sequences > options.max_queue:
            told = f"{len(read.prompts)} prompts x n = {read.params.n} are {num_sequences} sequences"
            raise RequestError(
                "invalid_request", f"prompt: {told}; a queue of {options.max_queue} never has room for all", "prompt"
            )
        streams: list[Stream] = []
        try:
            for prompt in read.prompts:
                streams.append(
                    await life.service.submit(
                        prompt,
                        read.params,
                        priority=read.priority,
                        timeout_s=options.timeout_s,
                        stream=read.is_streamed,
                    )
                )
        except BaseException:
            for stream in streams:
                stream.abort()
            raise
        return streams

    return router


def read_json(body: bytes) -> Any:
    """Raises RequestError."""
    try:
        return msgspec.json.decode(body)
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
