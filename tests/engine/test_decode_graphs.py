"""Steps of decodes alone: their inputs against those made from scratch, and padded steps, computed by the code that a GPU captures."""

from __future__ import annotations

import itertools

import pytest
import torch
from diptych.core.layout import CacheGroup, CacheKind, DType
from diptych.core.sampling import SamplingParams
from diptych.engine import inputs as inputs_module
from diptych.engine.batch import NO_BLOCK, Draw, Row
from diptych.engine.decode_graphs import run_again
from diptych.engine.decode_inputs import DecodeInputs, decodes
from diptych.engine.decode_shapes import DecodeShape, decode_shapes, shape_for
from diptych.engine.inputs import make_inputs
from diptych.engine.prepared import prepare
from diptych.kernels.native import native
from hypothesis import given, settings
from hypothesis import strategies as st

BLOCK = 16
GREEDY = (Draw(SamplingParams(temperature=0.0), 0),)
GROUPS = (
    CacheGroup(CacheKind.WINDOW, layers=(0,), kv_heads=2, head_dim=16, dtype=DType.BFLOAT16, window=24),
    CacheGroup(CacheKind.FULL, layers=(1,), kv_heads=1, head_dim=32, dtype=DType.BFLOAT16),
)


@settings(max_examples=200)
@given(st.integers(1, 300), st.integers(1, 200_000), st.integers(1, 300), st.integers(1, 200_000))
def test_every_step_has_the_least_shape_with_room(most, context, rows, reached):
    shapes = decode_shapes(most, context)
    assert list(shapes) == sorted(set(shapes), reverse=True)
    assert shapes[0] == DecodeShape(min(most, 256), context)
    shape = shape_for(shapes, rows, reached)
    if rows > min(most, 256) or reached > context:
        assert shape is None
    else:
        assert shape is not None
        assert shape.rows - rows < max(8, rows)
        assert shape.context <= max(2048, 4 * reached)


def test_shapes_of_a_usual_worker():
    shapes = decode_shapes(32, 32_768)
    assert {shape.rows for shape in shapes} == {1, 2, 4, 8, 16, 24, 32}
    assert {shape.context for shape in shapes} == {2048, 8192, 32_768}


def test_only_decodes_that_draw_are_meant():
    draw = GREEDY
    assert decodes((Row(0, 5, (), ((1,),), draw), Row(1, 9, (7,), ((2,),), draw * 2)))
    assert not decodes((Row(0, 5, (), ((1,),), draw), Row(1, 9, (7,), ((2,),))))
    assert not decodes((Row(0, 5, (1, 2), ((1,),), draw),))


class Sequence:
    """One that decodes: its tables grow, and blocks leave the window."""

    def __init__(self, slot: int, start: int, fresh: itertools.count[int]) -> None:
        self.slot, self.start, self.fresh = slot, start, fresh
        self.blocks: list[list[int]] = [[], []]

    def row(self, token: int | None) -> Row:
        for blocks, group in zip(self.blocks, GROUPS, strict=True):
            while len(blocks) * BLOCK <= self.start:
                blocks.append(next(self.fresh))
            for passed in range(group.first_needed(self.start) // BLOCK):
                blocks[passed] = NO_BLOCK
        return Row(self.slot, self.start, () if token is None else (token,), tuple(map(tuple, self.blocks)), GREEDY)


steps = st.lists(
    st.tuples(st.sampled_from(["on", "on", "on", "leave", "turn", "again"]), st.integers(0, 4), st.sampled_from([None, 5])), max_size=20
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=5), steps)
def test_inputs_that_stay_are_those_made_from_scratch(starts, steps):
    """Rows go on, leave, change places, and lose their blocks to come again with others."""
    fresh = itertools.count(3)
    sequences = [Sequence(slot, start, fresh) for slot, start in enumerate(starts)]
    kept = DecodeInputs(GROUPS, block_size=BLOCK, rows=6, context=120)
    last_drawn = [40 + slot for slot in range(6)]
    for what, which, token in steps:
        rows = [sequence.row(token) for sequence in sequences]
        kept.fill(rows, last_drawn)
        same_as_from_scratch(kept, rows, last_drawn)
        for sequence in sequences:
            sequence.start += 1
        chosen = which % len(sequences)
        if what == "leave" and len(sequences) > 1:
            del sequences[chosen]
        elif what == "turn":
            sequences = [*sequences[chosen:], *sequences[:chosen]]
        elif what == "again":
            sequences[chosen] = Sequence(sequences[chosen].slot, max(0, sequences[chosen].start - which), fresh)


