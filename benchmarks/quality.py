"""What a cheaper way of computing a model costs in quality: each variant beside the first, over the same text.

    python -m diptych.benchmarks.quality [--variants bfloat16 int8 int4 …] [--model SOURCE] [--texts 16] [--scored 128] [--keep quality]

Texts are windows of the documentation that comes with Python (`pydoc_data.topics`): of each, 256 tokens are read as a prompt and the next
ones one at a time, as a worker decodes, each variant given the text's own tokens whatever it would have said. So prompts and decodes are
both computed by the variant, and what it stored is what it reads. Printed for each variant:

    perplexity      of the text's tokens, and by how much it is above the first variant's, as a share, with the standard error of that
    same token      the share of steps in which its likeliest token is the first variant's
    divergence      of its probabilities from the first variant's (Kullback-Leibler), nats a token, mean over the steps
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import exp
from pydoc_data.topics import topics
from typing import Any
from unittest.mock import patch

import torch
from diptych.benchmarks.bare_engine import asked, empty_caches
from diptych.benchmarks.record import describe, keep, surroundings
from diptych.core.layout import DType
from diptych.core.model import TOKENIZER
from diptych.core.quantization import Quantization
from diptych.core.sampling import SamplingParams
from diptych.engine import engine as engine_module
from diptych.engine.batch import Batch, Draw, Row
from diptych.engine.engine import Engine
from diptych.engine.prepared import PreparedModel, find_or_prepare, open_prepared
from diptych.engine.sampler import sample
from tokenizers import Tokenizer
from torch import Tensor

BLOCK = 16
PROMPT = 256
GREEDY = (Draw(SamplingParams(temperature=0.0), 0),)


@dataclass(frozen=True)
class Variant:
    """One way of computing a model. `held`: the dtype of its KV cache, if not the weights'."""

    dtype: DType = DType.BFLOAT16
    held: DType | None = None
    quantization: Quantization = Quantization.NONE


VARIANTS = {
    "bfloat16": Variant(),
    "float32": Variant(DType.FLOAT32),
    "int8": Variant(quantization=Quantization.INT8),
    "int4": Variant(quantization=Quantization.INT4),
    "int8-kv": Variant(held=DType.INT8),
    "int8-all": Variant(held=DType.INT8, quantization=Quantization.INT8),
}


@dataclass
class Score:
    """Of one variant, an entry for each token scored: minus the logarithm of its probability, whether the likeliest token was the first
    variant's, and the divergence from it."""

    lost: list[float] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)

    def note(self, found: Tensor, first: Tensor, tokens: Tensor) -> None:
        """`found` and `first`: log-probabilities [rows, vocab], this variant's and the first's; `tokens` [rows]: what the texts have."""
        self.lost += (-found.gather(1, tokens[:, None])[:, 0]).tolist()
        self.same += (found.argmax(1) == first.argmax(1)).tolist()
        self.divergence += (first.exp() * (first - found)).sum(1).tolist()

    def summary(self, first: Score) -> dict[str, float]:
        count = len(self.lost)
        more = torch.tensor(self.lost) - torch.tensor(first.lost)
        return {
            "perplexity": exp(sum(self.lost) / count),
            "above_first": exp(float(more.mean())) - 1,
            "standard_error": float(more.std()) / count**0.5,
            "same_token": sum(self.same) / count,
            "divergence": sum(self.divergence) / count,
        }


class Reader:
    """An engine that reads texts side by side, each in a slot of its own."""

    def __init__(self, model: PreparedModel, held: DType | None, texts: int, tokens: int) -> None:
        layout = model.card.layout(block_size=BLOCK, kv_tokens=texts * -(-tokens // BLOCK) * BLOCK, kv_dtype=held)
        self._engine = Engine(model, empty_caches(layout), block_size=BLOCK, max_slots=texts)
        scattered = [random.Random(0).sample(range(blocks), blocks) for blocks in layout.num_blocks]
        self._tables = [tuple(tuple(each[i::texts]) for each in scattered) for i in range(texts)]

    def read(self, start: int, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Compute `tokens[i]` of text i from position `start` on; log-probabilities of what follows, fp32 [texts, vocab]."""
        rows = tuple(Row(slot, start, tuple(each), self._tables[slot], GREEDY) for slot, each in enumerate(tokens))
        with caught() as logits:
            self._engine.run(Batch(0, rows))
        return logits[0].float().log_softmax(1)


@contextmanager
def caught() -> Iterator[list[Tensor]]:
    """The logits from which the engine draws meanwhile."""
    logits: list[Tensor] = []

    def catching(found: Tensor, *others: Any) -> Any:
        logits.append(found)
        return sample(found, *others)

    with patch.object(engine_module, "sample", catching):
        yield logits


def windows(tokenizer: Tokenizer, texts: int, tokens: int) -> list[list[int]]:
    """As many parts of the text, evenly apart, of so many tokens."""
    ids = tokenizer.encode("\n".join(topics[name] for name in sorted(topics)), add_special_tokens=False).ids
    apart = (len(ids) - tokens) // texts
    return [ids[start : start + tokens] for start in range(0, texts * apart, apart)]


def begun(text: Sequence[int], bos: int | None) -> list[int]:
    """The text as a model is asked to go on with it."""
    return list(text) if bos is None else [bos, *text[:-1]]


def compare(models: dict[str, PreparedModel], texts: int, scored: int) -> dict[str, dict[str, float]]:
    """The variants' summaries; all read the same texts, step by step together, so that no log-probabilities are kept."""
    first = next(iter(models.values()))
    read = windows(Tokenizer.from_file(str(first.directory / TOKENIZER)), texts, PROMPT + scored)
    read = [begun(text, first.card.bos_token_id) for text in read]
    readers = {name: Reader(model, VARIANTS[name].held, texts, PROMPT + scored) for name, model in models.items()}
    scores = {name: Score() for name in models}
    begin, end = 0, PROMPT
    while end < PROMPT + scored:
        found = {name: reader.read(begin, [text[begin:end] for text in read]) for name, reader in readers.items()}
        for name, score in scores.items():
            score.note(found[name], found[next(iter(models))], torch.tensor([text[end] for text in read]))
        begin, end = end, end + 1
    first_score = next(iter(scores.values()))
    return {name: score.summary(first_score) for name, score in scores.items()}


def prepared(name: str, source: str) -> PreparedModel:
    """The model as a variant has it, made if it is not there."""
    variant = VARIANTS[name]
    return open_prepared(find_or_prepare(source, dtype=variant.dtype, quantization=variant.quantization))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m diptych.benchmarks.quality", description="What does a cheaper variant cost in quality?"
    )
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="the first is the measure")
    parser.add_argument("--texts", type=int, default=16, help="read side by side")
    parser.add_argument("--scored", type=int, default=128, help="tokens of each that are scored")
    options, source = asked(parser)
    where = surroundings()
    print(describe(where))
    models = {name: prepared(name, source) for name in options.variants}
    with torch.inference_mode():
        results = compare(models, options.texts, options.scored)
    print(f"{options.texts * options.scored} tokens behind {options.texts} prompts of {PROMPT}:")
    for name, each in results.items():
        above = f"{each['above_first']:+.2%} ± {each['standard_error']:.2%}"
        print(
            f"{name:>10}: perplexity {each['perplexity']:.3f} ({above}), same token {each['same_token']:.1%}, "
            f"divergence {each['divergence']:.5f}"
        )
    if options.keep:
        print(f"kept in {keep(options.keep, where, vars(options), results)}")


if __name__ == "__main__":
    main()
