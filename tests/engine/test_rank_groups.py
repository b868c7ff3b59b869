"""The ranks of a worker over gloo, which asks nobody who he is: so they ask each other."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
from decoders import GEMMA, card
from diptych.core.layout import DType
from diptych.core.proofs import STRANGER
from diptych.engine.parallel import EXCHANGED, SECRET, Parallel, gloo
from torch.distributed import HashStore
from torch.distributed.distributed_c10d import Store

WAIT = timedelta(seconds=20)


class Overheard(Store):
    """All that is said in a store but the secret, of which it has another."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store

    def set(self, key: str, value: str | bytes) -> None:
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        return b"00" * 32 if key == SECRET else self._store.get(key)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._store.wait(keys, WAIT)

    def has_extended_api(self) -> bool:
        return False


def made(stores: list[Store]) -> list[Any]:
    """What each rank gets: its group, or the error."""
    with ThreadPoolExecutor(len(stores)) as threads:
        make = gloo("127.0.0.1")
        found: list[Future[Any]] = [threads.submit(make, store, rank, len(stores), WAIT) for rank, store in enumerate(stores)]
        return [each.exception(40) or each.result() for each in found]


def test_ranks_of_one_store_are_a_group() -> None:
    store = HashStore()
    groups = made([store, store, store])
    parts = [torch.full((2,), float(rank)) for rank in range(3)]
    works = [group.allreduce([part]) for group, part in zip(groups, parts, strict=True)]
    for work in works:
        work.wait()
    assert [part.tolist() for part in parts] == [[3.0, 3.0]] * 3


@pytest.mark.parametrize("stranger", [0, 1])
def test_who_has_not_heard_what_was_said_between_them_is_no_rank(stranger: int) -> None:
    store = HashStore()
    found = made([Overheard(store) if rank == stranger else store for rank in range(2)])
    assert [str(each) for each in found] == [STRANGER] * 2


class Noting:
    """A group, and what it was asked for: `waits` are the time limits."""

    def __init__(self) -> None:
        self.waits: list[tuple[object, ...]] = []

    def wait(self, *limit: object) -> None:
        self.waits.append(limit)

    def allreduce(self, *_: object) -> Noting:
        return self

    gather = send = recv = allreduce


@pytest.mark.parametrize(("device", "limit"), [("cpu", (WAIT,)), ("meta", ())])
def test_only_on_a_cpu_does_the_host_wait_for_other_ranks(device: str, limit: tuple[object, ...]) -> None:
    """Asked to wait for so long torch's NCCL keeps the host, twice a layer; asked to wait it keeps the stream alone."""
    layout = card(GEMMA, DType.FLOAT32, 500).layout(block_size=16, kv_tokens=16, tp=2, stages=(1, 1))
    group = Noting()
    part = torch.zeros(EXCHANGED, 2, device=device)
    first, last = (Parallel(layout, rank, tensor=group, pipeline=group, timeout=WAIT) for rank in (0, 2))
    for _ in range(3):  # two stages: the third waits for the first
        first.send(first.sum(part))
    last.receive(1, 2, torch.float32, torch.device(device))
    last.gather(part, (2, 2))
    assert group.waits == [limit] * 6
