"""From what was timed to a profile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...core.model import Decoder, ModelCard
from ..planner.fitting import BothPoint, DecodePoint, PrefillPoint, fit_steps
from ..planner.latency import StepTimes
from ..planner.profile import CPU, Basis, Cores, DeviceShare, Link, Model, Overheads, Parallelism, Profile, Residuals
from ..process.spec import BLOCK_SIZE
from ..resources.devices import CPU_FRACTION, Gpu
from ..resources.memory import LEAST_TOKENS
from .grid import CHUNK, CHUNK_START, Place, Room, Step
from .reckoning import EngineStep, Moment, Seen, Together, beside, request_seconds, with_both, with_prompts, with_serving

REQUEST_S = 0.005
"""Of a request outside of steps, where no cluster is to be started."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """Times of the engine of a worker alone, there. `room`: tokens of KV that its pool held."""

    place: Place
    room: int
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


def fitted_to(place: Place, told: Sequence[Room | Step]) -> Fitted:
    """By the steps and the first room. `ConfigError` if fewer were timed than there are terms."""
    rooms, steps = [each.tokens for each in told if isinstance(each, Room)], [each for each in told if isinstance(each, Step)]
    prefills = [PrefillPoint(each.batch, each.length, each.seconds) for each in steps if each.what == "prefill"]
    decodes = [DecodePoint(each.batch, each.length, each.seconds) for each in steps if each.what == "decode"]
    both = [BothPoint(each.batch, each.length, CHUNK, CHUNK_START, each.seconds) for each in steps if each.what == "both"]
    return Fitted(place, rooms[0], *fit_steps(prefills, decodes, both), by_step(place, steps))


def by_step(place: Place, told: Iterable[Room | Step]) -> dict[EngineStep, float]:
    return {EngineStep(place.each, each.what, each.batch, each.length): each.seconds for each in told if isinstance(each, Step)}


def of_host(
    card: ModelCard,
    cores: int,
    shares: Sequence[int],
    fitted: Mapping[int, Fitted],
    sharded: Sequence[Fitted],
    crossings: Mapping[str, Crossing],
    seen: Seen | None,
    memory_bytes: float,
) -> Profile:
    """Of a host's cores. `shares`: those of a prefill and of a decode worker beside each other; `fitted`: of one rank, by its cores;
    `sharded`: of workers of several, each on as many as the larger share. Serving adds as much to their steps as to one rank's."""
    reading = writing = {count: each.times for count, each in fitted.items()}
    request, host, served = REQUEST_S, Cores(count=cores), Basis.ASSUMED
    if seen is not None:
        apart, together = seen.apart, seen.together
        served = Basis.MEASURED
        reading = reading | {cores: with_prompts(reading[cores], apart.prompts, None)}
        lent = with_serving(writing[lent_to(writing, shares)], apart.answers, seen.while_apart.engine)
        writing = {count: _adding(times, lent) for count, times in writing.items()}
        writing[cores] = with_serving(writing[cores], together.answers, seen.while_together.engine)
        writing[cores] = with_both(with_prompts(writing[cores], together.prompts, together.chunk), together.both)
        slower = beside(reading[shares[0]], writing[shares[1]], apart)
        request = request_seconds((*apart.prompts, *together.prompts))
        host = Cores(count=cores, prefill_beside=slower[0], decode_beside=slower[1])
    model, own = model_of(card), max(shares)
    share = memory_bytes * CPU_FRACTION / max(2, cores)
    known = Parallelism(
        tp=1,
        times=writing[own],
        by_cores=reading,
        decode_by_cores=writing,
        kv_tokens={1: _pool(share, model, 1)},
        prefill_residuals=fitted[own].prefill,
        decode_residuals=fitted[own].decode,
    )
    others = [_parallelism(each, _adding(each.times, writing[own]), _pool(share, model, each.place.tp)) for each in sharded]
    return Profile(
        source=f"measured on this machine, {cores} cores",
        model=model,
        device=DeviceShare(name=CPU, memory_bytes=memory_bytes),
        parallelisms=(known, *others),
        links={name: each.link for name, each in crossings.items()},
        overheads=_overheads(request, crossings),
        cores=host,
        basis=_basis(served, Basis.RECKONED) | dict.fromkeys(("cores.prefill_beside", "cores.decode_beside"), served),
    )


def of_gpus(
    card: ModelCard, gpu: Gpu, fitted: Sequence[Fitted], crossings: Mapping[str, Crossing], seen: tuple[Together, Moment] | None
) -> Profile:
    """Of GPUs of that kind. `fitted`: the least tp first; `seen`: of one worker of that for both phases. Serving adds as much to the steps
    of all."""
    times, request, served = [each.times for each in fitted], REQUEST_S, Basis.ASSUMED
    if seen is not None:
        together, moment = seen
        served, request = Basis.MEASURED, request_seconds(together.prompts)
        serving = with_serving(times[0], together.answers, moment.engine)
        times = [_adding(each, serving) for each in times]
        times[0] = with_both(times[0], together.both)
    return Profile(
        source=f"measured on this machine, {gpu.name}",
        model=model_of(card),
        device=DeviceShare(name=gpu.kind, memory_bytes=gpu.size),
        parallelisms=tuple(_parallelism(each, own, each.room) for each, own in zip(fitted, times, strict=True)),
        links={name: each.link for name, each in crossings.items()},
        overheads=_overheads(request, crossings),
        basis=_basis(served, Basis.MEASURED),
    )


def lent_to(counts: Iterable[int], shares: Sequence[int]) -> int:
    """Of the counts of cores that were timed, the one nearest to what both workers have together."""
    return max(count for count in counts if count <= sum(shares))


def _adding(times: StepTimes, serving: StepTimes) -> StepTimes:
    """With what serving adds to the steps of others."""
    return times.model_copy(update={"step": serving.step, "step_row": serving.step_row})


def _parallelism(each: Fitted, times: StepTimes, kv_tokens: int) -> Parallelism:
    return Parallelism(
        tp=each.place.tp, times=times, kv_tokens={1: kv_tokens}, prefill_residuals=each.prefill, decode_residuals=each.decode
    )


def _pool(share: float, model: Model, tp: int) -> int:
    """Tokens for which ranks have room, with so many bytes each. With more of them than KV heads some have the same ones."""
    return max(LEAST_TOKENS, int(share * min(tp, model.kv_heads) / model.kv_token_bytes) // BLOCK_SIZE * BLOCK_SIZE)


def _overheads(request: float, crossings: Mapping[str, Crossing]) -> Overheads:
    return Overheads(request=request, message=next(iter(crossings.values())).message)


def _basis(served: Basis, kv_tokens: Basis) -> dict[str, Basis]:
    fitted = dict.fromkeys(("prefill", "decode", "links"), Basis.FITTED)
    measured = dict.fromkeys(("overheads.message", "device.memory_bytes"), Basis.MEASURED)
    return (
        fitted
        | measured
        | dict.fromkeys(("overheads.request", "step", "step_row"), served)
        | {"kv_tokens": kv_tokens, "device.cost_per_hour": Basis.ASSUMED}
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
