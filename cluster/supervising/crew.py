"""The workers of one cluster: makes their posts, and changes their number while it serves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...core.config import ClusterConfig, WorkerGroup, load_config
from ...core.errors import ConfigError, Unavailable
from ...core.fleet import Phase
from ...core.model import ModelCard
from ...core.security import TlsFiles
from ..process.launcher import Launch, Launcher
from ..process.spec import Worker, require_in_place
from ..resources import preflight
from ..resources.allotment import allot
from ..resources.devices import Gpu
from .control import Numbers, Tell
from .headcount import pair_changes, phase_changes
from .post import Post
from .posts import Name, Programs, in_place_of, launch_on_nodes, launch_worker, newcomers, worker_name, worker_number
from .restarts import RestartBudget
from .supervisor import Supervisor

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Crew:
    """`config`: with the numbers of workers that were asked for last. `cores`, `gpus`: those of this host, for the workers on it.
    `core_table`: by which those of one rank lend each other cores."""

    config: ClusterConfig
    card: ModelCard
    model_dir: Path
    source: str
    cores: Sequence[int]
    programs: Programs
    logs: Path
    budget: Callable[[], RestartBudget] = RestartBudget
    internal_tls: TlsFiles | None = None
    gpus: Sequence[Gpu] = ()
    core_table: Path | None = None
    _changing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def posts(self, workers: Sequence[Worker], launcher: Launcher, present: Sequence[Post] = ()) -> list[Post]:
        launches = self.launches(workers, present)
        return [Post(launch, launcher, worker, self.budget()) for launch, worker in zip(launches, workers, strict=True)]

    def launches(self, workers: Sequence[Worker], present: Sequence[Post] = ()) -> list[Launch]:
        """Each with its partner, which comes with it or is among those present."""
        ours = [self.launch(worker) for worker in workers]
        known = {launch.name: launch for launch in (*(replace(post.launch, partner=None) for post in present), *ours)}
        return [replace(launch, partner=known.get(worker.partner or "")) for launch, worker in zip(ours, workers, strict=True)]

    def launch(self, worker: Worker) -> Launch:
        update: dict[str, object] = {} if self.internal_tls is None else {"internal_tls": self.internal_tls}
        if len(worker.ranks) == 1 and worker.ranks[0].cpus and worker.ranks[0].device == "cpu":
            update["core_table"] = self.core_table
        worker = replace(worker, ranks=tuple(spec.model_copy(update=update) for spec in worker.ranks))
        if self.config.ray.joined:
            return launch_on_nodes(worker, self.config, self.card, self.source, self.logs)
        return launch_worker(worker, self.programs, self.logs)

    async def scale(self, supervisor: Supervisor, launcher: Launcher, wanted: Numbers, tell: Tell, *, in_place: bool = False) -> None:
        """Have so many workers of each phase named in `wanted`: those that can change their role in place do so, then new ones join, then
        others leave. With `in_place` no more workers are wanted: where each has cores or GPUs of its own, these are free for another only
        when it has left.

        Raises `DiptychError` if a number is not possible or a worker cannot join; those that could stay, and none leaves (any more).
        """
        if not supervisor.all_ready.is_set():
            raise Unavailable("The cluster is still starting.")
        async with self._changing:
            self.config = _changed(self.config, wanted)
            if self.config.paired:  # what is asked of one phase is asked of both
                wanted = {phase: tuple(group.workers for group in self.config.section(phase).all_groups) for phase in Phase}
            gone = [post for post in supervisor.workers if post.given_up and post.phase in wanted]
            await asyncio.gather(*(supervisor.leave(post) for post in gone))
            names: list[Name] = []
            leaving: list[Post] = []
            present = {phase: _present(supervisor, phase, len(numbers)) for phase, numbers in wanted.items()}
            for phase, found in (pair_changes if self.config.paired else phase_changes)(present, wanted).items():
                for group, change in enumerate(found):
                    names += [(phase, group, number) for number in change.join]
                    leaving += [present[phase][group][number] for number in change.leave]
            flips = self._flips(supervisor, names, leaving)
            await _all(self._flip(supervisor, post, worker, tell) for post, worker in flips)
            leave_first = in_place and self._own_places(supervisor)
            if leave_first:
                await self._dismiss(supervisor, leaving, tell)
            await self._join(supervisor, self.posts(self._newcomers(supervisor, names), launcher, supervisor.workers), tell)
            if not leave_first:
                await self._dismiss(supervisor, leaving, tell)

    def _newcomers(self, supervisor: Supervisor, names: Sequence[Name]) -> list[Worker]:
        present = [post.worker for post in supervisor.workers if post.worker]
        joining = newcomers(self.config, self.card, self.model_dir, self.cores, present, names)
        workers = allot(self.config, self.card, joining, self.gpus, present)
        if workers:
            preflight.check_memory(self.config, self.card, workers)
        return workers

    def _flips(self, supervisor: Supervisor, names: list[Name], leaving: list[Post]) -> list[tuple[Post, Worker]]:
        """Of those that leave, who becomes one of those that come, in the same processes; they are taken out of both lists. Why others do
        not is logged."""
        flips = []
        for name in tuple(names):
            for post in tuple(leaving):
                try:
                    flips.append((post, self._in_place(supervisor, post, name)))
                except ConfigError as error:
                    _log.warning("%s cannot become %s in place, and ends: %s", post.name, worker_name(name[0], name[2]), error.message)
                    continue
                names.remove(name)
                leaving.remove(post)
                break
        return flips

    def _in_place(self, supervisor: Supervisor, post: Post, name: Name) -> Worker:
        """What the worker `name` is on the processes of `post`. Raises `ConfigError` if it cannot be."""
        assert post.worker is not None
        for hinders, why in (
            (self.config.paired, "workers are paired."),
            (self.config.ray.joined, "its place on the Ray cluster was chosen for its role."),
            (post.worker.ranks[0].device == "cuda", "what its pool has of a GPU is given back by the end of its process."),
            (post.ready is None, "it is not ready."),
        ):
            if hinders:
                raise ConfigError(why)
        others = [other.worker for other in supervisor.workers if other.worker and other is not post]
        there = in_place_of(post.worker, self.config, self.card, self.model_dir, name)
        (worker,) = allot(self.config, self.card, [there], self.gpus, others)
        require_in_place(post.worker, worker)
        return worker

    async def _flip(self, supervisor: Supervisor, post: Post, worker: Worker, tell: Tell) -> None:
        was = post.name
        tell(f"{was} finishes what it has, and becomes {worker.name}")
        if await supervisor.flip(post, worker, self.launch(worker)):
            tell(f"{worker.name} has joined, in the processes of {was}")
        else:
            _log.warning("%s could not become %s in place, and was started again", was, worker.name)
            tell(f"{worker.name} has joined, started again: {was} could not change its role in place. Its log says why")

    async def _join(self, supervisor: Supervisor, posts: Sequence[Post], tell: Tell) -> None:
        await _all(self._welcome(supervisor, post, tell) for post in posts)

    async def _welcome(self, supervisor: Supervisor, post: Post, tell: Tell) -> None:
        tell(f"{post.name} is starting")
        await supervisor.join(post)
        tell(f"{post.name} has joined")

    def _own_places(self, supervisor: Supervisor) -> bool:
        """Whether workers have GPUs or cores of their own."""
        ranks = (spec for post in supervisor.workers if post.worker for spec in post.worker.ranks)
        return self.config.ray.joined or bool(self.gpus) or any(spec.cpus for spec in ranks)

    async def _dismiss(self, supervisor: Supervisor, posts: Sequence[Post], tell: Tell) -> None:
        await asyncio.gather(*(self._leave(supervisor, post, tell) for post in posts))

    async def _leave(self, supervisor: Supervisor, post: Post, tell: Tell) -> None:
        tell(f"{post.name} finishes what it has")
        await supervisor.leave(post)
        tell(f"{post.name} has left")


async def _all(changes: Iterable[Awaitable[None]]) -> None:
    """Raises the first error when all have come to an end."""
    for outcome in await asyncio.gather(*changes, return_exceptions=True):
        if outcome is not None:
            raise outcome


def _present(supervisor: Supervisor, phase: Phase, groups: int) -> list[dict[int, Post]]:
    """The workers of each group of a phase, by number."""
    present: list[dict[int, Post]] = [{} for _ in range(groups)]
    for post in supervisor.workers:
        if post.worker and post.phase is phase:
            present[post.worker.group][worker_number(post.name)] = post
    return present


def _changed(config: ClusterConfig, wanted: Numbers) -> ClusterConfig:
    """The config with these numbers of workers; `ConfigError` if no cluster could be started with them."""
    values = config.model_dump(mode="json", exclude_unset=True)
    for phase, numbers in wanted.items():
        groups = config.section(phase).all_groups
        if len(numbers) != len(groups):
            raise _not_one_each(phase, groups)
        section = values.setdefault(phase.value, {})
        for group, number in zip(section.get("groups") or [section], numbers, strict=True):
            group["workers"] = number
    return load_config(values)


def _not_one_each(phase: Phase, groups: Sequence[WorkerGroup]) -> ConfigError:
    if len(groups) == 1:
        return ConfigError(
            f"{phase.value} workers are of one group: give one number, as in --{phase.value} 2.", field=f"{phase.value}.workers"
        )
    key, example = f"{phase.value}.groups", ",".join(str(group.workers) for group in groups)
    spread = "; ".join(map(str, groups))
    return ConfigError(
        f"{key}: {phase.value} workers are of {len(groups)} groups ({spread}): give a number for each, as in --{phase.value} {example}.",
        field=key,
    )
