"""What a plan is made of, and what can be said of it without simulating: whether it fits, how fast one request is. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from ...core.fleet import Phase
from ..load.slo import Slo
from ..load.summary import percentile
from ..load.workload import Arrival
from .latency import StepTimes, Work, step_seconds
from .policies import Policies
from .profile import Hardware, Parallelism, Profile


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """How one worker is spread. `device`: on which kind; empty where there is but one."""

    tp: int
    pp: int
    device: str = ""

    @property
    def devices(self) -> int:
        return self.tp * self.pp

    def __str__(self) -> str:
        return f"tp {self.tp} pp {self.pp}" + (f" on {self.device}" if self.device else "")


@dataclass(frozen=True, slots=True)
class Plan:
    """So many workers of each phase, alike within a phase."""

    prefill: Shape
    decode: Shape
    prefills: int = 1
    decodes: int = 1

    @property
    def devices(self) -> int:
        return self.prefills * self.prefill.devices + self.decodes * self.decode.devices

    def __str__(self) -> str:
        return f"{self.prefills} × prefill ({self.prefill}) + {self.decodes} × decode ({self.decode})"

    @property
    def kinds(self) -> tuple[str, str]:
        """Of its prefill and of its decode workers' devices, by name."""
        return self.prefill.device, self.decode.device

    @property
    def sides(self) -> tuple[tuple[Phase, Shape, int], ...]:
        """Its workers: phase, shape and how many."""
        return (Phase.PREFILL, self.prefill, self.prefills), (Phase.DECODE, self.decode, self.decodes)


class Loss(StrEnum):
    """Why a shape or a plan is not the one."""

    NO_PROFILE = "no profile"
    MEMORY = "memory"
    SLO = "SLO"
    DOMINATED = "dominated"


@dataclass(frozen=True, slots=True)
class Lost:
    """`plan`: if more devices would let it serve what is asked, with them."""

    what: str
    loss: Loss
    why: str
    plan: Plan | None = None


def hardware(profile: Profile, phase: Phase, shape: Shape) -> Hardware:
    return Hardware(phase, shape.tp, shape.pp, _known(profile, shape).times, profile.kv_tokens(shape.tp, shape.pp))


def _known(profile: Profile, shape: Shape) -> Parallelism:
    known = profile.parallelism(shape.tp)
    assert known is not None, f"no times for tp {shape.tp}"
    return known


def _times(profile: Profile, phase: Phase, shape: Shape) -> StepTimes:
    """The shortest: on a host whose cores are shared, with all of them."""
    known = _known(profile, shape)
    return known.times if profile.cores is None else known.on_cores(profile.cores.count, phase)


@dataclass(frozen=True, slots=True)
class Sample:
    """Requests as the load has them, for what is known without a simulation."""

    arrivals: tuple[Arrival, ...]

    @property
    def prompt_tokens(self) -> float:
        """Of a request, on average."""
        return sum(arrival.prompt_tokens for arrival in self.arrivals) / len(self.arrivals)

    @property
    def own_tokens(self) -> float:
        """Of a prompt what no other begins with, on average: computed, and held, for it alone."""
        return sum(arrival.prompt_tokens - cached(arrival) for arrival in self.arrivals) / len(self.arrivals)

    @property
    def output_tokens(self) -> float:
        """Of a request, on average."""
        return sum(arrival.output_tokens for arrival in self.arrivals) / len(self.arrivals)

    @property
    def longest(self) -> int:
        return max(arrival.prompt_tokens + arrival.output_tokens for arrival in self.arrivals)


def cached(arrival: Arrival) -> int:
    """Tokens of the prompt that are cached at best: its prefix, as if nobody were the first to have it, but the last token is always
    computed. So what is reckoned with it is the least that a request takes, and no plan is lost that would have served."""
    return min(arrival.prefix_tokens, arrival.prompt_tokens - 1)


