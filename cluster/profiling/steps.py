"""Steps of a worker's engine, timed alone: its ranks are processes of their own, which load what they compute with as production's do, and
keep to the cores or to the GPU they are given."""

from __future__ import annotations

import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path

from torch.distributed import FileStore  # type: ignore[attr-defined]  # torch says so at run time only

from ...core.errors import DiptychError, Unavailable
from ...core.fleet import Phase
from ...core.sampling import SamplingParams
from ...core.transfer import Transport
from ...engine.batch import Batch, Draw, Row
from ..planner.policies import Policies
from ..process.spec import BLOCK_SIZE, RankSpec
from ..programs.lent_cores import compute_on
from ..programs.loading import Loaded, load
from ..programs.rank import take_device
from ..resources.devices import GPU_FRACTION
from .grid import CHUNK, CHUNK_START, Place, Room, Step, blocks_for

HOST = "127.0.0.1"
AHEAD = 8
"""Steps in a row, each launched behind the one that computes, of which a GPU's is the mean."""
SILENT_S = 1800.0
"""Longest time from one word of the ranks to the next, which is that in which they load: a large model from a slow disk."""
GREEDY = SamplingParams(temperature=0.0)


def timed_steps(model_dir: Path, place: Place, repeats: int, steps: Sequence[tuple[str, int, int]]) -> Iterator[Room | Step]:
    """The pool's room, then each of `steps` that it holds as it has been timed; without any, the room is that of a worker with the settings
    of a config that names none. Raises what keeps a rank from loading, as `DiptychError`; `Unavailable` if one ends before all is timed,
    or all are silent."""
    context = multiprocessing.get_context("spawn")
    children, ears = [], []
    with tempfile.TemporaryDirectory(prefix="diptych-profile-") as scratch:
        for rank in range(place.tp):
            ear, mouth = context.Pipe(duplex=False)
            spec = _spec(model_dir, place, rank, steps)
            child = context.Process(target=_rank, args=(mouth, spec, place, Path(scratch, "store"), repeats, tuple(steps)), daemon=True)
            child.start()
            mouth.close()
            children.append(child)
            ears.append(ear)
        try:
            yield from _told(ears, SILENT_S)
        except EOFError:
            raise Unavailable(f"A process that timed steps on {place} ended before it was through.") from None
        finally:
            for child in children:
                child.kill()  # if it has not ended
                child.join()


def _told(ears: list[Connection], silent_s: float) -> Iterator[Room | Step]:
    """What the ranks say, until each has said that it is through."""
    while ears:
        if not (speaking := wait(ears, silent_s)):
            raise Unavailable(f"The processes that time steps have said nothing for {silent_s:g} s.")
        for ear in speaking:
            assert isinstance(ear, Connection)
            told = ear.recv()
            if isinstance(told, DiptychError):
                raise told
            if told is None:
                ears.remove(ear)
            else:
                yield told


def _spec(model_dir: Path, place: Place, rank: int, steps: Sequence[tuple[str, int, int]]) -> RankSpec:
    """A decode worker's rank, so that on a GPU its steps are captured where they can be."""
    on_gpu = bool(place.gpus)
    where = (
        {"device": "cuda", "gpu": place.gpus[rank], "memory_fraction": GPU_FRACTION, "transports": (Transport.NCCL, Transport.CUDA_IPC)}
        if on_gpu
        else {"threads": place.each, "kv_tokens": BLOCK_SIZE * max(blocks_for(*step) for step in steps)}
    )
    usual = Policies()
    longest = max((batch * length for what, batch, length in steps if what == "prefill"), default=usual.chunk_tokens)
    most = max((1 + batch for _, batch, _ in steps), default=usual.decode_running)
    return RankSpec.model_validate(
        {"worker_id": "profile", "phase": Phase.DECODE, "model_dir": model_dir, "rank": rank, "tp": place.tp}
        | {"chunk_tokens": longest, "max_running": most}
        | where
    )


