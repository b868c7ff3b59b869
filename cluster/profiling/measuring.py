"""What `diptych profile` does: steps, links and small clusters timed on this host, a latency model fitted, shown and written."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ...core.errors import ConfigError, DiptychError
from ...core.fleet import Phase
from ...core.model import ModelCard, read_card
from ...core.transfer import Transport
from ...kv_transfer.transports.wiring import usable
from ..planner.profile import Profile
from ..process.spec import BLOCK_SIZE
from ..resources.cores import share_cores
from ..resources.devices import VISIBLE, Gpu
from ..resources.memory import available_bytes
from .grid import AGAIN, Place, Room, Step
from .links import TOKENS, link_of, timed_link
from .making import Crossing, Fitted, by_step, fitted_to, lent_to, of_gpus, of_host
from .reckoning import Apart, EngineStep, Moment, Seen, Together, moment_of
from .served import LEAST_CONTEXT, STAGES, Small, watched
from .showing import Check, show
from .steps import timed_steps

LINK_RUNS = 30
T = TypeVar("T", Apart, Together)


def profile_here(
    model_dir: Path, *, gpus: Sequence[Gpu], tps: Collection[int], threads: int | None, repeats: int, clusters: bool, out: Path
) -> Profile:
    """Measure, show how well the fit is, write. `gpus`: those of this host, all alike; none: its cores are measured. `tps`: of the workers
    whose steps are timed; on cores also of one rank. `threads`: of each rank on cores; None: as `up` shares them. Times of steps are
    medians of `repeats`; without `clusters` what serving takes besides is assumed. Raises `ConfigError` for what cannot be measured."""
    card = read_card(model_dir)
    for tp in sorted(tps):
        card.layout(block_size=BLOCK_SIZE, kv_tokens=BLOCK_SIZE, tp=tp)
    if clusters and card.max_context < LEAST_CONTEXT:
        raise ConfigError(
            f"{card.name} takes {card.max_context} tokens, and small clusters are asked for {LEAST_CONTEXT}: use --no-clusters.",
            field="clusters",
        )
    if gpus:
        made = _Gpus(model_dir, card, gpus, sorted(tps or {1}), repeats).measured(clusters)
    else:
        made = _Host(model_dir, card, sorted({*tps} - {1}), threads, repeats).measured(clusters)
    out.write_text(made.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return made


class _Measuring:
    """What both do: `places` are those whose whole grid is timed, and small clusters are begun and ended by steps on `again`."""

    def __init__(
        self,
        model_dir: Path,
        card: ModelCard,
        repeats: int,
        places: Sequence[Place],
        again: Sequence[Place],
        small: Small,
        gpus: Sequence[str] = (),
    ) -> None:
        """`gpus`: all that there are, of which KV moves between two."""
        self.card, self.again, self._small = card, again, small
        device = torch.device("cuda" if gpus else "cpu")
        self._gpus, self._transports = gpus, usable(tuple(each for each in Transport if each.on_gpu == bool(gpus)), device)
        self._model_dir, self._repeats, self._places = model_dir, repeats, places
        self._done: Callable[[str], None]
        self._say: Callable[[str], None]

    @contextmanager
    def bar(self, kinds: Sequence[type]) -> Iterator[None]:
        """On stderr, until all is measured; `kinds`: of small clusters."""
        stages = sum(len(STAGES[kind]) for kind in kinds) + (1 + len(kinds)) * len(self.again) * len(AGAIN) * bool(kinds)
        steps = sum(len(self._steps_on(place)) for place in self._places)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("measuring", total=steps + len(self._transports) + stages)
            self._done = lambda what: bar.update(task, description=what, advance=1)
            self._say = lambda what: bar.console.print(what, markup=False, soft_wrap=True)
            yield

    def fitted(self) -> list[Fitted]:
        """Of each place."""
        return [fitted_to(place, [*self._room(place), *self._timed(place, self._steps_on(place))]) for place in self._places]

    def _room(self, place: Place) -> list[Room | Step]:
        """On GPUs that of a usual worker: larger batches and chunks than it has, as are timed, leave less."""
        return self._timed(place, ()) if place.gpus else []

    def _steps_on(self, place: Place) -> list[tuple[str, int, int]]:
        return place.grid.steps(self.card.max_context)

    def _timed(self, place: Place, steps: Sequence[tuple[str, int, int]]) -> list[Room | Step]:
        told = []
        for each in timed_steps(self._model_dir, place, self._repeats, steps):
            told.append(each)
            if isinstance(each, Step):
                self._done(f"{each.what} {each.batch} × {each.length} on {place}")
        return told

    def crossings(self) -> dict[str, Crossing]:
        """By the transport's name. One over which nothing moves here is left out, and it is said why; `DiptychError` if none is left."""
        found, errors = {}, []
        for transport in self._transports:
            try:
                found[transport.value] = self._crossing(transport)
            except DiptychError as error:
                errors.append(error)
                self._say(f"KV over {transport.value} could not be timed: {error.message}")
        if not found:
            raise errors[0]
        return found

    def _crossing(self, transport: Transport) -> Crossing:
        tokens = max(each for each in TOKENS if each < self.card.max_context)
        layout = self.card.layout(block_size=BLOCK_SIZE, kv_tokens=tokens)
        times = timed_link(layout, transport, LINK_RUNS, self._gpus)
        self._done(f"KV over {transport.value}")
        return Crossing(*link_of(times), times.message)

    def steps_again(self) -> dict[EngineStep, float]:
        """A few of those that were timed at first, as they are now."""
        return {step: seconds for place in self.again for step, seconds in by_step(place, self._timed(place, AGAIN)).items()}

    def cluster(self, kind: type[T]) -> T:
        for told in watched(kind, self._small, self._repeats):
            if isinstance(told, kind):
                return told
            self._done(f"a small cluster, {told}")
        raise AssertionError("what was seen is told last")


