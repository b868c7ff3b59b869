"""What `diptych profile` does: steps, links and small clusters timed on this host, a latency model fitted, shown and written."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ...core.errors import ConfigError
from ...core.model import Decoder, ModelCard, read_card
from ...core.transfer import Transport
from ..planner.fitting import BothPoint, DecodePoint, PrefillPoint, fit_steps
from ..planner.latency import StepTimes
from ..planner.profile import Basis, Cores, DeviceShare, Link, Model, Overheads, Parallelism, Profile, Residuals
from ..process.spec import BLOCK_SIZE
from ..resources.cores import share_cores
from ..resources.memory import available_bytes
from .links import TOKENS, link_of, timed_link
from .reckoning import Apart, EngineStep, Seen, Together, beside, moment_of, request_seconds, with_both, with_prompts, with_serving
from .served import LEAST_CONTEXT, STAGES, watched
from .showing import show
from .steps import AGAIN, CHUNK, CHUNK_START, Step, grid, timed_steps

REQUEST_S = 0.005
"""Of a request outside of steps, where no cluster is to be started."""
LINK_RUNS = 30
MEMORY_SHARE = 0.5
"""Of the memory that is free, for KV: what `up` gives all ranks of a host together. A worker has its part of it, as if there were one
for each core: a plan has no more of them."""
Advance = Callable[[str], None]
T = TypeVar("T", Apart, Together)


@dataclass(frozen=True, slots=True)
class Fitted:
    """Times of an engine alone on so many cores."""

    cores: int
    times: StepTimes
    prefill: Residuals
    decode: Residuals
    steps: dict[EngineStep, float]
    """As they were timed, in seconds."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """A link, and how far its line is from what was measured; `message`: one way."""

    link: Link
    residuals: Residuals
    message: float


def profile_here(model_dir: Path, *, threads: int | None, repeats: int, clusters: bool, out: Path) -> Profile:
    """Measure, show how well the fit is, write. `threads`: of each worker of the small clusters; None: as `up` shares the cores.
    Times of steps are medians of `repeats`; without `clusters` what serving takes besides is assumed."""
    cores = sorted(os.sched_getaffinity(0))
    shares = [threads or share.threads for share in share_cores(cores, (None, None))]
    if max(shares) > len(cores):
        raise ConfigError(f"--threads {threads}: this process may use {len(cores)} cores.", field="threads")
    card = read_card(model_dir)
    if clusters and card.max_context < LEAST_CONTEXT:
        raise ConfigError(
            f"{card.name} takes {card.max_context} tokens, and small clusters are asked for {LEAST_CONTEXT}: use --no-clusters.",
            field="clusters",
        )
    counts = sorted({*shares, len(cores)})
    transports = [each for each in Transport if not each.on_gpu]
    total = len(counts) * len(grid(card.max_context)) + len(transports)
    if clusters:
        total += sum(map(len, STAGES.values())) + (1 + len(STAGES)) * len(counts) * len(AGAIN)
    with _bar(total) as advance:
        fitted = {count: _fitted(model_dir, cores[:count], repeats, advance) for count in counts}
        crossings = {each.value: _crossing(card, each, advance) for each in transports}
        seen = _seen(model_dir, card, threads, repeats, shares, fitted, advance) if clusters else None
    made = profile_of(card, len(cores), shares, fitted, crossings, seen, available_bytes())
    out.write_text(made.model_dump_json(indent=1) + "\n", encoding="utf-8")
    show(made, fitted, crossings, seen)
    return made


def _fitted(model_dir: Path, cores: Sequence[int], repeats: int, advance: Advance) -> Fitted:
    steps = _timed(model_dir, cores, repeats, advance)
    prefills = [PrefillPoint(each.batch, each.length, each.seconds) for each in steps if each.what == "prefill"]
    decodes = [DecodePoint(each.batch, each.length, each.seconds) for each in steps if each.what == "decode"]
    both = [BothPoint(each.batch, each.length, CHUNK, CHUNK_START, each.seconds) for each in steps if each.what == "both"]
    return Fitted(len(cores), *fit_steps(prefills, decodes, both), _by_step(cores, steps))


def _timed(
    model_dir: Path, cores: Sequence[int], repeats: int, advance: Advance, again: Sequence[tuple[str, int, int]] | None = None
) -> list[Step]:
    on = f"on {len(cores)} core{'s' if len(cores) > 1 else ''}"
    steps: list[Step] = []
    for step in timed_steps(model_dir, cores, repeats, again):
        advance(f"{step.what} {step.batch} × {step.length} {on}")
        steps.append(step)
    return steps


def _by_step(cores: Sequence[int], steps: Sequence[Step]) -> dict[EngineStep, float]:
    return {EngineStep(len(cores), each.what, each.batch, each.length): each.seconds for each in steps}


def _crossing(card: ModelCard, transport: Transport, advance: Advance) -> Crossing:
    tokens = max(each for each in TOKENS if each < card.max_context)
    times = asyncio.run(timed_link(card.layout(block_size=BLOCK_SIZE, kv_tokens=tokens), transport, LINK_RUNS))
    advance(f"KV over {transport.value}")
    return Crossing(*link_of(times), times.message)


def _seen(
    model_dir: Path,
    card: ModelCard,
    threads: int | None,
    repeats: int,
    shares: Sequence[int],
    fitted: dict[int, Fitted],
    advance: Advance,
) -> Seen:
    """Both clusters; some of the engine's steps are timed again before and after each."""
    cores = sorted(os.sched_getaffinity(0))
    first = {step: seconds for each in fitted.values() for step, seconds in each.steps.items()}

    def again() -> dict[EngineStep, float]:
        owns = [cores[:count] for count in fitted]
        return {step: s for own in owns for step, s in _by_step(own, _timed(model_dir, own, repeats, advance, AGAIN)).items()}

    def cluster(kind: type[T]) -> T:
        for told in watched(kind, model_dir, card.dtype, threads, repeats):
            if isinstance(told, kind):
                return told
            advance(f"a small cluster, {told}")
        raise AssertionError("what was seen is told last")

    before, apart = again(), cluster(Apart)
    between, together = again(), cluster(Together)
    moments = moment_of(_lent(fitted, shares), first, before, between), moment_of(len(cores), first, between, again())
    return Seen(apart.as_at_first(moments[0]), together.as_at_first(moments[1]), *moments)


