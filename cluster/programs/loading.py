"""What a rank computes with: the model's weights that are its own, its pool, its engine, connected to the other ranks."""

from __future__ import annotations

import gc
import logging
import os
from dataclasses import dataclass, replace

import torch
from torch.distributed.distributed_c10d import PrefixStore, Store

from ...core.errors import ConfigError
from ...core.layout import DType, Layout
from ...core.model import ModelCard
from ...engine.engine import Engine
from ...engine.nccl_groups import nccl
from ...engine.parallel import MakeGroup, Parallel, connect, gloo
from ...engine.prepared import PreparedModel, open_prepared
from ...kernels.native import native
from ...kernels.threads import by_thread_that_ends
from ...kv_transfer.pool import DTYPES, Pool
from ...worker.leader import STEP_S
from ..process.child import progress
from ..process.spec import BLOCK_SIZE, RankSpec
from ..resources.devices import NO_INT8_ON_GPU, VISIBLE, hindrance, visible_gpus
from ..resources.pool_size import blocks_here, say_size, smallest
from .graphs import capture, rehearse, shapes_of
from .identity import worker_layout

WARM_CONTEXT = 16384
"""On a GPU the first step attends to a context of so many tokens, if the model has them: a longer one takes more memory than was put aside
for it, from what `memory_fraction` leaves."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """`layout`: the worker's. `parallel`: None in a worker of one rank. `spare_blocks`: of each group's, the last ones, which are the
    engine's own. `flips`: how often the role was changed since the weights were loaded."""

    card: ModelCard
    layout: Layout
    pool: Pool
    engine: Engine
    parallel: Parallel | None
    spare_blocks: int
    flips: int = 0

    def disconnect(self) -> None:
        """From the other ranks, when no step runs, and before the process ends: gloo's threads would abort it."""
        if self.parallel is not None:
            self.parallel.close()


def load(spec: RankSpec, host: str, store: Store | None) -> Loaded:
    """`store`: of the worker's ranks, which all do this at the same time; None if there is but one. Returns with the engine warm. Raises
    `DiptychError` if there is no memory, no such model, or no such device."""
    torch.set_num_threads(spec.threads)
    device = _device(spec)
    model = open_prepared(spec.model_dir)
    if model.card.slow_path:
        log.warning(model.card.slow_path)
    layout = worker_layout(spec, model.card)
    progress("model mapped")
    if model.card.dtype is DType.BFLOAT16 and device.type == "cpu":  # compiled now if this host has not done so: 3 s
        progress("kernels loaded" if native() else "no C++ kernels, slower: see the log")
    parallel = None if store is None else connect(layout, spec.rank, store, _groups(device, host), timeout_s=STEP_S)
    try:
        engine = _warm(spec, model, layout, parallel, device)
        progress("warm")
        pool, layout, captured = _pool(spec, model.card, layout, engine, device, store)
    except BaseException:
        if parallel is not None:
            parallel.close()
        raise
    gc.freeze()  # what is there stays; a full search of it for garbage takes 112 ms, five decode steps, in which nobody has the interpreter
    progress("pool allocated")
    return Loaded(model.card, layout, pool, engine, parallel, int(captured))


def flipped(loaded: Loaded, spec: RankSpec, store: Store | None) -> Loaded:
    """The same weights and groups, for the role of `spec`: with a pool of its own, in place of that which `loaded` has, and which nobody
    uses any more. All ranks call it at the same time. Raises `ConfigError` if there is no memory for it."""
    device, layout, flips = loaded.pool.device, worker_layout(spec, loaded.card), loaded.flips + 1
    own = None if store is None else PrefixStore(f"flip{flips}", store)
    loaded.engine.hold(_least_caches(layout.on(spec.rank).layout, device))
    loaded.pool.close()
    gc.collect()  # the role that was holds what is left of its pool, in a circle
    _all_have_given_back(spec.rank, layout.ranks, own)
    pool, layout, captured = _pool(spec, loaded.card, layout, loaded.engine, device, own)
    gc.freeze()
    progress("pool allocated")
    return replace(loaded, layout=layout, pool=pool, spare_blocks=int(captured), flips=flips)


def _all_have_given_back(rank: int, ranks: int, store: Store | None) -> None:
    """Before anyone looks how much memory there is."""
    if store is not None:
        store.set(f"given back/{rank}", "")
        for other in range(ranks):
            store.get(f"given back/{other}")


def _pool(
    spec: RankSpec, card: ModelCard, layout: Layout, engine: Engine, device: torch.device, store: Store | None
) -> tuple[Pool, Layout, bool]:
    """The pool over which `engine` computes from now on, the layout with its blocks, and whether decode steps are captured over it."""
    shapes, graph_bytes = rehearse(engine, shapes_of(spec, card, layout, device), device)
    if spec.kv_tokens is None:
        layout = _sized(spec, card, layout, device, store, graph_bytes)
    pool = Pool.allocate(layout.on(spec.rank).layout, device)
    engine.hold(pool.caches, pool.stored)
    return pool, layout, capture(engine, shapes, device)


def _device(spec: RankSpec) -> torch.device:
    """The rank sees one GPU alone. Raises `ConfigError` if it is not there, or is to hold what its kernels cannot read."""
    if spec.device == "cpu":
        return torch.device("cpu")
    if spec.kv_dtype is DType.INT8:
        raise ConfigError(NO_INT8_ON_GPU, field="kv_dtype")
    there = visible_gpus()
    why = hindrance(there, torch.version.cuda) if there and torch.version.cuda else None
    if why is None and not torch.cuda.is_available():
        why = "torch is a CPU build" if torch.version.cuda is None else "torch finds no GPU there"
    if why is not None:
        gpu = spec.gpu or os.environ.get(VISIBLE) or "of its own"
        raise ConfigError(f"{spec.worker_id} is to compute on GPU {gpu}, but {why} ({torch.__version__}).", field="device")
    return torch.device("cuda", 0)


def _groups(device: torch.device, host: str) -> MakeGroup:
    return gloo(host) if device.type == "cpu" else nccl


def _warm(spec: RankSpec, model: PreparedModel, layout: Layout, parallel: Parallel | None, device: torch.device) -> Engine:
    """The engine, with a pool of one block, which is all that a first step needs."""
    small = _least_caches(layout.on(spec.rank).layout, device)
    engine = Engine(model, small, block_size=BLOCK_SIZE, max_slots=spec.max_running, parallel=parallel, device=device)
    if device.type == "cpu":
        by_thread_that_ends(engine.warm_up)
    else:  # what the largest steps take of its memory is not there for the pool
        context = min(model.card.max_context - 1, WARM_CONTEXT)
        engine.warm_up(tokens=min(spec.chunk_tokens, context), context=context, rows=spec.max_running)
    return engine


def _least_caches(own: Layout, device: torch.device) -> list[list[torch.Tensor]]:
    """Of one block, on this rank."""
    shapes = [(group, (1, group.kv_heads, 2, own.block_size, group.width)) for group in own.groups]
    return [[torch.zeros(shape, dtype=DTYPES[group.dtype], device=device) for _ in group.layers] for group, shape in shapes]


def _sized(spec: RankSpec, card: ModelCard, layout: Layout, device: torch.device, store: Store | None, graph_bytes: int) -> Layout:
    """The layout with as many blocks as the rank with the least memory can hold."""
    own = blocks_here(card, spec, layout.on(spec.rank).layout, device, graph_bytes)
    blocks, decided = smallest(own, spec.rank, layout.ranks, store)
    say_size(spec, blocks, decided, layout.ranks)
    return replace(layout, num_blocks=(blocks,) * len(layout.groups))
