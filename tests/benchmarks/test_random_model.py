"""The model of random weights: it is prepared as any other, on the fast path, and what it answers are numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diptych.benchmarks.bare_engine import empty_caches
from diptych.benchmarks.random_model import SHAPES, Shape, write
from diptych.core.layout import DType
from diptych.core.model import TOKENIZER, Decoder
from diptych.core.sampling import SamplingParams
from diptych.engine.batch import Batch, Draw, Row
from diptych.engine.engine import Engine
from diptych.engine.prepared import open_prepared, prepare
from tokenizers import Tokenizer

SMALL = Shape(vocabulary=300, hidden=64, intermediate=96, layers=3, heads=4, kv_heads=2, context=512)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("random") / "small"
    write(SMALL, made)
    return made


def test_it_answers(directory: Path, tmp_path: Path) -> None:
    card = prepare(str(directory), tmp_path / "prepared", dtype=DType.BFLOAT16)
    assert isinstance(card.decoder, Decoder), "on the fast path"
    layout = card.layout(block_size=16, kv_tokens=64)
    engine = Engine(open_prepared(tmp_path / "prepared"), empty_caches(layout), block_size=16, max_slots=1)
    asked = (Draw(SamplingParams(temperature=0.0, logprobs=3), 0),)
    tokens: tuple[int, ...] = tuple(range(10, 30))
    for step, start in enumerate((0, 20, 21)):
        (drawn,) = engine.run(Batch(step, (Row(0, start, tokens, ((0, 1, 2),), asked),))).drawn[0]
        assert 0 <= drawn.token_id < SMALL.vocabulary
        assert math.isfinite(drawn.logprob)
        tokens = ()


def test_its_tokenizer_takes_any_text_and_has_a_text_for_each_token(directory: Path) -> None:
    tokenizer = Tokenizer.from_file(str(directory / TOKENIZER))
    text = "A naïve café: 東京 🙂"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() == SMALL.vocabulary
    assert all(tokenizer.decode([token]) for token in range(3, SMALL.vocabulary))


def test_a_directory_that_is_there_is_left_alone(directory: Path) -> None:
    with pytest.raises(FileExistsError, match="there already"):
        write(SMALL, directory)


def test_shapes_have_as_many_weights_as_their_names_say() -> None:
    from diptych.benchmarks.random_model import _layers, _outside

    for name, shape in SHAPES.items():
        parts = [*_layers(shape), _outside(shape)]
        count = sum(torch.Size(each).numel() for part in parts for each in part.values())
        assert count / 1e9 == pytest.approx(float(name.removeprefix("llama-").removesuffix("b")), rel=0.25)
