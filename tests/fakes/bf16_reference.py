"""What judges answers in bfloat16: a model in transformers, and the margin rule of `kernels.tolerance`."""

from __future__ import annotations

import torch
from diptych.core.sampling import SamplingParams
from diptych.kernels.noise import Noise
from diptych.kernels.tolerance import may_differ

GREEDY = SamplingParams(temperature=0.0)


class Reference:
    """A model in transformers, in bfloat16: its greedy tokens, and the logits by which a difference is judged."""

    def __init__(self, model):
        self.model = model.to(torch.bfloat16).eval()

    def logits(self, ids):
        with torch.inference_mode():
            return self.model(torch.tensor([ids])).logits[0, -1]

    def generate(self, ids, count):
        with torch.inference_mode():
            out = self.model.generate(torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return out[0, len(ids) :].tolist()

    def agreed(self, ids, one, other, sampling=GREEDY, dtype=torch.bfloat16):
        """How many tokens after `ids` are equal; fails if the first difference is not within the tolerance of `dtype`."""
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            if a != b:
                logits = self.logits([*ids, *one[:index]])
                noise = None if sampling.greedy else Noise(sampling.seed, 0, index)
                temperature = 1.0 if sampling.greedy else sampling.temperature
                assert may_differ(logits, a, b, dtype, temperature=temperature, noise=noise), f"step {index}: {a} or {b}"
                return index
        return len(one)
