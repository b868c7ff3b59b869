"""A rank's engine on its own cores, and on those that others of its host lend."""

from __future__ import annotations

import logging
import os
import time
from array import array
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from ...core.fleet import Phase
from ...kernels import threads
from ...kernels.native import native
from ...worker.lending import CoreTable, Lending
from ...worker.patience import Patience

PAUSE_S = 50e-6

log = logging.getLogger(__name__)


def lending(path: Path, phase: Phase, own: Sequence[int]) -> Lending | None:
    """By the table at `path`; the kernels compute with as many threads as there are cores then. None where there is no such table."""
    try:
        with path.open("r+b") as file:
            table = CoreTable(file.fileno(), os.fstat(file.fileno()).st_size // CoreTable.size(1))
    except (OSError, ValueError) as error:
        log.warning("No cores are lent here: %s", error)
        return None
    patience = Patience(phase)
    found = Lending(table, own, os.getpid(), patience=patience, use=compute_on, now=time.monotonic_ns, pause=_pause, lives=_lives)
    threads.ask(found.look)
    return found


def _pause() -> None:
    """No event tells that another process' product has ended; it takes some tenths of a millisecond, and this is for at most a few."""
    time.sleep(PAUSE_S)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def compute_on(cores: Sequence[int]) -> None:
    """One thread on each of `cores`, the calling one on the first. Where the host does not allow that, threads run where it puts them."""
    log.debug("computing on %s", cores)
    torch.set_num_threads(len(cores))
    if (kernels := native()) is None:
        try:
            os.sched_setaffinity(0, cores)
        except OSError:
            _not_bound(*cores)
        return
    table = array("q", cores)
    kernels.bind(table.buffer_info()[0], len(table))
    if -1 in table:
        _not_bound(*(core for core, bound in zip(cores, table, strict=True) if bound < 0))


@cache
def _not_bound(*cores: int) -> None:
    """Once for the same cores: they are lent and taken back many times a second."""
    log.warning("No thread can be bound to core %s: products run on other cores, beside others' work", ", ".join(map(str, cores)))
