"""The ranks of one worker, and what they say to each other while they compute a step.

Rank `stage * tp + shard`. The shards of a stage add up their parts of every product that closes a layer, and of the embedding
(all-reduce); those of the last stage bring their logits together at its shard 0, which draws: what then crosses to the leader is a few
tokens, and not 0.5 MB a draw (262,144 ids in bf16). Shard s of a stage sends its activations to shard s of the next, without waiting
until they are taken, so that as many steps may be in flight as there are stages.

The groups stand alone: torch's default group and its environment variables are not touched.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroupGloo
from torch.distributed.distributed_c10d import GatherOptions, PrefixStore, Store

from ..core.errors import Unavailable
from ..core.layout import Layout
from ..core.proofs import PROOF_BYTES, SECRET_BYTES, STRANGER, proof, proves

MakeGroup = Callable[[Store, int, int, timedelta], Any]
"""A stand-alone process group of `torch.distributed` from (store, rank, size, timeout). `gloo(host)` is one; NCCL's takes the same four."""
ACTIVATIONS = 0
"""The tag of what stages send: one queue for each pair of ranks, in the order of the steps."""
PARTS = 0
"""The tag of the parts that shards add up; their group is another."""
SECRET = "secret"
"""Where the ranks of a group find what each shows the others."""
EXCHANGED = 256 << 10
"""Bytes up to which parts are sent to all: 4 KiB between two shards take 0.17 ms, gloo's all-reduce 0.48 (medians, loopback); between
four 1.7 and 6.3. From 1 MiB on its ring is three times as fast."""


