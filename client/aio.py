"""The client for asyncio."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import TracebackType
from typing import Self, Unpack

from ..core.access import Access
from ..core.generate import Chunk, Model
from ..rpc.inference import InferenceClient
from .call import Answer, Options, Prompt, gather, make_call


class AsyncClient:
    """A connection to a Diptych router, for one event loop; close it, or use it in an `async with`.

        async with AsyncClient("127.0.0.1:50051") as client:
            answers = await asyncio.gather(*(client.generate(prompt) for prompt in prompts))

    Raises what `diptych.client.sync.Client` raises. Cancelling the task that waits for an answer cancels the request.
    """

    def __init__(self, address: str, *, api_key: str | None = None, tls: bool = False, ca: str | None = None) -> None:
        """`address`: host:port of the router's gRPC face. Connects when first used, and again after the connection was lost.

        `api_key`: by default that of the environment's DIPTYCH_API_KEY, if there is one. `tls`: the router is known by the system's
        authorities, or by the one in the file `ca` (PEM), which asks for TLS by itself.
        """
        self._inference = InferenceClient(address, Access(api_key or os.environ.get("DIPTYCH_API_KEY"), tls, ca))

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """The whole answer to `prompt` (text, or token ids), when it is complete. See `Options` for what may be asked."""
        async with aclosing(self.stream(prompt, **options)) as chunks:
            return gather([chunk async for chunk in chunks])

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncGenerator[Chunk, None]:
        """The answer in chunks as it is written, each of one `choice`; the last one has `finish`.

        Closing the generator cancels the request at the server. A loop that may be left early should see to that:

            async with aclosing(client.stream("Once upon a time")) as chunks:
                async for chunk in chunks:
                    ...
        """
        call, timeout_s = make_call(prompt, options)
        return self._inference.generate(call, timeout_s=timeout_s)

    async def models(self) -> tuple[Model, ...]:
        """What is served."""
        return await self._inference.models()

    async def close(self) -> None:
        """End the connection, and with it every request still under way."""
        await self._inference.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()
