"""Simulates the recent load on several splits, in a process of its own that takes only the time nobody else wants.

    python -m diptych.cluster.autoplan.scoring < question > answer

Both are one JSON value: `Question`, and the scores in the order of its splits. What is wrong with profile or config is said on stderr,
exit status 2.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ...core.config import ClusterConfig, load_config
from ...core.errors import DiptychError, Unavailable
from ...core.fleet import Phase
from ..load.slo import parse_slo
from ..load.workload import Arrival
from ..planner.policies import Policies, workers_of
from ..planner.profile import Profile, read_profile
from ..planner.world import World
from .deciding import Look
from .figures import lasting
from .replan import HEADROOM, Score, Split

SCORE_S = 120.0
"""A simulation of 8192 requests on ten splits takes 20 s of a core that is free."""
NICE = 19


class Question(BaseModel):
    """`splits`: prefill and decode workers; the first is the one there is. `requests`: arrival in seconds, tokens of prompt and answer,
    and of the prefix that is cached. `cores`: of the host, if all workers are on one."""

    model_config = ConfigDict(frozen=True)
    profile: Path
    config: dict[str, object]
    slo: str
    splits: tuple[tuple[int, int], ...]
    cores: int
    requests: tuple[tuple[float, int, int, int], ...]


def scores(question: Question) -> list[Score]:
    """Raises `DiptychError` if profile and config do not fit together."""
    profile, config, slo = _on_cores(read_profile(question.profile), question.cores), load_config(question.config), parse_slo(question.slo)
    policies = Policies.of(config)
    found = []
    for prefills, decodes in question.splits:
        fewer = prefills + decodes < sum(question.splits[0])
        world = World(profile, workers_of(_resized(config, prefills, decodes), profile), policies, slo=slo)
        world.run(_arrivals(question.requests, HEADROOM if fewer else 1.0))
        p90 = (figure.percentile(0.9) if figure.count else None for figure in (world.ttft, world.tpot))
        found.append(Score(world.met, world.requests, *p90))
    return found


def _on_cores(profile: Profile, count: int) -> Profile:
    """Of the host the cluster may use so many cores, which may be fewer than were profiled."""
    return profile if profile.cores is None else profile.model_copy(update={"cores": profile.cores.model_copy(update={"count": count})})


def _resized(config: ClusterConfig, prefills: int, decodes: int) -> ClusterConfig:
    """With so many workers of the one group of each phase; their cores are dealt out as if it were started so."""
    sections = {}
    for phase, workers in ((Phase.PREFILL, prefills), (Phase.DECODE, decodes)):
        group = config.section(phase).all_groups[0].model_copy(update={"workers": workers})
        sections[phase.value] = config.section(phase).model_copy(update={"groups": (group,)})
    return config.model_copy(update=sections)


def _arrivals(requests: Iterable[tuple[float, int, int, int]], times: float) -> Iterable[Arrival]:
    """The load, at so many times its rate."""
    for number, (at, prompt, output, cached) in enumerate(requests):
        yield Arrival(number, at / times, prompt, output, prefix=min(1, cached), prefix_tokens=cached)


async def ask(question: Question, environment: Mapping[str, str]) -> list[Score]:
    """Have it simulated. `Unavailable` says why it could not be."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", __name__),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=dict(environment),
    )  # fmt: skip
    try:
        async with asyncio.timeout(SCORE_S):
            answer, said = await process.communicate(question.model_dump_json().encode())
    except TimeoutError:
        raise Unavailable(f"The load was not simulated within {SCORE_S:g} s.") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise Unavailable(f"The load could not be simulated: {said.decode(errors='replace').strip()[-2000:]}")
    return [Score(**values) for values in json.loads(answer)]


def question_of(look: Look, splits: Iterable[Split], config: ClusterConfig, cores: int) -> Question:
    """Of a cluster with this `autoplan`, under the load of the look for as long as its window."""
    plan = config.autoplan
    assert plan.profile is not None
    assert plan.slo is not None
    return Question(
        profile=Path(plan.profile),
        config=config.model_dump(mode="json", exclude_unset=True),
        slo=plan.slo,
        splits=tuple((split.prefills, split.decodes) for split in splits),
        cores=cores,
        requests=tuple(
            (each.at, each.prompt_tokens, each.output_tokens, each.prefix_tokens)
            for each in lasting(look.arrivals, look.seconds, plan.window_s)
        ),
    )


def main() -> int:
    os.nice(NICE)
    try:
        found = scores(Question.model_validate_json(sys.stdin.read()))
    except DiptychError as error:
        print(error.message, file=sys.stderr)
        return 2
    json.dump([{"met": each.met, "total": each.total, "ttft": each.ttft, "tpot": each.tpot} for each in found], sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
