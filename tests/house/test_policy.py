"""Policy is pure: no torch, grpc, ray, asyncio, threads or clock, neither imported nor loaded. The shell does the I/O."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from house_rules import ROOT, Tree, check_policy

POLICIES = {
    "engine": "batch block_pool decode_shapes group_blocks last_drawn step_codec",
    "worker": "admit attempts chunks load patience",
    "prefill_worker": "leases prompt scheduler",
    "decode_worker": "admission branches choices decision growth leases roster scheduler sequence steady totals waits",
    "kv_transfer": "actions announcing answers closed_ids coverage crossing destination_machine destination_state faults geometry "
    "keep_alive order_codec ranks receipt slices source_machine source_state staging",
    "router": "actions admission budget machine openapi outputs placement sharing times",
    "cluster.resources": "cores layouts",
    "cluster.supervising": "headcount restarts",
    "cluster.on_ray": "nodes",
    "cluster.autoplan": "deciding drift figures replan",
    "cluster.doctor": "finding gpus host",
    "cluster.load": "agreement answer arrivals choice dialect fitting goodput lengths mix prompts report retimed slo sse summary traces "
    "workload",
    "cluster.spans": "shares taken trace",
    "cluster.planner": "agenda data_sheets decode extrapolating figures goodput lane latency life nearest plan_file policies prefill "
    "profile search shapes sharing site standing trying worker world",
}
MODULES = [f"diptych.{room}.{name}" for room, names in POLICIES.items() for name in names.split()]
LOOKED_FOR = ["torch", "grpc", "ray", "asyncio", "numpy", "transformers"]


@pytest.fixture(scope="module")
def house() -> Tree:
    return Tree(ROOT)


@pytest.mark.parametrize("policy", MODULES)
def test_a_policy_imports_only_policy(house: Tree, policy: str) -> None:
    assert check_policy(house, policy) == []


@pytest.mark.parametrize("policy", MODULES)
def test_a_policy_loads_nothing_heavy(policy: str) -> None:
    loaded = loaded_by(f"import {policy}")
    if "pydantic" in loaded:  # core.config and core.model describe files with it, and it loads asyncio
        loaded.discard("asyncio")
    assert sorted(loaded & set(LOOKED_FOR)) == []


def loaded_by(code: str) -> set[str]:
    """Top-level modules a fresh interpreter has loaded after running `code`."""
    script = f"import sys, json\n{code}\njson.dump(sorted({{name.partition('.')[0] for name in sys.modules}}), sys.stdout)"
    result = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, check=True, timeout=60, text=True)
    return set(json.loads(result.stdout))


def test_the_fresh_interpreter_would_tell() -> None:
    assert "asyncio" in loaded_by("import asyncio")


@pytest.mark.parametrize(
    "text", ["import time\n", "def f():\n    from time import monotonic\n", "from ..core.clock import MonotonicClock\n"]
)
def test_a_policy_with_a_clock_is_found(tmp_path: Path, text: str) -> None:
    for room in ("router", "core"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").touch()
    (tmp_path / "core/clock.py").write_text("import time\n")
    (tmp_path / "router/placement.py").write_text(text)
    assert check_policy(Tree(tmp_path), "diptych.router.placement")


def test_what_a_policy_reaches_through_another_is_found(tmp_path: Path) -> None:
    (tmp_path / "router").mkdir()
    for name, text in {"__init__": "", "placement": "from . import scores\n", "scores": "import asyncio\n"}.items():
        (tmp_path / "router" / f"{name}.py").write_text(text)
    assert check_policy(Tree(tmp_path), "diptych.router.placement") == [
        "router/scores.py:1: diptych.router.placement is policy and reaches asyncio"
    ]
