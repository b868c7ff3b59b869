"""The pilot over a cluster that is none: what it proposes, what it says, and that the process it asks answers as it would itself."""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cluster_harness import write_card
from diptych.cluster.autoplan.deciding import Autoplanner
from diptych.cluster.autoplan.pilot import Cluster, Pilot, check
from diptych.cluster.autoplan.replan import Split, Terms
from diptych.cluster.autoplan.scoring import Question, ask, question_of, scores
from diptych.cluster.load.slo import Slo
from diptych.cluster.planner.profile import Cores
from diptych.core.clock import MonotonicClock
from diptych.core.config import ClusterConfig, load_config
from diptych.core.errors import ConfigError, Unavailable
from diptych.core.model import ModelCard, read_card
from diptych.core.workload import Window
from windows import window
from worlds import MODEL, profile

TEXT = "ttft=1s,tpot=60ms"
LONG_ANSWERS = {"rate": 4.0, "prompt": 20.0, "output": 60.0, "spread": 0.3}


@pytest.fixture
def known(tmp_path: Path) -> Path:
    path = tmp_path / "P.json"
    path.write_text(profile().model_dump_json())
    return path


def config(known: Path, **changes: object) -> ClusterConfig:
    plan = {"mode": "propose", "profile": str(known), "slo": TEXT, "every_s": 1, "least_requests": 40}
    return load_config(
        {
            "prefill": {"workers": 2, "kv_tokens": 4096},
            "decode": {"workers": 1, "kv_tokens": 4096, "max_running": 4},
            "router": {"local_prefill": "never"},
            "autoplan": plan | changes,
        }
    )


def question(known: Path) -> Question:
    look = Autoplanner(Slo(1.0, 0.06), Terms(), 40, 300).look(0.0, window(60, 1, **LONG_ANSWERS), Split(2, 1))  # type: ignore[arg-type]
    assert look is not None
    return question_of(look, [Split(2, 1), Split(1, 2)], config(known), 2)


def test_the_process_answers_what_the_simulation_says(known: Path) -> None:
    asked = question(known)
    found = scores(asked)
    assert asyncio.run(ask(asked, {**os.environ, "PYTHONSAFEPATH": "1"})) == found
    assert found[1].share > found[0].share + 0.2
    assert found[0].total == len(asked.requests)


def test_a_load_seen_for_a_moment_is_simulated_for_as_long_as_a_window(known: Path) -> None:
    """Somewhat more than a decode worker serves: in the 12 seconds that were seen hardly anything is late yet."""
    look = Autoplanner(Slo(1.0, 0.06), Terms(), 40, 300).look(0.0, window(12, 5, **LONG_ANSWERS), Split(2, 1))  # type: ignore[arg-type]
    assert look is not None
    short, long = (question_of(look, [Split(2, 1), Split(1, 2)], config(known, window_s=seconds), 2) for seconds in (12, 120))
    assert len(long.requests) == 10 * len(short.requests)
    assert [at for at, *_ in long.requests] == sorted(at for at, *_ in long.requests)
    (moment, _), (now, other) = scores(short), scores(long)
    assert now.share < 0.5 < moment.share
    assert other.share > now.share + 0.3


def test_workers_share_the_cores_of_their_host(known: Path) -> None:
    """One decode worker more helps where it has a core of its own, and where it takes others' time it does not."""
    known.write_text(profile(cores=Cores(count=8)).model_dump_json())
    found = {cores: scores(question(known).model_copy(update={"cores": cores})) for cores in (1, 3)}
    assert found[3][1].share > found[3][0].share + 0.2
    assert found[1][1].share <= found[1][0].share


def test_why_it_could_not_be_simulated_is_said(known: Path) -> None:
    asked = question(known).model_copy(update={"profile": known.with_name("none.json")})
    with pytest.raises(Unavailable, match=r"none\.json"):
        asyncio.run(ask(asked, os.environ))


@dataclass
class Still:
    """A cluster with one load. `fails`: how often its router does not answer at first."""

    load: Window
    fails: int = 0
    said: list[str] = field(default_factory=list)
    changed: list[Split] = field(default_factory=list)
    proposed: asyncio.Event = field(default_factory=asyncio.Event)

    async def window(self, seconds: float) -> Window:
        if self.fails:
            self.fails -= 1
            raise Unavailable("no answer")
        return self.load

    async def change(self, split: Split) -> None:
        self.changed.append(split)

    def show(self, said: str) -> None:
        self.said.append(said)
        if "scale" in said:
            self.proposed.set()


def test_it_proposes_with_its_evidence_and_changes_nothing(known: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def fly() -> Still:
        cluster = Still(window(60, 1, **LONG_ANSWERS), fails=1)  # type: ignore[arg-type]
        seen = Cluster(cluster.window, lambda: Split(2, 1), cluster.change, cluster.show)
        flight = asyncio.create_task(Pilot(config(known), seen, 2, os.environ, MonotonicClock()).run())
        async with asyncio.timeout(60):
            await cluster.proposed.wait()
        flight.cancel()
        await asyncio.gather(flight, return_exceptions=True)
        return cluster

    with caplog.at_level(logging.INFO):
        cluster = asyncio.run(fly())
    assert cluster.changed == []
    assert "looked at once more" in cluster.said[0]
    assert "`diptych scale --prefill 1 --decode 2`" in cluster.said[-1]
    assert "no answer" in caplog.text
    evidence = caplog.records[-1].fields  # type: ignore[attr-defined]
    assert evidence["load"]["rate"] == pytest.approx(4.0, rel=0.3)
    assert set(evidence["simulated"]) == {"2 prefill + 1 decode", "1 prefill + 2 decode"}


@pytest.fixture
def card(tmp_path: Path) -> ModelCard:
    return read_card(write_card(tmp_path / "model", name="m"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profile": "none.json"}, "none.json"),
        ({"slo": "ttft=1s"}, "autoplan.slo"),
        ({"slo": "fast"}, "--slo"),
        ({}, "autoplan.profile"),  # the profile is in bfloat16, the card in float32
    ],
)
def test_what_does_not_fit_is_refused_before_the_start(known: Path, card: ModelCard, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(config(known, **changes), card)


def test_workers_that_differ_are_not_planned_again(known: Path, card: ModelCard) -> None:
    values = config(known).model_dump(mode="json", exclude_unset=True)
    known.write_text(profile(model=MODEL.model_copy(update={"dtype": "float32"})).model_dump_json())
    check(load_config(values), card)
    values["decode"]["tp"] = 2
    with pytest.raises(ConfigError, match="a decode worker 2"):
        check(load_config(values), card)
    values["decode"] = {"groups": [{"workers": 1}, {"workers": 1}]}
    with pytest.raises(ConfigError, match=r"decode\.groups"):
        check(load_config(values), card)


@pytest.mark.parametrize("key", ["profile", "slo"])
def test_what_it_needs_is_named(known: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"autoplan.{key}") as error:
        config(known, **{key: None})
    assert error.value.field == f"autoplan.{key}"


def test_off_is_off_however_yaml_reads_it() -> None:
    assert load_config({"autoplan": {"mode": False}}).autoplan.mode == "off"
    with pytest.raises(ConfigError, match=r"autoplan\.mode"):
        load_config({"autoplan": {"mode": True}})
