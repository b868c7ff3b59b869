"""Keeps a running cluster's plan true: looks at the router's record, has other splits simulated, and proposes or carries out a change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...core.clock import Clock
from ...core.config import ClusterConfig
from ...core.errors import ConfigError, DiptychError
from ...core.fleet import Phase
from ...core.model import ModelCard
from ...core.notes import note
from ...core.workload import Window
from ..load.slo import parse_slo
from ..planner.policies import workers_of
from ..planner.profile import read_profile
from .deciding import Autoplanner, Decision, Look
from .replan import Score, Split, Terms, candidates
from .scoring import ask, question_of

log = logging.getLogger(__name__)
HISTORY = 4
"""How many windows of the past the router is asked for: what ends now may have come long before."""


def check(config: ClusterConfig, card: ModelCard) -> None:
    """Before anything is started: `ConfigError` names the key that keeps this cluster from being planned again."""
    plan = config.autoplan
    if plan.mode == "off":
        return
    assert plan.profile is not None
    assert plan.slo is not None
    profile, slo = read_profile(Path(plan.profile)), parse_slo(plan.slo)
    if slo.ttft is None or slo.tpot is None:
        raise ConfigError("autoplan.slo: a plan needs a limit for both ttft and tpot, as in ttft=1s,tpot=100ms.", field="autoplan.slo")
    if (profile.model.name, profile.model.dtype) != (card.name, card.precision):
        raise ConfigError(
            f"autoplan.profile: {plan.profile} is of {profile.model.name} in {profile.model.dtype}, and this is {card.name} in "
            f"{card.precision}.",
            field="autoplan.profile",
        )
    _check_alike(config)
    workers_of(config, profile)


def _check_alike(config: ClusterConfig) -> None:
    ranks = []
    for phase in Phase:
        groups = config.section(phase).all_groups
        if len(groups) > 1:
            key = f"{phase.value}.groups"
            raise ConfigError(f"autoplan.mode: {key} has several groups, and only workers that are alike are planned again.", field=key)
        ranks.append(groups[0].tp * (len(groups[0].stages) or groups[0].pp))
    if len(set(ranks)) > 1 and not config.paired:  # those of a pair keep their roles
        sizes = f"a prefill worker has {ranks[0]} ranks, a decode worker {ranks[1]}"
        raise ConfigError(f"autoplan.mode: {sizes}; only one as large as the others can change its role.", field="autoplan.mode")


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a pilot sees and does. `window`: of the router's record, of so many seconds. `change` has workers change their role, join and
    leave until the split is that; raises `DiptychError` if it could not be. `show`: the latest decision, for whoever looks."""

    window: Callable[[float], Awaitable[Window]]
    split: Callable[[], Split]
    change: Callable[[Split], Awaitable[None]]
    show: Callable[[str], None]


@dataclass(slots=True)
class Pilot:
    """`config`: of a cluster that `check` has let pass. `cores`: those of this host that it may use. `environment`: of the process that
    simulates."""

    config: ClusterConfig
    cluster: Cluster
    cores: int
    environment: Mapping[str, str]
    clock: Clock

    async def run(self) -> None:
        """Until cancelled."""
        plan = self.config.autoplan
        assert plan.slo is not None
        terms = Terms(plan.target, plan.margin, plan.least_workers, plan.most_workers, self.config.paired)
        planner = Autoplanner(parse_slo(plan.slo), terms, plan.least_requests, plan.cool_down_s, plan.window_s)
        while True:
            await asyncio.sleep(plan.every_s)
            try:
                await self._look(planner)
            except DiptychError as error:
                log.warning("autoplan: %s", error.message)
            except Exception:
                log.exception("autoplan: a defect; the cluster serves on")

    async def _look(self, planner: Autoplanner) -> None:
        window = await self.cluster.window(HISTORY * self.config.autoplan.window_s)
        look = planner.look(self.clock.now(), window, self.cluster.split())
        if look is None:
            return
        splits = list(candidates(look.split, planner.terms))
        decision = planner.judge(self.clock.now(), look, dict(zip(splits, await self._scores(look, splits), strict=True)))
        self._tell(decision)
        if decision.sure and self.config.autoplan.mode == "apply":
            await self._apply(planner, decision)

    async def _scores(self, look: Look, splits: Sequence[Split]) -> list[Score]:
        return await ask(question_of(look, splits, self.config, self.cores), self.environment)

    def _tell(self, decision: Decision) -> None:
        """All that it was decided by."""
        proposed = decision.sure and self.config.autoplan.mode == "propose"
        said = (
            f"{decision}; `diptych scale --prefill {decision.split.prefills} --decode {decision.split.decodes}`"
            if proposed
            else str(decision)
        )
        look = decision.look
        scores = {str(split): str(score) for split, score in decision.scores.items()}
        note(log, f"autoplan: {said}", load=look.figures.as_json(), seconds=round(look.seconds, 1), simulated=scores)
        self.cluster.show(said)

    async def _apply(self, planner: Autoplanner, decision: Decision) -> None:
        began = self.clock.now()
        try:
            await self.cluster.change(decision.split)
        finally:
            planner.changed(self.clock.now())
        took = f"now {decision.split}, after {self.clock.now() - began:.1f} s"
        note(log, f"autoplan: {took}")
        self.cluster.show(took)
