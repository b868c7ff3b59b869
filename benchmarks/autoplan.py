"""Does a cluster keep its own plan true? Three single-threaded workers share the cores of this machine, two of them for prompts. The load
turns from long prompts to long answers, and `autoplan: apply` has to notice. Beside it: the same load on the same cluster without
`autoplan`, and a load that does not turn, prompts of many lengths in bursts, under which nothing may change.

    python -m diptych.benchmarks.autoplan --profile P.json [--before 35] [--after 130] [--noisy 50] [--model M] [--plot FILE.png]

`P.json` is what `diptych profile --threads 1` has written here, minutes before; `autoplan` reckons with it. The rates are of what this
machine does just then: each split is given more of each load than it serves, and of what the right one serves `--share` is sent. It is
refused if the other serves that too. Attainment is the client's, by when requests were sent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from diptych.benchmarks.record import RESULTS, describe, keep, surroundings
from diptych.cluster.autoplan.replan import Split
from diptych.cluster.commands.up import Served
from diptych.cluster.commands.while_up import serve, settings
from diptych.cluster.load.answer import Answer
from diptych.cluster.load.measure import measure
from diptych.cluster.load.mix import Mix, Stream
from diptych.cluster.load.server import Server, find_server
from diptych.cluster.load.slo import Slo, parse_slo
from diptych.cluster.load.workload import Arrival, limited
from diptych.cluster.planner.life import Life
from diptych.cluster.planner.policies import Policies, workers_of
from diptych.cluster.planner.profile import Profile, read_profile
from diptych.cluster.planner.world import World
from diptych.core.config import load_config

BIN_S = 5.0
CHUNK_TOKENS = 256
TIMEOUT_S = 300.0
TARGET = 0.9
ENOUGH = 30
BEGIN, END = Split(2, 1), Split(1, 2)
EVEN = 4.0
"""Gamma shape of what turns: of Poisson arrivals a minute may hold a fifth more or less than their rate."""
GAIN = 1.1
"""How many times as much as a split serves is clearly too much for it."""


# -- what this machine can do ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of these lengths. `served`: how many per second each split serves when it is given more; `right`: that which serves more;
    `share`: how much of that is sent."""

    lengths: str
    served: Mapping[Split, float]
    right: Split
    share: float

    @property
    def rate(self) -> float:
        return self.share * self.served[self.right]

    @property
    def tells_apart(self) -> bool:
        """Whether the other split cannot serve it."""
        return self.rate >= GAIN * min(self.served.values())

    def arrivals(self, seed: int, seconds: float, *, begin: float = 0.0, burstiness: float = EVEN) -> Iterator[Arrival]:
        return (replace(each, at=begin + each.at) for each in limited(drawn(self.lengths, self.rate, seed, burstiness), None, seconds))

    def __str__(self) -> str:
        serves = ", ".join(f"{split} serves {rate:.2f}" for split, rate in self.served.items())
        return f"{self.lengths} tokens in and out: {serves}; sent {self.rate:.2f} a second"


def drawn(lengths: str, rate: float, seed: int, burstiness: float = EVEN) -> Iterator[Arrival]:
    """Endless."""
    prompt, output = lengths.split(":")
    return Mix(streams=(Stream(rate=rate, burstiness=burstiness, prompt=prompt, output=output),)).arrivals(rate, seed)


def loads(options: argparse.Namespace) -> tuple[Load, Load]:
    """Of prompts and of answers; refused if not the one is for the first split and the other for the second."""
    kinds = options.prompts, options.answers
    served = {split: capacities(options, split, kinds) for split in (BEGIN, END)}
    prompts, answers = (
        Load(lengths, {split: served[split][number] for split in served}, right, options.share)
        for number, (lengths, right) in enumerate(zip(kinds, (BEGIN, END), strict=True))
    )
    print(prompts, answers, sep="\n", flush=True)
    if not answers.tells_apart:
        raise SystemExit(f"{BEGIN} serves that nearly as well: choose other lengths of --answers, or another --max-running.")
    return prompts, answers


