"""Drawing tokens on a GPU: temperature, limits, Gumbel noise and the largest sum, of all draws in one pass over the logits.

The noise is that of noise.py, made where it is added. The twin is `draw_torch`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 64
"""As in noise.py."""
CHUNK = 2048
"""Logits of a program."""


@triton.jit
def _exponential(word: tl.tensor) -> tl.tensor:
    """-log(1 - w) of a 32-bit word, w = (word + 1/2) / 2**32 kept below 1. Without log1p: what is rounded away from 1 - w comes back with
    the quotient (Goldberg, 1991, theorem 4)."""
    w = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355)
    rest = 1.0 - w
    lost = rest == 1.0
    return tl.where(lost, w, -tl.log(rest) * w / tl.where(lost, 1.0, 1.0 - rest))


@triton.jit
def _draw_chunk(
    best_ptr: tl.tensor,
    token_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    ask_ptr: tl.tensor,
    floor_ptr: tl.tensor,
    last_ptr: tl.tensor,
    row_stride: tl.tensor,
    vocab: tl.tensor,
    LIMITED: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    GROUPS: tl.constexpr = CHUNK // GROUP
    number, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    ask_ptr += number * 5
    seed = tl.load(ask_ptr)
    choice, index = tl.load(ask_ptr + 1).to(tl.uint32), tl.load(ask_ptr + 2).to(tl.uint32)
    temperature = tl.load(ask_ptr + 3).to(tl.int32).to(tl.float32, bitcast=True)
    row = tl.load(ask_ptr + 4)

    group = chunk * GROUPS + tl.arange(0, GROUPS)
    zero = tl.zeros([GROUPS], tl.uint32)
    first, second, third, fourth = tl.philox(seed, (group // 2).to(tl.uint32), zero + choice, zero + index, zero + 1)
    odd = group % 2 == 1
    least = (_exponential(tl.where(odd, third, first)) / GROUP)[:, None]
    place = (tl.where(odd, fourth, second) % GROUP).to(tl.int32)[:, None]

    counter = chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
    zeros = tl.zeros([CHUNK // 4], tl.uint32)
    one, two, three, four = tl.philox(seed, counter.to(tl.uint32), zeros + choice, zeros + index, zeros)
    words = tl.interleave(tl.interleave(one, three), tl.interleave(two, four))  # the four of a counter side by side
    more = _exponential(tl.reshape(words, [GROUPS, GROUP]))
    more = tl.where(tl.arange(0, GROUP)[None, :] == place, 0.0, more)
    # The minimum holds whatever way logarithms are rounded: no noise is above its group's.
    noise = tl.minimum(-tl.log(more + least), -tl.log(least))

    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = token < vocab
    logits = tl.load(logits_ptr + row * row_stride + token, mask=inside, other=float("-inf")).to(tl.float32)
    scaled = tl.div_rn(logits, temperature + tl.zeros([GROUPS, GROUP], tl.float32))  # as on a CPU
    if LIMITED:
        floor, last = tl.load(floor_ptr + number), tl.load(last_ptr + number)
        kept = (logits > floor) | ((logits == floor) & (token <= last))
        scaled = tl.where(kept | (logits != logits), scaled, float("-inf"))
    sums = scaled + noise
    sums = tl.where(sums == sums, sums, float("inf"))  # what is no number wins, as in argmax
    flat = tl.reshape(sums, [CHUNK])
    winner = tl.argmax(flat, axis=0)
    at = number * tl.num_programs(0) + chunk
    tl.store(best_ptr + at, tl.max(flat, axis=0))
    tl.store(token_ptr + at, (chunk * CHUNK + winner).to(tl.int64))


@triton.jit
def _best_chunk(out_ptr: tl.tensor, best_ptr: tl.tensor, token_ptr: tl.tensor, chunks: tl.tensor, CHUNKS: tl.constexpr) -> None:
    number = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, CHUNKS)
    best = tl.load(best_ptr + number * chunks + at, mask=at < chunks, other=float("-inf"))
    winner = tl.argmax(best, axis=0)
    tl.store(out_ptr + number, tl.load(token_ptr + number * chunks + winner))


def draw(out: Tensor, logits: Tensor, asks: Tensor, floors: Tensor | None, lasts: Tensor | None) -> None:
    """out: int64 [draws], the tokens; logits: [rows, vocab], each row contiguous; asks: int64 [draws, 5], seed, choice and index of the
    noise, the bits of the temperature in fp32, the row.

    floors: fp32 [draws], the least logit that can be drawn, if there are limits, and lasts: int64 [draws], the last token that can be drawn
    of those that have it.
    """
    draws, vocab = len(asks), logits.shape[1]
    chunks = triton.cdiv(vocab, CHUNK)
    best = torch.empty(draws, chunks, dtype=torch.float32, device=out.device)
    tokens = torch.empty(draws, chunks, dtype=torch.int64, device=out.device)
    limits = (best, tokens) if floors is None or lasts is None else (floors, lasts)  # not read without limits
    _draw_chunk[(chunks, draws)](
        best,
        tokens,
        logits,
        asks,
        *limits,
        logits.stride(0),
        vocab,
        LIMITED=floors is not None,
        CHUNK=CHUNK,
        GROUP=GROUP,
        num_warps=8,
    )
    _best_chunk[(draws,)](out, best, tokens, chunks, CHUNKS=max(16, triton.next_power_of_2(chunks)))
