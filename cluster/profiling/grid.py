"""What `diptych profile` times of a worker's engine, and on what its ranks compute. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ..process.spec import BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class Grid:
    """What is timed: batch and length of prompts, batch and tokens attended to of answers, and of answers beside a prompt's chunk."""

    prefills: tuple[tuple[int, int], ...]
    decodes: tuple[tuple[int, int], ...]
    both: tuple[tuple[int, int], ...]

    def steps(self, max_context: int) -> list[tuple[str, int, int]]:
        """Those that the model has positions for."""
        kinds = (("prefill", self.prefills), ("decode", self.decodes), ("both", self.both))
        return [(what, batch, length) for what, pairs in kinds for batch, length in pairs if length < max_context]


ON_CORES = Grid(
    prefills=((1, 16), (1, 32), (1, 64), (1, 128), (1, 256), (1, 512), (1, 1024), (2, 256), (4, 64), (4, 128), (8, 32)),
    decodes=(
        (1, 16), (1, 512), (1, 1024), (2, 256), (4, 16), (4, 512), (8, 16), (8, 256),
        (9, 256), (12, 16), (16, 16), (16, 256), (32, 16), (32, 128),
    ),
    both=((1, 256), (4, 256), (8, 256), (16, 256)),
)  # fmt: skip
ON_GPUS = Grid(
    prefills=((1, 64), (1, 128), (1, 256), (1, 512), (1, 1024), (1, 2048), (1, 4096), (1, 8192), (4, 256), (4, 1024), (16, 128)),
    decodes=(
        (1, 16), (1, 1024), (1, 8192), (4, 1024), (8, 16), (8, 4096), (16, 256), (16, 2048),
        (32, 16), (32, 1024), (64, 256), (64, 1024), (128, 256), (256, 16), (256, 256),
    ),
    both=((1, 1024), (16, 1024), (64, 256), (128, 256)),
)  # fmt: skip
"""Up to what a pool of some 100,000 tokens holds; what does not fit beside the weights is left out."""
CHUNK, CHUNK_START = 64, 128
"""Of the prompt beside answers: `decode.chunk_tokens` by default, behind so many."""
ROWS = (1, 8)
"""Answers at once of which it is measured what serving adds."""
AGAIN = (("prefill", 1, 256), *(("decode", rows, 16) for rows in ROWS))
"""What is timed again, to know how fast the machine is by then; all of it is in each grid."""


@dataclass(frozen=True, slots=True)
class Place:
    """What the ranks of a worker compute on, which has as many shards: each on some cores of this host, as many as the others, or on a GPU,
    as CUDA_VISIBLE_DEVICES names it."""

    cores: tuple[tuple[int, ...], ...] = ()
    gpus: tuple[str, ...] = ()

    @property
    def tp(self) -> int:
        return len(self.gpus or self.cores)

    @property
    def each(self) -> int:
        """Cores of a rank; 0 on a GPU."""
        return len(self.cores[0]) if self.cores else 0

    @property
    def grid(self) -> Grid:
        return ON_GPUS if self.gpus else ON_CORES

    def __str__(self) -> str:
        each = "GPU" if self.gpus else f"{self.each} core{'s' * (self.each > 1)}"
        if self.tp == 1:
            return "a GPU" if self.gpus else each
        return f"{self.tp} GPUs" if self.gpus else f"{self.tp} × {each}"


@dataclass(frozen=True, slots=True)
class Room:
    """Tokens of KV that a worker's pool holds: as many as the steps need, on GPUs as many as fit beside weights and all else."""

    tokens: int


@dataclass(frozen=True, slots=True)
class Step:
    """A step that was timed (`what`: prefill, decode or both): the median of its runs, in seconds."""

    what: str
    batch: int
    length: int
    seconds: float


def blocks_for(what: str, batch: int, length: int) -> int:
    """Of KV that a step takes."""
    return batch * -(-length // BLOCK_SIZE) + (-(-(CHUNK_START + CHUNK) // BLOCK_SIZE) if what == "both" else 0)
