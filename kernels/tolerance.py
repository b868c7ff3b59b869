"""How far two right computations of the same logits may lie apart: the numbers behind "the same tokens"."""

from __future__ import annotations

import torch
from torch import Tensor

from .noise import Noise

LOGIT_TOLERANCE = {torch.float32: 0.0, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5, torch.int8: 2.0**-4}
"""Per dtype of weights and KV (int8: of KV alone, whatever the weights are): as a share of the step's largest absolute logit, the margin
below which another chunk size, batch or kernel may draw the runner-up. From the first such step on, two answers go their own ways.

fp32 has none: tokens are equal, one for one. bfloat16 keeps 8 bits, and 1/32 is eight of its roundings: single logits of Gemma 3 270M
differ by up to 1.6 % of the largest between bf16 and fp32 and by 1.3 % between chunk sizes; tiny random models by 1.9 % and 1.1 %, and
by 2.5 % from transformers in bf16. float16 keeps 11 bits: an eighth of that. In int8 the least difference may round a number to the next:
over 6 other texts single logits differ by up to 2.6 % between chunk sizes (2.4 % with KV in bf16), and from KV in bf16 by as much.
"""


def may_differ(logits: Tensor, one: int, other: int, dtype: torch.dtype, *, temperature: float = 1.0, noise: Noise | None = None) -> bool:
    """Whether computations in `dtype` may draw token `one` or token `other` from what one of them found to be `logits` [vocab].

    A greedy draw has no noise; a sampled one is the largest of `logits / temperature + noise`.
    """
    tokens = torch.tensor([one, other])
    scores = logits.float()[tokens] / temperature
    if noise is not None:
        scores += noise.of(tokens)
    tolerance = LOGIT_TOLERANCE[dtype] * float(logits.float().abs().max()) / temperature
    return abs(float(scores[0] - scores[1])) < tolerance
