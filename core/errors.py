"""Every error Diptych raises on purpose.

    DiptychError
    ├── InvalidRequest        the caller's fault; `field` names what is wrong        400 INVALID_ARGUMENT
    │   ├── ContextExceeded   prompt (or prompt + max_tokens) cannot ever fit        400 INVALID_ARGUMENT
    │   └── TooLarge          the body is larger than the limit                      413 INVALID_ARGUMENT
    ├── Unauthenticated       no API key, or not a good one                          401 UNAUTHENTICATED
    ├── NotFound              no such model                                          404 NOT_FOUND
    ├── Overloaded            queues are full; try again later                       429 RESOURCE_EXHAUSTED
    ├── Unavailable           no worker can take it now                              503 UNAVAILABLE
    ├── DeadlineExceeded      the request's own time limit ended it                  504 DEADLINE_EXCEEDED
    ├── Cancelled             the caller went away or asked to stop                  499 CANCELLED
    ├── TransferFailed        one attempt's KV did not arrive; another may be made   503 ABORTED
    ├── ConfigError           refused at start; `field` is the key in the config     –
    ├── ModelError            a model cannot be read, prepared or loaded             –
    └── Internal              a defect of ours                                       500 INTERNAL

Errors carry ids and names, never objects, so that they cross processes whole: `to_wire` and `from_wire` are exact inverses.
"""

from __future__ import annotations

from typing import ClassVar


class DiptychError(Exception):
    """Base of the tree. `message` is a full sentence for a person; `field` names the part of the input it is about, if any."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field

    def __reduce__(self) -> tuple[object, ...]:
        return (from_wire, (self.code, self.message, self.field))


class InvalidRequest(DiptychError):
    code, http_status, grpc_status = "invalid_request", 400, "INVALID_ARGUMENT"


class ContextExceeded(InvalidRequest):
    code = "context_length_exceeded"


class TooLarge(InvalidRequest):
    code, http_status = "too_large", 413


class Unauthenticated(DiptychError):
    code, http_status, grpc_status = "invalid_api_key", 401, "UNAUTHENTICATED"


class NotFound(DiptychError):
    code, http_status, grpc_status = "not_found", 404, "NOT_FOUND"


class Overloaded(DiptychError):
    code, http_status, grpc_status, retryable = "overloaded", 429, "RESOURCE_EXHAUSTED", True


class Unavailable(DiptychError):
    code, http_status, grpc_status, retryable = "unavailable", 503, "UNAVAILABLE", True


class DeadlineExceeded(DiptychError):
    code, http_status, grpc_status = "deadline_exceeded", 504, "DEADLINE_EXCEEDED"


class Cancelled(DiptychError):
    code, http_status, grpc_status = "cancelled", 499, "CANCELLED"


class TransferFailed(DiptychError):
    code, http_status, grpc_status, retryable = "transfer_failed", 503, "ABORTED", True


class ConfigError(DiptychError):
    code, http_status, grpc_status = "config", 400, "FAILED_PRECONDITION"


class ModelError(DiptychError):
    code, http_status, grpc_status = "model", 500, "FAILED_PRECONDITION"


class Internal(DiptychError):
    code = "internal"


_BY_CODE: dict[str, type[DiptychError]] = {
    cls.code: cls
    for cls in (
        InvalidRequest,
        ContextExceeded,
        TooLarge,
        Unauthenticated,
        NotFound,
        Overloaded,
        Unavailable,
        DeadlineExceeded,
        Cancelled,
        TransferFailed,
        ConfigError,
        ModelError,
        Internal,
    )
}


def to_wire(error: DiptychError) -> tuple[str, str, str | None]:
    """`(code, message, field)`, all a peer needs to raise the same error."""
    return error.code, error.message, error.field


def from_wire(code: str, message: str, field: str | None) -> DiptychError:
    """The error `to_wire` described; an unknown code (a newer peer) becomes `Internal` with the code in its text."""
    known = _BY_CODE.get(code)
    return known(message, field=field) if known else Internal(f"{code}: {message}", field=field)
