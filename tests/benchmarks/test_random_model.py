"""The model of random weights: it is prepared as any other, on the fast path, and what it answers are numbers. Steps on a GPU are measured
over it, here by the same code on a CPU."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diptych.benchmarks import engine
from diptych.benchmarks.bare_engine import CPU, empty_caches, kv_bytes, stored
from diptych.benchmarks.engine_gpu import Sizes, measure, operations
from diptych.benchmarks.pictures import PICTURES
from diptych.benchmarks.random_model import SHAPES, Shape, write
from diptych.core.layout import DType
from diptych.core.model import TOKENIZER, Decoder
from diptych.core.sampling import SamplingParams
from diptych.engine.batch import Batch, Draw, Row
from diptych.engine.decode_graphs import run_again
from diptych.engine.engine import Engine
from diptych.engine.prepared import PreparedModel, open_prepared, prepare
from diptych.kernels.native import native
from tokenizers import Tokenizer

SMALL = Shape(vocabulary=300, hidden=64, intermediate=96, layers=3, heads=4, kv_heads=2, context=512)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("random") / "small"
    write(SMALL, made)
    return made


@pytest.fixture(scope="module")
def model(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    out = tmp_path_factory.mktemp("prepared") / "small"
    prepare(str(directory), out, dtype=DType.BFLOAT16)
    return open_prepared(out)


def test_it_answers(model: PreparedModel) -> None:
    assert isinstance(model.card.decoder, Decoder), "on the fast path"
    layout = model.card.layout(block_size=16, kv_tokens=64)
    engine = Engine(model, empty_caches(layout), block_size=16, max_slots=1)
    asked = (Draw(SamplingParams(temperature=0.0, logprobs=3), 0),)
    tokens: tuple[int, ...] = tuple(range(10, 30))
    for step, start in enumerate((0, 20, 21)):
        (drawn,) = engine.run(Batch(step, (Row(0, start, tokens, ((0, 1, 2),), asked),))).drawn[0]
        assert 0 <= drawn.token_id < SMALL.vocabulary
        assert math.isfinite(drawn.logprob)
        tokens = ()


def test_steps_are_measured_captured_and_not(model: PreparedModel) -> None:
    if native() is None:
        pytest.skip("what is captured is attention without a gather, which takes a C++ compiler on a CPU")
    captured = []

    def capture(run):
        captured.append(run)
        return run_again(run)

    sizes = Sizes(batches=(1, 3), context=40, steps=4, prefills=(24, 1024))
    found = measure(model, 1e9, 1e9, CPU, capture, sizes)
    assert len(captured) == 2, "a shape for each number of rows"
    assert [each["tokens"] for each in found["prefill"]] == [24], "no longer than the model's context"
    assert found["prefill"][0]["bound_ms"] == pytest.approx(operations(model, 24) / 1e6)
    _, matrices_bytes, _, head_bytes = stored(model)
    for each, rows in zip(found["decode"], sizes.batches, strict=True):
        assert each["rows"] == rows
        assert min(each["ms"], each["eager_ms"]) > 0
        read = matrices_bytes + head_bytes + kv_bytes(model, rows * (41 + 42 + 43 + 44)) / 4
        assert each["reading_ms"] == pytest.approx(read / 1e6)
    assert PICTURES["engine-gpu"]({"none": found})


def test_what_cannot_be_captured_is_said(model: PreparedModel, capsys: pytest.CaptureFixture[str]) -> None:
    def refuses(_run):
        raise RuntimeError("operation not permitted")

    found = measure(model, 1e9, 1e9, CPU, refuses, Sizes(batches=(1,), context=20, steps=2, prefills=(24,)))
    assert found["decode"][0]["ms"] is None
    assert "cannot be captured: operation not permitted" in capsys.readouterr().out
    assert PICTURES["engine-gpu"]({"none": found})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_nothing_is_measured(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["engine", "--device", "cuda", "--model", str(directory)])
    with pytest.raises(SystemExit, match="no GPU: not measured"):
        engine.main()


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
