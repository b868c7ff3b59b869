"""What a run says: figures from its answers, as one value that table, plot and JSON are made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from .agreement import Agreement, compare
from .answer import Answer, Counting, kinds
from .slo import Slo
from .summary import Summary, summarise, wilson

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Client:
    """What the client itself cost. `cpu_share`: of one core; `woke_late`: samples in seconds."""

    wall_s: float
    cpu_s: float
    woke_late: tuple[float, ...]

    @property
    def cpu_share(self) -> float:
        return self.cpu_s / self.wall_s if self.wall_s else 0.0


@dataclass(frozen=True, slots=True)
class Attainment:
    """How many of all counted requests met the SLO jointly; errors did not."""

    slo: str
    met: int
    total: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.met / self.total


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of the requests behind the warm-up. `seconds`: from the first of them being sent to the last having ended;
    `unfinished` were cut off."""

    requests: int
    warm_up: int
    unfinished: int
    errors: dict[str, int]
    seconds: float
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens: float | None
    output_tokens: float
    times: dict[str, Summary]
    attainment: Attainment | None
    events: int
    shared_events: int
    uncounted_tokens: int
    counting: tuple[Counting, ...]
    handed_over: int | None
    lag: Summary | None
    client: Client
    cpu_us_per_event: float | None
    agreement: Agreement | None

    @property
    def itl_p99_over_p50(self) -> float | None:
        itl = self.times.get("itl")
        return itl.p99 / itl.p50 if itl and itl.p50 > 0 else None

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["itl_p99_over_p50"] = self.itl_p99_over_p50
        values["client"] = {"wall_s": self.client.wall_s, "cpu_s": self.client.cpu_s, "cpu_share": self.client.cpu_share}
        late = summarise(self.client.woke_late)
        values["client"]["woke_late"] = late.as_json() if late else None
        if self.attainment:
            values["attainment"]["share"] = self.attainment.share
        if self.agreement:
            values["agreement"]["sentence"] = self.agreement.sentence()
        return values


def report(answers: Sequence[Answer], *, warm_up: int, unfinished: int, slo: Slo | None, client: Client) -> Report:
    """From all answers of a run; those of its first `warm_up` requests are not counted."""
    counted = [answer for answer in answers if answer.arrival.number >= warm_up]
    good = [answer for answer in counted if answer.error is None]
    seconds = max((a.sent + a.ended for a in counted), default=0.0) - min((a.sent for a in counted), default=0.0)
    prompts = [answer.prompt_tokens for answer in good if answer.prompt_tokens is not None]
    told = [answer.handed_over for answer in good if answer.handed_over is not None]
    every_event = sum(answer.events for answer in answers)
    return Report(
        requests=len(counted),
        warm_up=len(answers) - len(counted),
        unfinished=unfinished,
        errors=kinds(counted),
        seconds=seconds,
        requests_per_s=len(good) / seconds if seconds else 0.0,
        output_tokens_per_s=sum(answer.output_tokens for answer in good) / seconds if seconds else 0.0,
        prompt_tokens=sum(prompts) / len(prompts) if prompts else None,
        output_tokens=sum(answer.output_tokens for answer in good) / len(good) if good else 0.0,
        times=_times(good),
        attainment=_attainment(counted, slo) if slo and counted else None,
        events=sum(answer.events for answer in good),
        shared_events=sum(answer.shared_events for answer in good),
        uncounted_tokens=sum(answer.output_tokens - len(answer.token_times) for answer in good),
        counting=tuple(sorted({answer.counting for answer in good})),
        handed_over=sum(told) if told else None,
        lag=summarise([answer.lag for answer in counted]),
        client=client,
        cpu_us_per_event=1e6 * client.cpu_s / every_event if every_event else None,
        agreement=compare(good, client.woke_late),
    )


def _times(good: Sequence[Answer]) -> dict[str, Summary]:
    """By the design's words. A name without a value is left out."""
    samples = {
        "ttft": [answer.ttft for answer in good if answer.ttft is not None],
        "tpot": [answer.tpot for answer in good if answer.tpot is not None],
        "itl": list(chain.from_iterable(answer.itl for answer in good)),
        "handover_gap": [answer.gap for answer in good if answer.gap is not None],
        "e2e": [answer.e2e for answer in good],
        "connect": [answer.connected for answer in good if answer.connected is not None],
    }
    return {name: found for name, values in samples.items() if (found := summarise(values)) is not None}


def _attainment(counted: Sequence[Answer], slo: Slo) -> Attainment:
    met = sum(slo.met(answer) for answer in counted)
    return Attainment(str(slo), met, len(counted), *wilson(met, len(counted), CONFIDENCE))


def rows(answers: Sequence[Answer], warm_up: int) -> list[dict[str, Any]]:
    """Every request by itself, for the JSON file. Times in seconds, rounded to microseconds."""
    return [
        {
            "number": answer.arrival.number,
            "counted": answer.arrival.number >= warm_up,
            "due": _rounded(answer.arrival.at),
            "sent": _rounded(answer.sent),
            "prompt_tokens": answer.prompt_tokens or answer.arrival.prompt_tokens,
            "output_tokens": answer.output_tokens,
            "connected": _rounded(answer.connected),
            "ttft": _rounded(answer.ttft),
            "server_ttft": _rounded(answer.server_ttft),
            "tpot": _rounded(answer.tpot),
            "handover_gap": _rounded(answer.gap),
            "itl": [_rounded(gap) for gap in answer.itl],
            "e2e": _rounded(answer.e2e),
            "shared_events": answer.shared_events,
            "error": answer.error,
        }
        for answer in sorted(answers, key=lambda answer: answer.arrival.number)
    ]


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
