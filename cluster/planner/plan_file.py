"""A plan as the config file that `diptych up -f` loads. Pure."""

from __future__ import annotations

from typing import Any

from .policies import Policies
from .profile import Profile
from .shapes import Plan, Sample

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
    rows = int(1.2 * most / max(1.0, sample.prompt_tokens))
    return Policies(chunk_tokens=chunk, prefill_running=max(32, min(1024, rows)), decode_running=max(32, min(1024, rows)))


def config_of(plan: Plan, profile: Profile, policies: Policies, source: str | None) -> dict[str, Any]:
    """Values of the config file. `source`: of the model; without one it is named only, and `up --model` must say where it is."""
    model: dict[str, Any] = {"name": profile.model.name, "dtype": profile.model.dtype}
    if source is not None:
        model["source"] = source
    sides = {}
    for side, shape, count in (("prefill", plan.prefill, plan.prefills), ("decode", plan.decode, plan.decodes)):
        sides[side] = {"workers": count, "tp": shape.tp, "pp": shape.pp, "kv_tokens": profile.kv_tokens(shape.tp, shape.pp) // 16 * 16}
    sides["prefill"]["chunk_tokens"] = policies.chunk_tokens
    sides["decode"] |= {"chunk_tokens": policies.decode_chunk_tokens, "max_running": policies.decode_running}
    limits = {} if policies.most_running is None else {"limits": {"running": policies.most_running}}
    router = {"local_prefill": str(policies.local_prefill), **limits}
    paired = {"paired": True} if policies.paired else {}
    return {**paired, "model": model, **sides, "router": router, "ray": {"placement": "pack"}}
