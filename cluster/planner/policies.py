"""What a cluster's config decides, as the simulation needs it, and what a plan makes of a profile: workers with their times. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

from ...core.config import ClusterConfig
from ...core.errors import ConfigError
from ...core.fleet import LocalPrefill, Phase
from ..resources.cores import Share, share_cores
from .profile import Hardware, Profile


@dataclass(frozen=True, slots=True)
class Policies:
    """The settings of the production schedulers and of the router; defaults are the config file's.

    `most_running`: requests at once, more are refused; None: any number. `paired`: workers of one number are a pair.
    """

    chunk_tokens: int = 512
    decode_chunk_tokens: int = 64
    prefill_running: int = 32
    decode_running: int = 32
    watermark: float = 0.05
    local_prefill: LocalPrefill = LocalPrefill.AUTO
    local_prefill_below: int = 16
    lease_s: float = 10.0
    offer_wait_s: float = 5.0
    most_running: int | None = 1024
    paired: bool = False

    @classmethod
    def of(cls, config: ClusterConfig) -> Policies:
        return cls(
            chunk_tokens=config.prefill.chunk_tokens,
            decode_chunk_tokens=config.decode.chunk_tokens,
            prefill_running=config.decode.max_running,  # one setting for the slots of both, as workers are started
            decode_running=config.decode.max_running,
            local_prefill=config.router.local_prefill,
            local_prefill_below=config.router.local_prefill_below,
            lease_s=config.transfer.lease_s,
            offer_wait_s=config.transfer.offer_wait_s,
            most_running=config.router.limits.running,
            paired=config.paired,
        )


def workers_of(config: ClusterConfig, profile: Profile, others: Sequence[Profile] = ()) -> list[Hardware]:
    """Every worker of a plan. `others`: of further kinds of device, if there are any. `ConfigError` names the key of one that the profile
    does not know, or has no memory for."""
    found = []
    shares = repeat(None) if others else _shares(config, profile)
    for phase in Phase:
        section = config.section(phase)
        for number, group in enumerate(section.all_groups):
            pp = len(group.stages) or group.pp
            key = f"{phase.value}.groups.{number}" if section.groups else phase.value
            known = on_device(group.accelerator, (profile, *others), key)
            for _ in range(group.workers):
                ranks = [next(shares) for _ in range(group.tp * pp)]
                found.append(hardware_of(known, phase, group.tp, pp, group.kv_tokens, key, ranks[0]))
    return found


def on_device(accelerator: str | None, profiles: Sequence[Profile], key: str) -> Profile:
    """The profile of that device; the first where none is named and there is one alone."""
    there = ", ".join(each.device.name for each in profiles)
    if accelerator is None and len(profiles) == 1:
        return profiles[0]
    if accelerator is None:
        raise ConfigError(
            f"{key}.accelerator: the profiles are of {there}; name one, or give a single profile.", field=f"{key}.accelerator"
        )
    found = next((each for each in profiles if each.device.name == accelerator), None)
    if found is None:
        raise ConfigError(
            f"{key}.accelerator: there is no profile of {accelerator} (there is one of {there}): give it with --profile.",
            field=f"{key}.accelerator",
        )
    return found


def _shares(config: ClusterConfig, profile: Profile) -> Iterator[Share | None]:
    """What each rank computes on, in the order in which workers are started; None where the profile does not know of cores, or other
    hosts have them."""
    if profile.cores is None or config.ray.joined:
        return repeat(None)
    groups = (group for phase in Phase for group in config.section(phase).all_groups)
    ranks = ((group.threads, group.workers * group.tp * (len(group.stages) or group.pp)) for group in groups)
    return iter(share_cores(range(profile.cores.count), [threads for threads, count in ranks for _ in range(count)]))


def hardware_of(profile: Profile, phase: Phase, tp: int, pp: int, kv_tokens: int | None, key: str, share: Share | None = None) -> Hardware:
    """`kv_tokens` None: as many as fit. `share`: of the host's cores."""
    known = profile.parallelism(tp)
    if known is None:
        tps = ", ".join(str(each.tp) for each in profile.parallelisms)
        raise ConfigError(
            f"{key}.tp: the profile of {profile.model.name} on {profile.device.name} has no times for tp {tp}; it has tp {tps}.",
            field=f"{key}.tp",
        )
    if pp > profile.model.layers:
        raise ConfigError(f"{key}.pp: {pp} stages of the {profile.model.layers} layers of {profile.model.name}.", field=f"{key}.pp")
    most = profile.kv_tokens(tp, pp)
    kv_tokens = most if kv_tokens is None else kv_tokens
    if not 256 <= kv_tokens <= most:
        fits = f"{most} do" if most >= 256 else "its weights alone fill it"
        raise ConfigError(
            f"{key}.kv_tokens: {kv_tokens} tokens of KV do not fit beside the weights on {tp * pp} × {profile.device.name}; {fits}.",
            field=f"{key}.kv_tokens",
        )
    worker = Hardware(phase, tp, pp, known.times, kv_tokens)
    return worker if share is None else on_share(worker, profile, share)


def on_share(worker: Hardware, profile: Profile, share: Share) -> Hardware:
    """With the cores that `up` would give each of its ranks, or its threads on all of them."""
    known = profile.parallelism(worker.tp)
    assert known is not None, f"no times for tp {worker.tp}"
    worker = replace(worker, times=known.on_cores(share.threads, worker.phase))
    if worker.tp * worker.pp > 1 or profile.cores is None:
        return worker
    if share.cpus is None:
        return replace(worker, roaming=min(share.threads, profile.cores.count))
    return replace(worker, cores=len(share.cpus))
