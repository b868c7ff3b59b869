"""A step on a device that is not there: torch's fake tensors carry device, dtype and shape through every op and refuse a mix of devices.

The device is torch's private one and not called cuda: a torch without CUDA cannot even cut a fake one in two. What it cannot show are
numbers; those of the same code on the CPU are tested elsewhere, those of a GPU in `test_gpu.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
from decoders import GEMMA, LLAMA, card
from diptych.core.layout import DType
from diptych.core.model import Decoder, ModelCard
from diptych.core.sampling import SamplingParams
from diptych.engine import decoder as decoder_module
from diptych.engine.batch import Draw, Row
from diptych.engine.decode_graphs import DecodeGraphs, run_again
from diptych.engine.decode_shapes import decode_shapes
from diptych.engine.decoder import LoadedDecoder
from diptych.engine.inputs import CPU, Inputs, make_inputs
from diptych.engine.nccl_groups import nccl
from diptych.engine.parallel import Parallel
from diptych.engine.placing import Upload, _each_tensor
from diptych.engine.sampler import sample
from diptych.engine.weights import TORCH_DTYPE, shapes_of
from diptych.kernels.attend_singles import PagedSingles
from diptych.kernels.block_copy import copy_blocks
from diptych.kernels.penalties import Seen
from lazy_device import THERE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import HashStore
from torch.utils._python_dispatch import TorchDispatchMode

BLOCK, VOCABULARY = 16, 500
META = torch.device("meta")
OPT = LLAMA.model_copy(
    update={
        "activation": "relu", "layer_norm": True, "biases": ("qkv", "o", "gate_up", "down"), "learned_positions": 128, "rope_full": None
    }
)  # fmt: skip
GREEDY = SamplingParams(temperature=0.0)
DRAWS = [
    GREEDY,
    SamplingParams(temperature=0.7, seed=2**63 + 5),
    SamplingParams(temperature=0.7, seed=1, top_k=5, top_p=0.9),
    SamplingParams(temperature=0.7, seed=1, top_p=0.9, min_p=0.1),
    SamplingParams(temperature=0.0, repetition_penalty=1.2),
    SamplingParams(temperature=0.9, seed=4, repetition_penalty=1.2, presence_penalty=0.1, frequency_penalty=0.2),
]


def rows() -> tuple[Row, ...]:
    """A chunk in the middle of a prompt, one that draws, and sequences in decode, some with a long context."""
    tables = ((3, 1, 4, 7, 5),) * 2
    draw = (Draw(GREEDY, 0),)
    return (
        Row(0, 20, (5,) * 30, tables),
        Row(1, 0, (5,) * 18, tables, draw),
        *(Row(2 + slot, 60 - 25 * (slot % 2), (7,), tables, draw) for slot in range(len(DRAWS) - 1)),
    )


def step(made: ModelCard, parallel: Parallel) -> tuple[LoadedDecoder, torch.Tensor | None, list[int]]:
    """Logits of `rows`, computed by fakes on the GPU."""
    groups, dtype = parallel.groups, TORCH_DTYPE[made.dtype]
    tensors = {name: torch.empty(shape, dtype=kind) for name, (shape, kind) in shapes_of(made.decoder, VOCABULARY, made.dtype).items()}
    upload = Upload(THERE)
    decoder = LoadedDecoder(made, tensors, parallel, upload)
    shapes = [(group, (8, group.kv_heads, 2, BLOCK, group.head_dim)) for group in groups]
    decoder.hold([[torch.empty(shape, dtype=dtype, device=THERE) for _ in group.layers] for group, shape in shapes])
    inputs = make_inputs(rows(), [], groups, block_size=BLOCK, dtype=dtype, device=THERE)
    layers: list[int] = []
    return decoder, decoder.logits(upload.batch(inputs), layers.append), layers


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16])
@pytest.mark.parametrize("decoder", [LLAMA, GEMMA, OPT], ids=["llama", "gemma", "opt"])
def test_a_step_stays_on_the_device(decoder: Decoder, dtype: DType) -> None:
    made = card(decoder, dtype, VOCABULARY)
    parallel = Parallel(made.layout(block_size=BLOCK, kv_tokens=BLOCK))
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        loaded, logits, layers = step(made, parallel)
        assert logits is not None
        assert (logits.device, logits.dtype, logits.shape) == (THERE, TORCH_DTYPE[dtype], (len(DRAWS), VOCABULARY))
        assert layers == [0, 1]
        weights = [loaded.embed, loaded.head, *(layer.o[0] for layer in loaded.layers.values())]
        assert {weight.device for weight in weights} == {THERE}
        copy_blocks(loaded.caches[0], *torch.empty(2, 2, dtype=torch.int64, device=THERE).unbind(1))


@pytest.mark.parametrize("rank", range(4))
def test_so_does_that_of_a_rank_of_many(rank: int) -> None:
    """Without the other ranks: a sum is then the part, and the activations of another stage are what memory holds."""
    made = card(GEMMA, DType.BFLOAT16, VOCABULARY)

    class Nobody:
        def send(self, parts: list[torch.Tensor], *_: int) -> None:
            assert parts[0].device == THERE

        def recv(self, parts: list[torch.Tensor], *_: int) -> Nobody:
            assert parts[0].device == THERE
            return self

        def wait(self, *_: object) -> None: ...

    layout = made.layout(block_size=BLOCK, kv_tokens=BLOCK, tp=2, stages=(1, 1))
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        _, logits, layers = step(made, Parallel(layout, rank, pipeline=Nobody()))
    assert layers == [rank // 2]
    assert (logits is not None) == (rank // 2 == 1)


@pytest.mark.parametrize("decoder", [LLAMA, GEMMA, OPT], ids=["llama", "gemma", "opt"])
def test_so_does_a_step_that_is_captured(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its attention, which is a kernel. What a CUDA graph must not do, ask the host, a fake cannot do either."""

    def attend(query: torch.Tensor, _cache: torch.Tensor, spans: Sequence[PagedSingles], *_: float) -> torch.Tensor:
        assert {part.device for span in spans for part in (span.tokens, span.tables, span.firsts, span.lasts)} == {THERE}
        return torch.empty_like(query).flatten(1)

    made, shapes = card(decoder, DType.BFLOAT16, VOCABULARY), decode_shapes(8, 128)
    parallel = Parallel(made.layout(block_size=BLOCK, kv_tokens=BLOCK))
    alone = [row for row in rows() if row.length == 1]
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        loaded, _, _ = step(made, parallel)
        monkeypatch.setattr(decoder_module, "attend", attend)
        graphs = DecodeGraphs(
            lambda inputs: loaded.logits(inputs, None), parallel.groups, shapes,
            block_size=BLOCK, scratch=[7] * len(parallel.groups), device=THERE, capture=run_again, captured=lambda _: None,
        )  # fmt: skip
        ready = graphs.step(alone, [])
        assert ready is not None
        logits = ready.logits()
    assert (logits.device, logits.shape) == (THERE, (len(alone), VOCABULARY))


