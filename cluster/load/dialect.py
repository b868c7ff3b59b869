"""What a server of OpenAI's completions understands beyond the standard, found by asking with less until it does not refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import product
from typing import Any


@dataclass(frozen=True, slots=True)
class Dialect:
    """Fields a request may use.

    `running_usage`: token counts in every event (vLLM's `continuous_usage_stats`). `ignore_eos`: answers as long as asked for.
    `token_ids`: prompts as ids. `usage`: token counts in the last event.
    """

    running_usage: bool = True
    ignore_eos: bool = True
    token_ids: bool = True
    usage: bool = True

    def body(self, model: str, prompt: str | list[int], output_tokens: int) -> bytes:
        """A greedy, streamed completion of at most `output_tokens` tokens, as JSON."""
        values: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": output_tokens, "temperature": 0, "stream": True}
        if self.ignore_eos:
            values["ignore_eos"] = True
        if self.usage:
            values["stream_options"] = {"include_usage": True}
            if self.running_usage:
                values["stream_options"]["continuous_usage_stats"] = True
        return json.dumps(values, separators=(",", ":")).encode()

    @property
    def missing(self) -> list[str]:
        """Names of what is not used."""
        return [field.name for field in fields(self) if not getattr(self, field.name)]


def dialects() -> Iterator[Dialect]:
    """Every dialect once: the fewest fields left out first, and of as many those a measurement misses least."""
    every = [Dialect(*reversed(used)) for used in product((True, False), repeat=len(fields(Dialect)))]
    sensible = [dialect for dialect in every if dialect.usage or not dialect.running_usage]
    return iter(sorted(sensible, key=lambda dialect: len(dialect.missing)))
