"""What `diptych profile` does: steps of the engine timed on this machine, and a latency model fitted to them."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ...core.errors import ConfigError
from ...core.model import Decoder, ModelCard
from ...core.sampling import SamplingParams
from ...engine.batch import Batch, Draw, Row
from ...engine.engine import Engine
from ...engine.prepared import PreparedModel, open_prepared
from ...engine.weights import TORCH_DTYPE
from ..planner.fitting import DecodePoint, PrefillPoint, fit_decode, fit_prefill
from ..planner.latency import StepTimes
from ..planner.profile import DeviceShare, Link, Model, Overheads, Parallelism, Profile, Residuals
from ..process.spec import BLOCK_SIZE
from ..resources.memory import available_bytes

PREFILLS = ((1, 16), (1, 64), (1, 128), (1, 256), (1, 512), (1, 1024), (2, 256), (4, 64), (4, 128), (8, 32))
"""Batch and length."""
DECODES = ((1, 16), (1, 512), (1, 1024), (2, 256), (4, 16), (4, 512), (8, 256), (16, 16), (16, 256), (32, 16), (32, 128))
"""Batch and tokens attended to."""
REQUEST_S, LATENCY_S, MESSAGE_S = 0.005, 0.0005, 0.0002
ASSUMED = (
    f"assumed, not measured: {1000 * REQUEST_S:g} ms of a request outside of steps, {1000 * LATENCY_S:g} ms until KV moves, "
    f"{1000 * MESSAGE_S:g} ms of a message"
)
"""What takes a router, a second worker and clients to measure; `diptych bench` shows the first as what TTFT has beside the step."""
POOR = 0.25
"""Residuals of an idle machine are below this share."""
GREEDY = SamplingParams(temperature=0.0)
_out = Console(highlight=False, soft_wrap=True)


class Timed:
    """An engine and blocks for the largest batch of the grids."""

    def __init__(self, model: PreparedModel, max_context: int) -> None:
        self.prefills = [(batch, length) for batch, length in PREFILLS if length < max_context]
        self.decodes = [(batch, context) for batch, context in DECODES if context < max_context]
        tokens = max(batch * (length + BLOCK_SIZE) for batch, length in (*self.prefills, *self.decodes))
        layout = model.card.layout(block_size=BLOCK_SIZE, kv_tokens=tokens)
        dtype = TORCH_DTYPE[model.card.dtype]
        shapes = [
            (group, (blocks, group.kv_heads, 2, BLOCK_SIZE, group.head_dim))
            for group, blocks in zip(layout.groups, layout.num_blocks, strict=True)
        ]
        self.caches = [[torch.zeros(shape, dtype=dtype) for _ in group.layers] for group, shape in shapes]
        self.engine = Engine(model, self.caches, block_size=BLOCK_SIZE, max_slots=max(batch for batch, _ in (*PREFILLS, *DECODES)))
        draw = random.Random(0)
        self._scattered = [draw.sample(range(blocks), blocks) for blocks in layout.num_blocks]
        self._ids = tuple(draw.randrange(3, model.card.vocab_size) for _ in range(max(length for _, length in PREFILLS)))
        self.engine.warm_up()

    def prefill(self, batch: int, length: int) -> None:
        self._run(batch, length, 0, self._ids[:length])

    def decode(self, batch: int, context: int) -> None:
        self._run(batch, context, context - 1, self._ids[:1])

    def _run(self, batch: int, length: int, start: int, ids: tuple[int, ...]) -> None:
        each = -(-length // BLOCK_SIZE)
        rows = tuple(
            Row(slot, start, ids, tuple(tuple(row[slot * each : (slot + 1) * each]) for row in self._scattered), (Draw(GREEDY, 0),))
            for slot in range(batch)
        )
        self.engine.run(Batch(0, rows))


def profile_here(model_dir: Path, *, threads: int | None, repeats: int, out: Path) -> Profile:
    """Measure, show how well the fit is, write. Times are medians of `repeats`."""
    if not out.parent.is_dir():
        raise ConfigError(f"{out} cannot be written: there is no directory {out.parent}.", field="out")
    torch.set_num_threads(threads or torch.get_num_threads())
    model = open_prepared(model_dir)
    timed = Timed(model, model.card.max_context)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=len(timed.prefills) + len(timed.decodes))

        def measured(what: str, run: Callable[[int, int], None], grid: Sequence[tuple[int, int]]) -> list[tuple[int, int, float]]:
            found = []
            for batch, length in grid:
                bar.update(task, description=f"{what} {batch} × {length}")
                found.append((batch, length, _median(lambda b=batch, n=length: run(b, n), repeats)))  # type: ignore[misc]
                bar.advance(task)
            return found

        prefills = [PrefillPoint(*point) for point in measured("prefill", timed.prefill, timed.prefills)]
        decodes = [DecodePoint(*point) for point in measured("decode", timed.decode, timed.decodes)]
    made = _profile(model, timed, prefills, decodes)
    out.write_text(made.model_dump_json(indent=1) + "\n", encoding="utf-8")
    _show(made, prefills, decodes)
    return made


def _median(run: Callable[[], None], repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _profile(model: PreparedModel, timed: Timed, prefills: list[PrefillPoint], decodes: list[DecodePoint]) -> Profile:
    card = model.card
    prefill, prefill_residuals = fit_prefill(prefills)
    decode, decode_residuals = fit_decode(decodes)
    memory = available_bytes()
    known = Parallelism(
        tp=1,
        times=StepTimes(prefill=prefill, decode=decode),
        kv_tokens={1: max(256, int(memory * 0.5 / model_of(card).kv_token_bytes) // 16 * 16)},
        prefill_residuals=prefill_residuals,
        decode_residuals=decode_residuals,
    )
    return Profile(
        source=f"measured on this machine, {torch.get_num_threads()} threads; {ASSUMED}",
        model=model_of(card),
        device=DeviceShare(name="cpu", memory_bytes=memory),
        parallelisms=(known,),
        links={"shm": Link(bytes_per_s=_copy_speed(timed), latency=LATENCY_S)},
        overheads=Overheads(request=REQUEST_S, message=MESSAGE_S),
    )


def model_of(card: ModelCard) -> Model:
    """The profile's words for a prepared model."""
    decoder = card.decoder
    windows = {window: decoder.windows.count(window) for window in set(decoder.windows)}
    groups = card.cache_groups()
    return Model(
        name=card.name,
        dtype=str(card.dtype),
        layers=decoder.layers,
        heads=decoder.heads if isinstance(decoder, Decoder) else 1,
        kv_heads=decoder.kv_heads if isinstance(decoder, Decoder) else 1,
        max_context=card.max_context,
        windows=windows if any(windows) else {},
        kv_token_bytes=sum(group.token_bytes * len(group.layers) for group in groups),
        weight_bytes=card.weights_bytes,
    )


