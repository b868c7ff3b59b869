"""Launching a step on a GPU before the one before it is done.

The engine's thread asks for a step as soon as it is decided, and another thread waits for what was drawn, step by step. So the GPU goes
from one step to the next by itself, while the host takes the output of the one and decides the one after the other:

    loop             decide 2 ────────────────▶ decide 3 ───────────────▶ …
    engine thread    launch 1      launch 2 ◀──        launch 3 ◀──
    GPU              …  step 0 ──▶ step 1 ──────────▶ step 2 ──────────▶ …
    look-ahead       tokens of 0 ─▶     tokens of 1 ─▶      tokens of 2 ─▶
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ..core.recordings import Doing
from ..core.spans import span
from ..engine.batch import Batch, StepOutput
from .loop import OnLayer, Ran

Launch = Callable[[Batch, OnLayer | None], Callable[[], StepOutput]]
"""`engine.engine.Engine.launch`."""


class LookAhead:
    """`worker.loop.RunStep` over an engine that is launched. How far ahead follows from how many steps the loop has in flight: with
    `worker.loop.DEPTH` one computes and one waits behind it on the GPU."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._outputs = ThreadPoolExecutor(1, "engine-outputs")

    def run(self, batch: Batch, on_layer: OnLayer | None, ran: Ran) -> None:
        """A step whose layers somebody wants to know of is waited for: there is one event for each layer (`kv_transfer.pool`), and a step
        launched behind this one would have those who read its KV wait for its own."""
        waiting = self._outputs.submit(_take, self._launched(batch, on_layer), ran)
        if on_layer is not None:
            with span(Doing.UNDER_WAY, batch.step):
                waiting.result()

    def close(self) -> None:
        """When nothing more is launched; returns when all that was launched is done."""
        self._outputs.shutdown()

    def _launched(self, batch: Batch, on_layer: OnLayer | None) -> Callable[[], StepOutput]:
        try:
            return self._launch(batch, on_layer)
        except Exception as error:  # noqa: BLE001 - told in its turn, behind the outputs of the steps before it
            return _raising(error)


def _raising(error: Exception) -> Callable[[], StepOutput]:
    def output() -> StepOutput:
        raise error

    return output


def _take(output: Callable[[], StepOutput], ran: Ran) -> None:
    try:
        outcome: StepOutput | Exception = output()
    except Exception as error:  # noqa: BLE001 - any defect of the engine must end the step's attempts, not hang them
        outcome = error
    ran(outcome)
