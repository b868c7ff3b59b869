"""What the engine answers: draws, slots, logprobs, and how much memory it takes."""

from __future__ import annotations

import pytest
import torch
from diptych.core.layout import DType
from diptych.core.sampling import SamplingParams
from diptych.engine import sampler
from diptych.engine.batch import Draw, Row
from diptych.engine.prepared import prepare
from diptych.kernels import sampling as kernels

GREEDY = SamplingParams(temperature=0.0)


def test_a_row_without_tokens_reads_the_last_drawn_of_its_slot(bench, prompt, tiny_gemma3_dir):
    ids = prompt(20)
    fed = bench(tiny_gemma3_dir)
    tables = fed.table(30)
    first = fed.prefill(ids, tables).token_id
    given = fed.step(Row(3, 20, (first,), tables, (Draw(GREEDY, 1),)))[0]
    taken = next(fed.decode(20, 1, tables))
    assert given == taken


def test_seeded_draws_do_not_depend_on_the_batch(bench, prompt, tiny_gemma3_dir):
    sampling = SamplingParams(temperature=1.3, seed=11, top_p=0.95)
    ids = prompt(30)
    alone = [drawn.token_id for drawn in bench(tiny_gemma3_dir).generate(ids, 12, chunk=7, sampling=sampling)]
    both = bench(tiny_gemma3_dir, seed=5)
    tables, others = both.table(50), both.table(80)
    out = [both.prefill(ids, tables, slot=1, sampling=sampling).token_id]
    both.prefill(prompt(40, seed=3), others, slot=2)
    for index in range(1, 12):
        rows = (Row(2, 39 + index, (), others, (Draw(GREEDY, index),)), Row(1, 29 + index, (), tables, (Draw(sampling, index),)))
        out.append(both.step(*rows)[1].token_id)
    assert out == alone
    assert len(set(alone)) > 3


def test_choices_draw_differently(bench, prompt, tiny_llama_dir):
    sampling = SamplingParams(temperature=2.0, seed=1)
    bench_ = bench(tiny_llama_dir)
    tables = bench_.table(20)
    rows = (Row(0, 0, tuple(prompt(20)), tables, (Draw(sampling, 0, choice=0),)),)
    first = bench_.step(*rows)[0]
    others = {bench_.step(Row(0, 0, tuple(prompt(20)), tables, (Draw(sampling, 0, choice=c),)))[0].token_id for c in range(1, 8)}
    assert len(others | {first.token_id}) > 4


def test_logprobs(bench, prompt, tiny_llama_dir):
    bench_ = bench(tiny_llama_dir)
    tables = bench_.table(20)
    row = Row(0, 0, tuple(prompt(20)), tables, (Draw(SamplingParams(temperature=0.0, logprobs=3), 0),))
    (drawn,) = bench_.step(row)
    assert drawn.top[0] == (drawn.token_id, drawn.logprob)
    assert [value for _, value in drawn.top] == sorted((value for _, value in drawn.top), reverse=True)
    assert len(drawn.top) == 3
    (none,) = bench_.step(Row(0, 0, tuple(prompt(20)), tables, (Draw(SamplingParams(temperature=0.0, logprobs=0), 0),)))
    assert none.top == ()
    assert none.logprob == drawn.logprob


def test_a_step_that_draws_nothing(bench, prompt, tiny_llama_dir):
    bench_ = bench(tiny_llama_dir)
    assert bench_.step(Row(0, 0, tuple(prompt(20)), bench_.table(20), ())) == (None,)


def test_only_its_own_blocks_are_written(bench, prompt, tiny_gemma3_dir):
    bench_ = bench(tiny_gemma3_dir)
    for group in bench_.caches:
        for cache in group:
            cache.fill_(7.0)
    tables = bench_.table(40)
    bench_.prefill(prompt(40), tables)
    for table, group in zip(tables, bench_.caches, strict=True):
        for cache in group:
            others = [block for block in range(len(cache)) if block not in table]
            assert bool((cache[others] == 7.0).all())
            assert bool((cache[table[2]][:, :, 8:] == 7.0).all())
            assert not bool((cache[table[2]][:, :, :8] == 7.0).any())


def test_warm_up_leaves_the_engine_as_new(bench, prompt, tiny_gemma3_dir):
    cold, warm = bench(tiny_gemma3_dir), bench(tiny_gemma3_dir)
    warm.engine.warm_up()
    assert [d.token_id for d in cold.generate(prompt(20), 5)] == [d.token_id for d in warm.generate(prompt(20), 5)]


def test_on_a_gpu_every_kind_of_draw_is_launched_before_anybody_waits(bench, prompt, monkeypatch, tiny_gemma3_source, tmp_path):
    """With all limits and without, from logits as they are and from changed ones: so many are compiled."""
    prepare(str(tiny_gemma3_source), tmp_path / "narrow", dtype=DType.BFLOAT16)
    cold, warm = bench(tmp_path / "narrow"), bench(tmp_path / "narrow")
    asked = set()

    def draw(logits, asks):
        asked.update((logits.dtype, each.top_k, each.top_p, each.min_p) for each in asks)
        return kernels.draw(logits, asks)

    monkeypatch.setattr(sampler, "draw", draw)
    warm.engine._launch_the_rest()
    monkeypatch.undo()
    assert asked == {(dtype, *limits) for dtype in (torch.bfloat16, torch.float32) for limits in ((0, 1.0, 0.0), (1, 0.5, 0.5))}
    assert [d.token_id for d in cold.generate(prompt(20), 5)] == [d.token_id for d in warm.generate(prompt(20), 5)]


def test_bfloat16_follows_float32(bench, prompt, tiny_gemma3_source, tiny_gemma3_dir, tmp_path):
    """Logprobs of the same prompts agree to a few bf16 roundings."""

    prepare(str(tiny_gemma3_source), tmp_path / "narrow", dtype=DType.BFLOAT16)
    sampling = SamplingParams(temperature=0.0, logprobs=20)
    for length in (1, 30, 90):
        wide, narrow = (bench(d).generate(prompt(length), 1, sampling=sampling)[0] for d in (tiny_gemma3_dir, tmp_path / "narrow"))
        known = dict(narrow.top)
        shared = [(value, known[token]) for token, value in wide.top if token in known]
        assert len(shared) >= 12
        assert [n for _, n in shared] == pytest.approx([w for w, _ in shared], abs=0.25)
    assert torch.backends.mkldnn.enabled


def test_a_first_step_as_large_as_any_takes_one_block(bench, tiny_gemma3_dir):
    """What a GPU is asked for before its pool has a size: a chunk behind a long context, then a row for each slot."""
    made = bench(tiny_gemma3_dir, kv_tokens=16)
    made.engine.warm_up(tokens=40, context=700, rows=8)
    assert all(len(cache) == 1 and cache.abs().sum() > 0 for group in made.caches for cache in group)


def test_caches_are_changed_for_others_and_a_layer_is_noted_before_it_is_told(bench, prompt, tiny_llama_dir):
    made, told = bench(tiny_llama_dir), []
    first = made.caches
    made.caches = [[torch.zeros_like(cache) for cache in group] for group in first]
    made.engine.hold(made.caches, lambda layer: told.append(("stored", layer)))
    ids = prompt(16)
    made.run(Row(0, 0, tuple(ids), made.table(16)), on_layer=lambda layer: told.append(("told", layer)))
    assert told == [(what, layer) for layer in range(3) for what in ("stored", "told")]
    assert all(cache.abs().sum() > 0 for group in made.caches for cache in group)
    assert not any(cache.any() for group in first for cache in group)
