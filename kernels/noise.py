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
from torch import Tensor

from .philox import philox, philox_tensor

GROUP = 64
"""Tokens of a group. 262,144 logits take 0.4 to 0.6 ms with 64, 0.35 to 1.2 with 256, and 2 if all noise is made."""

_COUNTERS = GROUP // 4
_BLOCK = 512
"""Groups made at once on a CPU: their arrays of 64 KiB stay in the second-level cache."""


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

    def caps(self, groups: int, device: torch.device | None = None) -> Caps:
        """Of groups 0 to groups - 1."""
        words = self._words(torch.arange(-(-groups // 2), device=device), 1)
        least = _exponential(words[:, 0::2].flatten()[:groups]).div_(GROUP)
        return Caps(least, words[:, 1::2].flatten()[:groups] & (GROUP - 1))

    def of_groups(self, groups: Tensor, caps: Caps) -> Tensor:
        """Noise of all tokens of some groups, fp32 [n, GROUP]. groups: int64 [n], into `caps`."""
        noise = torch.empty(len(groups), GROUP, device=groups.device)
        counters = torch.arange(_COUNTERS, device=groups.device)
        at_once = _BLOCK if groups.is_cpu else max(1, len(groups))
        for start in range(0, len(groups), at_once):
            part = groups[start : start + at_once]
            words = self._words((part[:, None] * _COUNTERS + counters).flatten(), 0).view(len(part), GROUP)
            more = _exponential(words).scatter_(1, caps.place[part, None], 0.0)
            noise[start : start + at_once] = _noise(caps.least[part, None], more)
        return noise

    def of(self, tokens: Tensor) -> Tensor:
        """Noise of each token id, fp32. tokens: int64 [n]."""
        groups = tokens // GROUP
        words, first = self._words(groups >> 1, 1), (groups & 1)[:, None] * 2
        least = _exponential(words.gather(1, first)[:, 0]).div_(GROUP)
        place = words.gather(1, first + 1)[:, 0] & (GROUP - 1)
        own = self._words(tokens >> 2, 0).gather(1, (tokens & 3)[:, None])[:, 0]
        return _noise(least, _exponential(own).masked_fill_(place == tokens % GROUP, 0.0))

    def of_all(self, vocab_size: int, device: torch.device | None = None) -> Tensor:
        """Noise of tokens 0 to vocab_size - 1, fp32."""
        groups = -(-vocab_size // GROUP)
        return self.of_groups(torch.arange(groups, device=device), self.caps(groups, device)).flatten()[:vocab_size]

    def _words(self, counters: Tensor, kind: int) -> Tensor:
        """int64 [n, 4], where the counters are: on a CPU by numpy, which has unsigned products and takes half of torch's time."""
        rest = (self.choice, self.index, kind)
        if not counters.is_cpu:
            return philox_tensor((counters, *rest), self.seed)
        words = philox((counters.numpy().view(np.uint64), *rest), self.seed)
        return torch.from_numpy(np.stack(words, axis=1).view(np.int64))


def _exponential(words: Tensor) -> Tensor:
    """w is kept below 1, where fp32 would round the last 2**7 words up to it and the exponential would be infinite."""
    w = words.float().add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return w.neg_().log1p_().neg_()


def _noise(least: Tensor, more: Tensor) -> Tensor:
    """The minimum holds whatever way a device rounds logarithms: no noise is above its group's."""
    return torch.minimum(more.add_(least).log_().neg_(), least.log().neg_())
