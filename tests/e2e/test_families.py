"""Every family through real ranks, prefill and decode apart: the tokens transformers itself generates, in fp32."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diptych.core.fleet import Phase
from diptych.core.layout import DType
from diptych.core.model import read_card
from diptych.core.request import Request
from diptych.engine.families import FAMILIES
from diptych.engine.prepared import prepare
from e2e_harness import Rank, Workers, attached, rank_spec, ranks, request

COMMON = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 512}
COMMON |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
GATED = COMMON | {"intermediate_size": 96, "num_key_value_heads": 2}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 24}
FAST: dict[str, dict[str, Any]] = {
    "llama": GATED,
    "mistral": GATED | {"sliding_window": 20},  # no full cache group at all
    "qwen2": GATED | {"tie_word_embeddings": True},
    "qwen3": GATED | {"head_dim": 32},
    "gemma2": GATED | MIXED | {"head_dim": 32, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0},
    "gemma3_text": GATED | MIXED | {"head_dim": 32, "query_pre_attn_scalar": 40},
    "phi3": GATED | {"sliding_window": 31},
    "opt": COMMON | {"ffn_dim": 96, "word_embed_proj_dim": 64},  # no rotary embedding
}
SLOW: dict[str, dict[str, Any]] = {
    "gpt_neox": COMMON | {"intermediate_size": 96},
    "cohere2": GATED | MIXED | {"logit_scale": 1.5},
}
MORE: dict[str, dict[str, Any]] = {
    "glm4": GATED | {"head_dim": 16},
    "gpt2": COMMON,
    "mixtral": GATED | {"num_local_experts": 4},
    "olmo2": GATED,
    "phi": GATED,
    "starcoder2": GATED | {"sliding_window": 20},
}
SOME = ("mistral", "gemma2", "opt", "gpt_neox")
"""Of every kind of KV that crosses one: windows alone, both, no positions in it, what transformers' own module stores. What an engine makes
of each family is shown without processes (`tests/engine/test_families.py`)."""
COUNT = 20
SHORT, LONG = (3, 47, 120), (1, 15, 16, 17, 31, 32, 33, 64, 100, 200, 333)


def test_every_family_is_here() -> None:
    assert set(FAST) == set(FAMILIES)


@pytest.mark.parametrize("kind", SOME)
def test_disaggregated_as_transformers_generates(kind: str, save_random: Callable[[Any, Path], None], tmp_path: Path) -> None:
    _same_tokens(kind, (FAST | SLOW)[kind], SHORT, save_random, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", [*FAST, *SLOW, *MORE])
def test_disaggregated_as_transformers_generates_at_every_length(
    kind: str, save_random: Callable[[Any, Path], None], tmp_path: Path
) -> None:
    _same_tokens(kind, (FAST | SLOW | MORE)[kind], LONG, save_random, tmp_path)


def _same_tokens(kind: str, settings: dict[str, Any], lengths: tuple[int, ...], save: Callable[[Any, Path], None], directory: Path) -> None:
    """Greedy, apart twice (the second from both prefix caches and beside each other) and locally."""
    prompts = [[2, *random.Random(length).choices(range(3, 512), k=length - 1)] for length in lengths]
    with _served(directory, kind, settings, save) as (pair, expected):
        wanted = [expected(ids) for ids in prompts]
        asyncio.run(_check(pair, prompts, wanted))
        slow = read_card(directory / "model").slow_path
        assert (slow is None) == (kind in FAST)
        assert [slow in rank.log.read_text() if slow else False for rank in pair] == [kind not in FAST] * 2


async def _check(pair: list[Rank], prompts: list[list[int]], wanted: list[tuple[int, ...]]) -> None:
    asked = [request(ids, max_tokens=COUNT) for ids in prompts]
    async with attached(*pair) as workers:
        apart = [await workers.disaggregated(each) for each in asked]
        again = await asyncio.gather(*(workers.disaggregated(each) for each in asked))
        local = await asyncio.gather(*(workers.local(each) for each in asked))
        for answers in (apart, again, local):
            assert [answer.error for answer in answers] == [None] * len(asked)
            assert [answer.tokens for answer in answers] == wanted
        assert all(answer.handed_over is not None for answer in apart)
        assert again[-1].first is not None
        assert again[-1].first.cached_tokens == (len(prompts[-1]) - 1) // 16 * 16
        await _check_choices(workers, request(prompts[-1], max_tokens=COUNT, n=3, temperature=1.0, seed=5))
        await workers.idle()


async def _check_choices(workers: Workers, asked: Request) -> None:
    """Each is what it would be alone, apart and locally."""
    choices = frozenset(range(asked.sampling.n))
    alone = {choice: await workers.disaggregated(replace(asked, finished=choices - {choice})) for choice in choices}
    wanted = {choice: answer.choices[choice].tokens for choice, answer in alone.items()}
    assert len(set(wanted.values())) == len(choices), "choices draw their own noise"
    for together in (await workers.disaggregated(asked), await workers.local(asked)):
        assert {choice: written.tokens for choice, written in together.choices.items()} == wanted


@contextmanager
def _served(
    directory: Path, kind: str, settings: dict[str, Any], save: Callable[[Any, Path], None]
) -> Iterator[tuple[list[Rank], Callable[[list[int]], tuple[int, ...]]]]:
    """A random model of a kind on one prefill and one decode rank, and what transformers generates with it.

    Eager attention: transformers' fused one leaves Gemma 2's caps out.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), attn_implementation="eager").eval()
    save(model, directory / "source")
    model.generation_config.eos_token_id = None  # like the requests, which ignore it
    prepare(str(directory / "source"), directory / "model", dtype=DType.FLOAT32)

    def generate(ids: list[int]) -> tuple[int, ...]:
        with torch.inference_mode():
            out = model.generate(torch.tensor([ids]), max_new_tokens=COUNT, do_sample=False)
        return tuple(out[0, len(ids) :].tolist())

    specs = [rank_spec(directory / "model", Phase.PREFILL, "p0"), rank_spec(directory / "model", Phase.DECODE, "d0", chunk_tokens=16)]
    with ranks(directory, *specs) as pair:
        yield pair, generate