def capacities(options: argparse.Namespace, split: Split, kinds: Sequence[str]) -> list[float]:
    """Requests per second of each kind, when `--burst` of them come within a second."""
    found: list[float] = []

    async def ask(served: Served) -> None:
        server = await _server(options, served)
        for lengths in kinds:
            burst = list(limited(drawn(lengths, options.burst, options.seed + 1), options.burst, None))
            answers = (await measure(server, burst, asyncio.Event(), lambda _: None)).answers
            if failed := [answer.error for answer in answers if answer.error is not None]:
                raise SystemExit(f"{len(failed)} of {options.burst} requests failed: {failed[0]}")
            found.append(len(answers) / max(answer.sent + answer.e2e for answer in answers))

    serve(config_of(options, split), ask)
    return found


def foretold(options: argparse.Namespace, profile: Profile, split: Split, arrivals: Iterator[Arrival]) -> tuple[float, float]:
    """Attainment before and after the turn if this split stays, by simulation."""
    config, lives = load_config(config_of(options, split)), list[Life]()
    world = World(profile, workers_of(config, profile), Policies.of(config), slo=parse_slo(options.slo), on_end=lives.append)
    world.run(arrivals)
    before, after = ([world.meets(life) for life in lives if (life.arrival.at < options.before) is early] for early in (True, False))
    return sum(before) / len(before), sum(after) / len(after)


# -- what it did -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Course:
    """What became of one load. Times are seconds from its begin."""

    answers: Sequence[Answer]
    decisions: Sequence[dict[str, Any]]
    slo: Slo

    @property
    def errors(self) -> list[str]:
        return [answer.error for answer in self.answers if answer.error is not None]

    @property
    def end(self) -> float:
        return max(answer.sent for answer in self.answers)

    @property
    def decided(self) -> list[float]:
        """When it was sure of a change."""
        sure = (" in place of ", "looked at once more")
        return [each["at_s"] for each in self.decisions if sure[0] in each["message"] and sure[1] not in each["message"]]

    @property
    def changed(self) -> list[float]:
        """When changes were through."""
        return [each["at_s"] for each in self.decisions if each["message"].startswith("autoplan: now ")]

    def attainment(self, begin: float, end: float) -> float | None:
        """Of what was sent in that time; None: nothing was."""
        met = [self.slo.met(answer) for answer in self.answers if begin <= answer.sent < end]
        return sum(met) / len(met) if met else None

    def sent(self, begin: float, end: float) -> int:
        """How many requests were, in that time."""
        return sum(begin <= answer.sent < end for answer in self.answers)

    def times(self, begin: float) -> Iterator[float]:
        """The begins of the stretches of `BIN_S` seconds after that time."""
        return (number * BIN_S for number in range(math.ceil(begin / BIN_S), int(self.end / BIN_S) + 1))

    def bins(self) -> Iterator[dict[str, Any]]:
        """Each stretch of `BIN_S` seconds in which something was sent: how much, and how much of it was in time."""
        for number in range(int(self.end / BIN_S) + 1):
            begin = number * BIN_S
            sent = [answer.arrival for answer in self.answers if begin <= answer.sent < begin + BIN_S]
            if sent:
                offered = {key: sum(getattr(each, key) for each in sent) / BIN_S for key in ("prompt_tokens", "output_tokens")}
                share = self.attainment(begin, begin + BIN_S)
                yield {"from_s": begin, "requests": len(sent), "offered_per_s": offered, "share": share}

    def as_json(self) -> dict[str, Any]:
        return {
            "requests": len(self.answers),
            "failed": len(self.errors),
            "errors": sorted(set(self.errors)),
            "decided_s": self.decided,
            "changed_s": self.changed,
            "course": list(self.bins()),
            "decisions": list(self.decisions),
        }


def config_of(options: argparse.Namespace, split: Split, mode: str = "off", logs: str | None = None) -> dict[str, Any]:
    config = settings(
        prefill=split.prefills, decode=split.decodes, model=options.model, dtype=options.dtype, log={"directory": logs, "format": "json"},
    )  # fmt: skip
    config["prefill"] |= {"threads": 1, "kv_tokens": options.kv_tokens, "chunk_tokens": CHUNK_TOKENS}
    config["decode"] |= {"threads": 1, "kv_tokens": options.kv_tokens, "max_running": options.max_running}
    config["router"]["local_prefill"] = "never"
    config["autoplan"] = {
        "mode": mode, "profile": options.profile, "slo": options.slo, "window_s": options.window, "every_s": 5, "cool_down_s": 60,
        "least_requests": 30,
    }  # fmt: skip
    return config


