"""From what small clusters showed to what serving takes beside the steps of an engine alone. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..planner.fitting import line
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
class EngineStep:
    """A step of an engine alone (`what`: prefill or decode), of so many prompts or sequences of that length. `cores`: 0 on GPUs."""

    cores: int
    what: str
    batch: int
    length: int


@dataclass(frozen=True, slots=True)
class Moment:
    """The machine while a cluster ran: how many times as long as at first an engine alone takes, to read prompts and to write answers.
    A machine that is shared has no speed of its own: it changes by a tenth within the minutes of a profile, and what serving adds to a
    step is less than that."""

    prefill: float
    decode: float
    engine: Mapping[int, float]
    """Seconds of a step of so many sequences, on the cores that answers have when nobody reads prompts; as at first."""


def moment_of(cores: int, first: Mapping[EngineStep, float], *again: Mapping[EngineStep, float]) -> Moment:
    """By the steps that were timed again, before and after the cluster, which count alike: the medians over them. `cores`: those on which
    answers are written when nobody reads prompts."""
    later = {step: statistics.fmean(each[step] for each in again) for step in again[0]}

    def median(what: str) -> float:
        return statistics.median(seconds / first[step] for step, seconds in later.items() if step.what == what)

    decode = median("decode")
    engine = {step.batch: seconds / decode for step, seconds in later.items() if (step.cores, step.what) == (cores, "decode")}
    return Moment(median("prefill"), decode, engine)


@dataclass(frozen=True, slots=True)
class Apart:
    """What a cluster of a prefill and a decode worker showed: each phase alone, and beside the other."""

    prompts: tuple[Prompt, ...]
    answers: tuple[Answers, ...]
    prompts_beside: tuple[Read, ...]
    answers_beside: tuple[Answers, ...]

    def as_at_first(self, moment: Moment) -> Apart:
        """If the machine had been as fast as when the engine's times were taken."""
        return Apart(
            _prompts(self.prompts, moment),
            _answers(self.answers, moment),
            tuple(_read(each, moment) for each in self.prompts_beside),
            _answers(self.answers_beside, moment),
        )


@dataclass(frozen=True, slots=True)
class Together:
    """What one worker for both phases showed, which reads a prompt in pieces of `chunk` tokens."""

    prompts: tuple[Prompt, ...]
    answers: tuple[Answers, ...]
    both: Read
    chunk: int

    def as_at_first(self, moment: Moment) -> Together:
        """As `Apart.as_at_first`."""
        return Together(_prompts(self.prompts, moment), _answers(self.answers, moment), _read(self.both, moment), self.chunk)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the clusters showed, as if the machine had always been as fast as at first; and how it was while each of them ran."""

    apart: Apart
    together: Together
    while_apart: Moment
    while_together: Moment


def _prompts(found: Sequence[Prompt], moment: Moment) -> tuple[Prompt, ...]:
    return tuple(replace(each, ttft=each.ttft / moment.prefill, computed=each.computed / moment.prefill) for each in found)


def _answers(found: Sequence[Answers], moment: Moment) -> tuple[Answers, ...]:
    return tuple(replace(each, gap=each.gap / moment.decode) for each in found)


def _read(found: Read, moment: Moment) -> Read:
    return replace(found, seconds=found.seconds / moment.prefill)


def with_serving(times: StepTimes, seen: Sequence[Answers], engine: Mapping[int, float]) -> StepTimes:
    """The times of an engine alone with what serving adds to each step, and to each sequence of it; neither is below 0. `seen`: of one
    sequence and of several. `engine`: seconds of its steps alone of as many, timed in the same minute."""
    more = [(each.rows, each.gap - engine[round(each.rows)]) for each in seen]
    row = max(0.0, line(more)[0])
    step = max(0.0, statistics.fmean(each - row * rows for rows, each in more))
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
    more = [(each.tokens, each.computed - prompt_seconds(times, each.tokens, chunk)) for each in seen]
    prefill, token = times.prefill, 0.0
    if chunk is None:
        token = max(-prefill.token, line(more)[0])
        constant = statistics.median(each - token * tokens for tokens, each in more)
    else:
        constant = statistics.median(each / -(-tokens // chunk) for tokens, each in more)
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


def beside(times_prefill: StepTimes, times_decode: StepTimes, seen: Apart) -> tuple[dict[int, float], dict[int, float]]:
    """How many times as long a step of each phase takes while the other computes, none below 1; by the sequences that decode. `times`: of
    their own cores."""
    prompts = {each.rows: max(1.0, each.seconds / step_seconds(times_prefill, each.alone)) for each in seen.prompts_beside}
    answers = {each.work.rows: max(1.0, each.gap / step_seconds(times_decode, each.work)) for each in seen.answers_beside}
    return prompts, answers
