"""``GET /dashboard``: one page without data in it, and ``GET /dashboard/data``, which it asks once a second.

The page has to be let in without a key, for a browser sends none with an address; what it draws is not.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import HTMLResponse, JSONResponse

from fastdecode.server.history import KEPT_S, LEAST_S, History

PAGE_PATH = "/dashboard"
_PAGE = Path(__file__).with_name("dashboard.html")


def dashboard_router(history: History) -> APIRouter:
    router, page = APIRouter(), _PAGE.read_text(encoding="utf-8")
    headers = {
        "content-security-policy": _policy(page),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }

    @router.get(PAGE_PATH, include_in_schema=False)
    def dashboard() -> Response:
        return HTMLResponse(page, headers=headers)

    @router.get(f"{PAGE_PATH}/data", include_in_schema=False)
    def data(seconds: Annotated[int, Query(ge=LEAST_S, le=KEPT_S)] = 300) -> Response:
        told: dict[str, Any] = history.told(seconds)
        return JSONResponse(told, headers={"cache-control": "no-store"})

    return router


def _policy(page: str) -> str:
    """This very script and style, data from here, nothing else; nobody may frame the page."""
    sources = {
        kind: " ".join(f"'sha256-{_digest(text)}'" for text in re.findall(f"<{kind}>(.*?)</{kind}>", page, re.DOTALL))
        for kind in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
