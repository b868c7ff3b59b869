"""What a rank computes with: the model's weights that are its own, its pool, its engine, connected to the other ranks."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch.distributed.distributed_c10d import Store

from ..core.layout import DType, Layout
from ..core.model import ModelCard
from ..engine.engine import Engine
from ..engine.parallel import Parallel, connect, gloo
from ..engine.prepared import PreparedModel, open_prepared
from ..kernels.native import native
from ..kv_transfer.pool import Pool
from ..worker.leader import STEP_S
from .child import progress
from .identity import worker_layout
from .spec import BLOCK_SIZE, RankSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """`layout`: the worker's. `parallel`: None in a worker of one rank."""

    card: ModelCard
    layout: Layout
    pool: Pool
    engine: Engine
    parallel: Parallel | None

    def disconnect(self) -> None:
        """From the other ranks, when no step runs, and before the process ends: gloo's threads would abort it."""
        if self.parallel is not None:
            self.parallel.close()


def load(spec: RankSpec, host: str, store: Store | None) -> Loaded:
    """`store`: of the worker's ranks, which all do this at the same time; None if there is but one. Returns with the engine warm. Raises
    `DiptychError` if there is no memory, or no such model."""
    torch.set_num_threads(spec.threads)
    model = open_prepared(spec.model_dir)
    if model.card.slow_path:
        log.warning(model.card.slow_path)
    layout = worker_layout(spec, model.card)
    pool = Pool.allocate(layout.on(spec.rank).layout)
    progress("model mapped, pool allocated")
    if model.card.dtype is DType.BFLOAT16:  # compiled now if this host has not done so: 3 s
        progress("kernels loaded" if native() else "no C++ kernels, slower: see the log")
    parallel = None if store is None else connect(layout, spec.rank, store, gloo(host), timeout_s=STEP_S)
    try:
        engine = _warm(spec, model, pool, parallel)
    except BaseException:
        if parallel is not None:
            parallel.close()
        raise
    progress("warm")
    return Loaded(model.card, layout, pool, engine, parallel)


def _warm(spec: RankSpec, model: PreparedModel, pool: Pool, parallel: Parallel | None) -> Engine:
    engine = Engine(model, pool.caches, block_size=BLOCK_SIZE, max_slots=spec.max_running, parallel=parallel)
    engine.warm_up()
    return engine
