"""Models with weights of 8 and 4 bits: prepared, refused, cut among ranks, and computed as the same weights without."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from diptych.core.errors import ConfigError, ModelError
from diptych.core.layout import DType
from diptych.core.model import CARD, WEIGHTS, Decoder, read_card
from diptych.core.quantization import Quantization
from diptych.engine.location import default_prepared_dir
from diptych.engine.placing import Upload
from diptych.engine.prepared import find_or_prepare, open_prepared, prepare
from diptych.engine.shards import Shard
from diptych.engine.weights import SCALES, product, shapes_of, write_weights
from diptych.kernels.quantized import Quantized, dequantized_torch

KINDS = [Quantization.INT8, Quantization.INT4]


@pytest.fixture(scope="module", params=KINDS)
def narrow(request, tiny_llama_source: Path, tmp_path_factory) -> Path:
    """A tiny Llama of few bits a weight, computed in float32."""
    out = tmp_path_factory.mktemp("quantized") / "model"
    prepare(str(tiny_llama_source), out, dtype=DType.FLOAT32, quantization=request.param)
    return out


def without(directory: Path, out: Path) -> Path:
    """The same weights as a model that is not quantised."""
    model = open_prepared(directory)
    assert isinstance(model.card.decoder, Decoder)
    shapes = shapes_of(model.card.decoder, model.card.vocab_size, model.card.dtype)

    def make(name: str) -> torch.Tensor:
        kept = product(model.tensors, name)
        return dequantized_torch(kept, torch.float32) if isinstance(kept, Quantized) else kept

    out.mkdir()
    list(write_weights(out / WEIGHTS, shapes, make, hashlib.sha256()))
    (out / CARD).write_text(model.card.model_copy(update={"quantization": Quantization.NONE}).model_dump_json())
    return out


def test_it_computes_with_the_weights_it_has(narrow, tmp_path, bench, prompt):
    tokens = prompt(70)
    drawn = [each.token_id for each in bench(narrow).generate(tokens, 20)]
    assert drawn == [each.token_id for each in bench(without(narrow, tmp_path / "wide")).generate(tokens, 20)]
    assert len(set(drawn)) > 3


def test_what_is_stored(narrow, tiny_llama_dir):
    card, wide = read_card(narrow), read_card(tiny_llama_dir)
    tensors = open_prepared(narrow).tensors
    quantised = {name.removesuffix(SCALES) for name in tensors if name.endswith(SCALES)}
    assert quantised == {"embed", "head", *(f"{layer}.{part}" for layer in range(3) for part in ("qkv", "o", "gate_up", "down"))}
    assert card.weights_bytes == sum(each.nbytes for each in tensors.values()) < wide.weights_bytes / 2
    for name in quantised:
        matrix = product(tensors, name)
        assert isinstance(matrix, Quantized)
        stored = card.table_bytes if name in ("embed", "head") else card.matrix_bytes
        assert stored(*matrix.shape) == matrix.values.nbytes + matrix.scales.nbytes
    assert str(card.quantization) in card.precision


def test_other_weights_are_another_model(tiny_llama_source, narrow, tiny_llama_dir, tmp_path):
    other = next(kind for kind in KINDS if kind is not read_card(narrow).quantization)
    cards = [
        read_card(narrow),
        read_card(tiny_llama_dir),
        prepare(str(tiny_llama_source), tmp_path / "o", dtype=DType.FLOAT32, quantization=other),
    ]
    layouts = [card.layout(block_size=16, kv_tokens=64) for card in cards]
    assert len({card.fingerprint for card in cards}) == 3
    assert "fingerprint" in (layouts[0].difference(layouts[1]) or "")
    source = str(tiny_llama_source)
    assert len({default_prepared_dir(source, dtype=DType.FLOAT32, quantization=kind) for kind in Quantization}) == 3


def test_a_prepared_model_stays_what_it_is(narrow):
    with pytest.raises(ModelError, match="was prepared with quantization int") as refused:
        find_or_prepare(str(narrow), dtype=DType.FLOAT32)
    assert refused.value.field == "quantization"
    assert find_or_prepare(str(narrow), dtype=DType.FLOAT32, quantization=read_card(narrow).quantization) == narrow


def test_ranks_have_their_parts(narrow):
    """Rows and columns of two shards, side by side, are the whole; int4 cannot be cut in the middle of a group."""
    model = open_prepared(narrow)
    decoder = model.card.decoder
    assert isinstance(decoder, Decoder)
    if model.card.quantization is Quantization.INT4:
        decoder = decoder.model_copy(update={"intermediate": 64})  # of 96 a half is a group and a half
    shards = [Shard(decoder, 2, number) for number in range(2)]
    whole = dequantized_torch(product(model.tensors, "1.o"), torch.float32)
    parts = [shard.o(model.tensors, 1)[0] for shard in shards]
    assert torch.equal(torch.cat([dequantized_torch(part, torch.float32) for part in parts], 1), whole)
    rows = [part for shard in shards for part, _ in shard.qkv(model.tensors, 1)]
    assert sum(len(part) for part in rows) == len(product(model.tensors, "1.qkv"))


def test_a_cut_through_a_group_is_refused(narrow):
    card = read_card(narrow)
    if card.quantization is Quantization.INT8:
        assert card.layout(block_size=16, kv_tokens=64, tp=2).tp == 2
        return
    with pytest.raises(ConfigError, match=r"tp 2 does not split .* with quantization int4") as refused:
        card.layout(block_size=16, kv_tokens=64, tp=2)
    assert refused.value.field == "tp"


def test_what_cannot_be_quantised_is_refused(write_llama, tmp_path, save_random):
    from transformers import GPT2Config, GPT2LMHeadModel

    write_llama(tmp_path / "odd", intermediate_size=90)
    with pytest.raises(ModelError, match=r"0\.down has 90 inputs, and int4 takes 32 at a time: use int8"):
        prepare(str(tmp_path / "odd"), tmp_path / "out", dtype=DType.BFLOAT16, quantization=Quantization.INT4)
    save_random(GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=64, n_embd=32, n_layer=1, n_head=2)), tmp_path / "gpt2")
    with pytest.raises(ModelError, match="GPT2LMHeadModel runs through transformers, which takes no int8 weights") as refused:
        prepare(str(tmp_path / "gpt2"), tmp_path / "out", dtype=DType.FLOAT32, quantization=Quantization.INT8)
    assert refused.value.field == "quantization"
    assert not (tmp_path / "out").exists()


def test_a_gpu_is_refused(narrow):
    weight = product(open_prepared(narrow).tensors, "head")
    with pytest.raises(ModelError, match="weights are for CPUs"):
        Upload(torch.device("cuda")).product(weight)
