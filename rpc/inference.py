"""The public service: the face a router implements, and the clients under `diptych.client`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, closing, suppress
from types import TracebackType
from typing import Protocol, Self

from ..core.access import OPEN, Access
from ..core.errors import DiptychError, Unavailable
from ..core.generate import Chunk, Generate, Model
from ..proto.inference_pb2 import DESCRIPTOR, ListModelsRequest
from .blocking import ask, iterate, open_blocking_channel
from .channels import ANSWER_S, call_stream, call_unary, open_channel
from .codec_inference import decode_chunk, decode_models, encode_generate
from .credentials import client_credentials

_METHODS = DESCRIPTOR.services_by_name["Inference"].methods_by_name


class InferenceFace(Protocol):
    """What serves `diptych.v1.Inference`; called on the event loop's thread."""

    def generate(self, call: Generate) -> AsyncGenerator[Chunk, None]:
        """The answer in chunks, the last one (and no other) with `finish`; raises a `DiptychError` instead if it fails.

        The generator is closed (or cancelled at its await) when the client goes away: that cancels the request.
        """
        ...

    def models(self) -> tuple[Model, ...]:
        """What is served."""
        ...

    def refused(self, error: DiptychError) -> None:
        """Told of a call that came no further: nobody knows whose it is, or it says nothing that can be read."""
        ...


class InferenceClient:
    """A connection to the router at `address` (host:port), for asyncio."""

    def __init__(self, address: str, access: Access = OPEN) -> None:
        """Raises `ConfigError` for an authority that cannot be read."""
        self.address = address
        self._metadata = tuple(access.headers.items())
        self._peer = f"Diptych at {address}"
        self._channel = open_channel(address, client_credentials(access))

    async def generate(self, call: Generate, *, timeout_s: float | None = None) -> AsyncGenerator[Chunk, None]:
        """The answer in chunks, the last with `finish`, which is given when the call has ended. Closing the generator before that
        cancels the request.

        Raises the `DiptychError` the router ended it with; `Unavailable` when the connection is lost; `DeadlineExceeded` after
        `timeout_s` seconds.
        """
        request, method = encode_generate(call), _METHODS["Generate"]
        async with aclosing(
            call_stream(self._channel, method, request, timeout_s=timeout_s, peer=self._peer, metadata=self._metadata)
        ) as messages:
            async for message in messages:
                chunk = decode_chunk(message)
                if chunk.finish is not None:
                    # A call cancelled before its status has come costs a grpc.aio server 80 bytes for ever (grpc issue 43360).
                    with suppress(DiptychError):
                        async for _ in messages:
                            pass
                    yield chunk
                    return
                yield chunk
        raise Unavailable(f"{self._peer} ended the answer without a finish.")

    async def models(self) -> tuple[Model, ...]:
        """What is served."""
        request = ListModelsRequest().SerializeToString()
        return decode_models(
            await call_unary(self._channel, _METHODS["ListModels"], request, timeout_s=ANSWER_S, peer=self._peer, metadata=self._metadata)
        )

    async def close(self) -> None:
        """End everything on this connection."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()


class SyncInferenceClient:
    """`InferenceClient` for code without asyncio; safe to use from several threads."""

    def __init__(self, address: str, access: Access = OPEN) -> None:
        """Raises `ConfigError` for an authority that cannot be read."""
        self.address = address
        self._metadata = tuple(access.headers.items())
        self._peer = f"Diptych at {address}"
        self._channel = open_blocking_channel(address, client_credentials(access))

    def generate(self, call: Generate, *, timeout_s: float | None = None) -> Generator[Chunk, None, None]:
        """As `InferenceClient.generate`."""
        request, method = encode_generate(call), _METHODS["Generate"]
        with closing(iterate(self._channel, method, request, timeout_s=timeout_s, peer=self._peer, metadata=self._metadata)) as messages:
            for message in messages:
                chunk = decode_chunk(message)
                if chunk.finish is not None:
                    with suppress(DiptychError):
                        for _ in messages:
                            pass
                    yield chunk
                    return
                yield chunk
        raise Unavailable(f"{self._peer} ended the answer without a finish.")

    def models(self) -> tuple[Model, ...]:
        """What is served."""
        request, method = ListModelsRequest().SerializeToString(), _METHODS["ListModels"]
        return decode_models(ask(self._channel, method, request, timeout_s=ANSWER_S, peer=self._peer, metadata=self._metadata))

    def close(self) -> None:
        """End everything on this connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
