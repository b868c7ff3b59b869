"""A plan as the config file that `diptych up -f` loads. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...core.quantization import Quantization
from .policies import Policies
from .profile import Profile
from .shapes import Plan, Sample
from .site import Site

MOST_ON_CPU = 32
"""Sequences at once on a CPU: the largest batch that `diptych profile` times, and the config's default. Memory holds hundreds."""
CONSTANT_SHARE = 0.1
"""A prefill step is long enough when what it costs however little it computes is this share of it: the paper's L_m."""


def policies_for(profile: Profile, tp: int, sample: Sample) -> Policies:
    """Settings of the schedulers that suit the model on its device: chunks that saturate a worker of `tp` shards, and as many sequences at
    once as the largest worker's memory holds."""
    known = profile.parallelism(tp) or profile.parallelisms[0]
    prefill = known.times.prefill
    saturating = (prefill.constant + known.times.step) / CONSTANT_SHARE / prefill.token if prefill.token else 512
    chunk = max(512, min(8192, int(saturating) // 16 * 16))
    most = max(max(each.kv_tokens.values(), default=profile.kv_tokens(each.tp, 1)) for each in profile.parallelisms)
    rows = max(32, min(MOST_ON_CPU if profile.on_cpu else 1024, int(1.2 * most / max(1.0, sample.own_tokens))))
    return Policies(chunk_tokens=chunk, prefill_running=rows, decode_running=rows)


def policies_for_all(site: Site, sample: Sample) -> Policies:
    """The same for every kind of device: of each setting the largest that suits one, since a plan may put either phase on any."""
    each = [policies_for(kind.profile, kind.profile.parallelisms[0].tp, sample) for kind in site.kinds]
    return replace(
        each[0],
        chunk_tokens=max(one.chunk_tokens for one in each),
        prefill_running=max(one.prefill_running for one in each),
        decode_running=max(one.decode_running for one in each),
    )


def config_of(plan: Plan, profile: Profile, policies: Policies, source: str | None, decode: Profile | None = None) -> dict[str, Any]:
    """Values of the config file. `source`: of the model; without one `up` serves the demo model under that name. `decode`: of the device of
    the decode workers, if it may be another."""
    dtype, quantization = profile.model.stored
    model: dict[str, Any] = {"name": profile.model.name, "dtype": dtype}
    if quantization is not Quantization.NONE:
        model["quantization"] = str(quantization)
    if source is not None:
        model["source"] = source
    sides: dict[str, dict[str, Any]] = {}
    for (phase, shape, count), known in zip(plan.sides, (profile, decode or profile), strict=True):
        on = {"accelerator": shape.device} if shape.device else {}
        tokens = known.kv_tokens(shape.tp, shape.pp) // 16 * 16
        sides[phase.value] = {"workers": count, **on, "tp": shape.tp, "pp": shape.pp, "kv_tokens": tokens}
    sides["prefill"]["chunk_tokens"] = policies.chunk_tokens
    sides["decode"] |= {"chunk_tokens": policies.decode_chunk_tokens, "max_running": policies.decode_running}
    limits = {} if policies.most_running is None else {"limits": {"running": policies.most_running}}
    router = {"local_prefill": str(policies.local_prefill), **limits}
    paired = {"paired": True} if policies.paired else {}
    device = {"device": "cpu" if profile.on_cpu else "cuda"}  # on a Ray cluster that is joined `auto` is the CPU
    return {**device, **paired, "model": model, **sides, "router": router, "ray": {"placement": "pack"}}
