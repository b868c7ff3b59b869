"""Tokens drawn by the Triton kernel are those of its twin: the same noise, the same limits, of equal ones the first."""

from __future__ import annotations

import math

import pytest
import torch
from diptych.kernels.noise import GROUP, Noise
from diptych.kernels.sampling import Ask, draw_torch
from diptych.kernels.sampling import draw as draw_all
from row_by_row import one as draw
from row_by_row import slow
from triton_place import DEVICE, on_triton

pytestmark = [pytest.mark.usefixtures("on_triton"), pytest.mark.filterwarnings("ignore:overflow encountered")]
__all__ = ["on_triton"]


def logits_of(vocabulary: int, spread: float, banned: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocabulary, generator=generator) * spread
    logits[torch.rand(vocabulary, generator=generator) < banned] = -torch.inf
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 5, GROUP, GROUP + 1, 1000, 6000])
def test_of_all(vocabulary: int, dtype: torch.dtype) -> None:
    """Flat, so that the noise decides, and spread; with tokens that cannot be drawn; with seeds of 64 bits."""
    for trial, (spread, banned) in enumerate([(0.0, 0.0), (0.0, 0.0), (1.0, 0.0), (1.0, 0.3), (10.0, 0.0), (3.0, 0.999)]):
        logits, noise = logits_of(vocabulary, spread, banned, trial).to(dtype), Noise(2**64 - 1 - (trial << 40), trial % 3, 77 + trial)
        found = draw(logits.to(DEVICE), noise, temperature=0.8, top_k=0, top_p=1.0)
        assert (found.shape, found.dtype) == ((), torch.int64)
        assert int(found) == int(draw_torch(logits, Ask(0, noise, 0.8)))


@pytest.mark.parametrize(
    "limits",
    [(50, 1.0, 0.0), (0, 0.9, 0.0), (9999, 0.999, 0.0), (20, 0.8, 0.01), (0, 1.0, 0.1), (0, 1e-6, 0.0), (0, 0.95, 0.9), (1, 1.0, 0.0)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_limits(limits: tuple[int, float, float], dtype: torch.dtype) -> None:
    """In bf16 many logits are equal, some of them at the edge."""
    for index in range(3):
        logits, noise = logits_of(3000, 0.5 + index, 0.0, index).to(dtype), Noise(index, 1, index)
        ask = Ask(0, noise, 0.8, *limits)
        assert draw_all(logits[None].to(DEVICE), [ask]).tolist() == [slow(logits[None], ask)]


def test_all_in_one_go() -> None:
    """Draws from rows in any order, with limits and without, beside each other."""
    logits = torch.stack([logits_of(3000, spread, 0.0, row) for row, spread in enumerate((0.5, 2.0, 4.0))]).to(torch.bfloat16)
    wanted = [
        Ask(2, Noise(5, 0, 1), 0.8, 20),
        Ask(0, Noise(2**64 - 1, 3, 0), 1.5),
        Ask(0, Noise(7, 0, 9), 0.3, 0, 0.9),
        Ask(2, Noise(9, 1, 9), 1.0, 0, 1.0, 0.1),
    ]
    assert draw_all(logits.to(DEVICE), wanted).tolist() == [slow(logits, ask) for ask in wanted]


def test_of_equal_sums_the_first_wins_and_a_broken_model_breaks_no_draw() -> None:
    inf, nan = math.inf, math.nan
    for logits, token in (([-inf] * 200, 0), ([0.0] * 130 + [inf] * 70, 130), ([0.0] * 99 + [nan] * 101, 99)):
        assert int(draw(torch.tensor(logits).to(DEVICE), Noise(1, 0, 0), temperature=1.0, top_k=0, top_p=1.0)) == token
