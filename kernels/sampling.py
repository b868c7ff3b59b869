"""Drawing a token: temperature, then top-k, top-p and min-p, then the largest of log-probability plus Gumbel noise.

The largest of logit + Gumbel noise is a draw from the softmax (Gumbel, 1954; Maddison, Tarlow and Minka, 2014). The noise of a
token is a function of (seed, choice, index, token) alone, so the same request draws the same tokens on every device, in every
batch, and whatever else top-k and top-p let through.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .philox import philox

NUCLEUS_SIZES = (1024, 16384)
"""Top-p looks among so many likeliest tokens before it sorts the whole vocabulary (14 ms for 262,144; 0.7 for the first 1,024)."""

_GROUPS = 8192
"""Counters computed at once: their arrays of 64 KiB stay in the second-level cache (1.3 ms for 262,144 tokens instead of 3)."""


@dataclass(frozen=True, slots=True)
class Noise:
    """Which noise: of output token `index` of `choice` of the request with this 64-bit `seed`."""

    seed: int
    choice: int
    index: int

    def of(self, tokens: Tensor) -> Tensor:
        """Gumbel noise of each token id, fp32. tokens: int64 [n].

        Token t has word t % 4 of Philox counter (t // 4, choice, index, 0); word x gives w = (x + 1/2) / 2**32 and the noise
        -log(-log(1 - w)): the tail that wins, w near 0, keeps all 32 bits in fp32.
        """
        ids = tokens.numpy().astype(np.uint64)
        words = philox((ids >> np.uint64(2), self.choice, self.index, 0), self.seed)
        return _gumbel(np.choose((ids & np.uint64(3)).astype(np.int64), words).astype(np.float32))

    def of_all(self, vocab_size: int) -> Tensor:
        """Noise of tokens 0 to vocab_size - 1, fp32."""
        groups = -(-vocab_size // 4)
        words = np.empty((groups, 4), dtype=np.float32)
        for start in range(0, groups, _GROUPS):
            block = slice(start, min(start + _GROUPS, groups))
            counters = np.arange(block.start, block.stop, dtype=np.uint64)
            for place, word in enumerate(philox((counters, self.choice, self.index, 0), self.seed)):
                words[block, place] = word
        return _gumbel(words.ravel()[:vocab_size])


def _gumbel(words: NDArray[np.float32]) -> Tensor:
    w = torch.from_numpy(words).add_(0.5).mul_(2.0**-32)
    return w.neg_().log1p_().neg_().log_().neg_()


def draw(logits: Tensor, noise: Noise, *, temperature: float, top_k: int, top_p: float, min_p: float = 0.0) -> int:
    """The token drawn from fp32 logits [vocab]. temperature > 0; top_k 0, top_p 1 and min_p 0 are no limit."""
    scaled = logits / temperature
    if top_k or top_p < 1.0 or min_p > 0.0:
        values, tokens = survivors(scaled, top_k, top_p, min_p)
        return int(tokens[(values + noise.of(tokens)).argmax()])
    return int((scaled + noise.of_all(len(scaled))).argmax())


def survivors(logits: Tensor, top_k: int, top_p: float, min_p: float = 0.0) -> tuple[Tensor, Tensor]:
    """Values and ids of the tokens that top-k, then top-p, then min-p let through; at least one.

    min-p (Nguyen et al., 2024) is a share of the likeliest one's probability, which a sum over what is left does not change.
    """
    if not top_k and top_p == 1.0:
        tokens = _likely(logits, float(logits.max()), min_p).nonzero().flatten()
        return logits[tokens], tokens
    values, tokens = _likeliest(logits, top_k, top_p)
    if min_p > 0.0:
        kept = int(_likely(values, float(values[0]), min_p).sum())
        values, tokens = values[:kept], tokens[:kept]
    return values, tokens


def _likely(logits: Tensor, best: float, min_p: float) -> Tensor:
    return logits >= best + (math.log(min_p) if min_p > 0.0 else -math.inf)


def _likeliest(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """What top-k, then top-p, let through, likeliest first."""
    vocab = len(logits)
    if top_k:
        values, tokens = logits.topk(min(top_k, vocab))
        kept = _nucleus(values, values.logsumexp(0), top_p) if top_p < 1.0 else len(values)
        return values[:kept], tokens[:kept]
    total = logits.logsumexp(0)
    for size in (*NUCLEUS_SIZES, vocab):
        values, tokens = logits.topk(min(size, vocab))
        kept = _nucleus(values, total, top_p)
        if kept < len(values):
            break
    return values[:kept], tokens[:kept]


def _nucleus(values: Tensor, total: Tensor, top_p: float) -> int:
    """How many of the likeliest tokens are needed to hold probability top_p: those before which less than top_p is held."""
    probabilities = (values - total).exp()
    before = probabilities.cumsum(0) - probabilities
    return max(1, int((before < top_p).sum()))


def log_probabilities(logits: Tensor, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Natural log-probability of `token` and the `count` likeliest (id, log-probability), from fp32 logits [vocab]."""
    total = float(logits.logsumexp(0))
    values, tokens = logits.topk(count)
    top = tuple((int(i), float(v) - total) for i, v in zip(tokens.tolist(), values.tolist(), strict=True))
    return float(logits[token]) - total, top