class Hurried(TorchDispatchMode):
    """Refuses what goes to another device while the host waits: on a GPU for all that was asked of it before, a whole forward."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if op is torch.ops.aten.copy_.default:
            there, moved, hurried = args[0].device, args[1], (*args, named.get("non_blocking", False))[2]
            assert hurried or there == moved.device, f"{moved.shape} to {there}"
        if op is torch.ops.aten._to_copy.default:
            assert named.get("non_blocking") or named.get("device") in (None, args[0].device), f"{args[0].shape} to {named['device']}"
        return op(*args, **named)


@pytest.mark.parametrize(
    "waits", [lambda host, there: host.to(there), lambda host, there: torch.empty_like(host, device=there).copy_(host)]
)
def test_a_copy_that_is_waited_for_would_be_found(waits: Callable[[torch.Tensor, torch.device], torch.Tensor]) -> None:
    with Hurried(), pytest.raises(AssertionError, match=r"torch.Size\(\[3\]\) to meta"):
        waits(torch.zeros(3), META)


def test_drawing_waits_for_nothing() -> None:
    """Draws with no number brought to the host in between: a fake has none. Nor is a copy to the device waited for."""
    history = (1, 2, 2, 3)
    draws = [[Draw(sampling, 2, history=history)] for sampling in DRAWS]
    draws += [[Draw(SamplingParams(temperature=0.5, seed=1, logit_bias=((3, 1.0),)), 2, banned=frozenset({4, 5}))]]
    seen = [[Seen(history, 2) if draw.sampling.penalised else None] for (draw,) in draws]
    with Hurried():
        assert Seen(history, 2, META).tokens.device == META
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), Hurried():
        for counted in (each for row in seen for each in row if each is not None):
            counted.tokens, counted.counts = torch.empty(3, dtype=torch.int64, device=THERE), torch.empty(3, device=THERE)
        tokens = sample(torch.empty(len(draws), VOCABULARY, dtype=torch.bfloat16, device=THERE), draws, seen).tokens
        assert (tokens.device, tokens.dtype, tokens.shape) == (THERE, torch.int64, (len(draws),))
        greedy = sample(torch.empty(2, VOCABULARY, device=THERE), [[Draw(GREEDY, 0)]] * 2, [[None]] * 2).tokens
        assert (greedy.device, greedy.shape) == (THERE, (2,))


def test_a_mix_of_devices_would_be_found() -> None:
    made = card(LLAMA, DType.FLOAT32, VOCABULARY)
    parallel = Parallel(made.layout(block_size=BLOCK, kv_tokens=BLOCK))
    inputs = make_inputs(rows(), [], parallel.groups, block_size=BLOCK, dtype=torch.float32, device=THERE)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        decoder, _, _ = step(made, parallel)
        decoder.head = torch.empty_like(decoder.head, device=CPU)
        there = Upload(THERE).batch(inputs)
        with pytest.raises(RuntimeError, match="cpu"):
            decoder.logits(there, None)


def tensors_of(inputs: Inputs) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _each_tensor(inputs, lambda tensor: found.append(tensor) or tensor)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_inputs_for_a_device_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    """Packed into one buffer, and cut out of it again."""
    groups = card(GEMMA, DType.FLOAT32, VOCABULARY).layout(block_size=BLOCK, kv_tokens=BLOCK).groups
    inputs = make_inputs(rows(), [], groups, block_size=BLOCK, dtype=dtype)
    before, after = tensors_of(inputs), tensors_of(Upload().together(inputs))
    assert len(before) > 20
    for one, other in zip(before, after, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert len({tensor.untyped_storage().data_ptr() for tensor in after}) == 1


def test_weights_cross_in_pieces_and_unchanged() -> None:
    upload = Upload(torch.device("meta"), staged_bytes=64)
    weight = torch.randn(7, 9, dtype=torch.bfloat16)
    assert upload.weight(weight).shape == weight.shape
    pieces: list[torch.Tensor] = []
    upload._send = lambda source, target: pieces.append(source.clone())
    upload.weight(weight.T)
    assert max(len(piece) for piece in pieces) == 32
    assert torch.equal(torch.cat(pieces), weight.T.flatten())


def test_groups_over_nccl_need_a_torch_that_has_it() -> None:
    if torch.distributed.is_nccl_available():
        pytest.skip("this torch has it; groups over it need a GPU each")
    with pytest.raises(RuntimeError, match="was built without NCCL"):
        nccl(HashStore(), 0, 2, timedelta(seconds=1))