class Parallel:
    """One rank of a worker. Once a call has raised `Unavailable` the ranks are out of step, and the worker is lost."""

    def __init__(
        self, layout: Layout, rank: int = 0, *, tensor: Any = None, pipeline: Any = None, timeout: timedelta = timedelta()
    ) -> None:
        """`tensor`: the group of the stage's shards; `pipeline`: that of the shard's stages; None where it would be one rank's. `timeout`:
        for how long the others may keep a call waiting, on a CPU."""
        self.rank, self.tp = rank, layout.tp
        self.stage, self.shard = divmod(rank, layout.tp)
        self.layers = layout.stage(self.stage)
        self.groups = layout.on(rank).layout.groups
        self.first, self.last = self.stage == 0, self.stage == layout.pp - 1
        self._stages = layout.pp
        self._tensor, self._pipeline, self._timeout = tensor, pipeline, timeout
        self._sent: deque[tuple[Any, Tensor]] = deque()

    def sum(self, part: Tensor) -> Tensor:
        """The sum of the shards' parts, the same to the bit at each of them. May overwrite `part`."""
        if self._tensor is None:
            return part
        with self._told("add up", self._shards()):
            if part.is_cpu and part.nbytes <= EXCHANGED:
                return self._exchange(part)
            self._await(self._tensor.allreduce([part]), part)
        return part

    def _exchange(self, part: Tensor) -> Tensor:
        """The sum of the parts, each sent to all and added in the order of the shards."""
        parts = [part if shard == self.shard else torch.empty_like(part) for shard in range(self.tp)]
        others = [shard for shard in range(self.tp) if shard != self.shard]
        works = [self._tensor.recv([parts[other]], other, PARTS) for other in others]
        works += [self._tensor.send([part], other, PARTS) for other in others]
        for work in works:
            work.wait(self._timeout)
        return sum(parts[1:], parts[0])

    def gather(self, part: Tensor, widths: Sequence[int]) -> Tensor | None:
        """The shards' parts [rows, widths[shard]] side by side, at shard 0; None elsewhere."""
        if self._tensor is None:
            return part
        sent = F.pad(part, (0, max(widths) - part.shape[1])).contiguous()  # a group's parts are of one size
        parts = [torch.empty_like(sent) for _ in widths] if self.shard == 0 else []
        with self._told("gather", self._shards()):
            self._await(self._tensor.gather([parts] if parts else [], [sent], GatherOptions()), sent)
        return torch.cat([each[:, :width] for each, width in zip(parts, widths, strict=True)], 1) if parts else None

    def send(self, x: Tensor) -> None:
        """Send activations to the next stage. Waits only if as many as there are stages have not been taken."""
        with self._told("send", [self.rank + self.tp]):
            if len(self._sent) == self._stages:
                self._await(*self._sent.popleft())
            self._sent.append((self._pipeline.send([x], self.stage + 1, ACTIVATIONS), x))

    def receive(self, tokens: int, hidden: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The activations [tokens, hidden] of the stage before."""
        x = torch.empty(tokens, hidden, dtype=dtype, device=device)
        with self._told("receive", [self.rank - self.tp]):
            self._await(self._pipeline.recv([x], self.stage - 1, ACTIVATIONS), x)
        return x

    def close(self) -> None:
        """End the connections; the other ranks notice in their next call, or in the one they wait in. Call it before the process ends:
        gloo's threads would abort it."""
        self._sent.clear()
        self._tensor = self._pipeline = None

    def _await(self, work: Any, tensor: Tensor) -> None:
        """Until `tensor` is there, or taken. On a GPU the stream waits, and this host goes on: given a time limit torch would keep it until
        the work is done, twice a layer, and no graph could be captured. A rank that is lost there the worker's channels tell of."""
        if tensor.is_cpu:
            work.wait(self._timeout)
        else:
            work.wait()

    def _shards(self) -> list[int]:
        return [self.stage * self.tp + shard for shard in range(self.tp) if shard != self.shard]

    @contextmanager
    def _told(self, what: str, others: list[int]) -> Iterator[None]:
        """Errors of the group as one that says which ranks it is about."""
        try:
            yield
        except RuntimeError as error:
            ranks = f"rank{'s' * (len(others) > 1)} {', '.join(map(str, others))}"
            raise Unavailable(f"Rank {self.rank} lost {ranks} of its worker ({what}): {error}") from error


def connect(layout: Layout, rank: int, store: Store, make: MakeGroup, *, timeout_s: float) -> Parallel:
    """Rank `rank` of a worker with this layout, connected to the others. All ranks call it with the same store, which only this worker
    uses; returns when the ranks it talks to have done so (over NCCL: in the first step). `Unavailable` names the rank that found nobody."""
    stage, shard = divmod(rank, layout.tp)
    timeout = timedelta(seconds=timeout_s)
    try:
        tensor = make(PrefixStore(f"stage{stage}", store), shard, layout.tp, timeout) if layout.tp > 1 else None
        pipeline = make(PrefixStore(f"shard{shard}", store), stage, layout.pp, timeout) if layout.pp > 1 else None
    except RuntimeError as error:
        raise Unavailable(f"Rank {rank} of {layout.ranks} could not connect to the others of its worker: {error}") from error
    return Parallel(layout, rank, tensor=tensor, pipeline=pipeline, timeout=timeout)


def gloo(host: str) -> MakeGroup:
    """Groups over TCP, on ports that the kernel chooses, on the interface that has `host`. `RuntimeError` if none has, and of a group into
    which somebody has come who does not know what was said in the store: gloo asks nobody."""
    device = ProcessGroupGloo.create_device(hostname=host, lazy_init=False)

    def make(store: Store, rank: int, size: int, timeout: timedelta) -> ProcessGroupGloo:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs lack it
        options._devices, options._timeout, options._threads = [device], timeout, 1
        group = ProcessGroupGloo(store, rank, size, options)
        _prove(group, store, rank, size)
        return group

    return make


def _prove(group: Any, store: Store, rank: int, size: int) -> None:
    if rank == 0:
        store.set(SECRET, secrets.token_hex(SECRET_BYTES))
    secret, others = bytes.fromhex(store.get(SECRET).decode()), [other for other in range(size) if other != rank]
    heard = {other: torch.empty(PROOF_BYTES, dtype=torch.uint8) for other in others}
    works = [group.recv([heard[other]], other, PARTS) for other in others]
    shown = [torch.frombuffer(bytearray(proof(secret, rank, other)), dtype=torch.uint8) for other in others]
    works += [group.send([part], other, PARTS) for other, part in zip(others, shown, strict=True)]
    for work in works:
        work.wait()
    if not all(proves(bytes(heard[other].tolist()), secret, other, rank) for other in others):
        raise RuntimeError(STRANGER)