def _lent(counts: Iterable[int], shares: Sequence[int]) -> int:
    """Of the counts of cores that were timed, the one nearest to what both workers have together."""
    return max(count for count in counts if count <= sum(shares))


@contextmanager
def _bar(total: int) -> Iterator[Advance]:
    """On stderr; called with what has been measured, or is about to be."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=total)
        yield lambda what: bar.update(task, description=what, advance=1)


def profile_of(
    card: ModelCard,
    cores: int,
    shares: Sequence[int],
    fitted: dict[int, Fitted],
    crossings: dict[str, Crossing],
    seen: Seen | None,
    memory_bytes: float,
) -> Profile:
    """`shares`: the cores of a prefill and of a decode worker beside each other."""
    reading = writing = {count: each.times for count, each in fitted.items()}
    message = next(iter(crossings.values())).message
    basis = {"prefill": Basis.FITTED, "decode": Basis.FITTED, "links": Basis.FITTED, "overheads.message": Basis.MEASURED}
    overheads, host, served = Overheads(request=REQUEST_S, message=message), Cores(count=cores), Basis.ASSUMED
    if seen is not None:
        apart, together = seen.apart, seen.together
        served = Basis.MEASURED
        reading = reading | {cores: with_prompts(reading[cores], apart.prompts, None)}
        lent = with_serving(writing[_lent(writing, shares)], apart.answers, seen.while_apart.engine)
        writing = {count: times.model_copy(update={"step": lent.step, "step_row": lent.step_row}) for count, times in writing.items()}
        writing[cores] = with_serving(writing[cores], together.answers, seen.while_together.engine)
        writing[cores] = with_both(with_prompts(writing[cores], together.prompts, together.chunk), together.both)
        slower = beside(reading[shares[0]], writing[shares[1]], apart)
        overheads = Overheads(request=request_seconds((*apart.prompts, *together.prompts)), message=message)
        host = Cores(count=cores, prefill_beside=slower[0], decode_beside=slower[1])
    model, own = model_of(card), max(shares)
    known = Parallelism(
        tp=1,
        times=writing[own],
        by_cores=reading,
        decode_by_cores=writing,
        kv_tokens={1: max(256, int(memory_bytes * MEMORY_SHARE / max(2, cores) / model.kv_token_bytes) // BLOCK_SIZE * BLOCK_SIZE)},
        prefill_residuals=fitted[own].prefill,
        decode_residuals=fitted[own].decode,
    )
    return Profile(
        source=f"measured on this machine, {cores} cores",
        model=model,
        device=DeviceShare(name="cpu", memory_bytes=memory_bytes),
        parallelisms=(known,),
        links={name: each.link for name, each in crossings.items()},
        overheads=overheads,
        cores=host,
        basis=basis
        | dict.fromkeys(("overheads.request", "step", "step_row", "cores.prefill_beside", "cores.decode_beside"), served)
        | {"device.memory_bytes": Basis.MEASURED, "kv_tokens": Basis.RECKONED, "device.cost_per_hour": Basis.ASSUMED},
    )


def model_of(card: ModelCard) -> Model:
    """The profile's words for a prepared model."""
    decoder = card.decoder
    windows = {window: decoder.windows.count(window) for window in set(decoder.windows)}
    groups = card.cache_groups()
    here = Path(card.source)
    return Model(
        name=card.name,
        source=str(here.absolute()) if here.exists() else card.source,
        dtype=card.precision,
        layers=decoder.layers,
        heads=decoder.heads if isinstance(decoder, Decoder) else 1,
        kv_heads=decoder.kv_heads if isinstance(decoder, Decoder) else 1,
        max_context=card.max_context,
        windows=windows if any(windows) else {},
        kv_token_bytes=sum(group.token_bytes * len(group.layers) for group in groups),
        weight_bytes=card.weights_bytes,
    )
