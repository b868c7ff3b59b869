"""The client for code without asyncio."""

from __future__ import annotations

import os
from collections.abc import Generator
from types import TracebackType
from typing import Self, Unpack

from ..core.access import Access
from ..core.generate import Chunk, Model
from ..rpc.inference import SyncInferenceClient
from .call import Answer, Options, Prompt, gather, make_call


class Client:
    """A connection to a Diptych router. Safe to share between threads; close it, or use it in a `with`.

        with Client("127.0.0.1:50051") as client:
            print(client.generate("Once upon a time", max_tokens=32).text)

    Every method raises the errors of `diptych.core.errors` and no others: `InvalidRequest` names the `field` that is wrong,
    `Unauthenticated` asks for another API key, `Overloaded` and `Unavailable` are worth another try, `DeadlineExceeded` says that
    `timeout_s` has passed.
    """

    def __init__(self, address: str, *, api_key: str | None = None, tls: bool = False, ca: str | None = None) -> None:
        """`address`: host:port of the router's gRPC face. Connects when first used, and again after the connection was lost.

        `api_key`: by default that of the environment's DIPTYCH_API_KEY, if there is one. `tls`: the router is known by the system's
        authorities, or by the one in the file `ca` (PEM), which asks for TLS by itself.
        """
        self._inference = SyncInferenceClient(address, Access(api_key or os.environ.get("DIPTYCH_API_KEY"), tls, ca))

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """The whole answer to `prompt` (text, or token ids), when it is complete. See `Options` for what may be asked."""
        return gather(self.stream(prompt, **options))

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Generator[Chunk, None, None]:
        """The answer in chunks as it is written, each of one `choice`; the last one has `finish`.

        Leaving the loop early and dropping (or closing) the generator cancels the request at the server:

            for chunk in client.stream("Once upon a time"):
                print(chunk.text, end="", flush=True)
        """
        call, timeout_s = make_call(prompt, options)
        return self._inference.generate(call, timeout_s=timeout_s)

    def models(self) -> tuple[Model, ...]:
        """What is served."""
        return self._inference.models()

    def close(self) -> None:
        """End the connection, and with it every request still under way."""
        self._inference.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
