"""What a stranger gets from a gRPC server that is not ours."""

from __future__ import annotations

from typing import cast

import grpc

from .blocking import open_blocking_channel

_SHUT = frozenset(
    {
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }
)
"""It asks who comes, wants TLS, or says nothing. Any other answer, a refusal of what was asked included, is an answer."""


def answers_strangers(address: str, method: str, *, timeout_s: float) -> bool:
    """Whether the server at `address` answers `method` (/package.Service/Method) to who shows nothing. Raises `ConfigError` for what is no
    address."""
    with open_blocking_channel(address, None) as channel:
        try:
            channel.unary_unary(method, None, None)(b"", timeout=timeout_s)
        except grpc.RpcError as error:
            return cast(grpc.Call, error).code() not in _SHUT
    return True
