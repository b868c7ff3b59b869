"""Families whose cache or arithmetic differs most, apart and local: the same tokens in fp32."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diptych.core.fleet import Phase
from diptych.core.layout import DType
from diptych.engine.prepared import prepare
from e2e_harness import attached, rank_spec, ranks, request

COMMON = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 512}
COMMON |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
GATED = COMMON | {"intermediate_size": 96, "num_key_value_heads": 2}
FAMILIES = {
    # No full cache group at all, layers of both kinds with soft caps, and no rotary embedding.
    "mistral": GATED | {"sliding_window": 20},
    "gemma2": GATED | {"sliding_window": 24, "head_dim": 32, "query_pre_attn_scalar": 24},
    "opt": COMMON | {"ffn_dim": 96},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_disaggregated_and_local_write_the_same_tokens(kind: str, save_random: Callable[[Any, Path], None], tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(4)
    save_random(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **FAMILIES[kind])), tmp_path / "source")
    model = tmp_path / "model"
    prepare(str(tmp_path / "source"), model, dtype=DType.FLOAT32)
    specs = [rank_spec(model, Phase.PREFILL, "p0", chunk_tokens=32), rank_spec(model, Phase.DECODE, "d0", chunk_tokens=16)]
    asked = [request([2, *range(10, 9 + length)], max_tokens=24) for length in (3, 16, 47, 120)]
    with ranks(tmp_path, *specs) as pair:

        async def main() -> None:
            async with attached(*pair) as workers:
                apart = [await workers.disaggregated(each) for each in asked]
                local = [await workers.local(each) for each in asked]
                for one, other in zip(apart, local, strict=True):
                    assert (one.error, other.error) == (None, None)
                    assert one.tokens == other.tokens
                    assert one.tokens
                await workers.idle()

        asyncio.run(main())