def same_as_from_scratch(kept: DecodeInputs, rows: list[Row], last_drawn: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(inputs_module, "fits", lambda *_: True)
        expected = make_inputs(rows, last_drawn, GROUPS, block_size=BLOCK, dtype=torch.bfloat16)
    for found in (kept.inputs(len(rows)), kept.cut(kept.whole.clone(), len(rows))):
        assert torch.equal(found.token_ids, expected.token_ids)
        assert torch.equal(found.positions, expected.positions)
        assert torch.equal(found.drawn, expected.drawn)
        assert found.last_spans == found.groups[1].spans
        for ours, theirs in zip(found.groups, expected.groups, strict=True):
            assert torch.equal(ours.store, theirs.store)
            (one,), (other,) = ours.spans, theirs.spans
            assert torch.equal(one.tokens, other.tokens)
            assert torch.equal(one.firsts, other.firsts)
            assert torch.equal(one.lasts, other.lasts)
            for row in range(len(rows)):
                used = int(other.lasts[row] // BLOCK - other.firsts[row] // BLOCK + 1)
                assert torch.equal(one.tables[row, :used], other.tables[row, :used])


@pytest.fixture(scope="module", params=["gemma3", "llama"])
def narrow(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("narrow") / request.param
    prepare(str(request.getfixturevalue(f"tiny_{request.param}_source")), directory, dtype=DType.BFLOAT16)
    return directory


SAMPLINGS = [
    SamplingParams(temperature=0.0, logprobs=2),
    SamplingParams(temperature=0.9, seed=3),
    SamplingParams(temperature=0.9, seed=4, top_k=20, top_p=0.9, repetition_penalty=1.2),
]


def answers(made, prompts, count):
    """Tokens of sequences that come and go: sequence i begins with step i and ends after `count` tokens; prompts alone in their steps."""
    for free, blocks in zip(made.free, made.layout.num_blocks, strict=True):
        free.remove(blocks - 1)  # the engine's own, once it has captured
    running, drawn = [], []
    waiting = list(enumerate(prompts))
    while waiting or running:
        if waiting:
            number, ids = waiting.pop(0)
            tables, sampling = made.table(len(ids) + count), SAMPLINGS[number % 3]
            history = tuple(ids) if sampling.penalised else ()
            first = made.step(Row(number, 0, tuple(ids), tables, (Draw(sampling, 0, history=history),)))[0]
            drawn.append([first])
            running.append((number, len(ids), tables, sampling))
        rows = [
            Row(number, length - 1 + len(drawn[number]), (), made.passed(tables, length - 1 + len(drawn[number])),
                (Draw(sampling, len(drawn[number])),))
            for number, length, tables, sampling in running
        ]  # fmt: skip
        for (number, *_), each in zip(running, made.step(*rows), strict=True):
            drawn[number].append(each)
        running = [each for each in running if len(drawn[each[0]]) < count]
    return drawn


@pytest.mark.skipif(native() is None, reason="no C++ compiler: attention over the cache where it lies needs it")
def test_a_padded_step_draws_the_same_tokens(narrow, bench, prompt):
    prompts = [prompt(length, seed=length) for length in (7, 30, 16, 23, 5, 41)]
    plain, padded = bench(narrow), bench(narrow)
    replayed = []

    def capture(run):
        number = len(replayed)
        replayed.append(0)

        def replay():
            replayed[number] += 1
            logits = run_again(run)()
            places.add(logits.untyped_storage().data_ptr())
            return logits

        run()  # as CUDA's, before the captured one
        return replay

    done, places = [], set()
    shapes = tuple(DecodeShape(rows, context) for context in (64, 40) for rows in (4, 2))
    padded.engine.capture(shapes, capture, done.append)
    assert done == [1, 2, 3, 4]
    expected = answers(plain, prompts, 12)
    assert answers(padded, prompts, 12) == expected
    assert all(replayed), "every shape was taken"
    assert len(places) == 1, "the logits of all shapes are in the same memory"
    assert sum(replayed) < padded.steps - len(prompts), "and steps of 5 and 6 rows had none"
    untouched = zip(itertools.chain(*plain.caches), itertools.chain(*padded.caches), strict=True)
    assert all(torch.equal(one[:-1], other[:-1]) for one, other in untouched), "a row that fills a step writes where nobody reads"
    assert all(cache[-1].any() for group in padded.caches for cache in group)