def _copy_speed(timed: Timed) -> float:
    """Bytes per second of copying the blocks of one cache to another, as a destination copies from a source's pool."""
    source = timed.caches[0][0]
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return source.numel() * source.element_size() / _median(copy, 9)


def _show(made: Profile, prefills: list[PrefillPoint], decodes: list[DecodePoint]) -> None:
    known = made.parallelisms[0]
    table = Table("fitted", "constant", "per token", "per pair | per sequence", "residuals", box=None, pad_edge=False, header_style="bold")
    prefill, decode = known.times.prefill, known.times.decode
    table.add_row(
        f"prefill, {len(prefills)} points",
        f"{1e3 * prefill.constant:.2f} ms",
        f"{1e6 * prefill.token:.2f} µs",
        f"{1e9 * prefill.pair:.3f} ns",
        _fit(known.prefill_residuals),
    )
    table.add_row(
        f"decode, {len(decodes)} points",
        f"{1e3 * decode.constant:.2f} ms",
        f"{1e6 * decode.context:.3f} µs",
        f"{1e6 * decode.row:.1f} µs",
        _fit(known.decode_residuals),
    )
    _out.print(table)
    _out.print(ASSUMED, markup=False)
    worst = max(each.worst for each in (known.prefill_residuals, known.decode_residuals) if each is not None)
    if worst > POOR:
        _out.print(
            f"A fit that is off by {worst:.0%} somewhere is poor: was the machine busy with something else? Measure again when it is idle.",
            markup=False,
        )


def _fit(residuals: Residuals | None) -> str:
    return "" if residuals is None else f"mean {residuals.mean:.1%}, worst {residuals.worst:.1%}"
