"""What a pair of workers must do whatever each is spread over: the tokens of one rank, and each byte of KV to each rank that lacks it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from diptych.cluster.process.spec import BLOCK_SIZE
from diptych.core.layout import Layout
from diptych.core.model import read_card
from diptych.core.request import Request
from diptych.core.transfer import Transport
from e2e_harness import Answer, Rank, attached, request

WINDOW = 24
"""Of the tiny Gemma 3."""
LENGTHS = (1, 15, 16, 17, WINDOW, 100)
"""Around the borders of a block and of the window; the last is more than one chunk. None but the first is the beginning of another."""
SAMPLED: tuple[dict[str, Any], ...] = (
    {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 11},
    {"temperature": 1.1, "seed": 5, "n": 2},
    {"temperature": 0.8, "seed": 8, "n": 2, "repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": ((7, 3.0), (9, -9.0))},
)
TOKENS = 8


def prompt(length: int, seed: int) -> list[int]:
    order = random.Random(f"spread {length} {seed}")
    return [2, *(order.randrange(3, 512) for _ in range(length - 1))]


def cases(tenant: str, lengths: Iterable[int] = LENGTHS) -> list[Request]:
    """The same requests for every tenant; no tenant finds another's prefix in a cache. The greedy ones come first, one for each length."""
    greedy = [request(prompt(length, 0), max_tokens=TOKENS, logprobs=2) for length in lengths]
    sampled = [
        request(prompt(40 + 13 * number, number + 1), max_tokens=TOKENS, logprobs=2, **sampling) for number, sampling in enumerate(SAMPLED)
    ]
    return [replace(each, tenant=tenant) for each in greedy + sampled]


def same(answers: list[Answer], expected: list[Answer]) -> None:
    """Equal choice by choice, none failed, log probabilities within what fp32 leaves open."""
    assert [answer.error for answer in answers] == [None] * len(expected)
    for ours, theirs in zip(answers, expected, strict=True):
        assert {choice: (written.tokens, written.finish) for choice, written in ours.choices.items()} == {
            choice: (written.tokens, written.finish) for choice, written in theirs.choices.items()
        }
        for choice, written in ours.choices.items():
            assert written.logprobs == pytest.approx(theirs.choices[choice].logprobs, abs=1e-3)


async def judged(judge: Rank, lengths: Iterable[int] = LENGTHS) -> list[Answer]:
    """What a decode worker of one rank answers to the cases, reading them itself; they differ as they should."""
    async with attached(None, judge) as workers:
        answers = [await workers.local(each) for each in cases("judge", lengths)]
        await workers.idle()
    assert [answer.error for answer in answers] == [None] * len(answers)
    assert len({answer.tokens for answer in answers}) == len(answers)
    assert all(len({written.tokens for written in answer.choices.values()}) == len(answer.choices) for answer in answers)
    return answers


@dataclass
class Pair:
    """A prefill and a decode worker, and what they shall say."""

    prefill: Rank
    decode: Rank
    transport: Transport
    expected: list[Answer]
    lengths: tuple[int, ...] = LENGTHS

    @property
    def tenant(self) -> str:
        """Nobody has met its prompts before."""
        return f"{self.prefill.spec.worker_id} to {self.decode.spec.worker_id}"

    async def check(self) -> None:
        """One after another to caches that know nothing, then all at once to caches that know all: the same tokens, and nothing is left."""
        asked = cases(self.tenant, self.lengths)
        async with attached(self.prefill, self.decode) as workers:
            cold = [await workers.disaggregated(each) for each in asked]
            same(cold, self.expected)
            self._moved(asked, cold, cached=False)
            again = await asyncio.gather(*(workers.disaggregated(each) for each in asked))
            same(again, self.expected)
            self._moved(asked, again, cached=True)
            await workers.idle()

    def _moved(self, asked: list[Request], answers: list[Answer], *, cached: bool) -> None:
        layout = layout_of(self.decode)
        for each, answer in zip(asked, answers, strict=True):
            length = len(each.prompt_ids)
            assert answer.first is not None
            assert answer.first.cached_tokens == (whole_blocks(length - 1) if cached else 0), "P computes the last position to draw"
            assert answer.handed_over is not None
            assert answer.handed_over.transport == self.transport
            assert answer.handed_over.kv_bytes == bytes_to_move(layout, length, whole_blocks(length) if cached else 0)


async def alone(decode: Rank, expected: list[Answer], lengths: tuple[int, ...] = LENGTHS) -> None:
    """A decode worker that reads all the prompts itself, beside each other."""
    async with attached(None, decode) as workers:
        same(await asyncio.gather(*(workers.local(each) for each in cases("local", lengths))), expected)
        await workers.idle()


def layout_of(rank: Rank) -> Layout:
    spec = rank.spec
    return read_card(Path(spec.model_dir)).layout(block_size=BLOCK_SIZE, kv_tokens=spec.kv_tokens, tp=spec.tp, stages=spec.stages)


def whole_blocks(tokens: int) -> int:
    """Tokens in them."""
    return tokens // BLOCK_SIZE * BLOCK_SIZE


def bytes_to_move(there: Layout, tokens: int, cached: int) -> int:
    """Of every position the destination lacks, to each of its ranks what it holds: a head that several hold goes to each. In a window
    group those from the block on where the next query's window begins."""
    total = 0
    for rank in range(there.ranks):
        for group in there.on(rank).layout.groups:
            first = max(cached, whole_blocks(group.first_needed(tokens)))
            total += (tokens - first) * group.token_bytes * len(group.layers)
    return total
