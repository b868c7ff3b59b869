"""What is known of a model on a device: the file that `diptych profile` writes, or a person. Versioned JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ...core.errors import ConfigError
from ...core.fleet import Phase
from ...core.quantization import Quantization, precision
from .latency import StepTimes

CPU = "cpu"
"""What `diptych profile` calls a host without GPUs."""
SHARE_OF_MEMORY = 0.9
"""Of a device's memory, for weights and KV, where a profile does not say how many tokens fit."""


Slower = Annotated[float, Field(ge=1)]
_PRECISIONS = {precision(dtype, each): (dtype, each) for dtype in ("bfloat16", "float16", "float32") for each in Quantization}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Model(_Part):
    """`kv_token_bytes`: of one token over all layers; `weight_bytes`: of all weights. `windows`: how many layers attend to so many
    positions (0: to all); empty if all attend to all. `dtype`: of weights and KV, and with ", int8 weights" (int4) behind it if weights are
    quantised. `source`: where `diptych up` finds it."""

    name: str
    source: str | None = None
    dtype: str
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    max_context: int = Field(ge=2)
    windows: dict[int, int] = {}
    kv_token_bytes: float = Field(gt=0)
    weight_bytes: float = Field(gt=0)

    @field_validator("dtype")
    @classmethod
    def _known(cls, dtype: str) -> str:
        if dtype not in _PRECISIONS:
            raise ValueError(f"{dtype!r} is none of {', '.join(each for each in _PRECISIONS if ',' not in each)}")
        return dtype

    @property
    def stored(self) -> tuple[str, Quantization]:
        """The config's words for `dtype`: what is computed with, and what weights are stored as."""
        return _PRECISIONS[self.dtype]


class DeviceShare(_Part):
    """One device of a worker. `memory_bytes`: of which SHARE_OF_MEMORY can be filled."""

    name: str
    memory_bytes: float = Field(gt=0)
    cost_per_hour: float = Field(1.0, gt=0, description="In any currency; plans are compared by it.")


class Residuals(_Part):
    """How far the fitted times are from the measured ones, as shares of these."""

    points: int = Field(ge=1)
    mean: float = Field(ge=0)
    worst: float = Field(ge=0)


class Parallelism(_Part):
    """Times of workers with so many shards; `kv_tokens` by number of stages, where it was measured. `error`: of times that were not
    measured but derived, the share by which they may be off. `by_cores`: of a rank that computes on so many cores of a host;
    `decode_by_cores`: of a decode worker's, which may read prompts too, if they are others."""

    tp: int = Field(ge=1)
    times: StepTimes
    by_cores: dict[int, StepTimes] = {}
    decode_by_cores: dict[int, StepTimes] = {}
    kv_tokens: dict[int, int] = {}
    prefill_residuals: Residuals | None = None
    decode_residuals: Residuals | None = None
    error: float = Field(0.0, ge=0)

    def on_cores(self, cores: int, phase: Phase | None = None) -> StepTimes:
        """Of a rank with so many, of a worker of that phase: those of the most measured that are not more, or of the fewest. `times` where
        none were."""
        known = self.decode_by_cores if phase is Phase.DECODE and self.decode_by_cores else self.by_cores
        return known[max((count for count in known if count <= cores), default=min(known))] if known else self.times


class Link(_Part):
    """A way for KV to move between two workers. `overlap`: layers cross while the next ones are computed."""

    bytes_per_s: float = Field(gt=0, description="Of one pair of ranks.")
    latency: float = Field(0.0, ge=0, description="Seconds before the first byte of a transfer.")
    overlap: bool = True


class Overheads(_Part):
    """Seconds that no step has."""

    request: float = Field(0.0, ge=0, description="Of a request, from its sending to its worker and from its first token back.")
    message: float = Field(0.0002, ge=0, description="Of a message between two workers.")