class _Host(_Measuring):
    """Cores: of one rank on those of one of two workers and on all, and of workers of `tps` ranks."""

    def __init__(self, model_dir: Path, card: ModelCard, tps: Sequence[int], threads: int | None, repeats: int) -> None:
        self._cores = cores = sorted(os.sched_getaffinity(0))
        self._shares = [threads or share.threads for share in share_cores(cores, (None, None))]
        each = max(self._shares)
        if each > len(cores):
            raise ConfigError(f"--threads {threads}: this process may use {len(cores)} cores.", field="threads")
        if tps and tps[-1] * each > len(cores):
            raise ConfigError(
                f"--tp {tps[-1]}: {tps[-1]} ranks of {each} threads take more than the {len(cores)} cores that this process may use; "
                f"tp {max(1, len(cores) // each)} is the most, or more with fewer --threads.",
                field="tp",
            )
        self._counts = sorted({*self._shares, len(cores)})
        alone = [Place((tuple(cores[:count]),)) for count in self._counts]
        sharded = [Place(tuple(tuple(cores[i * each : (i + 1) * each]) for i in range(tp))) for tp in tps]
        super().__init__(model_dir, card, repeats, [*alone, *sharded], alone, Small(model_dir, card.dtype, threads))

    def measured(self, clusters: bool) -> Profile:
        with self.bar((Apart, Together) if clusters else ()):
            every = self.fitted()
            fitted, sharded = dict(zip(self._counts, every, strict=False)), every[len(self._counts) :]
            crossings = self.crossings()
            seen = self._seen(fitted) if clusters else None
        cores = len(self._cores)
        made = of_host(self.card, cores, self._shares, fitted, sharded, crossings, seen, available_bytes())
        show(made, every, crossings, _host_checks(made, seen) if seen else ())
        return made

    def _seen(self, fitted: Mapping[int, Fitted]) -> Seen:
        first = {step: seconds for each in fitted.values() for step, seconds in each.steps.items()}
        before, apart = self.steps_again(), self.cluster(Apart)
        between, together = self.steps_again(), self.cluster(Together)
        while_apart = moment_of(lent_to(fitted, self._shares), first, before, between)
        while_together = moment_of(len(self._cores), first, between, self.steps_again())
        return Seen(apart.as_at_first(while_apart), together.as_at_first(while_together), while_apart, while_together)


class _Gpus(_Measuring):
    """Workers of `tps` ranks with a GPU each. Of small clusters there is one, of a worker of the least tp for both phases: what GPUs do
    none slows another's, and one GPU is enough for it."""

    def __init__(self, model_dir: Path, card: ModelCard, gpus: Sequence[Gpu], tps: Sequence[int], repeats: int) -> None:
        if tps[-1] > len(gpus):
            raise ConfigError(f"--tp {tps[-1]}: a rank has a GPU of its own, and this host has {len(gpus)}.", field="tp")
        if other := next((each for each in gpus if each.name != gpus[0].name), None):
            raise ConfigError(
                f"This host has {gpus[0].name} and {other.name}, and a profile is of one kind: name those to measure in {VISIBLE}.",
                field="device",
            )
        self._gpu = gpus[0]
        places = [Place(gpus=tuple(gpu.key for gpu in gpus[:tp])) for tp in tps]
        keys = tuple(gpu.key for gpu in gpus)
        super().__init__(model_dir, card, repeats, places, places[:1], Small(model_dir, card.dtype, tp=tps[0]), keys)

    def measured(self, clusters: bool) -> Profile:
        with self.bar((Together,) if clusters else ()):
            fitted = self.fitted()
            crossings = self.crossings()
            seen = self._seen(fitted[0]) if clusters else None
        made = of_gpus(self.card, self._gpu, fitted, crossings, seen)
        show(made, fitted, crossings, [_gpu_check(made, *seen)] if seen else ())
        return made

    def _seen(self, fitted: Fitted) -> tuple[Together, Moment]:
        before, together = self.steps_again(), self.cluster(Together)
        moment = moment_of(0, fitted.steps, before, self.steps_again())
        return together.as_at_first(moment), moment


def _host_checks(made: Profile, seen: Seen) -> list[Check]:
    assert made.cores is not None, "a host's profile knows its cores"
    reading, writing = (made.parallelisms[0].on_cores(made.cores.count, phase) for phase in Phase)
    return [
        Check("apart", seen.apart.prompts, reading, None, seen.while_apart),
        Check("at one worker for both", seen.together.prompts, writing, seen.together.chunk, seen.while_together),
    ]


def _gpu_check(made: Profile, together: Together, moment: Moment) -> Check:
    return Check("at one worker for both", together.prompts, made.parallelisms[0].times, together.chunk, moment)
