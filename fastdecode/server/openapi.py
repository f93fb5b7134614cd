"""What /openapi.json says: bodies are msgspec's, so their schemas come from there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

_REF = "#/components/schemas/{name}"


class _Error(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct):
    error: _Error


def takes(body: type[msgspec.Struct]) -> dict[str, Any]:
    """`openapi_extra` of a route with this body."""
    schema = {"$ref": _REF.format(name=body.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI, bodies: Sequence[type[msgspec.Struct]]) -> dict[str, Any]:
    """The document.  bodies: all that routes take."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schema = {"$ref": _REF.format(name=ErrorBody.__name__)}
    error = {"description": "An error", "content": {"application/json": {"schema": schema}}}
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"] |= {"4XX": error, "5XX": error}
    _, schemas = msgspec.json.schema_components([ErrorBody, *bodies], ref_template=_REF)
    for body in bodies:
        for name, values in getattr(body, "neutral", {}).items():
            # Of a field that is not supported: what may be said of it.
            schemas[body.__name__]["properties"].setdefault(name, {"enum": [None, *values]})
    document.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
    return document
