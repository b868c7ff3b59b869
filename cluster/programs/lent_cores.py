"""A rank's engine on its own cores, and on those that others of its host lend."""

from __future__ import annotations

import logging
import os
import time
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch

from ...core.fleet import Phase
from ...kernels import threads
from ...kernels.native import native
from ...worker.lending import REST_NS, CoreTable, Lending

log = logging.getLogger(__name__)


def lending(path: Path, phase: Phase, own: Sequence[int]) -> Lending | None:
    """By the table at `path`; the kernels compute with as many threads as there are cores then. None where there is no such table."""
    try:
        with path.open("r+b") as file:
            table = CoreTable(file.fileno(), os.fstat(file.fileno()).st_size // CoreTable.size(1))
    except (OSError, ValueError) as error:
        log.warning("No cores are lent here: %s", error)
        return None
    found = Lending(table, own, rest_ns=REST_NS[phase], use=compute_on, now=time.monotonic_ns)
    threads.ask(found.look)
    return found


def compute_on(cores: Sequence[int]) -> None:
    """One thread on each of `cores`, the calling one on the first."""
    log.debug("computing on %s", cores)
    torch.set_num_threads(len(cores))
    if (kernels := native()) is None:
        os.sched_setaffinity(0, cores)
    else:
        table = array("q", cores)
        kernels.bind(table.buffer_info()[0], len(table))
