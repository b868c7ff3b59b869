"""The kinds of device that `diptych plan` may use, from its options: `--profile`, several times, and `--device NAME,nodes=N,…`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

from rich.console import Console

from ...core.config import ClusterConfig
from ...core.errors import ConfigError
from ...core.fleet import Phase
from ..planner.data_sheets import DEVICES, device_of, estimate
from ..planner.extrapolating import extended
from ..planner.profile import Link, Profile, read_profile
from ..planner.site import NETWORK, Kind, Site, Space, slower

_COUNTS = ("nodes", "devices")
_FORM = "NAME[,nodes=N][,devices=N][,cost=C], as in --device H100,nodes=2,devices=8,cost=3.5"
_err = Console(stderr=True, highlight=False)


@dataclass(frozen=True, slots=True)
class Named:
    """One `--device`. None where the option that holds for all does."""

    name: str
    nodes: int | None = None
    devices: int | None = None
    cost: float | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What the options say of devices. `space` and `cost`: for those that do not name their own."""

    profiles: tuple[Path, ...]
    devices: tuple[str, ...]
    space: Space
    cost: float | None = None
    link: str | None = None
    derive: bool = False

    def site(self) -> Site:
        """`ConfigError` names the option that is wrong, and what would work."""
        known = read_profiles(self.profiles)
        wanted = [parse_device(text) for text in self.devices] or [Named(profile.device.name) for profile in known]
        _refuse_twice([each.name for each in wanted], "--device")
        found = [self._priced(each, profile_for(each.name, known, "--device")) for each in wanted]
        _check_movable(found, "--device" if self.devices else "--profile")
        self._check_costs(wanted, found)
        named = len(wanted) > 1
        return _sharing(Site(tuple(self._kind(each, profile, named) for each, profile in zip(wanted, found, strict=True))))

    def _kind(self, each: Named, profile: Profile, named: bool) -> Kind:
        space = Space(self.space.nodes if each.nodes is None else each.nodes, self.space.per_node if each.devices is None else each.devices)
        if self.derive:
            profile = _derived(profile, space)
        link = link_of(profile, self.link)
        away = between_nodes(profile) if self.link is None else link
        return Kind(profile, space, link, away, profile.device.name if named else "")

    def _priced(self, each: Named, profile: Profile) -> Profile:
        cost = self.cost if each.cost is None else each.cost
        if cost is None:
            return profile
        return profile.model_copy(update={"device": profile.device.model_copy(update={"cost_per_hour": cost})})

    def _check_costs(self, wanted: Sequence[Named], found: Sequence[Profile]) -> None:
        """Each has a cost, or none: 1 for what nobody has priced would be taken for one."""
        if self.cost is not None and len(found) > 1:
            raise ConfigError("--cost is of one kind of device; with several say --device NAME,cost=C for each.", field="cost")
        without = [
            each.device.name for named, each in zip(wanted, found, strict=True) if named.cost is None and each.device.cost_per_hour == 1
        ]
        if without and len(without) < len(found):
            named = next(each.device.name for each in found if each.device.name not in without)
            raise ConfigError(
                f"--device: {named} has a cost and {' and '.join(without)} has none: give each its own (--device {without[0]},cost=C), or "
                "none of them.",
                field="device",
            )


def _sharing(site: Site) -> Site:
    """With no more ranks on one host than it has cores for; it is said that these are shared."""
    if site.host is None:
        return site
    (kind,), cores = site.kinds, site.host.count
    ranks = min(kind.space.per_node, cores)
    _err.print(f"One host: its workers share its {cores} cores, as `up` shares them out; at most {ranks} of one rank each", markup=False)
    return Site((replace(kind, space=Space(1, ranks)),))


def parse_device(text: str) -> Named:
    """`ConfigError` says what of it is wrong."""
    name, *rest = (part.strip() for part in text.split(","))
    values: dict[str, float] = {}
    for part in rest:
        key, _, value = (side.strip() for side in part.partition("="))
        if key not in (*_COUNTS, "cost") or key in values:
            near = difflib.get_close_matches(key, [*_COUNTS, "cost"], n=1)
            hint = f" Did you mean {near[0]}?" if near and near[0] != key else ""
            raise ConfigError(
                f"--device {text}: {key!r} is {'twice there' if key in values else 'no part of it'}.{hint} It is {_FORM}.", field="device"
            )
        values[key] = _number(text, key, value)
    if not name or "=" in name:
        raise ConfigError(f"--device {text}: it begins with the name of a kind of device: {_FORM}.", field="device")
    counts = {key: int(values[key]) for key in _COUNTS if key in values}
    return Named(name, **counts, cost=values.get("cost"))


