"""The slow path: decoders that transformers computes over our cache, and those it refuses; tiny and random, in fp32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diptych.core.errors import ConfigError, ModelError
from diptych.core.layout import DType
from diptych.core.model import read_card
from diptych.core.sampling import SamplingParams
from diptych.engine.batch import Draw, Row
from diptych.engine.engine import Engine
from diptych.engine.foreign import TransformersDecoder
from diptych.engine.inputs import CPU, make_inputs
from diptych.engine.prepared import open_prepared, prepare
from safetensors.torch import load_file, save_file

COMMON = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 512}
COMMON |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
GATED = COMMON | {"intermediate_size": 96, "num_key_value_heads": 2}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 24}
MLA = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 128}
LONGROPE |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
VARIANTS = {
    "biogpt": COMMON | {"intermediate_size": 96},  # positions from its own table
    "cohere": GATED | {"logit_scale": 1.5},
    "cohere2": GATED | MIXED | {"logit_scale": 1.5},  # no rotary embedding in full layers
    "exaone4": GATED | MIXED,
    "glm": GATED | {"head_dim": 16},
    "glm4": GATED | {"head_dim": 16},
    "gpt2": COMMON,
    "gpt_bigcode": COMMON,  # one KV head
    "gpt_neox": COMMON | {"intermediate_size": 96, "use_parallel_residual": True},
    "granite": GATED | {"logits_scaling": 2.0, "attention_multiplier": 0.1, "residual_multiplier": 0.5},
    "mixtral": GATED | {"num_local_experts": 4},
    "nemotron": GATED,
    "olmo2": GATED,
    "phi": GATED,
    "smollm3": GATED | {"no_rope_layer_interval": 2},
    "stablelm": GATED | {"use_parallel_residual": True},
    "starcoder2": GATED | {"sliding_window": 20},
    # Settings of our own families that their fast path lacks.
    "opt-350m": COMMON | {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "opt-silu": COMMON | {"ffn_dim": 96, "word_embed_proj_dim": 64, "activation_function": "silu"},
    "phi3-partial": GATED | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "vaultgemma": GATED | MIXED | {"head_dim": 32, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
}
WINDOWS = {"cohere2": (24, 0, 24), "exaone4": (24, 0, 24), "vaultgemma": (24, 0, 24), "starcoder2": (20, 20, 20)}
COUNT = 12
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def save(save_random):
    """Write a random model of a type; returns it."""

    def write(directory: Path, kind: str, settings: dict) -> torch.nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), attn_implementation="eager")
        save_random(model, directory)
        model.generation_config.eos_token_id = None  # an end token is a token like any other here
        return model.eval()

    return write


@pytest.fixture(scope="module")
def phi(save, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("phi")
    save(directory, "phi", VARIANTS["phi"])
    return directory


@pytest.fixture
def source(phi, tmp_path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(phi, tmp_path / "spoilt")


def tokens(model, ids, count):
    with torch.inference_mode():
        out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("kind", VARIANTS)
def test_same_as_transformers(save, bench, prompt, tmp_path, kind):
    model = save(tmp_path / "source", kind.partition("-")[0], VARIANTS[kind])
    card = prepare(str(tmp_path / "source"), tmp_path / "out", dtype=DType.FLOAT32)
    assert card.decoder.windows == WINDOWS.get(kind, (0, 0, 0))
    assert card.slow_path is not None
    assert type(model).__name__ in card.slow_path
    ids, bench_ = prompt(75), bench(tmp_path / "out")
    row = Row(0, 0, tuple(ids), bench_.table(75), (Draw(GREEDY, 0),))
    with torch.inference_mode():
        inputs = make_inputs((row,), [0], bench_.layout.groups, block_size=16, dtype=torch.float32)
        ours = bench_.engine._decoder.logits(inputs, None)[0]
        theirs = model(torch.tensor([ids])).logits[0, -1]
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert [drawn.token_id for drawn in bench_.generate(ids, COUNT, chunk=30)] == tokens(model, ids, COUNT)


@pytest.mark.parametrize("kind", ["cohere2", "mixtral"])
def test_rows_of_every_kind_in_one_batch_and_a_cached_prefix(save, bench, prompt, tmp_path, kind):
    model = save(tmp_path / "source", kind, VARIANTS[kind])
    prepare(str(tmp_path / "source"), tmp_path / "out", dtype=DType.FLOAT32)
    bench_, shared = bench(tmp_path / "out"), prompt(48)
    prompts = [shared + prompt(9, seed=1)[1:], prompt(5, seed=2), shared + prompt(30, seed=3)[1:], prompt(70, seed=4)]
    expected = [tokens(model, ids, 3) for ids in prompts]
    tables = [bench_.table(len(ids) + 3) for ids in prompts]
    tables[2] = tuple(old[:3] + new[3:] for old, new in zip(tables[0], tables[2], strict=True))
    for slot in (0, 1):
        assert bench_.prefill(prompts[slot], tables[slot], slot=slot).token_id == expected[slot][0]
    rows = [Row(slot, len(prompts[slot]), (), bench_.passed(tables[slot], len(prompts[slot])), (Draw(GREEDY, 1),)) for slot in (0, 1)]
    rows.insert(1, Row(3, 0, tuple(prompts[3][:45]), tables[3], ()))
    rows.insert(0, Row(2, 48, tuple(prompts[2][48:]), bench_.passed(tables[2], 48), (Draw(GREEDY, 0),)))
    assert [each and each.token_id for each in bench_.step(*rows)] == [expected[2][0], expected[0][1], None, expected[1][1]]
    (last,) = bench_.step(Row(3, 45, tuple(prompts[3][45:]), bench_.passed(tables[3], 45), (Draw(GREEDY, 0),)))
    assert last.token_id == expected[3][0]


def test_on_layer_comes_after_each_layers_kv_is_stored(bench, prompt, phi, tmp_path):
    prepare(str(phi), tmp_path / "out", dtype=DType.FLOAT32)
    bench_ = bench(tmp_path / "out")
    tables, seen = bench_.table(20), []

    def stored(layer):
        seen.append((layer, *(bool(cache[tables[0][1]].any()) for cache in bench_.caches[0])))

    assert bench_.step(Row(0, 0, tuple(prompt(20)), tables, ()), on_layer=stored) == (None,)
    assert seen == [(0, True, False, False), (1, True, True, False), (2, True, True, True)]


def test_the_weights_stay_where_they_are_mapped(phi, tmp_path):
    """Workers of a host share the pages only if no worker copies them."""
    prepare(str(phi), tmp_path / "out", dtype=DType.FLOAT32)
    model = open_prepared(tmp_path / "out")
    caches = [[torch.zeros(4, 2, 2, 16, 16) for _ in range(3)]]
    module = Engine(model, caches, block_size=16, max_slots=1)._decoder._module
    mapped = {tensor.data_ptr() for tensor in model.tensors.values()}
    assert {parameter.data_ptr() for parameter in module.parameters()} == mapped


def test_a_tied_tensor_is_written_once(save, tmp_path):
    save(tmp_path / "source", "gpt2", VARIANTS["gpt2"])
    prepare(str(tmp_path / "source"), tmp_path / "out", dtype=DType.BFLOAT16)
    names = open_prepared(tmp_path / "out").tensors
    assert ("transformer.wte.weight" in names, "lm_head.weight" in names) == (True, False)


def test_it_is_not_spread_over_ranks(phi, tmp_path):
    card = prepare(str(phi), tmp_path / "out", dtype=DType.FLOAT32)
    assert read_card(tmp_path / "out") == card
    for spread in ({"tp": 2}, {"stages": (1, 2)}):
        with pytest.raises(ConfigError, match=r"runs through transformers, slower\. So it cannot be spread over ranks"):
            card.layout(block_size=16, kv_tokens=64, **spread)


def refused(source: Path, out: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        prepare(str(source), out, dtype=DType.FLOAT32)
    assert not out.exists()


@pytest.mark.parametrize(
    ("kind", "settings", "match"),
    [
        ("mamba", COMMON, "keeps a state that is not a KV cache"),
        ("rwkv", COMMON, "keeps a state that is not a KV cache"),
        ("jamba", GATED, "keeps a state that is not a KV cache"),
        ("lfm2", GATED | {"layer_types": ["conv", "full_attention", "conv"]}, "layers of type conv"),
        ("llama4_text", GATED, "layers of type chunked_attention"),
        ("bloom", COMMON, "does not go through transformers' attention interface"),  # ALiBi
        ("falcon", COMMON, "does not go through transformers' attention interface"),
        ("gptj", COMMON | {"rotary_dim": 8}, "does not go through transformers' attention interface"),
        ("gpt_oss", GATED | {"num_local_experts": 4}, "its attention asks for s_aux"),
        ("deepseek_v3", GATED | MLA, "queries, keys and values are of sizes 24, 24 and 16"),
        ("bart", COMMON | {"d_model": 64, "encoder_layers": 1}, "neither causal nor a sliding window"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_refuses_what_is_no_decoder_over_keys_and_values(save, tmp_path, kind, settings, match):
    save(tmp_path / "source", kind, settings)
    refused(tmp_path / "source", tmp_path / "out", f"type {kind!r} have no fast path .*, and this one cannot .*{match}")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, "is_encoder_decoder is True"),
        ({"model_type": "gemma3"}, r"made of several models \(text_config, vision_config\)"),
        ({"model_type": "vit"}, "transformers has no causal language model of that type"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ({"rope_parameters": LONGROPE}, "rotary embedding of type longrope changes with the length"),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) and "model_type" in value else "",
)
def test_refuses_what_the_config_says_already(source, tmp_path, changes, match):
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    refused(source, tmp_path / "out", match)


def change_weights(source, change):
    file = source / "model.safetensors"
    held = load_file(file)
    change(held)
    save_file(held, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda held: held.pop("model.layers.1.mlp.fc1.weight"), r"lacks model\.layers\.1\.mlp\.fc1\.weight\."),
        (lambda held: held.update({"model.layers.0.extra": torch.zeros(3)}), r"does not use: model\.layers\.0\.extra"),
        (lambda held: held["lm_head.weight"][3].fill_(torch.nan), r"lm_head\.weight has values that are not finite"),
        (lambda held: held.update({"lm_head.weight": torch.zeros(500, 64)}), r"lm_head\.weight has shape \(500, 64\), not \(512, 64\)"),
        (lambda held: held.update({"lm_head.bias": torch.zeros(512, dtype=torch.int8)}), r"lm_head\.bias is torch\.int8; quantised"),
    ],
    ids=["missing", "extra", "not finite", "another shape", "another type"],
)
def test_refuses_a_wrong_tensor_by_name(source, tmp_path, change, match):
    change_weights(source, change)
    refused(source, tmp_path / "out", match)


def test_refuses_a_truncated_and_a_pickled_file(source, tmp_path):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(source, tmp_path / "out", r"model\.safetensors is damaged or cut short")
    file.rename(source / "pytorch_model.bin")
    refused(source, tmp_path / "out", "pickled weights are never loaded")


def test_opening_refuses_what_does_not_fit_the_card(phi, tmp_path):
    prepare(str(phi), tmp_path / "out", dtype=DType.FLOAT32)
    weights = tmp_path / "out" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"layers.1.mlp.fc1.bias", b"layers.1.mlp.fc3.bias", 1))
    model = open_prepared(tmp_path / "out")
    with pytest.raises(ModelError, match=r"lacks model\.layers\.1\.mlp\.fc1\.bias"):
        TransformersDecoder(model.card, model.tensors, CPU)


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16])
def test_a_model_that_computes_something_else_over_a_cache_is_refused(phi, tmp_path, monkeypatch, dtype):
    """As if attention were told less than it needs: here, a scale."""
    right = TransformersDecoder.attend
    monkeypatch.setattr(TransformersDecoder, "attend", lambda self, layer, *heads: right(self, layer, *heads[:3], 1.0, None))
    with pytest.raises(ModelError, match="over a paged cache their logits differ"):
        prepare(str(phi), tmp_path / "out", dtype=dtype)
