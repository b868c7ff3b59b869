"""What both attention kernels do with scores: in fp32, in powers of two, a tile of keys after the other."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def scaled(products: tl.tensor, scale: tl.tensor, softcap: tl.tensor, SOFTCAP: tl.constexpr) -> tl.tensor:
    """The scores of products q·k, as exponents of 2; soft-capped if SOFTCAP."""
    if SOFTCAP:
        x = products * (scale / softcap)
        # tanh(x), and it holds far out: e to the 2x may be infinite or nothing
        return softcap * LOG2_E * (1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2_E))))
    return products * (scale * LOG2_E)


@triton.jit
def softened(scores: tl.tensor, most: tl.tensor) -> tl.tensor:
    """For a tile of scores [rows, keys] and the most of each row so far: its share of the softmax, not yet divided by the sum, the factor
    for what was summed before, and the new most. A row that has seen no key yet has -inf, and nothing to divide."""
    new_most = tl.maximum(most, tl.max(scores, axis=1))
    level = tl.where(new_most == float("-inf"), 0.0, new_most)
    return tl.exp2(scores - level[:, None]), tl.exp2(most - level), new_most
