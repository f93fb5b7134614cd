"""Between messages, text and tokens over HTTP: /tokenize and /detokenize, with vLLM's bodies; llama.cpp's
/apply-template."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from fastdecode.errors import RequestError
from fastdecode.openai_api import ChatBody
from fastdecode.openai_api.bodies import TemplateBody, read_body
from fastdecode.openai_api.requests import read_conversation
from fastdecode.server.errors import JSONBody
from fastdecode.server.life import Life
from fastdecode.server.openapi import takes
from fastdecode.server.options import ServerOptions
from fastdecode.server.routes import read_json
from fastdecode.text.prompts import Prompt, read_prompt
from fastdecode.text.tokenizer import Tokenizer


class TokenizeBody(TemplateBody):
    """prompt or messages"""

    prompt: str | None = None
    add_special_tokens: bool = True  # of a prompt; a chat template writes its own
    return_token_strs: bool = False


class DetokenizeBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    tokens: list[int]


def tokens_router(life: Life, options: ServerOptions) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize", openapi_extra=takes(TokenizeBody))
    async def tokenize(request: Request) -> Response:
        service = life.service
        body = read_body(read_json(await request.body()), TokenizeBody)
        life.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("invalid_request", "prompt: give either prompt or messages", "prompt")
        token_ids, texts = await service.with_tokenizer(lambda tokenizer: _encode(tokenizer, body, options))
        length = service.opened.max_model_len
        return JSONBody({"count": len(token_ids), "max_model_len": length, "tokens": token_ids, "token_strs": texts})

    @router.post("/apply-template", openapi_extra=takes(ChatBody))
    async def apply_template(request: Request) -> Response:
        service = life.service
        body = read_body(read_json(await request.body()), ChatBody)
        life.check_model(body.model)
        conversation = read_conversation(
            body, options.chat_template, trust_chat_template=options.trust_request_chat_template
        )
        text = await service.with_tokenizer(lambda tokenizer: tokenizer.render_chat(conversation))
        return JSONBody({"prompt": text})

    @router.post("/detokenize", openapi_extra=takes(DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        service = life.service
        body = read_body(read_json(await request.body()), DetokenizeBody)
        life.check_model(body.model)
        size = service.opened.facts.vocab_size
        bad = next((token for token in body.tokens if not 0 <= token < size), None)
        if bad is not None:
            told = f"tokens: {bad} is not in the vocabulary; ids are whole numbers from 0 to {size - 1}"
            raise RequestError("invalid_request", told, "tokens")
        text = await service.with_tokenizer(lambda tokenizer: tokenizer.decode(body.tokens, skip_special_tokens=False))
        return JSONBody({"prompt": text})

    return router


def _encode(tokenizer: Tokenizer, body: TokenizeBody, options: ServerOptions) -> tuple[list[int], list[str] | None]:
    """In a tokenizer's thread.  Raises RequestError."""
    if body.messages is None:
        token_ids = tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
    else:
        conversation: Prompt = read_conversation(
            body, options.chat_template, trust_chat_template=options.trust_request_chat_template
        )
        token_ids = read_prompt(conversation, tokenizer).token_ids
    return token_ids, [tokenizer.piece(token).name for token in token_ids] if body.return_token_strs else None
