"""Errors ↔ gRPC status, the one boundary where foreign errors become ours.

A `DiptychError` travels as status and message, for any client, and as trailing metadata `diptych-code` and `diptych-field`, from
which our clients build the same error again. A status without `diptych-code` was made by gRPC or a stranger: `FOREIGN` translates it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import cast
from urllib.parse import quote, unquote

import grpc

from ..core.errors import (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    DiptychError,
    Internal,
    InvalidRequest,
    NotFound,
    Overloaded,
    TooLarge,
    TransferFailed,
    Unauthenticated,
    Unavailable,
    from_wire,
    to_wire,
)

log = logging.getLogger(__name__)

CODE, FIELD = "diptych-code", "diptych-field"
MESSAGE_BYTES = 1000
"""Longer messages are cut: gRPC percent-encodes them (×3 at worst) into trailers, of which peers accept 8 KiB in all."""

WRITE_FAILED = "Internal error from Core"
"""grpc.aio ends a call with INTERNAL and this text when a write failed because the peer, at that moment, ended the stream."""

FOREIGN: dict[grpc.StatusCode, type[DiptychError]] = {
    grpc.StatusCode.OK: Internal,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNKNOWN: Internal,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: InvalidRequest,
    grpc.StatusCode.PERMISSION_DENIED: InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.FAILED_PRECONDITION: ConfigError,
    grpc.StatusCode.ABORTED: TransferFailed,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.UNIMPLEMENTED: ConfigError,
    grpc.StatusCode.INTERNAL: Internal,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DATA_LOSS: Internal,
}

Status = tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]


def to_status(error: Exception) -> Status:
    """Status code, message and trailing metadata that tell `error` to the peer. What is no `DiptychError` is a defect: it is logged
    here with its traceback, and the peer learns only that."""
    if not isinstance(error, DiptychError):
        log.error("a face raised what it should not", exc_info=error)
        error = Internal("An internal error ended the call; the server's log has it.")
    code, message, field = to_wire(error)
    metadata = ((CODE, code),) if field is None else ((CODE, code), (FIELD, quote(field[:200], errors="backslashreplace")))
    return grpc.StatusCode[error.grpc_status], _cut(message), metadata


def _cut(message: str) -> str:
    data = message.encode(errors="backslashreplace")
    return message if len(data) <= MESSAGE_BYTES else data[: MESSAGE_BYTES - 4].decode(errors="ignore") + " …"


def from_status(code: grpc.StatusCode, message: str | None, metadata: dict[str, str], *, peer: str) -> DiptychError:
    """The error that a status tells; `peer` names, in the messages of foreign errors, who was called."""
    text = message or code.name
    if (ours := metadata.get(CODE)) is not None:
        field = metadata.get(FIELD)
        return from_wire(ours, text, None if field is None else unquote(field))
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text:
        return TooLarge(f"{peer}: the message is larger than the limit ({text}).")
    if code is grpc.StatusCode.INTERNAL and text == WRITE_FAILED:
        return Unavailable(f"{peer}: the stream ended while a message was written to it.")
    return FOREIGN[code](f"{peer}: {text}")


def from_grpc(error: grpc.RpcError, *, peer: str) -> DiptychError:
    """What a call raised, translated. (The errors of grpc and of grpc.aio both carry code, details and trailing metadata.)"""
    call = cast(grpc.Call, error)
    metadata = {key: str(value) for key, value in cast(Iterable[tuple[str, str | bytes]], call.trailing_metadata() or ())}
    return from_status(call.code(), call.details(), metadata, peer=peer)
