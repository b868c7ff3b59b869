"""One of two ranks of a model plane, that do what tensor parallelism does: `python reducing_peer.py RANK STORE DEVICE`.

They add up activations over and over until stdin ends, then print how often, as JSON. A wrong sum ends the process.
"""

from __future__ import annotations

import json
import sys
import threading
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import FileStore, ProcessGroupGloo  # type: ignore[attr-defined]  # torch says so at run time only

WIDTH = 1 << 16
"""Numbers of one all-reduce: 64 tokens of a hidden size of 1024."""
TIMEOUT = timedelta(seconds=60)


def group(rank: int, store: FileStore, device: torch.device) -> Any:
    if device.type == "cpu":
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs lack it
        options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1", lazy_init=False)]
        options._timeout = TIMEOUT
        return ProcessGroupGloo(store, rank, 2, options)
    from torch.distributed import ProcessGroupNCCL  # type: ignore[attr-defined]

    return ProcessGroupNCCL(store, rank, 2, TIMEOUT)


def main() -> None:
    rank, device = int(sys.argv[1]), torch.device(sys.argv[3])
    torch.set_num_threads(1)
    ranks = group(rank, FileStore(sys.argv[2], 2), device)
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    rounds = 0
    go_on = True
    while go_on:
        # The last element says whether this rank goes on, so that both end with the same round.
        activations = torch.full((WIDTH,), float(rank + 1 + rounds % 100), device=device)
        activations[-1] = float(not over.is_set())
        ranks.allreduce([activations]).wait()
        assert bool((activations[:-1] == 3 + 2 * (rounds % 100)).all()), f"the sum of round {rounds} is wrong"
        go_on = activations[-1].item() == 2
        rounds += 1
        if rounds == 1:
            print(json.dumps({"reducing": True}), flush=True)
    print(json.dumps({"rounds": rounds}), flush=True)


if __name__ == "__main__":
    main()
