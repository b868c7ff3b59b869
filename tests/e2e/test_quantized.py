"""Weights of few bits through a real process, with the C++ kernels: tokens equal up to the first step whose margin is too small."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from bf16_reference import Reference
from diptych.core.fleet import Phase
from diptych.core.layout import DType
from diptych.core.quantization import Quantization
from diptych.engine.prepared import prepare
from diptych.kernels.quantized import dequantized_torch, quantize
from e2e_harness import attached, rank_spec, ranks, request

COUNT = 24


@pytest.mark.parametrize("kind", [pytest.param(Quantization.INT4), pytest.param(Quantization.INT8, marks=pytest.mark.nightly)])
def test_served(kind: Quantization, tiny_llama_source: Path, tmp_path: Path) -> None:
    """By a worker that does both, against transformers with the same weights."""
    from transformers import AutoModelForCausalLM

    prepare(str(tiny_llama_source), tmp_path / "model", dtype=DType.BFLOAT16, quantization=kind)
    wide = AutoModelForCausalLM.from_pretrained(tiny_llama_source)
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            if parameter.dim() == 2:
                stored = kind if "layers" in name else kind.of_tables
                parameter.copy_(dequantized_torch(quantize(parameter, stored.bits), torch.float32))
    reference = Reference(wide)

    async def main() -> None:
        agreed = compared = 0
        with ranks(tmp_path, rank_spec(tmp_path / "model", Phase.DECODE, "d0", chunk_tokens=80)) as (decode,):
            async with attached(None, decode) as workers:
                for length in (3, 17, 100, 200):
                    prompt = [2, *range(3, 2 + length)]
                    answer = await workers.local(request(prompt, max_tokens=COUNT))
                    assert answer.error is None
                    agreed += reference.agreed(prompt, reference.generate(prompt, COUNT), answer.tokens)
                    compared += COUNT
                await workers.idle()
        assert agreed > compared / 4, "the comparison says little: most tokens come after a difference"

    asyncio.run(main())
