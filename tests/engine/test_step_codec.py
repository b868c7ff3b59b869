"""A step on the wire is the step: batches and outputs survive their bytes, and tokens are known before they are sent."""

from __future__ import annotations

import struct
from dataclasses import fields, replace

import pytest
from diptych.core.sampling import SamplingParams
from diptych.engine.batch import NO_BLOCK, Batch, BlockCopy, Draw, Drawn, Row, StepOutput
from diptych.engine.last_drawn import LastDrawn
from diptych.engine.step_codec import decode_batch, decode_output, encode_batch, encode_output
from hypothesis import given, settings
from hypothesis import strategies as st

U32 = st.integers(0, 2**32 - 1)
FLOATS = st.floats(allow_nan=False)


def tuples(of, most=4):
    return st.lists(of, max_size=most).map(tuple)


ASKED = {
    "max_tokens": U32,
    "temperature": FLOATS,
    "top_p": FLOATS,
    "top_k": U32,
    "seed": st.none() | st.integers(0, 2**64 - 1),
    "stop_token_ids": tuples(U32),
    "ignore_eos": st.booleans(),
    "logprobs": st.none() | st.integers(0, 20),
    "min_p": FLOATS,
    "repetition_penalty": FLOATS,
    "presence_penalty": FLOATS,
    "frequency_penalty": FLOATS,
    "logit_bias": tuples(st.tuples(U32, FLOATS)),
    "min_tokens": U32,
    "n": st.integers(1, 16),
}
SAMPLINGS = st.builds(SamplingParams, **ASKED)
TABLES = st.builds(lambda passed, blocks: (NO_BLOCK,) * passed + blocks, st.integers(0, 3), tuples(U32))
DRAWS = st.builds(Draw, SAMPLINGS, U32, U32, tuples(U32), st.frozensets(U32, max_size=3))
ROWS = st.builds(Row, U32, U32, tuples(U32), tuples(TABLES, 3), tuples(DRAWS, 3))
COPIES = st.builds(BlockCopy, U32, U32, U32)
DRAWN = st.builds(Drawn, U32, st.none() | FLOATS, tuples(st.tuples(U32, FLOATS)))


def test_every_field_of_a_sampling_is_tried():
    assert [field.name for field in fields(SamplingParams)] == [*ASKED]


@settings(max_examples=100)
@given(st.builds(Batch, st.integers(-2, 2**62), tuples(ROWS, 3), tuples(COPIES, 3)))
def test_a_batch_survives_its_bytes(batch):
    assert decode_batch(encode_batch(batch)) == batch


@settings(max_examples=50)
@given(st.builds(StepOutput, st.integers(-2, 2**62), tuples(tuples(DRAWN, 3), 3), st.booleans()))
def test_an_output_survives_its_bytes(output):
    assert decode_output(encode_output(output)) == output


def test_bytes_cut_short_are_refused():
    data = encode_batch(Batch(1, (Row(0, 0, (1, 2, 3), ((4, 5),), (Draw(SamplingParams(), 0),)),)))
    for length in range(len(data)):
        with pytest.raises((struct.error, ValueError)):
            decode_batch(data[:length])


def test_a_decode_step_is_small():
    """64 sequences of 4,000 tokens, one window of 512: 4 bytes a block, and 90 for everything else of a row."""
    sampling = SamplingParams(temperature=0.7, top_p=0.95, seed=2**63)
    tables = (tuple(range(250)), (NO_BLOCK,) * 217 + tuple(range(33)))
    rows = tuple(Row(slot, 4000, (7,), tables, (Draw(replace(sampling, seed=slot), 9),)) for slot in range(64))
    assert len(encode_batch(Batch(3, rows))) < 64 * (4 * (250 + 33) + 150)


def test_tokens_are_filled_in_from_what_was_drawn():
    last, sampling = LastDrawn(4), SamplingParams()
    draws = (Draw(sampling, 0),)
    prompts = Batch(0, (Row(2, 0, (5, 6), ((1,),), draws), Row(1, 0, (5,), ((2,),)), Row(3, 0, (8,), ((3,),), draws * 2)))
    last.note(prompts, StepOutput(0, ((Drawn(40),), (), (Drawn(41), Drawn(42)))))
    following = Batch(1, (Row(3, 1, (), ((3,),)), Row(2, 2, (), ((1,),)), Row(1, 1, (9,), ((2,),))))
    resolved = last.resolve(following)
    assert [row.token_ids for row in resolved.rows] == [(41,), (40,), (9,)]
    assert replace(resolved, rows=()) == replace(following, rows=())
    assert all(replace(ours, token_ids=theirs.token_ids) == theirs for ours, theirs in zip(resolved.rows, following.rows, strict=True))
