"""What the cache of a worker looks like: groups of layers that share a kind, cut into blocks of tokens, spread over ranks.

Rank `stage * tp + shard` holds the layers of its pipeline stage and there a share of the KV heads: with tp <= kv_heads shard s holds
the heads [s * kv_heads / tp, (s + 1) * kv_heads / tp), with tp > kv_heads tp / kv_heads shards hold the same head. What is wrong
with a layout is an `InvalidRequest` that names the field: a layout comes from a peer as often as from here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from .errors import InvalidRequest

INT8_GROUP, SCALE_BYTES = 32, 2
"""Of an int8 row so many numbers share a scale, a bfloat16."""


class DType(StrEnum):
    """int8 is of KV alone: a row, one head's key or value of one token, is its numbers and behind them their scales."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        if self is DType.FLOAT32:
            return 4
        return 1 if self is DType.INT8 else 2


OF_WEIGHTS = (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16)
"""The dtypes that a model is prepared in."""


class CacheKind(StrEnum):
    FULL = "full"
    WINDOW = "window"


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers whose KV has one kind and one shape; a group has its own blocks and tables.

    Per layer a group's cache is `[num_blocks, kv_heads, 2, block_size, width]` of `dtype` (K is [..., 0, :, :], V is
    [..., 1, :, :]), so that a head range of a block, K and V, is one run of bytes; scales are in the run, so they go wherever it
    goes. A window group's layers attend to the last `window` positions, the current one included: query q sees keys k with
    q - window < k <= q.
    """

    kind: CacheKind
    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    dtype: DType
    window: int = 0

    def __post_init__(self) -> None:
        _at_least_one("groups.kv_heads", self.kv_heads)
        _at_least_one("groups.head_dim", self.head_dim)
        if (self.kind is CacheKind.WINDOW) != (self.window > 0):
            raise _wrong("groups.window", f"is {self.window} for a {self.kind} group")

    @property
    def width(self) -> int:
        """Elements of a row, one head's key or value of one token: head_dim, and in int8 the bytes of its scales."""
        return self.head_dim + (SCALE_BYTES * -(-self.head_dim // INT8_GROUP) if self.dtype is DType.INT8 else 0)

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one layer, K and V."""
        return 2 * self.kv_heads * self.row_bytes

    def first_needed(self, position: int) -> int:
        """The first position that a query at `position` sees; 0 for a full group."""
        return max(0, position - self.window + 1) if self.kind is CacheKind.WINDOW else 0


@dataclass(frozen=True, slots=True)
class Layout:
    """How one worker holds its KV, over all its ranks. Two workers may exchange KV only if `difference` finds nothing.

    `fingerprint` identifies weights and everything else that decides what a token's KV is. `groups` are those of the whole model.
    `num_blocks` has one entry per group: every rank has as many, and a block has one number on all of them. `stages`: how many layers
    each pipeline stage has; () where one stage has them all.
    """

    fingerprint: str
    groups: tuple[CacheGroup, ...]
    block_size: int
    num_blocks: tuple[int, ...]
    tp: int = 1
    stages: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _at_least_one("block_size", self.block_size)
        _at_least_one("tp", self.tp)
        if len(self.num_blocks) != len(self.groups):
            raise _wrong("num_blocks", f"has {len(self.num_blocks)} entries for {len(self.groups)} groups")
        layers = [layer for group in self.groups for layer in group.layers]
        if len(set(layers)) != len(layers):
            raise _wrong("groups.layers", f"name a layer twice: {sorted(layers)}")
        for group in self.groups:
            if not splits(group.kv_heads, self.tp):
                raise _wrong("tp", f"is {self.tp}, which neither divides {group.kv_heads} KV heads nor is a multiple of them")
        if self.stages and (len(self.stages) < 2 or min(self.stages) < 1 or sum(self.stages) < self._layers):
            raise _wrong("stages", f"are {self.stages}: not two or more stages that share out {self._layers} layers")

    @property
    def pp(self) -> int:
        """Pipeline stages."""
        return len(self.stages) or 1

    @property
    def ranks(self) -> int:
        return self.tp * self.pp

    def stage(self, number: int) -> range:
        """The layers of a pipeline stage."""
        first = sum(self.stages[:number])
        return range(first, first + self.stages[number]) if self.stages else range(self._layers)

    def on(self, rank: int) -> RankLayout:
        """What `rank` (below `ranks`) holds."""
        number, shard = divmod(rank, self.tp)
        stage = self.stage(number)
        groups = tuple(
            replace(group, layers=tuple(layer for layer in group.layers if layer in stage), kv_heads=max(1, group.kv_heads // self.tp))
            for group in self.groups
        )
        first_heads = tuple(shard * group.kv_heads // self.tp for group in self.groups)
        return RankLayout(rank, replace(self, groups=groups, tp=1, stages=()), first_heads)

    def difference(self, other: Layout) -> str | None:
        """The first difference in what the KV is, however it is held, as a sentence that names it; None if there is none. All others are
        bridged."""
        if self.fingerprint != other.fingerprint:
            what = "weights, settings (rope among them) or dtype are not the same"
            return f"{_differs('fingerprint', self.fingerprint, other.fingerprint)[:-1]}: {what}."
        if len(self.groups) != len(other.groups):
            return f"groups differ in number: {len(self.groups)} here, {len(other.groups)} there."
        if self.groups == other.groups:  # so it is nearly always
            return None
        for number, (ours, theirs) in enumerate(zip(self.groups, other.groups, strict=True)):
            for name in ("kind", "layers", "kv_heads", "head_dim", "window"):
                if getattr(ours, name) != getattr(theirs, name):
                    return _differs(f"groups[{number}].{name}", getattr(ours, name), getattr(theirs, name))
        return None

    @property
    def _layers(self) -> int:
        """How many layers the groups name, those without KV included."""
        return 1 + max((layer for group in self.groups for layer in group.layers), default=-1)

    def token_bytes(self) -> int:
        """Bytes of KV one token adds over all layers (a window group's share included), each KV head counted once."""
        return sum(group.token_bytes * len(group.layers) for group in self.groups)


@dataclass(frozen=True, slots=True)
class RankLayout:
    """What one rank of a worker holds.

    `layout` is that of its own pool: the worker's groups, by the same numbers, with the layers of its stage (perhaps none) and the KV
    heads it holds, of which the first is the model's head `first_heads[g]`.
    """

    rank: int
    layout: Layout
    first_heads: tuple[int, ...]

    def layers(self, group: int) -> tuple[int, ...]:
        return self.layout.groups[group].layers

    def heads(self, group: int) -> range:
        """The model's numbers of the KV heads held."""
        first = self.first_heads[group]
        return range(first, first + self.layout.groups[group].kv_heads)


def splits(kv_heads: int, tp: int) -> bool:
    """Whether `tp` ranks can share out `kv_heads` heads evenly: so many to each, or each to so many."""
    return kv_heads % tp == 0 or tp % kv_heads == 0


def even_stages(layers: int, pp: int) -> tuple[int, ...]:
    """`Layout.stages` of `pp` stages as even as can be, for 1 <= pp <= layers. The first have one layer more: the last bears the head."""
    return tuple(layers // pp + (stage < layers % pp) for stage in range(pp)) if pp > 1 else ()


def _differs(name: str, ours: object, theirs: object) -> str:
    return f"{name} differs: {ours} here, {theirs} there."


def _at_least_one(field: str, value: int) -> None:
    if value < 1:
        raise _wrong(field, f"must be at least 1, not {value}")


def _wrong(field: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"layout.{field} {what}.", field=f"layout.{field}")
