"""Drawing a token: temperature, then top-k, then top-p, then the largest of log-probability plus Gumbel noise.

The largest of logit + Gumbel noise is a draw from the softmax (Gumbel, 1954; Maddison, Tarlow and Minka, 2014). The noise of a
token is a function of (seed, choice, index, token) alone, so the same request draws the same tokens on every device, in every
batch, and whatever else top-k and top-p let through.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .philox import philox

HEAD = 1024
"""Top-p first looks among so many likeliest tokens; only if they hold less than p is the whole vocabulary sorted (14 ms)."""

NOISE_MAX = 22.9
"""Above the largest noise there is: -log(-log1p(-2**-33))."""


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
        groups, where = np.unique(ids >> np.uint64(2), return_inverse=True)
        words = np.stack(philox((groups, self.choice, self.index, 0), self.seed))
        return _gumbel(words[(ids & np.uint64(3)).astype(np.int64), where])

    def of_all(self, vocab_size: int) -> Tensor:
        """Noise of tokens 0 to vocab_size - 1, fp32."""
        groups = np.arange(-(-vocab_size // 4), dtype=np.uint64)
        words = np.stack(philox((groups, self.choice, self.index, 0), self.seed), axis=1)
        return _gumbel(words.ravel()[:vocab_size])


def _gumbel(words: np.ndarray[tuple[int, ...], np.dtype[np.uint64]]) -> Tensor:
    w = torch.from_numpy(words.astype(np.float32)).add_(0.5).mul_(2.0**-32)
    return w.neg_().log1p_().neg_().log_().neg_()


def draw(logits: Tensor, noise: Noise, *, temperature: float, top_k: int, top_p: float) -> int:
    """The token drawn from fp32 logits [vocab]. temperature > 0; top_k 0 and top_p 1 are no limit."""
    scaled = logits / temperature
    if top_k or top_p < 1.0:
        values, tokens = survivors(scaled, top_k, top_p)
        return int(tokens[(values + noise.of(tokens)).argmax()])
    return _draw_all(scaled, noise)


def survivors(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Values and ids of the tokens that top-k, then top-p, let through, likeliest first; at least one."""
    vocab = logits.shape[0]
    count = min(top_k or HEAD, vocab)
    values, tokens = logits.topk(count)
    if top_p >= 1.0:
        return values, tokens
    total = values.logsumexp(0) if top_k else logits.logsumexp(0)
    kept = _nucleus(values, total, top_p)
    if not top_k and kept == count < vocab:
        values, tokens = logits.sort(descending=True)
        kept = _nucleus(values, total, top_p)
    return values[:kept], tokens[:kept]


def _nucleus(values: Tensor, total: Tensor, top_p: float) -> int:
    """How many of the likeliest tokens are needed to hold probability top_p: those before which less than top_p is held."""
    probabilities = (values - total).exp()
    before = probabilities.cumsum(0) - probabilities
    return max(1, int((before < top_p).sum()))


def _draw_all(scaled: Tensor, noise: Noise) -> int:
    """The token with the largest logit plus noise. A first look at the likeliest gives a bound that rules most others out."""
    values, tokens = scaled.topk(min(HEAD, scaled.shape[0]))
    best = float((values + noise.of(tokens)).max())
    possible = (scaled >= best - NOISE_MAX).nonzero().flatten()
    return int(possible[(scaled[possible] + noise.of(possible)).argmax()])


def log_probabilities(logits: Tensor, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Natural log-probability of `token` and the `count` likeliest (id, log-probability), from fp32 logits [vocab]."""
    total = float(logits.logsumexp(0))
    values, tokens = logits.topk(count)
    top = tuple((int(i), float(v) - total) for i, v in zip(tokens.tolist(), values.tolist(), strict=True))
    return float(logits[token]) - total, top
