"""bfloat16 through real ranks: equal tokens up to the first step whose margin, noise included, is below the stated tolerance."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from bf16_reference import GREEDY, Reference
from diptych.core.fleet import Phase
from diptych.core.layout import DType
from diptych.core.sampling import SamplingParams
from diptych.engine.prepared import prepare
from e2e_harness import attached, rank_spec, ranks, request

COUNT = 24


def prompt(length: int) -> list[int]:
    order = random.Random(length)
    return [2, *(order.randrange(3, 512) for _ in range(length - 1))]


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_handed_over_and_read_locally(family: str, request_source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tmp_path / family
    prepare(str(request_source), model, dtype=DType.BFLOAT16)
    reference = Reference(AutoModelForCausalLM.from_pretrained(request_source))
    specs = [
        rank_spec(model, Phase.PREFILL, "p0", chunk_tokens=48),
        rank_spec(model, Phase.DECODE, "d0", chunk_tokens=16),
    ]

    async def main() -> None:
        agreed = compared = 0
        async with attached(*pair) as workers:
            for length in (3, 17, 40, 100, 200):
                for sampling in ({"temperature": 0.0}, {"temperature": 0.9, "seed": 17}):
                    asked = request(prompt(length), max_tokens=COUNT, **sampling)
                    local, apart = await workers.local(asked), await workers.disaggregated(asked)
                    assert (local.error, apart.error) == (None, None)
                    how = GREEDY if "seed" not in sampling else SamplingParams(temperature=0.9, seed=17)
                    agreed += reference.agreed(prompt(length), local.tokens, apart.tokens, how)
                    compared += COUNT
            await workers.idle()
        assert agreed > compared / 4, "the comparison says little: most tokens come after a difference"

    with ranks(tmp_path, *specs) as pair:
        asyncio.run(main())


@pytest.fixture
def request_source(request: pytest.FixtureRequest, family: str) -> Path:
    source = request.getfixturevalue(f"tiny_{family}_source")
    assert isinstance(source, Path)
    return source
