"""Every family against transformers, tiny and random: logits within 1e-4 and greedy tokens equal, in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diptych.core.errors import ModelError
from diptych.core.layout import DType
from diptych.core.sampling import SamplingParams
from diptych.engine.batch import Draw, Row
from diptych.engine.families import FAMILIES
from diptych.engine.inputs import make_inputs
from diptych.engine.prepared import prepare

LAYERS, HIDDEN = 3, 64
COMMON = {"vocab_size": 512, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "max_position_embeddings": 512}
COMMON |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
GATED = COMMON | {"intermediate_size": 96, "num_key_value_heads": 2}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 24}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS = {
    "llama": ("llama", GATED),
    "llama-biases": ("llama", GATED | {"attention_bias": True, "mlp_bias": True}),
    "llama-dynamic": ("llama", GATED | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-yarn": ("llama", GATED | {"rope_parameters": YARN}),
    "llama-yarn-scales": (
        "llama",
        GATED | {"rope_parameters": YARN | {"mscale": 0.8, "mscale_all_dim": 0.4, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}},
    ),
    "mistral": ("mistral", GATED | {"sliding_window": None}),
    "mistral-window": ("mistral", GATED | {"sliding_window": 20, "head_dim": 24}),
    "qwen2": ("qwen2", GATED),
    "qwen2-window": (
        "qwen2",
        GATED | {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("qwen3", GATED | {"head_dim": 32}),
    "qwen3-biases": ("qwen3", GATED | {"attention_bias": True, "head_dim": 16}),
    "gemma2": (
        "gemma2",
        GATED | MIXED | {"head_dim": 32, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("gemma3_text", GATED | MIXED | {"head_dim": 32, "query_pre_attn_scalar": 40}),
    "phi3": ("phi3", GATED),
    "phi3-window": ("phi3", GATED | {"sliding_window": 31}),
    "opt": ("opt", COMMON | {"ffn_dim": 96, "word_embed_proj_dim": HIDDEN}),
    "opt-no-biases": ("opt", COMMON | {"ffn_dim": 96, "enable_bias": False}),
}
COUNT = 16


@pytest.fixture(scope="module")
def save(save_random):
    """Write a random model of a family; returns it. Eager attention: transformers' fused one leaves Gemma 2's caps out."""

    def write(directory: Path, kind: str, settings: dict) -> torch.nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), attn_implementation="eager")
        save_random(model, directory)
        return model.eval()

    return write


def test_every_family_has_a_variant():
    assert {kind for kind, _ in VARIANTS.values()} == set(FAMILIES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_as_transformers(save, bench, prompt, tmp_path, variant):
    model = save(tmp_path / "source", *VARIANTS[variant])
    prepare(str(tmp_path / "source"), tmp_path / "out", dtype=DType.FLOAT32)
    ids = prompt(75)
    bench_ = bench(tmp_path / "out")
    row = Row(0, 0, tuple(ids), bench_.table(75), (Draw(SamplingParams(temperature=0.0), 0),))
    with torch.inference_mode():
        inputs = make_inputs((row,), [0], bench_.layout.groups, block_size=16, dtype=torch.float32)
        ours = bench_.engine._decoder.logits(inputs, None)[0]
        theirs = model(torch.tensor([ids])).logits[0, -1]
        out = model.generate(torch.tensor([ids]), max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False)
    assert theirs.std() > 0.3
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert [drawn.token_id for drawn in bench_.generate(ids, COUNT, chunk=30)] == out[0, 75:].tolist()


def refuse(source: Path, out: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        prepare(str(source), out, dtype=DType.FLOAT32)


def test_refuses_longrope(save, tmp_path):
    factors = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    save(tmp_path / "long", "phi3", GATED | {"rope_parameters": factors, "original_max_position_embeddings": 128})
    refuse(tmp_path / "long", tmp_path / "out", "longrope")
