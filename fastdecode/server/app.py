"""The application: routes behind the guard, errors in one envelope.

CORS, if a flag names origins: a browser's question before the request bears no key
  └─► Guard ─► /v1/completions  /v1/chat/completions  /v1/models
               /tokenize  /detokenize  /apply-template
               /health  /ping  /version  /reset_prefix_cache  and whatever other routers are given
"""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from fastdecode import __version__
from fastdecode.openai_api import ChatBody, CompletionBody
from fastdecode.server.errors import JSONBody, add_error_handlers, error_response
from fastdecode.server.guard import Guard
from fastdecode.server.head import HeadAsGet
from fastdecode.server.life import Life
from fastdecode.server.openapi import describe
from fastdecode.server.options import ServerOptions
from fastdecode.server.routes import openai_router
from fastdecode.server.service import Health
from fastdecode.server.tokens import DetokenizeBody, TokenizeBody, tokens_router

_BODIES = (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody)
_SERVES = {"ready": "ok", "degraded": "degraded"}  # what /health calls it
_SERVES_NOT = {"loading": ("loading", "Loading model"), "draining": ("draining", "shutting down")}


def create_app(life: Life, options: ServerOptions, routers: Iterable[APIRouter] = ()) -> FastAPI:
    """routers: further ones, behind the same guard."""
    # No /docs: its page would fetch scripts from elsewhere.
    app = FastAPI(
        title="FastDecode",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(HeadAsGet)  # the last one added is the outermost
    app.add_middleware(
        Guard,
        api_keys=options.api_keys,
        max_body_bytes=options.max_body_bytes,
        client_timeout_s=options.client_timeout_s,
        root_path=options.root_path,
    )
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),  # clients send many of their own
            expose_headers=("Retry-After", "WWW-Authenticate"),
            allow_private_network=True,  # who names an origin means it, wherever this server is
        )
    add_error_handlers(app)
    for router in (openai_router(life, options), tokens_router(life, options), _process_router(life), *routers):
        app.include_router(router)
    document = describe(app, _BODIES)
    app.openapi = lambda: document  # type: ignore[method-assign]
    return app


def _process_router(life: Life) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    @router.get("/ping")
    async def health() -> Response:
        return _health_response(life.health())

    @router.get("/version")
    async def version() -> Response:
        return JSONBody({"version": __version__})

    @router.post("/reset_prefix_cache", include_in_schema=False)
    async def reset_prefix_cache() -> Response:
        """vLLM's, which answers without a body, too."""
        await life.service.reset_prefix_cache()
        return Response()

    return router


def _health_response(health: Health) -> Response:
    if health.state in _SERVES:
        lost = [name.partition(" (")[0] for name in health.lost]  # without address and process: no key is asked for
        return JSONBody({"status": _SERVES[health.state], "lost_r_workers": lost})
    code, message = _SERVES_NOT.get(health.state, ("engine_dead", "the engine has ended; this process is about to"))
    return error_response(code, message, beside={"status": health.state})
