"""From what small clusters showed to what serving takes beside the steps of an engine alone. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

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
        return Work(self.alone.tokens, self.alone.pairs, self.rows, self.context)

    @property
    def alone(self) -> Work:
        """Where another worker writes the answers."""
        return Work(self.tokens, round(self.tokens * (2 * self.start + self.tokens)))


@dataclass(frozen=True, slots=True)
class Seen:
    """What the clusters showed: of a prefill and a decode worker each phase alone and beside the other, and of one worker for both, which
    reads a prompt in pieces of `chunk` tokens."""

    prompts: tuple[Prompt, ...]
    answers: tuple[Answers, ...]
    prompts_beside: tuple[Read, ...]
    answers_beside: tuple[Answers, ...]
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
    """The times with what each step of a prompt takes more, or less, than alone. `chunk`: tokens of a step; None: a prompt is read in one,
    and what it takes more may grow with its tokens: its KV is handed over meanwhile, and what is borrowed is not there all the time. In
    chunks that is the same as so much a step.

    By the line of Theil and Sen through the prompts, which those that were disturbed do not bend.
    """
    more = [each.computed - prompt_seconds(times, each.tokens, chunk) for each in seen]
    steps = [1 if chunk is None else -(-each.tokens // chunk) for each in seen]
    pairs = combinations(range(len(seen)), 2) if chunk is None else ()
    slopes = [(more[b] - more[a]) / (seen[b].tokens - seen[a].tokens) for a, b in pairs]
    token = max(-times.prefill.token, statistics.median(slopes)) if slopes else 0.0
    constant = statistics.median((each - token * prompt.tokens) / count for each, prompt, count in zip(more, seen, steps, strict=True))
    prefill = times.prefill
    found = {"constant": max(0.0, prefill.constant + constant), "token": prefill.token + token}
    return times.model_copy(update={"prefill": prefill.model_copy(update=found)})


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


def beside(times_prefill: StepTimes, times_decode: StepTimes, seen: Seen) -> tuple[dict[int, float], dict[int, float]]:
    """How many times as long a step of each phase takes while the other computes, none below 1; by the sequences that decode. `times`: of
    their own cores."""
    prompts = {each.rows: max(1.0, each.seconds / step_seconds(times_prefill, each.alone)) for each in seen.prompts_beside}
    answers = {each.work.rows: max(1.0, each.gap / step_seconds(times_decode, each.work)) for each in seen.answers_beside}
    return prompts, answers