def run(options: argparse.Namespace, mode: str, load: Iterator[Arrival]) -> Course:
    """Serve the load with a cluster that begins with two prefill workers and one decode worker."""
    slo, answers, began = parse_slo(options.slo), list[Answer](), datetime.now(UTC)

    async def ask(served: Served) -> None:
        nonlocal began
        server = await _server(options, served)
        began = datetime.now(UTC)
        answers.extend((await measure(server, load, asyncio.Event(), lambda _: None)).answers)

    with tempfile.TemporaryDirectory(prefix="diptych-autoplan-") as logs:
        serve(config_of(options, BEGIN, mode, logs), ask)
        return Course(answers, list(_decisions(Path(logs, "supervisor.log"), began)), slo)


async def _server(options: argparse.Namespace, served: Served) -> Server:
    return await find_server(
        f"http://{served.http}", model=None, api_key=None, vocabulary=served.card.vocab_size, seed=options.seed, timeout_s=TIMEOUT_S,
        as_text=False,
    )  # fmt: skip


def _decisions(log: Path, began: datetime) -> Iterator[dict[str, Any]]:
    for line in map(json.loads, log.read_text().splitlines()):
        if line["message"].startswith("autoplan: "):
            at = (datetime.fromisoformat(line["time"]) - began).total_seconds()
            yield {"at_s": at} | {key: line[key] for key in ("message", "load", "seconds", "simulated") if key in line}


# -- what that says --------------------------------------------------------------------------------------------------------


def stages(turn: float, turned: Course, control: Course) -> dict[str, dict[str, Any]]:
    """Attainment with and without `autoplan`: before the turn, from there to the flip, while what has piled up by then is written, and from
    when enough is in time until the load ends."""
    flip = turned.changed[0] if turned.changed else turned.end
    recovered = next((at for at in turned.times(flip) if (turned.attainment(at, math.inf) or 0.0) >= TARGET), math.inf)
    begins = {"before the turn": 0.0, "from there to the flip": turn, "while what piled up is written": flip, "from then on": recovered}
    return {
        name: {
            "from_s": begin, "requests": turned.sent(begin, end), "autoplan": turned.attainment(begin, end),
            "without": control.attainment(begin, end),
        }
        for (name, begin), end in zip(begins.items(), [*list(begins.values())[1:], math.inf], strict=True)
    }  # fmt: skip


def claims(found: Mapping[str, Mapping[str, Any]], turned: Course, control: Course, noisy: Course) -> dict[str, bool]:
    after = found["from then on"]
    return {
        "no request fails": not (turned.errors or control.errors or noisy.errors),
        "one worker flips, by itself": len(turned.changed) == 1,
        "before the turn the load is served": (found["before the turn"]["autoplan"] or 0.0) >= TARGET,
        f"attainment recovers, for the last {ENOUGH} requests at least": after["requests"] >= ENOUGH,
        "and not without the flip": after["without"] is not None and after["without"] < TARGET,
        "bursts change nothing": not noisy.changed,
    }


