"""Calls for code without asyncio; what `channels` is for the rest."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, cast

import grpc
from google.protobuf.descriptor import MethodDescriptor

from .channels import INTERNAL_MESSAGE_BYTES, Metadata, channel_options, closed, path_of, split_address
from .errors import from_grpc


def open_blocking_channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
    """A plain one without `credentials`."""
    split_address(address)
    options = channel_options(INTERNAL_MESSAGE_BYTES)
    if credentials is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, credentials, options=options)


def ask(channel: grpc.Channel, method: MethodDescriptor, request: bytes, *, timeout_s: float, peer: str, metadata: Metadata = ()) -> bytes:
    """The answer to `request`; raises only `DiptychError`."""
    try:
        return cast(bytes, channel.unary_unary(path_of(method), None, None)(request, timeout=timeout_s, metadata=metadata))
    except grpc.RpcError as error:
        raise from_grpc(error, peer=peer) from None
    except ValueError:  # all that grpc finds wrong with a call it has not begun
        raise closed(peer) from None


def iterate(
    channel: grpc.Channel, method: MethodDescriptor, request: bytes, *, timeout_s: float | None, peer: str, metadata: Metadata = ()
) -> Generator[bytes, None, None]:
    """The messages that answer `request`; closing the generator cancels the call; raises only `DiptychError`."""
    try:
        call: Any = channel.unary_stream(path_of(method), None, None)(request, timeout=timeout_s, metadata=metadata)
    except ValueError:
        raise closed(peer) from None
    try:
        yield from call
    except grpc.RpcError as error:
        raise from_grpc(error, peer=peer) from None
    finally:
        call.cancel()
