"""The workers of one cluster: makes their posts, and changes their number while it serves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..core.config import ClusterConfig, load_config
from ..core.errors import Unavailable
from ..core.fleet import Phase
from ..core.model import ModelCard
from . import preflight
from .control import Tell
from .headcount import change
from .launch import Launch, Launcher
from .post import Post
from .posts import Programs, launch_rank, launch_rank_on_a_node, newcomer_specs, worker_number
from .restarts import RestartBudget
from .spec import RankSpec
from .supervisor import Supervisor


@dataclass(slots=True)
class Crew:
    """`config`: with the numbers of workers that were asked for last. `cores`: those of this host, for the workers on it."""

    config: ClusterConfig
    card: ModelCard
    model_dir: Path
    source: str
    cores: Sequence[int]
    programs: Programs
    logs: Path
    budget: Callable[[], RestartBudget] = RestartBudget
    _changing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def posts(self, specs: Sequence[RankSpec], launcher: Launcher) -> list[Post]:
        return [Post(self.launch(spec), launcher, spec, self.budget()) for spec in specs]

    def launch(self, spec: RankSpec) -> Launch:
        if self.config.ray.joined:
            return launch_rank_on_a_node(spec, self.config, self.card, self.source, self.logs)
        return launch_rank(spec, self.programs, self.logs)

    async def scale(self, supervisor: Supervisor, launcher: Launcher, wanted: Mapping[Phase, int], tell: Tell) -> None:
        """Have so many workers of each phase named in `wanted`: the new ones join first, then the others leave.

        Raises `DiptychError` if a number is not possible or a worker cannot join; those that could stay, and none leaves.
        """
        if not supervisor.all_ready.is_set():
            raise Unavailable("The cluster is still starting.")
        async with self._changing:
            self.config = _changed(self.config, wanted)
            present = {phase: {worker_number(post.name): post for post in supervisor.workers if post.phase is phase} for phase in wanted}
            kept = {phase: [number for number, post in posts.items() if not post.given_up] for phase, posts in present.items()}
            changes = {phase: change(kept[phase], number) for phase, number in wanted.items()}
            gone = [post for posts in present.values() for post in posts.values() if post.given_up]
            await asyncio.gather(*(supervisor.leave(post) for post in gone))
            names = [(phase, number) for phase in changes for number in changes[phase].join]
            await self._join(supervisor, self.posts(self._newcomers(supervisor, names), launcher), tell)
            leaving = [present[phase][number] for phase in changes for number in changes[phase].leave]
            await asyncio.gather(*(self._leave(supervisor, post, tell) for post in leaving))

    def _newcomers(self, supervisor: Supervisor, names: Sequence[tuple[Phase, int]]) -> list[RankSpec]:
        present = [post.spec for post in supervisor.workers if post.spec]
        specs = newcomer_specs(self.config, self.model_dir, self.cores, present, names)
        if specs:
            preflight.check_memory(self.config, self.card, specs)
        return specs

    async def _join(self, supervisor: Supervisor, posts: Sequence[Post], tell: Tell) -> None:
        outcomes = await asyncio.gather(*(self._welcome(supervisor, post, tell) for post in posts), return_exceptions=True)
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    async def _welcome(self, supervisor: Supervisor, post: Post, tell: Tell) -> None:
        tell(f"{post.name} is starting")
        await supervisor.join(post)
        tell(f"{post.name} has joined")

    async def _leave(self, supervisor: Supervisor, post: Post, tell: Tell) -> None:
        tell(f"{post.name} finishes what it has")
        await supervisor.leave(post)
        tell(f"{post.name} has left")


def _changed(config: ClusterConfig, wanted: Mapping[Phase, int]) -> ClusterConfig:
    """The config with these numbers of workers; `ConfigError` if no cluster could be started with them."""
    values = config.model_dump(mode="json")
    for phase, number in wanted.items():
        values[phase.value]["workers"] = number
    return load_config(values)
