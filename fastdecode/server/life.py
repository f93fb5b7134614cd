"""A server's life, as routes see it: HTTP is there first, the engine comes later.

loading ──begin──► ready ◄─► degraded ──► draining
                     └──────────┴──► dead
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from fastdecode.api.model_names import is_called
from fastdecode.errors import RequestError, RWorkerError
from fastdecode.server.service import Health, Service


class Life:
    def __init__(self, model: str, names: Sequence[str]) -> None:
        """model: its directory; names: what requests may call it."""
        self.model, self.names = model, tuple(names)
        self.since = int(time.time())  # seconds since 1970
        self._service: Service | None = None

    def begin(self, service: Service) -> None:
        """The model is loaded."""
        self._service = service

    @property
    def service(self) -> Service:
        """Raises RequestError (loading, draining), RWorkerError (dead), so that no route need ask."""
        health = self.health()
        if self._service is None:
            raise RequestError("loading", "Loading model")
        if health.state == "draining":
            raise RequestError("draining", "this server is shutting down; ask another one")
        if health.state == "dead":
            raise RWorkerError(health.reason)
        return self._service

    def health(self) -> Health:
        return self._service.health() if self._service else Health("loading")

    def check_model(self, name: str | None) -> str:
        """What answers call it.  Raises RequestError."""
        if name is not None and not is_called(name, self.names, self.model):
            served = " or ".join(map(repr, self.names))
            raise RequestError("model_not_found", f"model {name!r} is not served here, but {served}", "model")
        return name or self.names[0]
