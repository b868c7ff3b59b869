"""Drawing a token: temperature, then top-k, top-p and min-p, then the largest of log-probability plus Gumbel noise.

The largest of logit + Gumbel noise is a draw from the softmax (Gumbel, 1954; Maddison, Tarlow and Minka, 2014). The noise of a
token is a function of (seed, choice, index, token) alone, so the same request draws the same tokens on every device, in every
batch, and whatever else top-k, top-p and min-p let through.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .likeliest import likeliest, log_total
from .native import native
from .noise import GROUP, Noise
from .triton_kernels import TritonKernels, triton_for

NUCLEUS_SIZES = (1024, 16384)
"""Top-p looks among so many likeliest tokens before it sorts the whole vocabulary (14 ms for 262,144; 0.13 for the first 1,024)."""
_FEW = 1024
"""Up to so many survivors get their noise one by one (0.15 ms for 50, 0.22 for 1,024, 30 for the whole vocabulary)."""
_FIRST = 4
"""Groups whose noise is made first, to learn what the others must reach."""


def draw(logits: Tensor, noise: Noise, *, temperature: float, top_k: int, top_p: float, min_p: float = 0.0) -> Tensor:
    """The token drawn from logits [vocab], int64 [] where they are. temperature > 0; top_k 0, top_p 1 and min_p 0 are no limit."""
    limited = top_k or top_p < 1.0 or min_p > 0.0
    if (kernels := triton_for(logits)) is not None:
        limits = limits_of(logits.float() / temperature, top_k=top_k, top_p=top_p, min_p=min_p) if limited else (None, None)
        return _drawn_by_triton(kernels, logits, noise, temperature, limits)
    if logits.is_cpu and not limited:
        return _drawn_of_all(logits, noise, temperature)
    if not logits.is_cpu:
        return draw_at_once(logits.float() / temperature, noise, top_k=top_k, top_p=top_p, min_p=min_p)
    values, tokens = survivors(logits, top_k, top_p, min_p, temperature)
    if len(tokens) <= _FEW:
        return tokens[(values + noise.of(tokens)).argmax()]
    return _drawn_of_all(torch.full((len(logits),), -math.inf).index_copy_(0, tokens, values), noise, 1.0)


def _drawn_of_all(logits: Tensor, noise: Noise, temperature: float) -> Tensor:
    kernels = native() if logits.dtype in (torch.float32, torch.bfloat16) and logits.is_contiguous() else None
    if kernels is None:
        return draw_torch(logits, noise, temperature)
    token = torch.empty((), dtype=torch.int64)
    wide, key = logits.dtype is torch.float32, (noise.seed, noise.choice, noise.index)
    kernels.draw(token.data_ptr(), logits.data_ptr(), wide, len(logits), temperature, *key)
    return token


def _drawn_by_triton(
    kernels: TritonKernels, logits: Tensor, noise: Noise, temperature: float, limits: tuple[Tensor | None, Tensor | None]
) -> Tensor:
    """Nothing waits: what is asked comes from pinned memory."""
    seed = noise.seed - (noise.seed >> 63 << 64)  # the same bits with a sign
    bits = torch.tensor(temperature).view(torch.int32)
    asks = torch.tensor([[seed, noise.choice, noise.index, int(bits)]], pin_memory=logits.is_cuda).to(logits.device, non_blocking=True)
    token = torch.empty((), dtype=torch.int64, device=logits.device)
    kernels.draw(token, logits[None], asks, *limits)
    return token


def limits_of(scaled: Tensor, *, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor]:
    """Of logits that are divided by the temperature, [vocab], the least that the limits let through, fp32 [], and the last token that they
    let through of those that have it, int64 []: of equal ones the first. With nothing that the host must know in between."""
    if not top_k and top_p == 1.0:
        return scaled.max() + math.log(min_p), torch.full((), len(scaled), dtype=torch.int64, device=scaled.device)
    count = min(top_k or len(scaled), len(scaled))
    values, tokens = (each[:count] for each in scaled.sort(descending=True, stable=True))
    kept = _likely(values, values[0], min_p)
    if top_p < 1.0:
        kept &= _before(values, values.logsumexp(0)) < top_p
    least = kept.sum().sub_(1).clamp_(min=0)
    return values.take(least), tokens.take(least)


def draw_at_once(logits: Tensor, noise: Noise, *, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The same from logits that are divided by the temperature, with nothing that the host must know in between: a device goes on. What
    the limits do not let through keeps its place and cannot win."""
    if not top_k and top_p == 1.0 and min_p == 0.0:
        return (logits + noise.of_all(len(logits), logits.device)).argmax()
    values, tokens = logits.topk(min(top_k or len(logits), len(logits)))
    kept = _likely(values, values[0], min_p)
    if top_p < 1.0:
        kept &= _before(values, (values if top_k else logits).logsumexp(0)) < top_p
        kept[0] = True
    return tokens.take((values.masked_fill(~kept, -math.inf) + noise.of(tokens)).argmax())  # an index would be brought to the host


