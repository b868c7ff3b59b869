"""How long a step takes: few terms, each of which is something that the device does. Pure.

    prefill    constant + token · tokens + pair · pairs            pairs: of positions that attend to each other, twice
    decode     constant + context · tokens attended to + row · sequences

`constant` is what a step costs however little it computes: launching, reading the weights. `token` is the arithmetic of one position,
`pair` that of attention; `context` reads one token's KV, `row` is one more sequence in the batch. With several pipeline stages a stage
has its part of that and a hop to the next. The form is DistServe's (OSDI 2024, appendix A); a chunk adds where its positions begin.
"""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field

from ...core.value import value
from .agenda import on_grid


class _Times(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PrefillTimes(_Times):
    """Seconds, through all shards of a worker with one stage."""

    constant: float = Field(ge=0, description="Of a step.")
    token: float = Field(ge=0, description="Per position computed.")
    pair: float = Field(ge=0, description="Per product length × (2 start + length) of each chunk: a whole prompt's length squared.")


class DecodeTimes(_Times):
    """Seconds, through all shards of a worker with one stage."""

    constant: float = Field(ge=0, description="Of a step.")
    context: float = Field(ge=0, description="Per token attended to, over all sequences of the batch.")
    row: float = Field(ge=0, description="Per sequence of the batch.")


class StepTimes(_Times):
    """All steps of a worker of this parallelism. `decode_large` holds from `large_from` sequences in a batch on."""

    prefill: PrefillTimes
    decode: DecodeTimes
    decode_large: DecodeTimes | None = None
    large_from: int = Field(96, ge=2)
    both: float = Field(0.0, ge=0, description="What a step takes more that computes prompts and decodes.")
    both_row: float | None = Field(
        None,
        ge=0,
        description="Per sequence that decodes in such a step, whose position is one more in the prompts' products. Default: as in others.",
    )
    step: float = Field(0.0, ge=0, description="What every step costs besides, once: handing it out and bringing its tokens back.")
    step_context: float = Field(0.0, ge=0, description="And that per token attended to.")
    step_row: float = Field(0.0, ge=0, description="And that per sequence that decodes: its token's way out.")
    hop: float = Field(0.0, ge=0, description="What each of several stages adds to its part.")

    def of_rows(self, rows: int) -> DecodeTimes:
        return self.decode_large if self.decode_large is not None and rows >= self.large_from else self.decode


@value
class Work:
    """What one step computes. `tokens`, `pairs`: of prompts (as above). `rows` sequences decode and attend to `context` tokens."""

    tokens: int = 0
    pairs: int = 0
    rows: int = 0
    context: int = 0


def step_seconds(times: StepTimes, work: Work, stages: int = 1) -> float:
    """From the step's begin to its tokens, through all stages. Prompts computed beside decodes read the weights with them: the
    larger constant counts, and every other term. (That of few sequences: of `decode_large` a part of the reading may be in `row`.)"""
    decode, prefill = times.of_rows(work.rows), times.prefill
    both, row = bool(work.rows and work.tokens), decode.row
    if both and times.both_row is not None:
        decode, row = times.decode, times.both_row
    constant = max(decode.constant if work.rows else 0.0, prefill.constant if work.tokens else 0.0)
    computed = constant + prefill.token * work.tokens + prefill.pair * work.pairs + decode.context * work.context + row * work.rows
    computed += times.both if both else 0.0
    around = times.step + times.step_context * work.context + times.step_row * work.rows
    return computed + around + (times.hop * stages if stages > 1 else 0.0)


@value
class Pace:
    """Of rounds of so many sequences: seconds of one, and what each token attended to adds; both on the agenda's grid."""

    sequences: int
    seconds: float
    token: float

    @classmethod
    def of(cls, times: StepTimes, sequences: int, stages: int = 1) -> Pace:
        """With several stages as many steps, of equal size, follow each other through them, and the round takes as long as one of them."""
        rows = -(-sequences // stages)
        token = on_grid((times.of_rows(rows).context + times.step_context) / stages)
        return cls(sequences, on_grid(step_seconds(times, Work(rows=rows), stages)), token)

    def rounds(self, context: int) -> Rounds:
        """That attend to `context` tokens together in the first."""
        return Rounds(self.seconds + self.token * context, self.token * self.sequences)


@value
class Rounds:
    """Rounds of decode steps, one after the other, in each of which every sequence is in one step and gets one more token: seconds of the
    first, and how much longer each is than the one before. Both are on the agenda's grid, so sums have no rounding."""

    first: float
    more: float

    def seconds(self, rounds: int) -> float:
        """Of so many."""
        return rounds * self.first + self.more * (rounds * (rounds - 1) // 2)

    def begun(self, seconds: float, most: int) -> int:
        """How many of at most `most` have begun after `seconds`: those that are complete, and the one that runs."""
        if self.seconds(most) <= seconds:
            return most
        half = self.first - self.more / 2
        complete = int(2 * seconds / (half + math.sqrt(half * half + 2 * self.more * seconds)))
        while self.seconds(complete) > seconds:
            complete -= 1
        while self.seconds(complete + 1) <= seconds:
            complete += 1
        return complete + 1


@value
class Arithmetic:
    """What a model computes and reads, by counting. `parameters`: weights that every token meets; the KV of a token is `kv_bytes`.

    FLOPs of a position: two for each weight; of attention: four per pair, layer and width of all heads (scores, then the sum).
    """

    parameters: float
    layers: int
    attention_width: int
    kv_bytes: float
    weight_bytes: float

    @property
    def token_flops(self) -> float:
        return 2 * self.parameters

    @property
    def pair_flops(self) -> float:
        """Of one of `Work.pairs`, which counts each pair twice; what is masked is not computed."""
        return 2 * self.layers * self.attention_width


@value
class Device:
    """What a data sheet says of one device: FLOP/s (dense, the model's dtype), bytes/s of memory, bytes, bytes/s to its neighbours on the
    node. `estimate`: nobody measured it."""

    name: str
    flops: float
    bandwidth: float
    memory_bytes: float
    link: float
    estimate: bool = True


@value
class Efficiency:
    """What share of the device's peaks is reached, and what a step costs besides, in seconds; of a shard of `tp` also its two reductions in
    each layer."""

    prefill_flops: float = 0.55
    attention_flops: float = 0.35
    bandwidth: float = 0.75
    step: float = 0.004
    reduction: float = 12e-6
    row: float = 4e-5


def roofline(model: Arithmetic, device: Device, tp: int, efficiency: Efficiency | None = None) -> StepTimes:
    """Times from a data sheet alone. A prefill step of few positions is no faster than reading the weights, which the constant is."""
    reached = efficiency or Efficiency()
    weights = model.weight_bytes / tp / (device.bandwidth * reached.bandwidth)
    reductions = 2 * model.layers * reached.reduction * (tp > 1)
    exchanged = 0.0 if tp == 1 else 4 * model.layers * model.attention_width * 2 * (tp - 1) / tp / device.link
    return StepTimes(
        prefill=PrefillTimes(
            constant=reached.step + reductions,
            token=model.token_flops / tp / (device.flops * reached.prefill_flops) + exchanged,
            pair=model.pair_flops / tp / (device.flops * reached.attention_flops),
        ),
        decode=DecodeTimes(
            constant=reached.step + reductions + weights,
            context=model.kv_bytes / tp / (device.bandwidth * reached.bandwidth),
            row=reached.row + model.token_flops / tp / (device.flops * reached.prefill_flops) + exchanged,
        ),
        hop=0.0005,
    )
