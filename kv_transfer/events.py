"""What the two shells tell their worker. Callbacks run on the asyncio thread and must not block."""

from __future__ import annotations

from typing import Protocol

from ..core.errors import DiptychError
from ..core.request import Token


class SourceEvents(Protocol):
    """For every transfer offered: perhaps `granted`; then exactly one of `handed_over` and `failed`; then exactly one `released`."""

    def granted(self, transfer_id: str) -> None:
        """The destination has given blocks; pieces flow as they are computed."""
        ...

    def handed_over(self, transfer_id: str, kv_bytes: int, seconds: float, transport: str) -> None:
        """The destination has acknowledged the Commit. `seconds`: first piece to last, measured there."""
        ...

    def failed(self, transfer_id: str, error: DiptychError) -> None:
        """Nothing more will be sent. `Cancelled` after a cancel from either end (also the worker's own), else `TransferFailed`."""
        ...

    def released(self, transfer_id: str) -> None:
        """Nothing reads the transfer's blocks any more: they may be freed and written."""
        ...

    def turned_away(self) -> None:
        """Of no transfer: a process asked for the memory of a pool and got nothing."""
        ...


class DestinationEvents(Protocol):
    """For every transfer expected: perhaps `offered`, then perhaps `nearly_done`; then exactly one of `committed` and `failed`;
    after `failed`, and only then, exactly one `released`."""

    def offered(self, transfer_id: str, prompt_tokens: int) -> None:
        """The source has begun to compute: answer with `grant` or `refuse`, at once or when memory frees."""
        ...

    def nearly_done(self, transfer_id: str) -> None:
        """An offered transfer that waits for its grant will not be waited for long once it has it."""
        ...

    def committed(self, transfer_id: str, first_tokens: tuple[Token, ...], kv_bytes: int, seconds: float, lacking: tuple[int, ...]) -> None:
        """All KV lies in the granted blocks, which belong to the worker from here on. `lacking`: the window groups whose first granted
        block holds rubbish before the window, where the source's blocks are shorter: nobody may find that block by its prefix."""
        ...

    def failed(self, transfer_id: str, error: DiptychError) -> None:
        """The KV will not come. `Cancelled` after a cancel from either end (also the worker's own), else `TransferFailed`."""
        ...

    def released(self, transfer_id: str) -> None:
        """The fence is up: nothing writes the granted blocks any more (there may have been none); they may be used again."""
        ...
