"""Preparing: what it makes, what it refuses and how it says so, and that nothing half-made is ever read."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diptych.core.errors import ModelError
from diptych.core.layout import DType
from diptych.core.model import read_card
from diptych.engine.prepared import default_prepared_dir, find_or_prepare, open_prepared, prepare
from safetensors.torch import load_file, save_file


@pytest.fixture
def source(tiny_llama_source, tmp_path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(tiny_llama_source, tmp_path / "spoilt")


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def refused(source, out, match):
    with pytest.raises(ModelError, match=match):
        prepare(str(source), out, dtype=DType.FLOAT32)
    assert not out.exists()
    assert list(out.parent.glob(".preparing-*")) == []


def change_weights(source, change):
    file = source / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_config(source, **changes):
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_card(tiny_gemma3_dir):
    card = read_card(tiny_gemma3_dir)
    assert (card.name, card.vocab_size, card.max_context, card.bos_token_id, card.eos_token_ids) == ("tiny-gemma3", 512, 1024, 2, (1,))
    assert [(group.kind, group.window, group.layers) for group in card.cache_groups()] == [("full", 0, (2,)), ("window", 24, (0, 1, 3))]
    assert card.weights_bytes <= (tiny_gemma3_dir / "weights.safetensors").stat().st_size
    assert card.dtype is DType.FLOAT32
    assert not card.has_chat_template


def test_fingerprint_is_of_weights_and_dtype(source, tmp_path, tiny_llama_dir):
    same = prepare(str(source), tmp_path / "same", dtype=DType.FLOAT32)
    narrow = prepare(str(source), tmp_path / "narrow", dtype=DType.BFLOAT16)
    change_weights(source, lambda tensors: tensors["model.norm.weight"].add_(1))
    other = prepare(str(source), tmp_path / "other", dtype=DType.FLOAT32)
    assert same.fingerprint == read_card(tiny_llama_dir).fingerprint
    assert len({same.fingerprint, narrow.fingerprint, other.fingerprint}) == 3


def test_sharded(source, tmp_path, tiny_llama_dir):
    file = source / "model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, source / shard, metadata={"format": "pt"})
    file.unlink()
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert prepare(str(source), tmp_path / "out", dtype=DType.FLOAT32).fingerprint == read_card(tiny_llama_dir).fingerprint
    (source / "model-00002-of-00002.safetensors").unlink()
    refused(source, tmp_path / "second", "model-00002-of-00002.safetensors is missing")


def test_refuses_a_missing_tensor(source, tmp_path):
    change_weights(source, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refused(source, tmp_path / "out", r"lacks model\.layers\.1\.mlp\.up_proj\.weight")


def test_refuses_an_extra_tensor(source, tmp_path):
    change_weights(source, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    refused(source, tmp_path / "out", r"does not use: model\.layers\.0\.self_attn\.q_proj\.bias")


def test_refuses_a_value_that_is_not_finite(source, tmp_path):
    change_weights(source, lambda tensors: tensors["model.layers.2.mlp.down_proj.weight"][3].fill_(torch.nan))
    refused(source, tmp_path / "out", r"model\.layers\.2\.mlp\.down_proj\.weight has values that are not finite")


def test_refuses_a_wrong_shape(source, tmp_path):
    change_weights(source, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(500, 64)}))
    refused(source, tmp_path / "out", r"head has shape \(500, 64\), not \(512, 64\)")


def test_refuses_a_truncated_file(source, tmp_path):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(source, tmp_path / "out", "model.safetensors is damaged or cut short")


def test_refuses_pickled_weights(source, tmp_path):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused(source, tmp_path / "out", r"pytorch_model\.bin is pickled, and pickled weights are never loaded")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "gpt2"}, r"lacks transformer\.h\.0"),
        ({"model_type": "no-such-model"}, "no-such-model"),
        ({"attention_bias": True}, r"lacks model\.layers\.0\.self_attn\.k_proj\.bias"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_refuses_what_it_would_compute_wrongly(source, tmp_path, changes, match):
    change_config(source, **changes)
    refused(source, tmp_path / "out", match)


@pytest.mark.parametrize(
    "changes",
    [{"hidden_act": "relu"}, {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}],
    ids=lambda value: next(iter(value)),
)
def test_what_the_fast_path_lacks_takes_the_slow_one(source, tmp_path, changes):
    assert prepare(str(source), tmp_path / "fast", dtype=DType.FLOAT32).slow_path is None
    change_config(source, **changes)
    assert prepare(str(source), tmp_path / "slow", dtype=DType.FLOAT32).slow_path is not None


def test_refuses_what_is_no_model(tmp_path):
    refused(tmp_path, tmp_path / "out", "no config.json")
    refused("/no/such/model", tmp_path / "out", "neither a Hugging Face directory nor a GGUF file")
    bad = tmp_path / "model.gguf"
    bad.write_bytes(b"GGUF nonsense")
    refused(bad, tmp_path / "out", "damaged or not GGUF")


def test_a_hub_name_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("diptych-tests/no-such-model", tmp_path / "out", "diptych-tests/no-such-model is not a path here and cannot be had")


def test_chat_template(source, tmp_path):
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": "from the config"}))
    prepare(str(source), tmp_path / "own", dtype=DType.FLOAT32)
    assert (tmp_path / "own" / "chat_template.jinja").read_text() == "from the config"
    (tmp_path / "other.jinja").write_text("given")
    card = prepare(str(source), tmp_path / "given", dtype=DType.FLOAT32, chat_template=tmp_path / "other.jinja", name="named")
    assert (tmp_path / "given" / "chat_template.jinja").read_text() == "given"
    assert (card.name, card.has_chat_template) == ("named", True)
    with pytest.raises(ModelError, match="no chat template"):
        prepare(str(source), tmp_path / "out", dtype=DType.FLOAT32, chat_template=tmp_path / "missing.jinja")


def test_end_tokens_of_config_and_generation_config(source, tmp_path):
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 106]}))
    assert prepare(str(source), tmp_path / "out", dtype=DType.FLOAT32).eos_token_ids == (1, 106)


def test_prepared_once_and_found_again(source, home):
    shares = []
    first = find_or_prepare(str(source), dtype=DType.FLOAT32, progress=lambda what, share: shares.append((what, share)))
    assert first.parent == home / "models"
    assert shares[-1] == ("writing weights", 1.0)
    stamp = (first / "card.json").stat().st_mtime_ns
    assert find_or_prepare(str(source), dtype=DType.FLOAT32) == first
    assert (first / "card.json").stat().st_mtime_ns == stamp
    assert find_or_prepare(str(first), dtype=DType.FLOAT32) == first
    with pytest.raises(ModelError, match="prepared as float32, not bfloat16"):
        find_or_prepare(str(first), dtype=DType.BFLOAT16)
    change_weights(source, lambda tensors: tensors["model.norm.weight"].add_(1))
    assert default_prepared_dir(str(source), dtype=DType.FLOAT32) != first


def test_what_a_killed_preparation_left_is_neither_read_nor_kept(source, home):
    left = home / "models" / ".preparing-dead" / "model"
    left.mkdir(parents=True)
    (left / "weights.safetensors").write_bytes(b"half")
    find_or_prepare(str(source), dtype=DType.FLOAT32)
    assert not left.parent.exists()


def _prepare_at_once(source, barrier):
    torch.set_num_threads(1)
    barrier.wait(60)
    open_prepared(find_or_prepare(str(source), dtype=DType.FLOAT32))


def test_two_processes_prepare_the_same_model(source, home):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_prepare_at_once, args=(source, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list((home / "models").iterdir())) == 1


def test_opening_refuses_what_does_not_fit_the_card(tiny_llama_dir, tmp_path):
    damaged = shutil.copytree(tiny_llama_dir, tmp_path / "damaged")
    weights = damaged / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    with pytest.raises(ModelError, match="cannot be read"):
        open_prepared(damaged)
    weights.write_bytes(whole.replace(b'"0.down"', b'"0.town"', 1))
    with pytest.raises(ModelError, match=r"0\.(d|t)own"):
        open_prepared(damaged)
    weights.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        open_prepared(damaged)
    (damaged / "card.json").unlink()
    with pytest.raises(ModelError, match="not a prepared model"):
        open_prepared(damaged)


def test_serving_does_not_import_transformers(tiny_llama_dir):
    code = (
        "import sys; from pathlib import Path; import diptych.engine.engine; from diptych.engine.prepared import open_prepared\n"
        f"open_prepared(Path({str(tiny_llama_dir)!r}))\n"
        "assert not {'transformers', 'huggingface_hub', 'tokenizers', 'accelerate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)
