"""OpenAI's request and response bodies, for batch files and for the server.  No engine, no HTTP, no files."""

from fastdecode.openai_api.bodies import ChatBody, CompletionBody
from fastdecode.openai_api.chunks import ChunkWriter
from fastdecode.openai_api.echo import Echo, make_echo
from fastdecode.openai_api.errors import KINDS, envelope, error_body, kind_of, status_of
from fastdecode.openai_api.requests import URLS, ReadRequest, read_line, read_request
from fastdecode.openai_api.responses import completion_body

__all__ = [
    "KINDS",
    "URLS",
    "ChatBody",
    "ChunkWriter",
    "CompletionBody",
    "Echo",
    "ReadRequest",
    "completion_body",
    "envelope",
    "error_body",
    "kind_of",
    "make_echo",
    "read_line",
    "read_request",
    "status_of",
]
