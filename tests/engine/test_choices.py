"""Several choices in the engine: many draws from one row, and forked blocks that go on as if computed again."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from diptych.core.sampling import SamplingParams
from diptych.engine.batch import BlockCopy, Draw, Row

BLOCK = 16
SAMPLING = SamplingParams(temperature=1.2, seed=7, logprobs=2)
PENALISED = SamplingParams(temperature=1.2, seed=7, logprobs=2, repetition_penalty=1.4, frequency_penalty=0.5)


@pytest.fixture(params=["gemma3", "llama"])
def model(request):
    return request.getfixturevalue(f"tiny_{request.param}_dir")


def fork(bench_, tables, tokens):
    """Tables that share the whole blocks of `tokens` tokens and go on in blocks of their own, and the copies that takes."""
    whole, rest = divmod(tokens, BLOCK)
    own = bench_.table(4 * BLOCK)
    others = tuple((*table[:whole], *fresh) for table, fresh in zip(tables, own, strict=True))
    pairs = enumerate(zip(tables, others, strict=True))
    return others, tuple(BlockCopy(g, table[whole], other[whole]) for g, (table, other) in pairs) if rest else ()


def alone(bench_, ids, count, sampling, choice):
    """A choice computed by itself, prompt and all."""
    tables, tokens, drawn = bench_.table(len(ids) + count), list(ids), []
    for index in range(count):
        start = len(ids) + index - 1 if index else 0
        draw = Draw(sampling, index, choice, history=tuple(tokens) if sampling.penalised else ())
        drawn.append(bench_.step(Row(0, start, tuple(tokens[start:]), bench_.passed(tables, start), (draw,)))[0])
        tokens.append(drawn[-1].token_id)
    return drawn


@pytest.mark.parametrize("sampling", [SAMPLING, PENALISED], ids=["seeded", "penalised"])
@pytest.mark.parametrize("length", [15, 16, 17, 33, 60])
def test_forked_choices_say_what_they_say_when_computed_alone(bench, prompt, model, length, sampling):
    ids, count, choices = prompt(length), 20, 3
    expected = [alone(bench(model), ids, count, sampling, choice) for choice in range(choices)]
    forked = bench(model, seed=9)
    trunk = forked.table(length + count)
    history = tuple(ids) if sampling.penalised else ()
    draws = tuple(Draw(sampling, 0, choice, history=history) for choice in range(choices))
    (firsts,) = forked.run(Row(0, 0, tuple(ids), trunk, draws))
    written = [[first] for first in firsts]
    branches = [(trunk, ()), *(fork(forked, trunk, length) for _ in range(choices - 1))]
    copies = tuple(copy for _, copies in branches for copy in copies)
    for index in range(1, count):
        rows = []
        for slot, (tables, _) in enumerate(branches):
            tokens = [*ids, *(each.token_id for each in written[slot])]
            first = index == 1  # from then on the slot knows
            history = tuple(tokens) if sampling.penalised and first else ()
            start = length + index - 1
            draw = Draw(sampling, index, slot, history=history)
            rows.append(Row(slot, start, tuple(tokens[start:]) if first else (), forked.passed(tables, start), (draw,)))
        for slot, drawn in enumerate(forked.run(*rows, copies=copies if index == 1 else ())):
            written[slot] += drawn
    assert [[each.token_id for each in one] for one in written] == [[each.token_id for each in one] for one in expected]
    for ours, theirs in zip(chain(*written), chain(*expected), strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    assert len({tuple(each.token_id for each in one) for one in written}) == choices


def test_a_slot_remembers_the_first_of_its_rows_draws(bench, prompt, tiny_llama_dir):
    ids, draws = prompt(20), tuple(Draw(PENALISED, 0, choice, history=tuple(prompt(20))) for choice in (5, 2, 9))
    many, one = bench(tiny_llama_dir), bench(tiny_llama_dir)
    for bench_, asked in ((many, draws), (one, draws[:1])):
        bench_.tables = bench_.table(30)
        bench_.run(Row(1, 0, tuple(ids), bench_.tables, asked))
    following = [bench_.step(Row(1, 20, (), bench_.tables, (Draw(PENALISED, 1, 5),)))[0] for bench_ in (many, one)]
    assert following[0] == following[1]


def test_copies_are_made_before_the_rows_and_touch_nothing_else(bench, prompt, tiny_gemma3_dir):
    bench_ = bench(tiny_gemma3_dir)
    tables = bench_.table(40)
    bench_.prefill(prompt(40), tables)
    before = [[cache.clone() for cache in group] for group in bench_.caches]
    other = bench_.table(BLOCK)
    copies = tuple(BlockCopy(g, table[0], fresh[0]) for g, (table, fresh) in enumerate(zip(tables, other, strict=True)))
    bench_.run(Row(2, 0, (3,), bench_.table(1), ()), copies=copies)
    for caches, olds, table, fresh in zip(bench_.caches, before, tables, other, strict=True):
        for cache, old in zip(caches, olds, strict=True):
            assert torch.equal(cache[fresh[0]], old[table[0]])
            assert all(torch.equal(cache[block], old[block]) for block in table)
