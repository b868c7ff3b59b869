"""Gumbel noise for drawing: of every token a function of (seed, choice, index, token) alone.

It is made top down, so that a draw need not make all of it: first the largest noise of each group of 64 tokens and the token that
has it, then, where that could still win, the noise of the others below it. The largest of n independent Gumbel variables is one
more, moved by log n; which has it is uniform; and the others are Gumbel variables cut off at it (Maddison, Tarlow and Minka,
"A* sampling", 2014, section 3). With y = exp(-noise), which for Gumbel noise is exponential: the least y of a group is
exponential / n, and every other y is that much plus an exponential of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .philox import philox

GROUP = 64
"""Tokens of a group. 262,144 logits take 0.4 to 0.6 ms with 64, 0.35 to 1.2 with 256, and 2 if all noise is made."""

_COUNTERS = GROUP // 4
_BLOCK = 512
"""Groups made at once: their arrays of 64 KiB stay in the second-level cache."""


@dataclass(frozen=True, slots=True)
class Caps:
    """Of each group, [groups]: `least`, exp(-its largest noise), fp32; `place`, of the token in the group that has it, int64."""

    least: Tensor
    place: Tensor

    @property
    def largest(self) -> Tensor:
        """No noise in the group is larger; one is this large."""
        return self.least.log().neg_()


@dataclass(frozen=True, slots=True)
class Noise:
    """Which noise: of output token `index` of `choice` of the request with this 64-bit `seed`.

    Group g has words 2 * (g % 2) and the next of Philox counter (g // 2, choice, index, 1), for its largest noise and for the place
    (low bits); token t has word t % 4 of counter (t // 4, choice, index, 0). Word x gives w = (x + 1/2) / 2**32 and the exponential
    -log(1 - w): the tail that wins, w near 0, keeps all 32 bits in fp32.
    """

    seed: int
    choice: int
    index: int

    def caps(self, groups: int) -> Caps:
        """Of groups 0 to groups - 1."""
        words = self._words(np.arange(-(-groups // 2), dtype=np.uint64), 1)
        least = _exponential(words[:, 0::2].astype(np.float32).ravel()[:groups]).div_(GROUP)
        place = words[:, 1::2].ravel()[:groups] & np.uint64(GROUP - 1)
        return Caps(least, torch.from_numpy(place.astype(np.int64)))

    def of_groups(self, groups: Tensor, caps: Caps) -> Tensor:
        """Noise of all tokens of some groups, fp32 [n, GROUP]. groups: int64 [n], into `caps`."""
        noise = torch.empty(len(groups), GROUP)
        for start in range(0, len(groups), _BLOCK):
            part = groups[start : start + _BLOCK]
            counters = (part[:, None] * _COUNTERS + torch.arange(_COUNTERS)).flatten().numpy().astype(np.uint64)
            words = self._words(counters, 0).astype(np.float32).reshape(len(part), GROUP)
            more = _exponential(words).scatter_(1, caps.place[part, None], 0.0)
            noise[start : start + _BLOCK] = _noise(caps.least[part, None], more)
        return noise

    def of(self, tokens: Tensor) -> Tensor:
        """Noise of each token id, fp32. tokens: int64 [n]."""
        ids = tokens.numpy().astype(np.uint64)
        groups, rows = (tokens // GROUP).numpy().astype(np.uint64), np.arange(len(ids))
        words, first = self._words(groups >> np.uint64(1), 1), (groups & np.uint64(1)).astype(np.int64) * 2
        least = _exponential(words[rows, first].astype(np.float32)).div_(GROUP)
        place = words[rows, first + 1] & np.uint64(GROUP - 1)
        own = self._words(ids >> np.uint64(2), 0)[rows, (ids & np.uint64(3)).astype(np.int64)]
        more = _exponential(own.astype(np.float32)).masked_fill_(torch.from_numpy(place == ids % np.uint64(GROUP)), 0.0)
        return _noise(least, more)

    def of_all(self, vocab_size: int) -> Tensor:
        """Noise of tokens 0 to vocab_size - 1, fp32."""
        groups = -(-vocab_size // GROUP)
        return self.of_groups(torch.arange(groups), self.caps(groups)).flatten()[:vocab_size]

    def _words(self, counters: NDArray[np.uint64], kind: int) -> NDArray[np.uint64]:
        return np.stack(philox((counters, self.choice, self.index, kind), self.seed), axis=1)


def _exponential(words: NDArray[np.float32]) -> Tensor:
    """w is kept below 1, where fp32 would round the last 2**7 words up to it and the exponential would be infinite."""
    w = torch.from_numpy(words).add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return w.neg_().log1p_().neg_()


def _noise(least: Tensor, more: Tensor) -> Tensor:
    """The minimum holds whatever way a device rounds logarithms: no noise is above its group's."""
    return torch.minimum(more.add_(least).log_().neg_(), least.log().neg_())
