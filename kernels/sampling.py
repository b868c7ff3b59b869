"""Drawing tokens: temperature, then top-k, top-p and min-p, then the largest of log-probability plus Gumbel noise; all draws at once.

The largest of logit + Gumbel noise is a draw from the softmax (Gumbel, 1954; Maddison, Tarlow and Minka, 2014). The noise of a
token is a function of (seed, choice, index, token) alone, so the same request draws the same tokens on every device, in every
batch, and whatever else top-k, top-p and min-p let through.

What limits let through is a floor: a logit, and of those tokens that have it the last. It is found first, for all draws that have
limits (on a GPU gpu/edges.py), and then one pass over the logits draws among what is not below (draw.cpp, gpu/draw.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from struct import Struct

import torch
from torch import Tensor

from .likeliest import likeliest, log_totals
from .native import Native, native
from .noise import GROUP, Noise
from .sent import sent
from .threads import threads
from .triton_kernels import triton_for

NUCLEUS_SIZES = (1024, 16384)
"""Without top-k the edge is looked for among so many likeliest tokens before the whole vocabulary is sorted (14 ms for 262,144; 0.13 for
the first 1,024)."""
_FIRST = 4
"""Groups whose noise is made first, to learn what the others must reach."""
_FLOAT = Struct("<f")

Limits = tuple[Tensor, Tensor]
"""Of each draw the least logit that is let through, fp32 [draws], and the last token that is of those that have it, int64 [draws]."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One draw from row `row`. temperature > 0; top_k 0, top_p 1 and min_p 0 are no limit."""

    row: int
    noise: Noise
    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def limited(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


def draw(logits: Tensor, asks: Sequence[Ask]) -> Tensor:
    """The tokens drawn from logits [rows, vocab], int64 [asks], where the logits are, which a device need not have computed yet."""
    asked = sent(torch.tensor([_packed(ask) for ask in asks]), logits.device)
    limits = limits_of(logits, asks) if any(ask.limited for ask in asks) else None
    tokens = torch.empty(len(asks), dtype=torch.int64, device=logits.device)
    if (on_gpu := triton_for(logits)) is not None:
        on_gpu.draw(tokens, logits, asked, *(limits or (None, None)))
    elif (kernels := _kernels(logits)) is not None:
        _draw_native(kernels, tokens, logits, asked, limits)
    else:
        return torch.stack([draw_torch(logits[ask.row], ask, _limits_at(limits, place)) for place, ask in enumerate(asks)])
    return tokens


def _packed(ask: Ask) -> tuple[int, int, int, int, int]:
    """Seed, choice, index, temperature, row; 64 bits each, of the temperature fp32's."""
    noise = ask.noise
    seed = noise.seed - (noise.seed >> 63 << 64)  # the same bits with a sign
    return seed, noise.choice, noise.index, _bits(ask.temperature), ask.row


def _kernels(logits: Tensor) -> Native | None:
    fits = logits.is_cpu and logits.dtype in (torch.float32, torch.bfloat16) and logits.stride(1) == 1
    return native() if fits else None


def _draw_native(kernels: Native, tokens: Tensor, logits: Tensor, asked: Tensor, limits: Limits | None) -> None:
    kernels.draw(
        tokens.data_ptr(),
        logits.data_ptr(),
        logits.dtype is torch.float32,
        logits.shape[1],
        logits.stride(0),
        asked.data_ptr(),
        limits and limits[0].data_ptr(),
        limits and limits[1].data_ptr(),
        len(tokens),
        threads(),
    )


def _limits_at(limits: Limits | None, place: int) -> Limits | None:
    return limits and (limits[0][place], limits[1][place])


def limits_of(logits: Tensor, asks: Sequence[Ask]) -> Limits:
    """Of every draw; of one without limits they let all through. top-k, then top-p, then min-p (Nguyen et al., 2024), which is a share of
    the likeliest one's probability: that a sum over what is left does not change. Of equal logits at the edge the first are let through."""
    device, vocab = logits.device, logits.shape[1]
    floors = torch.full((len(asks),), -math.inf, device=device)
    lasts = torch.full((len(asks),), vocab, dtype=torch.int64, device=device)
    limited = [place for place, ask in enumerate(asks) if ask.limited]
    there = not logits.is_cpu or triton_for(logits) is not None
    for places, edges in [(limited, _edges_there(logits, asks, limited))] if there else _edges_here(logits, asks, limited):
        at = sent(torch.tensor(places), device)
        floors.index_copy_(0, at, edges[0])
        lasts.index_copy_(0, at, edges[1])
    return floors, lasts


def _edges_here(logits: Tensor, asks: Sequence[Ask], limited: Sequence[int]) -> Iterator[tuple[list[int], Limits]]:
    """On a CPU: draws that look among as many of the likeliest tokens are looked at together; without top-k one that does not find its edge
    among them looks again."""
    vocab = logits.shape[1]
    waiting = [(min(asks[place].top_k or NUCLEUS_SIZES[0], vocab), asks[place].top_k > 0, place) for place in limited]
    while waiting:
        size, whole, _ = waiting[0]
        places = [place for *kind, place in waiting if kind == [size, whole]]
        waiting = [each for each in waiting if each[2] not in places]
        some = [asks[place] for place in places]
        rows, temperatures = torch.tensor([ask.row for ask in some]), _floats([ask.temperature for ask in some])
        values, tokens = likeliest(logits, rows, size, temperatures)
        kept = _kept(values, None if whole or all(ask.top_p == 1.0 for ask in some) else log_totals(logits, rows, temperatures), some)
        last = tokens.gather(1, kept[:, None] - 1)[:, 0]
        yield places, (logits[rows, last].float(), last)
        if not whole and size < vocab:
            larger = min([each for each in (*NUCLEUS_SIZES, vocab) if each > size])
            waiting += [(min(larger, vocab), whole, place) for place, count in zip(places, kept.tolist(), strict=True) if count == size]


def _edges_there(logits: Tensor, asks: Sequence[Ask], limited: Sequence[int]) -> Limits:
    """On a device: of all that have limits at once, with nothing that the host must know in between."""
    some, vocab = [asks[place] for place in limited], logits.shape[1]
    if (on_gpu := triton_for(logits)) is None:
        return edges_sorted(logits, some)
    asked = sent(torch.tensor([_packed_limits(ask, vocab) for ask in some]), logits.device)
    kinds = any(0 < ask.top_k < vocab for ask in some), any(ask.top_p < 1.0 for ask in some), any(ask.min_p > 0.0 for ask in some)
    floors, lasts = on_gpu.edges(logits, asked, *kinds)
    return floors, lasts


def _packed_limits(ask: Ask, vocab: int) -> tuple[int, ...]:
    """Row, top-k (0 where it lets all through), then the bits in fp32 of temperature, top-p, and min-p's logarithm; 64 bits each."""
    share = math.log(ask.min_p) if ask.min_p > 0.0 else -math.inf
    return ask.row, ask.top_k if ask.top_k < vocab else 0, _bits(ask.temperature), _bits(ask.top_p), _bits(share)


def _bits(number: float) -> int:
    """Of it in fp32."""
    return int.from_bytes(_FLOAT.pack(number), "little")


def edges_sorted(logits: Tensor, asks: Sequence[Ask]) -> Limits:
    """The twin of gpu/edges.py, by torch: rows are sorted, 64 of 262,144 logits in an estimated 2 to 4 ms on a GPU."""
    vocab = logits.shape[1]
    numbers = sent(torch.tensor([[ask.row, min(ask.top_k or vocab, vocab)] for ask in asks]), logits.device)
    temperatures = sent(_floats([ask.temperature for ask in asks]), logits.device)
    rows, top_k = numbers.unbind(1)
    raw, tokens = logits.index_select(0, rows).sort(dim=1, descending=True, stable=True)
    beyond = torch.arange(vocab, device=logits.device) >= top_k[:, None]
    values = (raw.float() / temperatures[:, None]).masked_fill_(beyond, -math.inf)
    edge = torch.minimum(_kept(values, None, asks), top_k)[:, None] - 1
    return raw.gather(1, edge)[:, 0].float(), tokens.gather(1, edge)[:, 0]


def _kept(values: Tensor, totals: Tensor | None, asks: Sequence[Ask]) -> Tensor:
    """How many of the likeliest tokens top-p and min-p let through, int64 [asks], at least one; values: their logits divided by the
    temperatures, [asks, n], largest first. totals: of all tokens that top-p knows, by default of these."""
    kept = torch.full((len(asks),), values.shape[1], dtype=torch.int64, device=values.device)
    if any(ask.min_p > 0.0 for ask in asks):
        shares = [math.log(ask.min_p) if ask.min_p > 0.0 else -math.inf for ask in asks]
        least = values[:, :1] + sent(_floats(shares), values.device)[:, None]
        kept = (values >= least).sum(1)
    if any(ask.top_p < 1.0 for ask in asks):
        masses = sent(_floats([ask.top_p if ask.top_p < 1.0 else math.inf for ask in asks]), values.device)
        totals = values.logsumexp(1) if totals is None else totals
        kept = torch.minimum(kept, (_before(values, totals[:, None]) < masses[:, None]).sum(1))
    return kept.clamp_(min=1)


def _floats(numbers: Sequence[float]) -> Tensor:
    """fp32 also where all of them are whole, as clients write them."""
    return torch.tensor(numbers, dtype=torch.float32)


def _before(values: Tensor, totals: Tensor) -> Tensor:
    """The probability of all tokens before each."""
    probabilities = (values - totals).exp()
    return probabilities.cumsum(1) - probabilities


def draw_torch(logits: Tensor, ask: Ask, limits: Limits | None = None) -> Tensor:
    """One of the draws, int64 [], from its row [vocab]: `(logits / temperature + noise).argmax()` of what is let through. On a CPU without
    most of the noise: by torch 262,144 logits take 0.5 ms, draw.cpp 0.05.

    A group whose largest logit and largest noise together are below a sum that some token has cannot win. Rounded sums keep that
    order, so the answer is the same to the bit; of equal sums the first wins, as in argmax.
    """
    noise, scaled = ask.noise, logits.float() / torch.full((), ask.temperature, device=logits.device)
    if limits is not None:
        floor, last = limits
        below = (logits < floor) | ((logits == floor) & (torch.arange(len(logits), device=logits.device) > last))
        scaled = scaled.masked_fill(below, -math.inf)
    if not logits.is_cpu:
        return (scaled + noise.of_all(len(logits), logits.device)).argmax()
    rows = _in_groups(scaled)
    caps = noise.caps(len(rows))
    bounds = rows.amax(1) + caps.largest
    promising = bounds.topk(min(_FIRST, len(rows))).indices
    reached = (rows[promising] + noise.of_groups(promising, caps)).max()
    groups = (bounds < reached).logical_not_().nonzero().flatten()  # all of them should a logit be NaN
    winner = (rows[groups] + noise.of_groups(groups, caps)).argmax()
    return groups[winner // GROUP] * GROUP + winner % GROUP


def _in_groups(logits: Tensor) -> Tensor:
    """[groups, GROUP], the last group filled with tokens that cannot win."""
    lacks = -len(logits) % GROUP
    return (torch.nn.functional.pad(logits, (0, lacks), value=-math.inf) if lacks else logits).view(-1, GROUP)


def log_probabilities(logits: Tensor, rows: Tensor, tokens: Tensor, count: int) -> Tensor:
    """Where the logits [rows, vocab] are, fp64 [n, 2 + 2 * count]: of token `tokens[i]` of row `rows[i]` (int64 [n]) the logit, the row's
    logarithm of all exponentials, then the `count` largest logits and their tokens. A log-probability is a logit less the second number."""
    ones = torch.ones(len(rows), device=logits.device)
    values, top = likeliest(logits, rows, count, ones)
    return torch.cat([each.double() for each in (logits[rows, tokens][:, None], log_totals(logits, rows, ones)[:, None], values, top)], 1)
