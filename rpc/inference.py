"""The public service: the face a router implements, and the clients under `diptych.client`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from types import TracebackType
from typing import Protocol, Self

from ..core.generate import Chunk, Generate, Model


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


class InferenceClient:
    """A connection to the router at `address` (host:port), for asyncio."""

    def __init__(self, address: str, *, max_message_bytes: int = 64 << 20) -> None:
        self.address = address

    def generate(self, call: Generate, *, timeout_s: float | None = None) -> AsyncGenerator[Chunk, None]:
        """The answer in chunks, the last with `finish`. Closing the generator cancels the request.

        Raises the `DiptychError` the router ended it with; `Unavailable` when the connection is lost; `DeadlineExceeded` after
        `timeout_s` seconds.
        """
        raise NotImplementedError

    async def models(self) -> tuple[Model, ...]:
        """What is served."""
        raise NotImplementedError

    async def close(self) -> None:
        """End everything on this connection."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()


class SyncInferenceClient:
    """`InferenceClient` for code without asyncio; safe to use from several threads."""

    def __init__(self, address: str, *, max_message_bytes: int = 64 << 20) -> None:
        self.address = address

    def generate(self, call: Generate, *, timeout_s: float | None = None) -> Generator[Chunk, None, None]:
        """As `InferenceClient.generate`."""
        raise NotImplementedError

    def models(self) -> tuple[Model, ...]:
        """What is served."""
        raise NotImplementedError

    def close(self) -> None:
        """End everything on this connection."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
