"""OpenAI's request and response bodies, for batch files and for the server.  No engine, no HTTP, no files."""

from fastdecode.openai_api.requests import URLS, ReadRequest, read_request
from fastdecode.openai_api.responses import completion_body, error_body, status_of

__all__ = ["URLS", "ReadRequest", "completion_body", "error_body", "read_request", "status_of"]
