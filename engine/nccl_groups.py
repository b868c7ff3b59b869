"""Groups of the model plane on GPUs. As `parallel.gloo`, over NCCL."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.distributed_c10d import Store

from .parallel import MakeGroup


def nccl(device: torch.device) -> MakeGroup:
    """Groups between the GPUs of a worker's ranks, each on one of its own. `RuntimeError` where torch was built without NCCL.

    A rank that dies is found by the worker's channels, in milliseconds; torch's monitor, which would end the process with its own words
    minutes later, is off, and so is the trace it keeps for that.
    """

    def make(store: Store, rank: int, size: int, timeout: timedelta) -> Any:
        if not torch.distributed.is_nccl_available():
            raise RuntimeError(f"this torch ({torch.__version__}) was built without NCCL")
        from torch._C._distributed_c10d import ProcessGroupNCCL

        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        options = ProcessGroupNCCL.Options()
        options._timeout = timeout
        group = ProcessGroupNCCL(store, rank, size, options)
        group.eager_connect_single_device(device)
        return group

    return make