def _rank(pipe: Connection, spec: RankSpec, place: Place, store: Path, repeats: int, steps: Sequence[tuple[str, int, int]]) -> None:
    """One of the processes. All make the same steps; the first says how long they took."""
    _be_quiet()
    say = pipe.send if spec.rank == 0 else lambda told: None
    try:
        take_device(spec)
        loaded = load(spec, HOST, FileStore(str(store), place.tp) if place.tp > 1 else None)
        if place.cores:
            compute_on(place.cores[spec.rank])
        timed = _Timed(loaded, ahead=AHEAD if place.gpus and place.tp == 1 else 1)
        say(Room(timed.blocks * BLOCK_SIZE))
        for what, batch, length in steps:
            if blocks_for(what, batch, length) <= timed.blocks:
                say(Step(what, batch, length, timed.seconds(what, batch, length, repeats)))
        loaded.disconnect()
        pipe.send(None)
    except DiptychError as error:
        pipe.send(error)
    except Exception as error:  # noqa: BLE001  of the device, whose words the other ranks and whoever measures should hear
        pipe.send(Unavailable(f"Rank {spec.rank} on {place} could not go on ({type(error).__name__}): {error}"))


def _be_quiet() -> None:
    """A rank tells its supervisor how far it is, and gloo who is connected: here nobody asks."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    os.dup2(sys.stdout.fileno(), 1)


class _Timed:
    """An engine, and its pool's blocks in an order that no two neighbours of a table have. `ahead`: answers' steps in a row, each launched
    behind the one that computes; a worker of several ranks does not."""

    def __init__(self, loaded: Loaded, *, ahead: int) -> None:
        self._engine, self._ahead, self._vocabulary, self._draw = loaded.engine, ahead, loaded.card.vocab_size, random.Random(0)
        counts = [blocks - loaded.spare_blocks for blocks in loaded.layout.num_blocks]
        self.blocks = min(counts)
        self._scattered = [self._draw.sample(range(count), count) for count in counts]

    def seconds(self, what: str, batch: int, length: int, repeats: int) -> float:
        """The median of so many runs."""
        made = {"prefill": self._prefill, "decode": self._decode, "both": self._both}[what](batch, length)
        run = partial(self._run, made, 1 if what == "prefill" else self._ahead)
        run()
        return statistics.median(run() for _ in range(repeats))

    def _run(self, batch: Batch, count: int) -> float:
        began = time.perf_counter()
        output = self._engine.launch(batch)
        for _ in range(count - 1):
            behind = self._engine.launch(batch)
            output()
            output = behind
        output()
        return (time.perf_counter() - began) / count

    def _prefill(self, batch: int, length: int) -> Batch:
        return Batch(0, self._rows(batch, length, 0, self._ids(length)))

    def _decode(self, batch: int, context: int) -> Batch:
        return Batch(0, self._rows(batch, context, context - 1, self._ids(1)))

    def _both(self, batch: int, context: int) -> Batch:
        chunk = Row(batch, CHUNK_START, self._ids(CHUNK), self._tables(batch, context, CHUNK_START + CHUNK))
        return Batch(0, (*self._rows(batch, context, context - 1, self._ids(1)), chunk))

    def _ids(self, count: int) -> tuple[int, ...]:
        return tuple(self._draw.randrange(3, self._vocabulary) for _ in range(count))

    def _rows(self, batch: int, length: int, start: int, ids: tuple[int, ...]) -> tuple[Row, ...]:
        return tuple(Row(slot, start, ids, self._tables(slot, length, length), (Draw(GREEDY, 0),)) for slot in range(batch))

    def _tables(self, slot: int, before: int, tokens: int) -> tuple[tuple[int, ...], ...]:
        """Blocks for so many tokens, behind those of `slot` sequences of `before`."""
        first, count = slot * -(-before // BLOCK_SIZE), -(-tokens // BLOCK_SIZE)
        return tuple(tuple(group[first : first + count]) for group in self._scattered)
