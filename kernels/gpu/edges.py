"""What top-k, top-p and min-p let through on a GPU, of all draws together: the least logit, and the last token of those that have it,
found without sorting.

A logit's key is a whole number in the same order. A search goes over a row once for every four bits of the key, the first ones first: a
pass adds up what lies at or above each of 15 keys, tokens for top-k and masses for top-p, and the last key that has enough there is
where the next pass looks on. Masses are whole numbers, so sums do not depend on who adds first, and a request draws the same tokens in
every run. What is launched follows from the dtype and from what is asked; a launch reads what those before it have added, so no host
waits. min-p needs no search: it says which logit is the least.

The twin, which sorts, is `edges_sorted` in sampling.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096
"""Logits of a program, 32 of each of its threads."""
PASSES = {torch.bfloat16: 4, torch.float16: 5, torch.float32: 8}
"""Of one search. As fp32 a bf16 has 16 bits that are not 0, an fp16 19, wherever they came from."""
TALLY = tl.constexpr(128)
"""Sums of a search: 8 passes of 16, of which the first of each pass is not one of the 15."""
LAST_PASS = tl.constexpr(8)
LEAST = tl.constexpr(-2147483648)
"""Below every key."""
INFINITE = tl.constexpr(0x7F800000)
NO_NUMBER = tl.constexpr(0x7FC00000)
WHOLE = tl.constexpr(1099511627776.0)
"""2**40, the mass of a row's largest logit: a token's is rounded by 2**-41 of that, and 2**22 tokens fit into 63 bits."""
NEVER = tl.constexpr(1 << 62)
"""More than there is of anything."""


@triton.jit
def _key(logits: tl.tensor) -> tl.tensor:
    """int32 in the order of these fp32: -0 equals 0, and what is no number is above all, as where they are sorted."""
    bits = logits.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return tl.where(logits == logits, key, NO_NUMBER)


@triton.jit
def _logit(key: tl.tensor) -> tl.tensor:
    """The fp32 of a key."""
    return tl.where(key < 0, (-key) | LEAST, key).to(tl.float32, bitcast=True)


@triton.jit
def _mass(logits: tl.tensor, largest: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """e to the ((logit - largest) / temperature), int64 in fixed point; whole where that difference is no number."""
    scaled = (logits - largest) * (1.4426950408889634 / temperature)
    return (tl.exp2(tl.where(scaled < 0.0, scaled, 0.0)) * WHOLE + 0.5).to(tl.int64)


@triton.jit
def _edge(tally_ptr: tl.tensor, target: tl.tensor, passes: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The largest key, as far as so many passes know it, at and above which lies `target`, and how much lies above. Above the least there
    is always enough, so it is none of the 15; nor are sums that no pass has added to."""
    place = tl.arange(0, TALLY)
    tally = tl.load(tally_ptr + place, mask=(place < passes * 16) & (place % 16 > 0), other=0)
    reached = tally >= target
    steps = tl.full([TALLY], 1, tl.int64) << (28 - place // 16 * 4).to(tl.int64)
    key = tl.sum(tl.where(reached, steps, 0), axis=0) + LEAST
    return key.to(tl.int32), tl.max(tl.where(reached, 0, tally), axis=0)


@triton.jit
def _float(ask_ptr: tl.tensor) -> tl.tensor:
    return tl.load(ask_ptr).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _tokens_wanted(ask_ptr: tl.tensor) -> tl.tensor:
    top_k = tl.load(ask_ptr + 1)
    return tl.where(top_k > 0, top_k, NEVER)


@triton.jit
def _mass_wanted(ask_ptr: tl.tensor, counts_ptr: tl.tensor, masses_ptr: tl.tensor, largest: tl.tensor, passes: tl.tensor) -> tl.tensor:
    """top-p's share of the mass that top-k keeps, which the first pass has added up but for the tokens at top-k's edge. Of a row whose
    largest logit is infinite or no number one token is let through."""
    temperature, top_p = _float(ask_ptr + 2), _float(ask_ptr + 3)
    wanted = _tokens_wanted(ask_ptr)
    edge, above = _edge(counts_ptr, wanted, LAST_PASS)
    at_edge = tl.where(wanted < NEVER, (wanted - above) * _mass(_logit(edge), largest, temperature), 0)
    total = tl.load(masses_ptr, mask=passes > 0, other=0) + at_edge
    share = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
    share = tl.where(tl.abs(largest) < float("inf"), tl.maximum(tl.minimum(share, total), 1), 1)
    return tl.where(top_p < 1.0, share, NEVER)


@triton.jit
def _least_likely(share: tl.tensor, largest: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """The least key that min-p lets through, bit by bit; share: its logarithm. Divided and compared as on a CPU."""
    least = tl.div_rn(largest, temperature) + share
    found = tl.zeros([], tl.int64) - INFINITE
    for passed in range(32):
        tried = found + (tl.full([], 1 << 31, tl.int64) >> passed)
        below = _logit(tl.minimum(tried - 1, INFINITE).to(tl.int32))
        found = tl.where(tl.div_rn(below, temperature) < least, tried, found)
    return found.to(tl.int32)


@triton.jit
def _logits_of(
    logits_ptr: tl.tensor, ask_ptr: tl.tensor, row_stride: tl.tensor, vocab: tl.tensor, chunk: tl.tensor, CHUNK: tl.constexpr
) -> tl.tensor:
    """A chunk of the asked row, fp32. Beyond the vocabulary it is -inf behind all others, which no limit lets through before these."""
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    row_ptr = logits_ptr + tl.load(ask_ptr) * row_stride
    return tl.load(row_ptr + token, mask=token < vocab, other=float("-inf")).to(tl.float32)


@triton.jit
def _largest_key(
    largest_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    ask_ptr: tl.tensor,
    row_stride: tl.tensor,
    vocab: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    number = tl.program_id(1).to(tl.int64)
    logits = _logits_of(logits_ptr, ask_ptr + number * 5, row_stride, vocab, tl.program_id(0), CHUNK)
    tl.atomic_max(largest_ptr + number, tl.max(_key(logits), axis=0), sem="relaxed")


@triton.jit(do_not_specialize=["passes"])  # the same code for the first pass and for the last
def _tally_chunk(
    counts_ptr: tl.tensor,
    masses_ptr: tl.tensor,
    largest_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    ask_ptr: tl.tensor,
    row_stride: tl.tensor,
    vocab: tl.tensor,
    passes: tl.tensor,
    BY_MASS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """One pass over a chunk, behind so many: its sums go where this pass has its place in the tally."""
    number = tl.program_id(1).to(tl.int64)
    ask_ptr += number * 5
    counts_ptr += number * TALLY
    masses_ptr += number * TALLY
    asked = _float(ask_ptr + 3) < 1.0 if BY_MASS else tl.load(ask_ptr + 1) > 0
    if asked:
        logits = _logits_of(logits_ptr, ask_ptr, row_stride, vocab, tl.program_id(0), CHUNK)
        keys = _key(logits)
        if BY_MASS:
            largest = _logit(tl.load(largest_ptr + number))
            amounts = _mass(logits, largest, _float(ask_ptr + 2))
            edge, _ = _edge(masses_ptr, _mass_wanted(ask_ptr, counts_ptr, masses_ptr, largest, passes), passes)
            sums_ptr = masses_ptr + passes * 16
            if passes == 0:
                kept, _ = _edge(counts_ptr, _tokens_wanted(ask_ptr), LAST_PASS)
                tl.atomic_add(sums_ptr, tl.sum(tl.where(keys > kept, amounts, 0), axis=0), sem="relaxed")
        else:
            amounts = tl.full([CHUNK], 1, tl.int32)
            edge, _ = _edge(counts_ptr, _tokens_wanted(ask_ptr), passes)
            sums_ptr = counts_ptr + passes * 16
        step = tl.full([], 1, tl.int32) << (28 - passes * 4)
        for number_of_key in tl.static_range(1, 16):
            above = tl.sum(tl.where(keys >= edge + number_of_key * step, amounts, 0), axis=0)
            tl.atomic_add(sums_ptr + number_of_key, above.to(tl.int64), sem="relaxed")


@triton.jit
def _found_edges(
    floor_ptr: tl.tensor,
    last_ptr: tl.tensor,
    key_ptr: tl.tensor,
    rank_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    masses_ptr: tl.tensor,
    largest_ptr: tl.tensor,
    ask_ptr: tl.tensor,
    vocab: tl.tensor,
) -> None:
    """The edge of a draw is the highest of those of its limits; its rank says how many tokens that have it are let through."""
    number = tl.program_id(0).to(tl.int64)
    ask_ptr += number * 5
    counts_ptr += number * TALLY
    masses_ptr += number * TALLY
    largest, temperature = _logit(tl.load(largest_ptr + number)), _float(ask_ptr + 2)
    tokens = _tokens_wanted(ask_ptr)
    mass = _mass_wanted(ask_ptr, counts_ptr, masses_ptr, largest, LAST_PASS)
    by_count, tokens_above = _edge(counts_ptr, tokens, LAST_PASS)
    by_mass, mass_above = _edge(masses_ptr, mass, LAST_PASS)
    key = tl.maximum(tl.maximum(by_count, by_mass), _least_likely(_float(ask_ptr + 4), largest, temperature))
    rank = tl.where((key == by_count) & (tokens < NEVER), tokens - tokens_above, NEVER)
    each = tl.maximum(_mass(_logit(by_mass), largest, temperature), 1)
    rank = tl.where((key == by_mass) & (mass < NEVER), (mass - mass_above + each - 1) // each, rank)
    tl.store(floor_ptr + number, _logit(key))
    tl.store(last_ptr + number, vocab.to(tl.int64))
    tl.store(key_ptr + number, key)
    tl.store(rank_ptr + number, rank)


@triton.jit
def _count_equal(
    equal_ptr: tl.tensor,
    key_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    ask_ptr: tl.tensor,
    row_stride: tl.tensor,
    vocab: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    """How many tokens of a chunk are at the edge."""
    number, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    logits = _logits_of(logits_ptr, ask_ptr + number * 5, row_stride, vocab, chunk, CHUNK)
    equal = (_key(logits) == tl.load(key_ptr + number)).to(tl.int32)
    tl.store(equal_ptr + number * tl.num_programs(0) + chunk, tl.sum(equal, axis=0))


@triton.jit
def _last_equal(
    last_ptr: tl.tensor,
    equal_ptr: tl.tensor,
    key_ptr: tl.tensor,
    rank_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    ask_ptr: tl.tensor,
    row_stride: tl.tensor,
    vocab: tl.tensor,
    chunks: tl.tensor,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """The token whose rank it is among those at the edge; where there are fewer what is stored stays, and lets all of them through."""
    number = tl.program_id(0).to(tl.int64)
    rank, at = tl.load(rank_ptr + number), tl.arange(0, CHUNKS)
    equal = tl.load(equal_ptr + number * chunks + at, mask=at < chunks, other=0)
    before = tl.cumsum(equal, axis=0) < rank
    chunk = tl.sum((before & (at < chunks)).to(tl.int32), axis=0)
    rank -= tl.sum(tl.where(before, equal, 0), axis=0)
    logits = _logits_of(logits_ptr, ask_ptr + number * 5, row_stride, vocab, chunk, CHUNK)
    ranks = tl.cumsum((_key(logits) == tl.load(key_ptr + number)).to(tl.int32), axis=0)
    token = chunk * CHUNK + tl.sum((ranks < rank).to(tl.int32), axis=0)
    tl.store(last_ptr + number, token.to(tl.int64), mask=chunk < chunks)


def edges(logits: Tensor, asks: Tensor, by_count: bool, by_mass: bool, by_share: bool) -> tuple[Tensor, Tensor]:
    """Of each ask the least logit that is let through, fp32 [asks], and the last token that is of those that have it, int64 [asks].

    logits: bf16, fp16 or fp32 [rows, vocab], each row contiguous, at most 2**22 logits; asks: int64 [asks, 5], the row, top-k (0 for none,
    else at most `vocab`), and as bits of fp32 the temperature, top-p (1 for none) and the logarithm of min-p (-inf for none). Whether any
    asks for top-k, for top-p and for min-p the host knows.
    """
    device, some, vocab = asks.device, len(asks), logits.shape[1]
    chunks = triton.cdiv(vocab, CHUNK)
    each_chunk = (chunks, some)
    counts, masses = torch.zeros(2, some, TALLY.value, dtype=torch.int64, device=device)
    largest = torch.full((some,), -INFINITE.value, dtype=torch.int32, device=device)
    row = (logits, asks, logits.stride(0), vocab)
    if by_mass or by_share:
        _largest_key[each_chunk](largest, *row, CHUNK=CHUNK)
    for kind in [kind for kind, asked in ((False, by_count), (True, by_mass)) if asked]:
        for passes in range(PASSES[logits.dtype]):
            _tally_chunk[each_chunk](counts, masses, largest, *row, passes, BY_MASS=kind, CHUNK=CHUNK)
    # Memory of its own for each: Triton compiles a kernel again for what does not begin at a multiple of 16 bytes.
    floors, keys = (torch.empty(some, dtype=dtype, device=device) for dtype in (torch.float32, torch.int32))
    lasts, ranks = (torch.empty(some, dtype=torch.int64, device=device) for _ in range(2))
    _found_edges[(some,)](floors, lasts, keys, ranks, counts, masses, largest, asks, vocab, num_warps=4)
    if by_count or by_mass:
        equal = torch.empty(some, chunks, dtype=torch.int32, device=device)
        _count_equal[each_chunk](equal, keys, *row, CHUNK=CHUNK)
        _last_equal[(some,)](
            lasts, equal, keys, ranks, *row, chunks, CHUNKS=max(16, triton.next_power_of_2(chunks)), CHUNK=CHUNK, num_warps=8
        )
    return floors, lasts
