"""Groups of the model plane on GPUs. As `parallel.gloo`, over NCCL.

They connect at their first call, in the worker's first step: a group's own communicator for what all its ranks add up, and one for each
pair that sends, with a stream of its own. A group that torch connects at once (`eager_connect_single_device`) has one communicator and one
stream for all: what a stage receives would then stand behind what it has sent, until that is taken.

Of the store torch asks `set` and `get`, for the ids of the communicators.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.distributed_c10d import Store

UNWANTED = ("TORCH_NCCL_ENABLE_MONITORING", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_BUFFER_SIZE")
"""Of torch's settings by environment variable, read when a process makes its first group."""


def nccl(store: Store, rank: int, size: int, timeout: timedelta) -> Any:
    """`parallel.MakeGroup` between the GPUs of a worker's ranks, each on one of its own. `RuntimeError` where torch was built without NCCL.

    A rank that dies is found by the worker's channels, in milliseconds; torch's monitor, which would end the process with its own words
    minutes later, is off, and so are the trace that it keeps for that, two entries a layer and step, and its asking the store once a second
    whether another rank wants it written.
    """
    if not torch.distributed.is_nccl_available():
        raise RuntimeError(f"this torch ({torch.__version__}) was built without NCCL")
    from torch._C._distributed_c10d import ProcessGroupNCCL

    for name in UNWANTED:
        os.environ.setdefault(name, "0")
    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    return ProcessGroupNCCL(store, rank, size, options)
