"""From what small clusters showed to what serving takes beside the steps of an engine alone. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..planner.latency import StepTimes, Work, step_seconds


@dataclass(frozen=True, slots=True)
class Prompt:
    """Prompts of so many tokens, one after another: the median TTFT, and of that what their steps took, in seconds."""

    tokens: int
    ttft: float
    computed: float


@dataclass(frozen=True, slots=True)
class Answers:
    """So many at once (on average), which attend to `context` tokens together: the mean time between two tokens, in seconds."""

    rows: float
    context: int
    gap: float

    @property
    def work(self) -> Work:
        return Work(rows=round(self.rows), context=self.context)


@dataclass(frozen=True, slots=True)
class Read:
    """A step that reads so many `tokens` of a prompt behind its first `start`, and beside that has so many answers: its mean seconds."""

    tokens: int
    start: float
    rows: int
    context: int
    seconds: float

    @property
    def work(self) -> Work:
        return Work(self.tokens, round(self.tokens * (2 * self.start + self.tokens)), self.rows, self.context)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the clusters showed: of a prefill and a decode worker each phase alone and beside the other, and of one worker for both, which
    reads a prompt in pieces of `chunk` tokens."""

    prompts: tuple[Prompt, ...]
    answers: tuple[Answers, ...]
    prompts_beside: Read
    answers_beside: Answers
    prompts_together: tuple[Prompt, ...]
    answers_together: tuple[Answers, ...]
    both_together: Read
    chunk: int


def with_serving(times: StepTimes, seen: Sequence[Answers]) -> StepTimes:
    """The times of an engine alone with what serving adds to each step, and to each sequence of it; neither is below 0. `seen`: of one
    sequence and of several."""
    more = [each.gap - step_seconds(times, each.work) for each in seen]
    fewest, most = min(seen, key=lambda each: each.rows), max(seen, key=lambda each: each.rows)
    few, many = more[seen.index(fewest)], more[seen.index(most)]
    row = max(0.0, (many - few) / (most.rows - fewest.rows))
    step = max(0.0, few - row * fewest.rows)
    if not row:
        step = max(0.0, statistics.fmean(more))
    return times.model_copy(update={"step": step, "step_row": row})


def request_seconds(prompts: Sequence[Prompt]) -> float:
    """What a request takes that its steps do not: the median over the prompts, none below 0."""
    return max(0.0, statistics.median(each.ttft - each.computed for each in prompts))


def with_prompts(times: StepTimes, seen: Sequence[Prompt], chunk: int | None) -> StepTimes:
    """The times with what each step of a prompt takes more, or less, than alone, by the median over the prompts (by the mean, a profile
    whose longest prompts were disturbed took 110 ms too much for each). `chunk`: tokens of a step; None: a prompt is read in one."""
    steps = [1 if chunk is None else -(-each.tokens // chunk) for each in seen]
    more = [(each.computed - prompt_seconds(times, each.tokens, chunk)) / count for each, count in zip(seen, steps, strict=True)]
    constant = max(0.0, times.prefill.constant + statistics.median(more))
    return times.model_copy(update={"prefill": times.prefill.model_copy(update={"constant": constant})})


def with_both(times: StepTimes, seen: Read) -> StepTimes:
    """The times with what a step takes more that reads a part of a prompt and writes answers."""
    alone = step_seconds(times.model_copy(update={"both": 0.0}), seen.work)
    return times.model_copy(update={"both": max(0.0, seen.seconds - alone)})


def prompt_seconds(times: StepTimes, tokens: int, chunk: int | None = None) -> float:
    """Of a prompt alone, in chunks of so many tokens."""
    starts = range(0, tokens, chunk or tokens)
    lengths = [min(tokens - start, chunk or tokens) for start in starts]
    return sum(
        step_seconds(times, Work(tokens=length, pairs=length * (2 * start + length))) for start, length in zip(starts, lengths, strict=True)
    )


def beside(times_prefill: StepTimes, times_decode: StepTimes, seen: Seen) -> tuple[float, float]:
    """How many times as long a step of each phase takes while the other computes, none below 1. `times`: of their own cores."""
    prompt, answers = seen.prompts_beside, seen.answers_beside
    return (
        max(1.0, prompt.seconds / step_seconds(times_prefill, prompt.work)),
        max(1.0, answers.gap / step_seconds(times_decode, answers.work)),
    )
