"""What a server may be told, checked; no HTTP here, so that flags and help need none."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastdecode.errors import ConfigError

_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#\s,]+")
_PREFIX = re.compile(r"(/[^/?#\s]+)+")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """
    served_model_name: what requests may call the model; the first is what answers call it.
    host: the one address to listen on; ``::`` or nothing: all there are, of IPv4 and IPv6.
    port: 0 takes a free one.
    api_keys: whoever has one of them is served; none: everybody is.
    max_queue: sequences that may wait, beside those that run or can at once (`EngineConfig.max_num_seqs` of them, or
        fewer where KV is short); a request that finds so many is answered 429.
    timeout_s: of one request, from its arrival to its end; None: any time.
    shutdown_timeout_s: what runs has so long to end after SIGTERM.
    max_body_bytes: of a request.
    chat_template: instead of the one that the model's tokenizer has; Jinja.
    trust_request_chat_template: a request may bring a chat template of its own, which is a program.
    cors_origins: pages of these origins may ask from within a browser; ``*``: of any.
    root_path: what a proxy puts before the paths, like ``/llm``; requests may come with it or without.
    client_timeout_s: a client that neither sends what it began nor reads what it is sent is left after so long.
    """

    served_model_name: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    max_queue: int = 256
    timeout_s: float | None = None
    shutdown_timeout_s: float = 30.0
    max_body_bytes: int = 32 << 20
    client_timeout_s: float = 60.0
    chat_template: str | None = None
    trust_request_chat_template: bool = False
    cors_origins: tuple[str, ...] = ()
    root_path: str = ""

    def __post_init__(self) -> None:
        if not self.served_model_name or not all(self.served_model_name):
            raise ConfigError("served_model_name wants at least one name, and none that is empty")
        if not all(self.api_keys):
            raise ConfigError("api_key: an empty one would let everybody in; leave it out, or give one")
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(f"cors_origins: {origin!r} is no origin; write it like https://a.example:8080, or *")
        if self.root_path and not _PREFIX.fullmatch(self.root_path):
            raise ConfigError(f"root_path begins with a slash and ends without, like /llm; got {self.root_path!r}")
        for name, value, low, high in (
            ("port", self.port, 0, 65535),
            ("max_queue", self.max_queue, 1, 1 << 20),
            ("timeout", self.timeout_s, 0.001, 1e7),
            ("shutdown_timeout", self.shutdown_timeout_s, 0, 1e7),
            ("max_body", self.max_body_bytes, 1, 1 << 31),
            ("client_timeout", self.client_timeout_s, 0.1, 1e6),
        ):
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{name} must be from {low:g} to {high:g}, got {value:g}")
