"""float16: through torch on a CPU too, equal to transformers' within its tolerance; refused where it could not hold the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diptych.core.errors import ModelError
from diptych.core.layout import DType
from diptych.engine.prepared import prepare
from diptych.engine.weights import write_weights
from diptych.kernels.tolerance import may_differ


@pytest.fixture(scope="module")
def half(tiny_llama_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("half") / "llama"
    assert prepare(str(tiny_llama_source), out, dtype=DType.FLOAT16).dtype is DType.FLOAT16
    return out


def test_greedy_tokens_are_transformers_up_to_the_tolerance(half: Path, tiny_llama_source: Path, bench, prompt) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_source, dtype=torch.float16).eval()
    compared = 0
    for seed in range(4):
        ids = prompt(40 + seed, seed=seed)
        ours = [drawn.token_id for drawn in bench(half).generate(ids, 24, chunk=16)]
        for index, token in enumerate(ours):
            with torch.inference_mode():
                logits = model(torch.tensor([[*ids, *ours[:index]]])).logits[0, -1]
            best = int(logits.argmax())
            assert best == token or may_differ(logits, best, token, torch.float16)
            compared += best == token
    assert compared > 80


def test_its_cache_is_half_as_large(half: Path, bench) -> None:
    assert {cache.dtype for group in bench(half).caches for cache in group} == {torch.float16}


def test_gemma_is_refused(tiny_gemma3_source: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gemma3_text models grow beyond what float16 holds.*bfloat16") as caught:
        prepare(str(tiny_gemma3_source), tmp_path / "out", dtype=DType.FLOAT16)
    assert caught.value.field == "dtype"
    assert not (tmp_path / "out").exists()


def test_a_weight_that_float16_cannot_hold_is_named(tmp_path: Path) -> None:
    import hashlib

    with pytest.raises(ModelError, match="Tensor embed has values that float16 cannot hold"):
        list(write_weights(tmp_path / "w", {"embed": ((2,), torch.float16)}, lambda _: torch.tensor([1.0, 1e5]), hashlib.sha256()))


def test_the_card_keeps_it(half: Path) -> None:
    assert json.loads((half / "card.json").read_text())["dtype"] == "float16"