def draw_torch(logits: Tensor, noise: Noise, temperature: float) -> Tensor:
    """The token whose logit and noise are the largest sum: `(logits / temperature + noise.of_all(len(logits))).argmax()`, without most of
    the noise. By torch 262,144 logits take 0.5 ms, draw.cpp 0.05.

    A group whose largest logit and largest noise together are below a sum that some token has cannot win. Rounded sums keep that
    order, so the answer is the same to the bit; of equal sums the first wins, as in argmax.
    """
    rows = _in_groups(logits.float() / temperature)
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


def survivors(logits: Tensor, top_k: int, top_p: float, min_p: float = 0.0, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits divided by the temperature, and ids, of the tokens that top-k, then top-p, then min-p let through; at least one.

    min-p (Nguyen et al., 2024) is a share of the likeliest one's probability, which a sum over what is left does not change.
    """
    if not top_k and top_p == 1.0:
        scaled = logits.float() / temperature
        tokens = _likely(scaled, scaled.max(), min_p).nonzero().flatten()
        return scaled[tokens], tokens
    values, tokens = _likeliest(logits, top_k, top_p, temperature)
    if min_p > 0.0:
        kept = int(_likely(values, values[0], min_p).sum())
        values, tokens = values[:kept], tokens[:kept]
    return values, tokens


def _likely(logits: Tensor, best: Tensor, min_p: float) -> Tensor:
    return logits >= best + (math.log(min_p) if min_p > 0.0 else -math.inf)


def _likeliest(logits: Tensor, top_k: int, top_p: float, temperature: float) -> tuple[Tensor, Tensor]:
    """What top-k, then top-p, let through, likeliest first."""
    vocab = len(logits)
    if top_k:
        values, tokens = likeliest(logits, min(top_k, vocab), temperature)
        kept = _nucleus(values, values.logsumexp(0), top_p) if top_p < 1.0 else len(values)
        return values[:kept], tokens[:kept]
    total = log_total(logits, temperature)
    for size in (*NUCLEUS_SIZES, vocab):
        values, tokens = likeliest(logits, min(size, vocab), temperature)
        kept = _nucleus(values, total, top_p)
        if kept < len(values):
            break
    return values[:kept], tokens[:kept]


def _nucleus(values: Tensor, total: Tensor, top_p: float) -> int:
    """How many of the likeliest tokens are needed to hold probability top_p: those before which less than top_p is held."""
    return max(1, int((_before(values, total) < top_p).sum()))


def _before(values: Tensor, total: Tensor) -> Tensor:
    """The probability of all tokens before each."""
    probabilities = (values - total).exp()
    return probabilities.cumsum(0) - probabilities


def log_probabilities(logits: Tensor, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Natural log-probability of `token` and the `count` likeliest (id, log-probability), from logits [vocab]."""
    total = float(log_total(logits))
    values, tokens = likeliest(logits, count)
    top = tuple((int(i), float(v) - total) for i, v in zip(tokens.tolist(), values.tolist(), strict=True))
    return float(logits[token]) - total, top