def _number(text: str, key: str, value: str) -> float:
    try:
        number = int(value) if key in _COUNTS else float(value)
    except ValueError:
        number = 0
    if not 0 < number < float("inf"):
        raise ConfigError(
            f"--device {text}: {key} is {value!r}; it is a {'whole number' if key in _COUNTS else 'number'} above 0.", field="device"
        )
    return number


def read_profiles(files: Sequence[Path]) -> list[Profile]:
    """One at least; each of another device, all of one model."""
    found = [read_profile(file) for file in files]
    _refuse_twice([profile.device.name for profile in found], "--profile")
    _check_alike(found)
    return found


def used_by(config: ClusterConfig, known: Sequence[Profile]) -> tuple[Profile, ...]:
    """Of the kinds of device that a config names; all of `known` if it names none."""
    names = {
        group.accelerator: f"{phase.value}.accelerator"
        for phase in Phase
        for group in config.section(phase).all_groups
        if group.accelerator
    }
    found = tuple(profile_for(name, known, key) for name, key in names.items()) or tuple(known)
    _check_movable(found, "--profile")
    return found


def link_among(profiles: Sequence[Profile], name: str | None) -> Link:
    """By which KV moves in a cluster on these devices: where they are several, between nodes, by the slowest there is."""
    if name is not None or len(profiles) == 1:
        return reduce(slower, (link_of(profile, name) for profile in profiles))
    return reduce(slower, map(between_nodes, profiles))


def between_nodes(profile: Profile) -> Link:
    return profile.links.get(NETWORK) or link_of(profile, None)


def _refuse_twice(names: Sequence[str], option: str) -> None:
    if twice := next((name for number, name in enumerate(names) if name in names[:number]), None):
        raise ConfigError(f"{option}: two are of {twice}; there is one for each kind of device.", field=option.removeprefix("--"))


def profile_for(name: str, known: Sequence[Profile], key: str) -> Profile:
    """What is known of a device: its profile, or an estimate from its data sheet, for the model that the others are of; it is said that it
    is. `ConfigError` lists those there are; `key`: where it was asked for."""
    for profile in known:
        if profile.device.name.lower() == name.lower():
            return profile
    if name.upper() not in DEVICES:
        there = [profile.device.name for profile in known]
        near = difflib.get_close_matches(name.upper(), [*DEVICES, *there], n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"{key}: nothing is known of {name}: there is no --profile of it (there is one of {', '.join(there)}), nor a data sheet (there "
            f"are some of {', '.join(DEVICES)}).{hint} Measure it with `diptych profile`, or write its profile by hand.",
            field=key.removeprefix("--"),
        )
    made = estimate(known[0].model, device_of(name))
    _err.print(f"{made.device.name}: times from its data sheet, ± {made.parallelisms[0].error:.0%}", markup=False)
    return made


def _check_alike(profiles: Sequence[Profile]) -> None:
    """`ConfigError` unless all are of one model."""
    first, *rest = profiles
    for other in rest:
        ours, theirs = (each.model.model_dump(exclude={"source"}) for each in (first, other))
        if differs := [key for key in ours if ours[key] != theirs[key]]:
            key = differs[0]
            raise ConfigError(
                f"--profile: all must be of one model, with weights and KV of the same type; model.{key} is {ours[key]} in that of "
                f"{first.device.name}, and {theirs[key]} in that of {other.device.name}.",
                field="profile",
            )


def _check_movable(profiles: Sequence[Profile], key: str) -> None:
    """`ConfigError` unless KV could move between any two of the devices."""
    first, *rest = profiles
    if other := next((other for other in rest if other.on_cpu != first.on_cpu), None):
        raise ConfigError(
            f"{key}: one of {first.device.name} and {other.device.name} is a CPU; KV moves between GPUs, or between CPUs.",
            field=key.removeprefix("--"),
        )


def link_of(profile: Profile, name: str | None) -> Link:
    """`ConfigError` if there is none of that name; without one the first."""
    if name is None:
        return next(iter(profile.links.values()))
    if name not in profile.links:
        raise ConfigError(f"The profile has no link {name!r}; it has {', '.join(profile.links)}.", field="link")
    return profile.links[name]


def _derived(known: Profile, space: Space) -> Profile:
    """With times for every tp that splits the model; says how far off they may be."""
    full = extended(known, [tp for tp in range(1, space.per_node + 1) if known.model.heads % tp == 0])
    for each in full.parallelisms:
        if known.parallelism(each.tp) is None:
            _err.print(f"{known.device.name}, tp {each.tp}: times derived from the others, ± {each.error:.0%}", markup=False)
    return full
