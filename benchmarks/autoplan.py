"""Does a cluster keep its own plan true? Three single-threaded workers, two of them for prompts; the load turns from long prompts to long
answers, and `autoplan: apply` has to notice. Then the same cluster under a load that does not turn, in bursts: nothing may change.

    python -m diptych.benchmarks.autoplan --profile P.json [--before 90] [--after 210] [--steady 180] [--model M] [--plot FILE.png]

`P.json` is what `diptych profile --threads 1` writes here. Attainment is the client's, by when requests were sent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from diptych.benchmarks.record import RESULTS, describe, keep, surroundings
from diptych.cluster.commands.up import Served
from diptych.cluster.commands.while_up import serve, settings
from diptych.cluster.load.answer import Answer
from diptych.cluster.load.measure import measure
from diptych.cluster.load.mix import Mix, Stream
from diptych.cluster.load.server import find_server
from diptych.cluster.load.slo import Slo, parse_slo
from diptych.cluster.load.workload import Arrival, limited
from diptych.cluster.planner.policies import Policies
from diptych.cluster.planner.profile import read_profile
from diptych.cluster.planner.shapes import Sample, Shape, most_answers, most_prompts

BIN_S = 10.0
CHUNK_TOKENS = 256
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Course:
    """What became of one load. Times are seconds from its begin."""

    answers: Sequence[Answer]
    decisions: Sequence[dict[str, Any]]
    slo: Slo

    def as_json(self) -> dict[str, Any]:
        errors = [answer.error for answer in self.answers if answer.error is not None]
        return {
            "requests": len(self.answers),
            "failed": len(errors),
            "errors": sorted(set(errors)),
            "attainment": [{"from_s": begin, "requests": total, "share": share} for begin, total, share in self.bins()],
            "decisions": list(self.decisions),
        }

    def bins(self) -> Iterator[tuple[float, int, float]]:
        """Begin, number of requests and attainment of each stretch of `BIN_S` seconds in which something was sent."""
        for number in range(int(max(answer.sent for answer in self.answers) / BIN_S) + 1):
            met = [self.slo.met(answer) for answer in self.answers if number * BIN_S <= answer.sent < (number + 1) * BIN_S]
            if met:
                yield number * BIN_S, len(met), sum(met) / len(met)


def rates(options: argparse.Namespace) -> tuple[float, float]:
    """Requests per second of long prompts and of long answers: more than one worker can do by its profile, less than two."""
    profile = read_profile(Path(options.profile))
    policies = Policies(chunk_tokens=CHUNK_TOKENS, decode_running=options.max_running)
    alone = Shape(1, 1)
    prompts, answers = (
        Sample((Arrival(0, 0.0, prompt, output),)) for prompt, output in (_lengths(options.prompts), _lengths(options.answers))
    )
    return (
        options.load * most_prompts(profile, alone, prompts, policies),
        options.load * most_answers(profile, alone, answers, Slo(), policies),
    )


def _lengths(text: str) -> tuple[int, int]:
    prompt, output = text.split(":")
    return int(prompt), int(output)


def _load(rate: float, lengths: str, burstiness: float) -> Mix:
    prompt, output = lengths.split(":")
    return Mix(streams=(Stream(rate=rate, burstiness=burstiness, prompt=prompt, output=output),))


def turning(options: argparse.Namespace) -> Iterator[Arrival]:
    """Long prompts until `--before`, then long answers."""
    of_prompts, of_answers = rates(options)
    prompts, answers = _load(of_prompts, options.prompts, 1.0), _load(of_answers, options.answers, 1.0)
    first = limited(prompts.arrivals(prompts.rate, options.seed), None, options.before)
    then = (
        replace(each, at=each.at + options.before) for each in limited(answers.arrivals(answers.rate, options.seed), None, options.after)
    )
    return (replace(each, number=number) for number, each in enumerate(chain(first, then)))


def bursts(options: argparse.Namespace) -> Iterator[Arrival]:
    """The long prompts alone, in bursts."""
    mix = _load(rates(options)[0], options.prompts, 0.5)
    return limited(mix.arrivals(mix.rate, options.seed), None, options.steady)


def run(options: argparse.Namespace, load: Iterator[Arrival]) -> Course:
    """Serve the load with a cluster that begins with two prefill workers and one decode worker."""
    slo, answers, began = parse_slo(options.slo), list[Answer](), datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="diptych-autoplan-") as logs:
        config = settings(
            prefill=2, decode=1, model=options.model, dtype=options.dtype, log={"directory": logs, "format": "json"},
        )  # fmt: skip
        config["prefill"] |= {"threads": 1, "kv_tokens": options.kv_tokens, "chunk_tokens": CHUNK_TOKENS}
        config["decode"] |= {"threads": 1, "kv_tokens": options.kv_tokens, "max_running": options.max_running}
        config["router"]["local_prefill"] = "never"
        config["autoplan"] = {
            "mode": "apply", "profile": options.profile, "slo": options.slo, "window_s": options.window, "every_s": 5,
            "cool_down_s": 60, "least_requests": 30,
        }  # fmt: skip

        async def ask(served: Served) -> None:
            nonlocal began
            server = await find_server(
                f"http://{served.http}", model=None, api_key=None, vocabulary=served.card.vocab_size, seed=options.seed,
                timeout_s=TIMEOUT_S, as_text=False,
            )  # fmt: skip
            began = datetime.now(UTC)
            answers.extend((await measure(server, load, asyncio.Event(), lambda _: None)).answers)

        serve(config, ask)
        return Course(answers, list(_decisions(Path(logs, "supervisor.log"), began)), slo)


def _decisions(log: Path, began: datetime) -> Iterator[dict[str, Any]]:
    for line in map(json.loads, log.read_text().splitlines()):
        if line["message"].startswith("autoplan: "):
            at = (datetime.fromisoformat(line["time"]) - began).total_seconds()
            yield {"at_s": at} | {key: line[key] for key in ("message", "load", "seconds", "simulated") if key in line}


def plot(file: Path, turned: Course, steady: Course, options: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    for axes, course, title in zip(figure.subplots(2), (turned, steady), ("the load turns", "bursts, and no turn"), strict=True):
        begins, _, shares = zip(*course.bins(), strict=True)
        axes.step(begins, [100 * share for share in shares], where="post", color="tab:blue")
        axes.axhline(90, linestyle="--", color="black", linewidth=1)
        axes.set(ylim=(-3, 103), xlabel="sent at (s)", ylabel=f"met {course.slo} (%)", title=title)
        axes.grid(alpha=0.3)
    top = figure.axes[0]
    top.axvline(options.before, color="tab:red", label="long prompts → long answers")
    for when in changed_at(turned):
        top.axvline(when, color="tab:green", label="a worker has changed its role")
    top.legend(loc="lower left")
    figure.savefig(file, dpi=120)


def changed_at(course: Course) -> list[float]:
    """When changes were through."""
    return [decision["at_s"] for decision in course.decisions if decision["message"].startswith("autoplan: now ")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diptych.benchmarks.autoplan", description="Does a cluster keep its own plan true?")
    parser.add_argument("--profile", required=True, help="of the model on one thread of this machine")
    parser.add_argument("--slo", default="ttft=3s,tpot=150ms")
    parser.add_argument("--prompts", default="448:4", help="tokens of prompt and output at first")
    parser.add_argument("--answers", default="32:64", help="and then")
    parser.add_argument("--load", type=float, default=1.3, help="how many times what one worker can do comes")
    parser.add_argument("--before", type=float, default=90.0)
    parser.add_argument("--after", type=float, default=210.0)
    parser.add_argument("--steady", type=float, default=180.0)
    parser.add_argument("--window", type=float, default=60.0, help="autoplan.window_s")
    parser.add_argument("--max-running", type=int, default=4)
    parser.add_argument("--kv-tokens", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", help="by default the demo model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--plot", type=Path, default=RESULTS / "autoplan.png")
    options = parser.parse_args()
    where = surroundings()
    print(describe(where))
    turned = run(options, turning(options))
    steady = run(options, bursts(options))
    for name, course in (("turned", turned), ("steady", steady)):
        print(f"{name}: {json.dumps(course.as_json(), indent=1)}")
    plot(options.plot, turned, steady, options)
    settings_used: dict[str, Any] = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    settings_used["rates"] = rates(options)
    print(f"kept in {keep('autoplan', where, settings_used, {'turned': turned.as_json(), 'steady': steady.as_json()})}")


if __name__ == "__main__":
    main()
