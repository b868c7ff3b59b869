"""Steps launched before the one before them is computed, on a device that lags (lazy_device.py): the tokens are those of a host that waits
for each step, and no host waits. What is not tested is CUDA: its events, its pinned memory, its graphs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch
from diptych.core.layout import DType
from diptych.core.sampling import SamplingParams
from diptych.engine import decode_graphs, marks, placing
from diptych.engine import decoder as decoder_module
from diptych.engine.batch import Batch, BlockCopy, Draw, Row, StepOutput
from diptych.engine.decode_graphs import run_again
from diptych.engine.decode_shapes import DecodeShape
from diptych.engine.engine import Engine
from diptych.engine.placing import _each_tensor
from diptych.engine.prepared import prepare
from diptych.kernels import sampling
from diptych.kernels.native import native
from diptych.kernels.noise import Noise
from diptych.kernels.paged_attention import attend
from diptych.kernels.sampling import _FLOAT, Ask, draw_torch, edges_sorted
from lazy_device import THERE, HostWaits, LazyDevice, LazyMark, There

SAMPLINGS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.9, seed=3, logprobs=2),
    SamplingParams(temperature=0.9, seed=4, top_k=20, top_p=0.9, repetition_penalty=1.4, frequency_penalty=0.3),
    SamplingParams(temperature=0.0, repetition_penalty=1.9, presence_penalty=0.5, logit_bias=((9, 1.0),)),
]


class Ahead:
    """An engine on a lazy device. `marks`: all that were made, the last behind what a step tells the host."""

    def __init__(self, made, device: LazyDevice, marks_: list[LazyMark]) -> None:
        self.device, self.marks = device, marks_
        caches = [[There(cache.clone()) for cache in group] for group in made.caches]
        self.engine = Engine(made.model, caches, block_size=16, max_slots=8, device=THERE)

    def run(self, steps: Sequence[Batch], ahead: int) -> list[StepOutput]:
        """Each is launched when `ahead` steps before it are still to be computed."""
        told, flying = [], []
        with self.device.lags():
            for batch in [*steps, *[None] * ahead]:
                if batch is not None:
                    flying.append((self.engine.launch(batch), self.marks[-1]))
                if batch is None or len(flying) > ahead:
                    output, mark = flying.pop(0)
                    assert not mark.passed
                    self.device.come_to(mark)
                    told.append(output())
        return told


@pytest.fixture
def lazily(bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Ahead]]:
    """An engine on a device that lags, which has three kernels: attention, draws and the edges of what limits let through."""
    device, recorded = LazyDevice(), []

    def new_mark(_device: torch.device) -> LazyMark:
        recorded.append(LazyMark(device))
        return recorded[-1]

    def attend_there(query: There, cache: There, spans, *rest: float) -> torch.Tensor:
        here = _each_tensor(spans, lambda tensor: tensor.here)
        like = torch.empty(query.shape, dtype=query.dtype, device="meta").flatten(1)
        return device.result_of(like, lambda: attend(query.here, cache.here, here, *rest))

    def draw_there(tokens: There, logits: There, asked: There, floors: There | None, lasts: There | None) -> None:
        def compute() -> None:
            for place, (seed, choice, index, temperature, row) in enumerate(asked.here.tolist()):
                noise = Noise(seed % 2**64, choice, index)
                limits = None if floors is None or lasts is None else (floors.here[place], lasts.here[place])
                ask = Ask(row, noise, *_FLOAT.unpack(temperature.to_bytes(4, "little")))
                tokens.here[place] = draw_torch(logits.here[row], ask, limits)

        device.ask(compute)

    def edges_there(logits: There, asked: There, *_kinds: bool) -> tuple[There, There]:
        def compute(which: int) -> torch.Tensor:
            asks = []
            for row, top_k, *numbers in asked.here.tolist():
                temperature, top_p, share = (_FLOAT.unpack(bits.to_bytes(4, "little"))[0] for bits in numbers)
                asks.append(Ask(row, Noise(0, 0, 0), temperature, top_k, top_p, math.exp(share)))
            return edges_sorted(logits.here, asks)[which]

        likes = [torch.empty(len(asked), dtype=dtype, device="meta") for dtype in (torch.float32, torch.int64)]
        floors, lasts = (device.result_of(like, partial(compute, which)) for which, like in enumerate(likes))
        return floors, lasts

    for module in (marks, decode_graphs, placing):
        monkeypatch.setattr(module, "new_mark", new_mark)
    kernels = SimpleNamespace(draw=draw_there, edges=edges_there)
    monkeypatch.setattr(sampling, "triton_for", lambda tensor: kernels if isinstance(tensor, There) else None)
    monkeypatch.setattr(decoder_module, "attend", lambda *asked: (attend_there if isinstance(asked[0], There) else attend)(*asked))
    for name in ("launch", "capture"):
        monkeypatch.setattr(Engine, name, getattr(Engine, name).__wrapped__)  # the device knows no inference mode
    with torch.no_grad(), device:
        yield lambda made: Ahead(made, device, recorded)


def decided(made, prompt) -> list[Batch]:
    """Sequences that come, answer and go, decided before anything is computed: their tokens are in slots. Prompts are read beside those who
    answer, and alone in the first step and in one that draws nothing."""
    steps, running = [], []

    def rows() -> list[Row]:
        on = [
            Row(slot, length + at, (), made.passed(tables, length + at), (Draw(asked, at + 1),))
            for slot, length, at, tables, asked in running
        ]
        running[:] = [(slot, length, at + 1, *rest) for slot, length, at, *rest in running]
        return on

    for number, drawn in enumerate(SAMPLINGS):
        slot, ids = number % 3, prompt(5 + 9 * number, seed=number)
        tables = made.table(len(ids) + 20)
        running[:] = [each for each in running if each[0] != slot]
        start = 4 if number == 2 else 0
        if start:
            steps.append(made.batch(Row(slot, 0, tuple(ids[:start]), tables)))
        draw = Draw(drawn, 0, history=tuple(ids) if drawn.penalised else ())
        steps.append(made.batch(Row(slot, start, tuple(ids[start:]), tables, (draw,)), *rows()))
        running.append((slot, len(ids), 0, tables, drawn))
        steps += [made.batch(*rows()) for _ in range(2)]
    return steps


def told(outputs: Sequence[StepOutput]) -> list[list[list[int]]]:
    return [[[drawn.token_id for drawn in each] for each in output.drawn] for output in outputs]


def values(outputs: Sequence[StepOutput]) -> list[float]:
    every = [drawn for output in outputs for each in output.drawn for drawn in each if drawn.logprob is not None]
    return [value for drawn in every for value in (drawn.logprob, *(likely for _, likely in drawn.top))]


def test_steps_launched_ahead_draw_the_tokens_of_a_cpu(lazily, bench, prompt, tiny_llama_dir):
    """In fp32, kernel by kernel; log-probabilities and penalties too. A block is copied while the step that writes it is not computed."""
    here = bench(tiny_llama_dir)
    steps = decided(here, prompt)
    copied = BlockCopy(0, steps[0].rows[0].tables[0][0], here.table(16)[0][0])
    steps[1] = Batch(steps[1].step, steps[1].rows, (copied,))
    expected = [output() for output in [here.engine.launch(each) for each in steps]]  # a CPU is done with each when it is launched
    there = lazily(bench(tiny_llama_dir))
    outputs = there.run(steps, ahead=1)
    assert told(outputs) == told(expected)
    assert values(outputs) == pytest.approx(values(expected), abs=1e-3)
    assert len(values(outputs)) > 10
    for cache, one in zip(there.engine._caches[0], here.caches[0], strict=True):
        assert torch.allclose(cache.here[copied.destination], one[copied.destination], atol=1e-4)


def test_captured_steps_too(lazily, bench, tiny_gemma3_source, tmp_path, prompt):
    """In bf16, with windows, in shapes with rows to fill. Their inputs are at one place of the device in every step, and are written into
    two places of this host by turns. With one of them a host waits, or what is on its way is written again."""
    if native() is None:
        pytest.skip("no C++ compiler: attention over the cache where it lies needs it")
    prepare(str(tiny_gemma3_source), tmp_path / "narrow", dtype=DType.BFLOAT16)
    here = bench(tmp_path / "narrow")
    for free, count in zip(here.free, here.layout.num_blocks, strict=True):
        free.remove(count - 1)  # the engine's own, once it has captured
    steps = decided(here, prompt)[:10]

    def run(ahead: int, *, one_place: bool = False, told_when_sent: bool = True) -> list[list[list[int]]]:
        there = lazily(here)
        there.engine.capture((DecodeShape(4, 80), DecodeShape(2, 80)), run_again, lambda _: None)
        for step in there.engine._graphs._steps.values() if one_place else ():
            inputs, mark = next(step.here)
            object.__setattr__(step, "here", cycle([(inputs, mark if told_when_sent else marks._Passed())]))
        return told(there.run(steps, ahead))

    expected = run(ahead=0)
    assert run(ahead=1) == expected
    with pytest.raises(HostWaits):
        run(ahead=1, one_place=True)
    assert run(ahead=1, one_place=True, told_when_sent=False) != expected


def test_a_host_that_waits_would_be_found(lazily, bench, prompt, tiny_llama_dir):
    made = bench(tiny_llama_dir)
    there = lazily(made)
    with there.device.lags(), pytest.raises(HostWaits):
        there.engine.run(decided(made, prompt)[0])
