"""One rank of a worker as a process. Commands are pickled tuples on stdin, each answered on stdout; it ends at the end of stdin."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from diptych.core.errors import DiptychError, to_wire
from diptych.engine.engine import Engine
from diptych.engine.parallel import Parallel, connect, gloo
from diptych.engine.prepared import open_prepared
from diptych.engine.step_codec import decode_batch, encode_output
from diptych.engine.weights import TORCH_DTYPE
from torch.distributed import FileStore

BLOCK = 16


class Rank:
    def __init__(
        self, directory: Path, *, tp: int, stages: tuple[int, ...], rank: int, store: Path, kv_tokens: int, timeout_s: float
    ) -> None:
        model = open_prepared(directory)
        layout = model.card.layout(block_size=BLOCK, kv_tokens=kv_tokens, tp=tp, stages=stages)
        own = layout.on(rank).layout
        dtype = TORCH_DTYPE[model.card.dtype]
        self.caches = [
            [torch.zeros(count, group.kv_heads, 2, BLOCK, group.head_dim, dtype=dtype) for _ in group.layers]
            for group, count in zip(own.groups, own.num_blocks, strict=True)
        ]
        self.parallel: Parallel = connect(layout, rank, FileStore(str(store), layout.ranks), gloo("127.0.0.1"), timeout_s=timeout_s)
        self.engine = Engine(model, self.caches, block_size=BLOCK, max_slots=8, parallel=self.parallel)

    def run(self, data: bytes) -> tuple[bytes, list[int], Any]:
        """Output, the layers `on_layer` was called for, and the logits."""
        layers: list[int] = []
        compute, logits = self.engine._decoder.logits, []
        self.engine._decoder.logits = lambda *inputs: logits.append(compute(*inputs)) or logits[0]
        try:
            output = self.engine.run(decode_batch(data), layers.append)
        finally:
            self.engine._decoder.logits = compute
        return encode_output(output), layers, None if logits[0] is None else logits[0].float().numpy()

    def warm_up(self) -> None:
        self.engine.warm_up()

    def stored(self) -> list[list[Any]]:
        return [[cache.float().numpy() for cache in group] for group in self.caches]

    def close(self) -> None:
        self.parallel.close()


def main() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # gloo prints
    rank: Rank | None = None
    while True:
        try:
            command, arguments, named = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        try:
            if command == "connect":
                rank = Rank(*arguments, **named)
                answer = None
            else:
                answer = getattr(rank, command)(*arguments, **named)
        except DiptychError as error:
            answer = to_wire(error)
        pickle.dump(answer, answers)
        answers.flush()
    if rank is not None:
        rank.close()


main()
