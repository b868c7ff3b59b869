"""A whole step of the decoder by the Triton kernels against the same by torch: every op is handed to them, from the engine's inputs."""

from __future__ import annotations

import pytest
import torch
from decoders import GEMMA, LLAMA, card
from diptych.core.layout import DType
from diptych.core.model import Decoder, ModelCard
from diptych.core.sampling import SamplingParams
from diptych.engine.batch import Draw, Row
from diptych.engine.decoder import LoadedDecoder
from diptych.engine.inputs import make_inputs
from diptych.engine.parallel import Parallel
from diptych.engine.placing import Upload
from diptych.engine.weights import TORCH_DTYPE, shapes_of
from diptych.kernels import triton_kernels
from diptych.kernels.attend_chunks import PagedChunks
from diptych.kernels.attend_singles import PagedSingles
from paged_world import BLOCK, randn
from triton_place import DEVICE, ON_GPU, on_triton

pytestmark = pytest.mark.usefixtures("on_triton")
__all__ = ["on_triton"]
VOCABULARY, BLOCKS = 300, 12
DRAW = (Draw(SamplingParams(temperature=0.0), 0),)
ROWS = (
    Row(0, 20, tuple(range(30)), ((3, 1, 4, 7),) * 2),
    Row(1, 0, tuple(range(40, 58)), ((0, 2),) * 2, DRAW),
    *(Row(2 + slot, start, (7 + slot,), ((8, 9, 10, 11),) * 2, DRAW) for slot, start in ((0, 62),)),
    Row(3, 3, (9,), ((5,),) * 2, DRAW),
)


def step(made: ModelCard) -> tuple[torch.Tensor, list[torch.Tensor], set[type]]:
    """Logits, the caches after the step, and the kinds of spans, of the same weights and caches each time."""
    parallel, dtype = Parallel(made.layout(block_size=BLOCK, kv_tokens=BLOCK)), TORCH_DTYPE[made.dtype]
    shapes = sorted(shapes_of(made.decoder, VOCABULARY, made.dtype).items())
    tensors = {name: randn(*shape, seed=i).mul(0.1).to(kind) for i, (name, (shape, kind)) in enumerate(shapes)}
    upload = Upload(DEVICE)
    decoder = LoadedDecoder(made, tensors, parallel, upload)
    caches = [
        [randn(BLOCKS, group.kv_heads, 2, BLOCK, group.head_dim, seed=layer).to(DEVICE, dtype) for layer in group.layers]
        for group in parallel.groups
    ]
    decoder.hold(caches)
    inputs = make_inputs(ROWS, [], parallel.groups, block_size=BLOCK, dtype=dtype, device=DEVICE)
    with torch.inference_mode():
        logits = decoder.logits(upload.batch(inputs), None)
    assert logits is not None
    return (
        logits.float().cpu(),
        [cache.float().cpu() for group in caches for cache in group],
        {type(s) for g in inputs.groups for s in g.spans},
    )


@pytest.mark.parametrize("decoder", [LLAMA, GEMMA], ids=["llama", "gemma"])
@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT16, *([DType.BFLOAT16] if ON_GPU else [])])
def test_a_step_by_triton_is_that_by_torch(decoder: Decoder, dtype: DType, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, caches, kinds = step(card(decoder, dtype, VOCABULARY))
    assert kinds == {PagedChunks, PagedSingles}, "nothing is gathered"
    monkeypatch.setattr(triton_kernels, "triton_kernels", lambda: None)
    by_torch, caches_by_torch, kinds = step(card(decoder, dtype, VOCABULARY))
    assert not kinds & {PagedChunks, PagedSingles}
    close = {DType.FLOAT32: 1e-5, DType.FLOAT16: 1e-2, DType.BFLOAT16: 8e-2}[dtype]
    torch.testing.assert_close(logits, by_torch, rtol=close, atol=close * float(by_torch.abs().max()))
    for one, other in zip(caches, caches_by_torch, strict=True):
        torch.testing.assert_close(one, other, rtol=close, atol=close)
