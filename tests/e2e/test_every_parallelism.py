"""All 81 pairs of tp and pp of 1, 2 and 4 with real processes. The nine prefill workers are started once, the decode workers in turn."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import pytest
from diptych.core.fleet import Phase
from diptych.core.layout import even_stages
from diptych.core.transfer import Transport, transports_for
from e2e_harness import Answer, Rank, rank_spec, ranks
from spread_harness import Pair, alone, judged

NINE = list(product((1, 2, 4), (1, 2, 4)))
LAYERS = 4
UNEVEN = {1: (), 2: (3, 1), 4: (1, 1, 1, 1)}
SHORTER = (1, 16, 17, 100)
pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def prefills(tiny_gemma3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Rank]]:
    """49 ranks of 230 MB. One worker after another: all at once they would be silent for too long."""
    directory = tmp_path_factory.mktemp("prefills")
    with ExitStack() as stack:
        started: list[Rank] = []
        for tp, pp in NINE:
            spec = rank_spec(tiny_gemma3_dir, Phase.PREFILL, f"P tp{tp} pp{pp}", tp=tp, stages=UNEVEN[pp])
            started += stack.enter_context(ranks(directory, spec))
        yield started
        assert [rank.stop() for rank in started] == [0] * len(NINE)


@pytest.fixture(scope="module")
def expected(tiny_gemma3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    with ranks(tmp_path_factory.mktemp("judge"), rank_spec(tiny_gemma3_dir, Phase.DECODE, "judge")) as (judge,):
        return asyncio.run(judged(judge, SHORTER))


@pytest.mark.parametrize("transport", transports_for((), on_gpu=False))
@pytest.mark.parametrize(("tp", "pp"), NINE)
def test_any_parallelism_to_any(
    prefills: list[Rank], expected: list[Answer], tiny_gemma3_dir: Path, tmp_path: Path, tp: int, pp: int, transport: Transport
) -> None:
    spread = {"tp": tp, "stages": even_stages(LAYERS, pp), "transports": (transport,)}

    async def main(decode: Rank) -> None:
        await alone(decode, expected, SHORTER)
        for prefill in prefills:
            await Pair(prefill, decode, transport, expected, SHORTER).check()

    with ranks(tmp_path, rank_spec(tiny_gemma3_dir, Phase.DECODE, f"D tp{tp} pp{pp} {transport}", **spread)) as (decode,):
        asyncio.run(main(decode))
        assert decode.stop() == 0