class Cores(_Part):
    """A host without GPUs, whose ranks have cores of their own and lend them while idle. What both phases want of it at once (its memory,
    and a core for each message) makes a step longer: by these factors, while a worker of the other phase computes. By the sequences that
    decode: few of them read weights as fast as memory gives them, many compute."""

    count: int = Field(ge=1, description="Of the host.")
    prefill_beside: dict[int, Slower] = Field({}, description="How many times as long a prefill step takes beside so many sequences.")
    decode_beside: dict[int, Slower] = Field({}, description="And a decode step of so many sequences beside prefill steps.")


def slower(beside: Mapping[int, float], rows: float) -> float:
    """The factor for so many sequences: on the line between the two measured around it; of fewer or more than any those of the nearest."""
    known = sorted(beside)
    if not known:
        return 1.0
    rows = min(max(rows, known[0]), known[-1])
    low = max(each for each in known if each <= rows)
    high = min(each for each in known if each >= rows)
    return beside[low] + (beside[high] - beside[low]) * (rows - low) / max(1, high - low)


class Basis(StrEnum):
    """Where a figure is from. `fitted`: to what was measured, with residuals; `reckoned`: from other figures of the profile."""

    MEASURED = "measured"
    FITTED = "fitted"
    RECKONED = "reckoned"
    ASSUMED = "assumed"


class Profile(_Part):
    """Times, memory and links of one model on one kind of device. `basis`: of its figures, by key, where it is known."""

    version: Literal[1] = 1
    source: str = Field(description="Where the numbers are from.")
    estimate: bool = Field(False, description="Nobody measured them.")
    model: Model
    device: DeviceShare
    parallelisms: tuple[Parallelism, ...] = Field(min_length=1)
    links: dict[str, Link] = Field(min_length=1)
    overheads: Overheads = Overheads()
    cores: Cores | None = None
    basis: dict[str, Basis] = {}

    @field_validator("parallelisms")
    @classmethod
    def _once(cls, parallelisms: tuple[Parallelism, ...]) -> tuple[Parallelism, ...]:
        tps = [each.tp for each in parallelisms]
        if twice := [tp for tp in tps if tps.count(tp) > 1]:
            raise ValueError(f"two are of tp {twice[0]}")
        return parallelisms

    @property
    def on_cpu(self) -> bool:
        """Whether it is of a host's cores, and not of a GPU."""
        return self.cores is not None or self.device.name == CPU

    def parallelism(self, tp: int) -> Parallelism | None:
        """What is known of workers of `tp` shards."""
        return next((known for known in self.parallelisms if known.tp == tp), None)

    def kv_tokens(self, tp: int, pp: int) -> int:
        """Tokens of KV that fit beside the weights into a worker of tp × pp devices, in whole blocks of 16; 0 if the weights do not fit."""
        known = self.parallelism(tp)
        if known is not None and pp in known.kv_tokens:
            return known.kv_tokens[pp]
        room = self.device.memory_bytes * SHARE_OF_MEMORY * tp * pp - self.model.weight_bytes
        return max(0, int(room / self.model.kv_token_bytes) // 16 * 16)


@dataclass(frozen=True, slots=True)
class Hardware:
    """A worker as the simulation has it: its times, stages and KV pool. `cores`: its own on the profile's host, which it lends to all
    other such workers. `roaming`: threads that have any core of that host, where there are too few for all. Neither: it shares nothing."""

    phase: Phase
    tp: int
    pp: int
    times: StepTimes
    kv_tokens: int
    cores: int | None = None
    roaming: int = 0

    @property
    def on_host(self) -> bool:
        """Whether it shares the cores of the profile's host."""
        return self.cores is not None or self.roaming > 0


def read_profile(path: Path) -> Profile:
    """`ConfigError` says what is wrong with the file, by key."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The profile {path} cannot be read: {error}.", field="profile") from None
    return parse_profile(text, str(path))


def parse_profile(text: str, name: str) -> Profile:
    try:
        return Profile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{name} is no profile: {where}: {message}.{_hint(first['type'])}", field="profile") from None


def _hint(wrong: str) -> str:
    """For what is another kind of file."""
    if wrong not in ("missing", "extra_forbidden", "json_invalid"):
        return ""
    return " `diptych profile` writes one; docs/replaying.md says how one is written by hand, as benchmarks/planner/opt-13b-a100.json is."
