"""Everything this runtime raises on purpose, and whose fault it is.

FastDecodeError
├── ConfigError              yours: an option or a combination that cannot work (also a ValueError)
├── ModelError               the model directory's: not there, not whole, or of a kind that is not supported
├── RequestError             one prompt's; reported in that prompt's output, the others go on
└── RWorkerError             an R-worker's
    ├── RWorkerUnreachable   nobody answers at its address
    ├── RWorkerLost          it was there and is gone: killed, hung or cut off
    ├── RWorkerTimeout       connected, but no answer before the deadline
    └── RWorkerFailed        it answered that it cannot
"""

from __future__ import annotations

from collections.abc import Mapping


class FastDecodeError(Exception):
    pass


class ConfigError(FastDecodeError, ValueError):
    pass


class ModelError(FastDecodeError):
    pass


class RequestError(FastDecodeError, ValueError):
    """`code`: one of those that `fastdecode.openai_api.errors` lists; `param`: the field that is wrong, if one is, as
    it was sent (``messages[0].content``); `numbers`: what a program may want of the message, by name.
    """

    def __init__(
        self, code: str, message: str, param: str | None = None, *, numbers: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(message)
        self.code, self.param, self.numbers = code, param, dict(numbers or {})


class DeviceKVFailed(FastDecodeError):
    """K and V on the S-worker's own device: no room where there should be some, or a fault of ours."""


class RWorkerError(FastDecodeError):
    r_worker: int = 0  # whose fault it is, by its place in the pool


class RWorkerUnreachable(RWorkerError):
    pass


class RWorkerLost(RWorkerError, ConnectionError):
    pass


class RWorkerTimeout(RWorkerError, TimeoutError):
    pass


class RWorkerFailed(RWorkerError):
    """`kind` is the name of the error on the R-worker, if it told one."""

    def __init__(self, message: str, kind: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind
