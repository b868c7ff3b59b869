"""The kinds of device that plans may use: what is known of the model on each, how many there are, what they cost, how KV moves. Pure.

A node has devices of one kind. So KV between workers on different kinds moves between nodes, by the slower of what both have for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..resources.cores import share_cores
from .policies import on_share
from .profile import Cores, Hardware, Link, Overheads, Profile
from .shapes import Plan, Shape, hardware

NETWORK = "network"
"""The link of a profile by which KV moves between nodes, if it has one of that name; else that between any two workers."""


@dataclass(frozen=True, slots=True)
class Space:
    """The devices there are of a kind."""

    nodes: int
    per_node: int

    @property
    def devices(self) -> int:
        return self.nodes * self.per_node


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of device. `name`: by which plans call it; empty where there is no other. `link`: between two workers on it; `away`: between
    one on it and one on another kind."""

    profile: Profile
    space: Space
    link: Link
    away: Link
    name: str = ""

    @property
    def cost(self) -> float:
        """Of a device for an hour."""
        return self.profile.device.cost_per_hour

    def shapes(self, most: int) -> list[Shape]:
        """Of at most `most` devices, the shards of a stage on one node."""
        model = self.profile.model
        tps = [tp for tp in range(1, min(self.space.per_node, most) + 1) if model.heads % tp == 0]
        return [Shape(tp, pp, self.name) for tp in tps for pp in range(1, min(model.layers, most // tp) + 1)]


@dataclass(frozen=True, slots=True)
class Cluster:
    """Workers to be simulated, with what is not theirs alone: `profile` has the model and what requests and messages take."""

    hardware: Sequence[Hardware]
    profile: Profile
    link: Link


@dataclass(frozen=True, slots=True)
class Site:
    """All kinds there are, at least one, on each the same model."""

    kinds: tuple[Kind, ...]

    def kind(self, shape: Shape) -> Kind:
        return next(kind for kind in self.kinds if kind.name == shape.device)

    def profile(self, shape: Shape) -> Profile:
        return self.kind(shape).profile

    def of(self, plan: Plan) -> tuple[Kind, Kind]:
        """Of its prefill and of its decode workers."""
        return self.kind(plan.prefill), self.kind(plan.decode)

    @property
    def host(self) -> Cores | None:
        """The one host without GPUs that all is on, whose cores workers share."""
        kind = self.kinds[0]
        return kind.profile.cores if len(self.kinds) == kind.space.nodes == 1 else None

    def cluster(self, plan: Plan) -> Cluster:
        """Raises nothing for shapes that `lacking` has let pass."""
        workers = [worker for phase, shape, count in plan.sides for worker in [hardware(self.profile(shape), phase, shape)] * count]
        if self.host is not None:
            shares = share_cores(range(self.host.count), [None for _ in workers])
            workers = [on_share(worker, self.kinds[0].profile, share) for worker, share in zip(workers, shares, strict=True)]
        prefill, decode = self.of(plan)
        link = prefill.link if prefill is decode else slower(prefill.away, decode.away)
        return Cluster(workers, together([prefill.profile, decode.profile]), link)

    # -- how many, and what they cost ----------------------------------------------------------------------------------

    def room(self, shape: Shape, used: int = 0) -> int:
        """How many workers of the shape there is room for beside `used` devices of its kind."""
        return max(0, self.kind(shape).space.devices - used) // shape.devices

    def fits(self, plan: Plan) -> bool:
        """Whether there are as many devices of each kind."""
        used = plan.prefills * plan.prefill.devices if plan.prefill.device == plan.decode.device else 0
        return plan.prefills <= self.room(plan.prefill) and plan.decodes <= self.room(plan.decode, used)

    def cost(self, plan: Plan) -> float:
        """Per hour; a host is had whole."""
        if self.host is not None:
            return self.kinds[0].cost
        return sum(count * shape.devices * self.kind(shape).cost for _, shape, count in plan.sides)

    def units(self, plan: Plan) -> float:
        """What a plan's rate is divided by: its devices, each counted as often as it costs more than the cheapest."""
        cheapest = min(kind.cost for kind in self.kinds)
        return round(self.cost(plan) / cheapest, 9)

    @property
    def unit(self) -> str:
        """What that is, in words."""
        if self.host is not None:
            return "host"
        cheapest = min(self.kinds, key=lambda kind: kind.cost)
        alike = all(kind.cost == cheapest.cost for kind in self.kinds)
        return "device" if alike else f"cost of one {cheapest.name}"

    def multiplied(self, factor: int, *, per_node: bool = False) -> Site:
        """So many times as many nodes; or with so many times as many devices on each."""

        def more(space: Space) -> Space:
            return Space(space.nodes, space.per_node * factor) if per_node else Space(space.nodes * factor, space.per_node)

        return Site(tuple(replace(kind, space=more(kind.space)) for kind in self.kinds))

    def amount(self, plan: Plan) -> str:
        """The devices of a plan, in words."""
        if plan.prefill.device == plan.decode.device:
            return f"{plan.devices} × {plan.prefill.device}" if plan.prefill.device else f"{plan.devices} devices"
        return " and ".join(f"{count * shape.devices} × {shape.device}" for _, shape, count in plan.sides)

    @property
    def names(self) -> str:
        return " and ".join(kind.profile.device.name for kind in self.kinds)

    def __str__(self) -> str:
        """What there is, for people."""
        return " and ".join(f"{kind.space.devices} × {kind.profile.device.name}" for kind in self.kinds)


def slower(one: Link, other: Link) -> Link:
    """By which KV moves between workers of which each has one of these."""
    return Link(
        bytes_per_s=min(one.bytes_per_s, other.bytes_per_s), latency=max(one.latency, other.latency), overlap=one.overlap and other.overlap
    )


def together(profiles: Sequence[Profile]) -> Profile:
    """What holds for a cluster with workers on all of these devices: a request and a message take what they take on the slowest; the
    devices share no cores."""
    first, *rest = profiles
    if all(other is first for other in rest):
        return first
    overheads = Overheads(
        request=max(each.overheads.request for each in profiles), message=max(each.overheads.message for each in profiles)
    )
    return first.model_copy(update={"overheads": overheads, "cores": None})
