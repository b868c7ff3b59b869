"""The engine on a GPU, against itself on the CPU. Runs only where there is one: nobody has run it on this machine."""

from __future__ import annotations

import pytest
import torch
from diptych.core.layout import DType
from diptych.core.sampling import SamplingParams
from diptych.engine.batch import Draw, Row
from diptych.engine.cuda_capture import CudaCapture
from diptych.engine.decode_shapes import decode_shapes
from diptych.engine.engine import Engine
from diptych.engine.placing import Upload
from diptych.engine.prepared import prepare
from diptych.engine.weights import TORCH_DTYPE

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
SAMPLINGS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, seed=5),
    SamplingParams(temperature=0.8, seed=6, top_k=40, top_p=0.9),
    SamplingParams(temperature=1.0, seed=7, repetition_penalty=1.3, frequency_penalty=0.2, logit_bias=((9, 1.0),)),
]


@pytest.fixture
def on_gpu(bench):
    """A bench whose engine computes on the GPU."""

    def make(directory):
        made = bench(directory)
        made.caches = [[cache.to(CUDA) for cache in group] for group in made.caches]
        made.engine = Engine(made.model, made.caches, block_size=16, max_slots=8, device=CUDA)
        return made

    return make


@pytest.mark.parametrize("model", ["tiny_gemma3_dir", "tiny_llama_dir"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=range(len(SAMPLINGS)))
def test_tokens_are_those_of_the_cpu(request, bench, on_gpu, prompt, model, sampling):
    """In fp32, without TF32: greedy and sampled, chunked, with windows."""
    directory = request.getfixturevalue(model)
    torch.backends.cuda.matmul.allow_tf32 = False
    for seed in range(3):
        ids = prompt(50 + 7 * seed, seed=seed)
        answers = [[drawn.token_id for drawn in make(directory).generate(ids, 30, chunk=16, sampling=sampling)] for make in (bench, on_gpu)]
        assert answers[0] == answers[1]


@pytest.mark.parametrize("model", ["tiny_gemma3_dir", "tiny_llama_dir"])
def test_captured_steps_draw_the_same_tokens(request, on_gpu, prompt, model):
    """Sequences beside each other, in shapes with rows to fill; a graph that is replayed reads what lies in its memory now."""
    torch.backends.cuda.matmul.allow_tf32 = False
    answers = []
    for captured in (False, True):
        made, done = on_gpu(request.getfixturevalue(model)), []
        made.free = [[block for block in free if block != count - 1] for free, count in zip(made.free, made.layout.num_blocks, strict=True)]
        if captured:
            made.engine.capture(decode_shapes(8, 128), CudaCapture(CUDA), done.append)
            assert done == [1, 2, 3, 4]
        tables = [made.table(80) for _ in range(5)]
        firsts = [made.prefill(prompt(9 + 7 * slot, seed=slot), each, slot=slot, sampling=SAMPLINGS[1]) for slot, each in enumerate(tables)]
        told = [[first.token_id] for first in firsts]
        for index in range(1, 30):
            places = [8 + 7 * slot + len(told[slot]) for slot in range(1 + index % 5)]
            rows = [
                Row(slot, place, (), made.passed(tables[slot], place), (Draw(SAMPLINGS[slot % 3], len(told[slot])),))
                for slot, place in enumerate(places)
            ]
            for slot, drawn in enumerate(made.step(*rows)):
                told[slot].append(drawn.token_id)
        answers.append(told)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("captured", [False, True])
def test_steps_launched_ahead_draw_the_same_tokens(on_gpu, prompt, tiny_llama_dir, captured):
    """One waits on the GPU while another computes, and the host reads the tokens of the one before."""
    torch.backends.cuda.matmul.allow_tf32 = False
    answers = []
    for ahead in (0, 1):
        made, told, flying = on_gpu(tiny_llama_dir), [], []
        made.free = [[block for block in free if block != count - 1] for free, count in zip(made.free, made.layout.num_blocks, strict=True)]
        if captured:
            made.engine.capture(decode_shapes(8, 128), CudaCapture(CUDA), lambda _: None)
        tables = [made.table(80) for _ in SAMPLINGS]
        for slot, sampling in enumerate(SAMPLINGS):
            ids = prompt(9 + 7 * slot, seed=slot)
            draw = Draw(sampling, 0, history=tuple(ids) if sampling.penalised else ())
            made.step(Row(slot, 0, tuple(ids), tables[slot], (draw,)))
        for index in range(1, 31):
            rows = [
                Row(slot, 8 + 7 * slot + index, (), made.passed(tables[slot], 8 + 7 * slot + index), (Draw(sampling, index),))
                for slot, sampling in enumerate(SAMPLINGS)
            ]
            flying.append(made.engine.launch(made.batch(*rows)))
            if len(flying) > ahead:
                told.append(flying.pop(0)().drawn)
        answers.append(told + [output().drawn for output in flying])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("dtype", [DType.BFLOAT16, DType.FLOAT16])
def test_half_precision_stays_near_float32(on_gpu, prompt, tiny_llama_source, tmp_path, dtype):
    prepare(str(tiny_llama_source), tmp_path / "narrow", dtype=dtype)
    made = on_gpu(tmp_path / "narrow")
    assert {cache.dtype for group in made.caches for cache in group} == {TORCH_DTYPE[dtype]}
    drawn = made.generate(prompt(60), 8, sampling=SamplingParams(temperature=0.0, logprobs=1))
    assert all(torch.isfinite(torch.tensor(each.logprob)) for each in drawn)


def test_weights_cross_whole_through_small_buffers():
    weight = torch.randn(1000, 77)
    assert torch.equal(Upload(CUDA, staged_bytes=4096).weight(weight).cpu(), weight)