def _prompt_work(arrival: Arrival) -> Work:
    """What is computed of it; positions attend to the cached ones too."""
    start = cached(arrival)
    return Work(tokens=arrival.prompt_tokens - start, pairs=arrival.prompt_tokens**2 - start**2)


def lacking(profile: Profile, phase: Phase, shape: Shape, sample: Sample, slo: Slo, target: float) -> Lost | None:
    """What no number of such workers could mend: no times, no memory, or one request alone is too slow."""
    what = f"{phase.value} {shape}"
    if profile.parallelism(shape.tp) is None:
        return Lost(what, Loss.NO_PROFILE, f"the profile has no times for tp {shape.tp}")
    tokens = profile.kv_tokens(shape.tp, shape.pp)
    longest = sample.longest if phase is Phase.DECODE else max(arrival.prompt_tokens for arrival in sample.arrivals)
    if tokens < longest:
        room = profile.device.memory_bytes * shape.devices / 1e9
        weights = profile.model.weight_bytes / 1e9
        need = f"of {room:.0f} GB the weights take {weights:.0f}; {tokens} tokens of KV fit, the longest request has {longest}"
        return Lost(what, Loss.MEMORY, need)
    limit, name = (slo.ttft, "TTFT") if phase is Phase.PREFILL else (slo.tpot, "TPOT")
    if limit is not None and (idle := idle_seconds(profile, phase, shape, sample, target)) > limit:
        when = "alone, with their prefixes cached" if phase is Phase.PREFILL and any(map(cached, sample.arrivals)) else "alone"
        return Lost(
            what, Loss.SLO, f"{when}, {target:.0%} of requests have a {name} of up to {1000 * idle:.0f} ms; the limit is {1000 * limit:.0f}"
        )
    return None


def idle_seconds(profile: Profile, phase: Phase, shape: Shape, sample: Sample, share: float) -> float:
    """TTFT (or TPOT) that `share` of the requests do not exceed when each is alone and its prefix is cached."""
    times = _times(profile, phase, shape)
    if phase is Phase.PREFILL:
        alone = map(_prompt_work, sample.arrivals)
        return percentile(sorted(step_seconds(times, work, shape.pp) for work in alone), share) + profile.overheads.request
    rounds = (Work(rows=1, context=a.prompt_tokens + a.output_tokens // 2) for a in sample.arrivals)
    return percentile(sorted(step_seconds(times, work, shape.pp) for work in rounds), share)


def most_prompts(profile: Profile, shape: Shape, sample: Sample, policies: Policies) -> float:
    """Requests per second above which a prefill worker's queue grows without end, whatever it batches."""
    times = _times(profile, Phase.PREFILL, shape)
    tokens = sample.own_tokens
    pairs = sum(_prompt_work(arrival).pairs for arrival in sample.arrivals) / len(sample.arrivals)
    constant = (times.prefill.constant + times.step) * min(1.0, tokens / policies.chunk_tokens)
    return shape.pp / (constant + times.prefill.token * tokens + times.prefill.pair * pairs)


def most_answers(profile: Profile, shape: Shape, sample: Sample, slo: Slo, policies: Policies) -> float:
    """Requests per second of a decode worker with the largest batch that its memory and the TPOT limit allow; a prefix is held
    once for all that have it, at best not at all."""
    times = _times(profile, Phase.DECODE, shape)
    output, prompt = sample.output_tokens, sample.prompt_tokens
    context = prompt + output / 2
    held = sample.own_tokens + output / 2
    most = max(1, min(policies.decode_running, int(profile.kv_tokens(shape.tp, shape.pp) / held)))

    def rate(rows: int) -> float:
        seconds = step_seconds(times, Work(rows=-(-rows // shape.pp), context=int(rows * context / shape.pp)), shape.pp)
        return 0.0 if slo.tpot is not None and seconds > slo.tpot * 1.1 else rows / (max(1.0, output - 1) * seconds)

    return max(map(rate, _sizes(most)))


def _sizes(most: int) -> Sequence[int]:
    return sorted({most, *(max(1, most * step // 24) for step in range(1, 24)), 1})
