"""The engine against transformers: logits within 1e-4 and greedy tokens equal, in fp32."""

from __future__ import annotations

import pytest
import torch
from diptych.core.layout import DType
from diptych.core.sampling import SamplingParams
from diptych.engine.batch import Draw, Row
from diptych.engine.inputs import make_inputs
from diptych.engine.prepared import prepare

GREEDY = SamplingParams(temperature=0.0)


def reference(source):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()


def reference_tokens(model, prompt, count):
    with torch.inference_mode():
        out = model.generate(torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module", params=["gemma3", "llama"])
def family(request):
    """(Hugging Face directory, prepared directory)"""
    name = request.param
    return request.getfixturevalue(f"tiny_{name}_source"), request.getfixturevalue(f"tiny_{name}_dir")


@pytest.mark.parametrize("length", [1, 15, 16, 17, 70])
def test_logits(family, bench, prompt, length):
    source, prepared = family
    ids = prompt(length)
    bench_ = bench(prepared)
    row = Row(0, 0, tuple(ids), bench_.table(length), (Draw(GREEDY, 0),))
    with torch.inference_mode():
        inputs = make_inputs((row,), [0], bench_.layout.groups, block_size=16, dtype=torch.float32)
        ours = bench_.engine._decoder.logits(inputs, None)[0]
        theirs = reference(source)(torch.tensor([ids])).logits[0, -1]
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [5, 16, 33, 1000])
def test_greedy_tokens_whatever_the_chunks(family, bench, prompt, chunk):
    source, prepared = family
    model = reference(source)
    for length in (3, 40, 100):
        ids = prompt(length, seed=length)
        ours = [drawn.token_id for drawn in bench(prepared).generate(ids, 30, chunk=chunk)]
        assert ours == reference_tokens(model, ids, 30)


def test_rows_of_every_kind_in_one_batch(family, bench, prompt):
    """Decodes of very different lengths, chunks and a fresh prompt in one step draw what each draws alone."""
    source, prepared = family
    model = reference(source)
    prompts = [prompt(length, seed=length) for length in (5, 200, 61, 3, 90)]
    expected = [reference_tokens(model, ids, 6) for ids in prompts]
    bench_ = bench(prepared)
    tables = [bench_.table(len(ids) + 6) for ids in prompts]
    for slot in range(3):
        assert bench_.prefill(prompts[slot], tables[slot], slot=slot).token_id == expected[slot][0]
    half = 45
    mixed = [Row(slot, len(prompts[slot]), (), tables[slot], (Draw(GREEDY, 1),)) for slot in range(3)]
    mixed.insert(1, Row(3, 0, tuple(prompts[3]), tables[3], (Draw(GREEDY, 0),)))
    mixed.insert(0, Row(4, 0, tuple(prompts[4][:half]), tables[4], ()))
    drawn = bench_.step(*mixed)
    assert [each and each.token_id for each in drawn] == [None, expected[0][1], expected[3][0], expected[1][1], expected[2][1]]
    last = Row(4, half, tuple(prompts[4][half:]), tables[4], (Draw(GREEDY, 0),))
    assert bench_.step(last)[0].token_id == expected[4][0]
    for index in range(2, 6):
        rows = [
            Row(slot, len(prompts[slot]) + index - 1, (), bench_.passed(tables[slot], len(prompts[slot])), (Draw(GREEDY, index),))
            for slot in range(3)
        ]
        assert [each.token_id for each in bench_.step(*rows)] == [expected[slot][index] for slot in range(3)]


def test_cached_prefix_of_another_sequence(family, bench, prompt):
    """A second prompt that shares 48 tokens reads their blocks and computes only the rest."""
    source, prepared = family
    shared, bench_ = prompt(48), bench(prepared)
    first, second = shared + prompt(9, seed=1)[1:], shared + prompt(30, seed=2)[1:]
    tables = bench_.table(len(first))
    bench_.prefill(first, tables)
    own = bench_.table(len(second) + 5)
    joined = tuple(old[:3] + new[3:] for old, new in zip(tables, own, strict=True))
    out = [bench_.prefill(second, joined, start=48), *bench_.decode(len(second), 4, joined)]
    assert [drawn.token_id for drawn in out] == reference_tokens(reference(source), second, 5)


def test_on_layer_comes_after_each_layers_kv_is_stored(family, bench, prompt):
    bench_ = bench(family[1])
    tables = bench_.table(20)
    seen = []

    def stored(layer):
        group = next(g for g, each in enumerate(bench_.layout.groups) if layer in each.layers)
        place = bench_.layout.groups[group].layers.index(layer)
        later = [c for g, each in enumerate(bench_.layout.groups) for i, c in enumerate(bench_.caches[g]) if each.layers[i] > layer]
        seen.append((layer, bool(bench_.caches[group][place][tables[group][1]].any()), any(bool(c.any()) for c in later)))

    bench_.step(Row(0, 0, tuple(prompt(20)), tables, ()), on_layer=stored)
    assert seen == [(layer, True, False) for layer in range(bench_.model.card.decoder.layers)]


ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize(
    "changes", [*({"rope_parameters": rope} for rope in ROPES.values()), {"tie_word_embeddings": True}, {"head_dim": 24}], ids=str
)
def test_llama_variants(tmp_path, write_llama, bench, prompt, changes):
    write_llama(tmp_path / "source", **changes)
    prepare(str(tmp_path / "source"), tmp_path / "out", dtype=DType.FLOAT32)
    ids = prompt(90)
    ours = [drawn.token_id for drawn in bench(tmp_path / "out").generate(ids, 12)]
    assert ours == reference_tokens(reference(tmp_path / "source"), ids, 12)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"sliding_window": 7},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ],
    ids=str,
)
def test_gemma3_variants(tmp_path, write_gemma3, bench, prompt, changes):
    write_gemma3(tmp_path / "source", **changes)
    prepare(str(tmp_path / "source"), tmp_path / "out", dtype=DType.FLOAT32)
    ids = prompt(60)
    ours = [drawn.token_id for drawn in bench(tmp_path / "out").generate(ids, 12, chunk=25)]
    assert ours == reference_tokens(reference(tmp_path / "source"), ids, 12)
