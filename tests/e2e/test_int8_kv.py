"""KV in int8 through real ranks: half the bytes cross, and tokens are equal up to the first step whose margin is below the tolerance."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bf16_reference import Reference
from diptych.core.fleet import Phase
from diptych.core.layout import DType
from diptych.core.transfer import Transport
from diptych.engine.prepared import prepare
from e2e_harness import attached, rank_spec, ranks, request

COUNT = 16
ROWS = 3 * 2 * 2
"""Layers, KV heads, K and V of the tiny model; a row of int8 is 16 numbers and a scale of 2 bytes."""


def prompt(length: int) -> list[int]:
    order = random.Random(length)
    return [2, *(order.randrange(3, 512) for _ in range(length - 1))]


@pytest.mark.nightly
@pytest.mark.parametrize("transport", [Transport.SHM, Transport.GLOO])
@pytest.mark.parametrize("there", [DType.INT8, None])
def test_handed_over_and_read_locally(there: DType | None, transport: Transport, tiny_llama_source: Path, tmp_path: Path) -> None:
    """`there`: what the decode worker holds it in; None is bfloat16, to which it casts what comes."""
    from transformers import AutoModelForCausalLM

    prepare(str(tiny_llama_source), tmp_path / "model", dtype=DType.BFLOAT16)
    reference = Reference(AutoModelForCausalLM.from_pretrained(tiny_llama_source))
    held = {Phase.PREFILL: DType.INT8, Phase.DECODE: there}
    specs = [
        rank_spec(tmp_path / "model", phase, phase.value, chunk_tokens=32, kv_dtype=held[phase], transports=(transport,)) for phase in Phase
    ]

    async def main() -> None:
        agreed = compared = 0
        async with attached(*pair) as workers:
            for length in (3, 40, 77, 200):
                asked = request(prompt(length), max_tokens=COUNT)
                local = await workers.local(asked)
                apart = await workers.disaggregated(replace(asked, tenant="another"))  # whose prefixes are not those just read
                assert local.error is apart.error is None
                assert apart.handed_over is not None
                assert apart.handed_over.kv_bytes == ROWS * length * (16 + 2)
                agreed += reference.agreed(prompt(length), local.tokens, apart.tokens, dtype=torch.int8)
                compared += COUNT
            await workers.idle()
        assert agreed > compared / 4, "the comparison says little: most tokens come after a difference"

    with ranks(tmp_path, *specs) as pair:
        asyncio.run(main())
