"""What every benchmark needs around its numbers: percentiles, where they were taken, and a file to keep them in."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diptych.benchmarks.pictures import PICTURES, draw

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "grpcio", "ray", "diptych")


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed (nearest rank; no interpolation)."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summary(values: Sequence[float]) -> dict[str, float]:
    """Count, mean, p50, p90, p99 and greatest of `values` (seconds), in milliseconds."""
    return {
        "count": len(values),
        "mean_ms": 1000 * sum(values) / len(values),
        **{f"p{share}_ms": 1000 * percentile(values, share / 100) for share in (50, 90, 99)},
        "max_ms": 1000 * max(values),
    }


def surroundings() -> dict[str, Any]:
    """Machine, versions and commit; `changed` if the tree differs from the commit in code."""
    status = _git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    return {
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(status),
        "machine": {
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "kernel": platform.release(),
            "load_before": round(os.getloadavg()[0], 2),
            "niceness": os.nice(0),
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def keep(name: str, where: dict[str, Any], settings: dict[str, Any], results: dict[str, Any]) -> Path:
    """Write `benchmarks/results/<name>.json`, over what an earlier run left there, and its picture beside it."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    document = {"benchmark": name, "command": " ".join(sys.orig_argv[1:]), **where, "settings": settings, "results": results}
    path.write_text(json.dumps(_rounded(document), indent=1) + "\n")
    if name in PICTURES:
        draw(path.with_suffix(".png"), f"{name}: {describe(where)}", PICTURES[name](results))
    return path


def describe(where: dict[str, Any]) -> str:
    """`surroundings()` in one line."""
    machine, versions = where["machine"], where["versions"]
    changed = " with changes" if where["changed"] else ""
    return f"{machine['cpu']}, {machine['cores']} cores; torch {versions['torch']}; commit {where['commit'][:12]}{changed}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False).stdout.strip()


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