def plot(file: Path, turned: Course, control: Course, noisy: Course, options: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8.5), layout="constrained")
    offered, attained, still = figure.subplots(3)
    answers = offered.twinx()
    for axes, key, colour, name in ((offered, "prompt_tokens", "tab:blue", "prompts"), (answers, "output_tokens", "tab:orange", "answers")):
        bins = list(turned.bins())
        axes.step([each["from_s"] for each in bins], [each["offered_per_s"][key] for each in bins], where="post", color=colour)
        axes.set_ylabel(f"tokens/s of {name}", color=colour)
    offered.set_title("what is sent")
    for axes, course, colour, name in (
        (attained, control, "tab:gray", "the same load without autoplan"), (attained, turned, "tab:blue", "autoplan"),
        (still, noisy, "tab:blue", "autoplan"),
    ):  # fmt: skip
        bins = list(course.bins())
        axes.step([each["from_s"] for each in bins], [100 * each["share"] for each in bins], where="post", color=colour, label=name)
    for axes in (attained, still):
        axes.axhline(100 * TARGET, linestyle="--", color="black", linewidth=1)
        axes.set(ylim=(-3, 103), ylabel=f"met {turned.slo} (%)")
    attained.set_title("what of it is in time")
    still.set(title="bursts of prompts of many lengths, and no turn: nothing changes", xlabel="sent at (s)")
    for when, colour, name in (
        ([options.before], "tab:red", "the load turns"), (turned.decided, "tab:purple", "decided"),
        (turned.changed, "tab:green", "a worker has changed its role"),
    ):  # fmt: skip
        for each in when:
            attained.axvline(each, color=colour, label=name)
            offered.axvline(each, color=colour)
    attained.legend(loc="lower left", fontsize=8)
    figure.savefig(file, dpi=120)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m diptych.benchmarks.autoplan", description="Does a cluster keep its own plan true?")
    parser.add_argument("--profile", required=True, help="of the model on one thread of this machine")
    parser.add_argument("--slo", default="ttft=3s,tpot=120ms")
    parser.add_argument("--prompts", default="448:4", help="tokens of prompt and output at first")
    parser.add_argument("--answers", default="32:64", help="and then")
    parser.add_argument("--noise", default="320-576:4", help="and of the load that does not turn, at the rate of the first")
    parser.add_argument("--share", type=float, default=0.8, help="of what the right split serves, that is sent")
    parser.add_argument("--burst", type=int, default=36, help="requests that come at once to find out what a split serves")
    parser.add_argument("--before", type=float, default=35.0, help="seconds until the turn")
    parser.add_argument("--after", type=float, default=130.0, help="and from there on")
    parser.add_argument("--noisy", type=float, default=50.0, help="seconds of the load that does not turn")
    parser.add_argument("--burstiness", type=float, default=0.5, help="its gamma shape; 1 is Poisson")
    parser.add_argument("--window", type=float, default=60.0, help="autoplan.window_s")
    parser.add_argument("--max-running", type=int, default=2, help="answers that a decode worker writes at once")
    parser.add_argument("--kv-tokens", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", help="by default the demo model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--plot", type=Path, default=RESULTS / "autoplan.png")
    return parser


def main() -> None:
    options = _parser().parse_args()
    where = surroundings()
    print(describe(where), flush=True)
    profile = read_profile(Path(options.profile))
    prompts, answers = loads(options)

    def turning() -> Iterator[Arrival]:
        both = chain(prompts.arrivals(options.seed, options.before), answers.arrivals(options.seed, options.after, begin=options.before))
        return (replace(each, number=number) for number, each in enumerate(both))

    expected = {str(split): foretold(options, profile, split, turning()) for split in (BEGIN, END)}
    print(*(f"by simulation, {split} all along: {a:.0%} in time, then {b:.0%}" for split, (a, b) in expected.items()), sep="\n", flush=True)
    noise = replace(prompts, lengths=options.noise)
    turned, control = run(options, "apply", turning()), run(options, "off", turning())
    noisy = run(options, "apply", noise.arrivals(options.seed, options.noisy, burstiness=options.burstiness))
    found = stages(options.before, turned, control)
    held = claims(found, turned, control, noisy)
    courses = {"turned": turned.as_json(), "control": control.as_json(), "noisy": noisy.as_json()}
    print(
        json.dumps(courses, indent=1),
        json.dumps(found, indent=1),
        *(f"{'yes' if yes else 'NO'}: {what}" for what, yes in held.items()),
        sep="\n",
    )
    plot(options.plot, turned, control, noisy, options)
    settings_used: dict[str, Any] = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    settings_used |= {"loads": [str(prompts), str(answers)], "rates": [prompts.rate, answers.rate], "foretold": expected}
    print(f"kept in {keep('autoplan', where, settings_used, {'stages': found, 'claims': held, **courses})}")


if __name__ == "__main__":
    main()
