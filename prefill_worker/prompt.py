"""One attempt on a prefill worker, as its scheduler sees it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.request import Request
from ..engine.block_pool import BlockTable


@dataclass(slots=True, eq=False)
class Prompt:
    """`decided`: positions computed once the steps in flight complete; `done`: positions computed. `cached`: of them, found in the
    prefix cache. `slot`: -1 before it starts and after its last chunk. `passes`: how many later prompts have started before it.
    `blocks`, `charge`: of its lease."""

    attempt_id: str
    request: Request
    destination: str | None
    token_ids: tuple[int, ...]
    tokens: int = field(init=False)
    table: BlockTable
    blocks: tuple[int, ...]
    charge: tuple[int, ...]
    arrived: float
    started: float = 0.0
    decided: int = 0
    done: int = 0
    cached: int = 0
    slot: int = -1
    passes: int = 0

    def __post_init__(self) -> None:
        self.tokens = len(self.token_ids)

    @property
    def first_index(self) -> int:
        """Of the output tokens that are drawn behind it."""
        return self.tokens - len(self.request.prompt_ids)

    @property
    def computing(self) -> bool:
        """Whether it has a slot: what steps in flight say of it counts."""
        return self.slot >= 0
