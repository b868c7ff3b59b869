"""The ranks of a worker over gloo, which asks nobody who he is: so they ask each other."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
from diptych.core.proofs import STRANGER
from diptych.engine.parallel import SECRET, gloo
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
