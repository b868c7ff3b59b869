"""What KubeRay makes of a RayCluster: pods with `ray start` lines, by its documents and the rules of its controllers/ray/common/pod.go.

Ray's container is the first of a pod. Its command becomes bash, its arguments `ulimit …; ray start …`: rayStartParams by name, and what
the container's limits say. KubeRay adds an init container that waits for Ray's head, environment, and probes where there are none.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any

from charts import Manifest

HEAD_PORT = 6379
AGENT_PORT = 52365
BASH = ["/bin/bash", "-c", "--"]
WAIT = "until ray health-check --address {address} > /dev/null 2>&1; do echo Waiting for GCS to be ready.; sleep 5; done"
FLAGS = {"log-color", "include-dashboard", "include-log-monitor"}
"""Options of `ray start` that take true and false as words."""


@dataclass(frozen=True)
class PodSpec:
    """A pod to be run. `group`: head, or the name of a worker group."""

    name: str
    group: str
    labels: dict[str, str]
    spec: dict[str, Any]


def head_service(cluster: Manifest, namespace: str) -> str:
    return f"{cluster['metadata']['name']}-head-svc.{namespace}.svc.cluster.local"


def pods(cluster: Manifest, namespace: str) -> list[PodSpec]:
    """The head, then the pods of each group."""
    spec = cluster["spec"]
    made = [_pod(cluster, namespace, "head", 0, spec["headGroupSpec"])]
    for group in spec["workerGroupSpecs"]:
        count = group["replicas"] * group.get("numOfHosts", 1)
        made += [_pod(cluster, namespace, group["groupName"], number, group) for number in range(count)]
    return made


def _pod(cluster: Manifest, namespace: str, group: str, number: int, given: dict[str, Any]) -> PodSpec:
    name, head = cluster["metadata"]["name"], group == "head"
    template = copy.deepcopy(given["template"])
    spec = template["spec"]
    ray = spec["containers"][0]
    address = f"{head_service(cluster, namespace)}:{HEAD_PORT}"
    parameters = {
        **given.get("rayStartParams", {}),
        "block": "true",
        "metrics-export-port": "8080",
        "dashboard-agent-listen-port": str(AGENT_PORT),
    }
    parameters |= {"dashboard-host": "0.0.0.0"} if head else {"address": address}
    parameters = {**_from_limits(ray["resources"], parameters), **parameters}
    ray["env"] += [
        {"name": "RAY_CLUSTER_NAME", "value": name},
        {"name": "RAY_PORT", "value": str(HEAD_PORT)},
        {"name": "RAY_ADDRESS", "value": f"127.0.0.1:{HEAD_PORT}" if head else address},
        {"name": "RAY_USAGE_STATS_KUBERAY_IN_USE", "value": "1"},
    ]
    if not head:
        spec.setdefault("initContainers", []).append(
            {**copy.deepcopy(ray), "name": "wait-gcs-ready", "command": BASH, "args": [WAIT.format(address=address)]}
        )
    assert "command" not in ray, "KubeRay would put it before `ray start`"
    ray["command"] = BASH
    ray["args"] = [f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; ray start {'--head ' if head else ''}{_line(parameters)}"]
    probe = {"httpGet": {"path": "/api/healthz", "port": AGENT_PORT}, "periodSeconds": 5}
    for kind in ("livenessProbe", "readinessProbe"):
        ray.setdefault(kind, probe)
    kuberay = {"ray.io/cluster": name, "ray.io/group": "headgroup" if head else group, "ray.io/node-type": "head" if head else "worker"}
    return PodSpec(f"{name}-{group}-{number}", group, {**template["metadata"]["labels"], **kuberay}, spec)


def _from_limits(resources: dict[str, Any], given: dict[str, str]) -> dict[str, str]:
    """CPUs, memory and GPUs. KubeRay also reads `resources`, to add accelerators: JSON between quotes."""
    json.loads(given.get("resources", "{}").strip("'\"` "))
    limits = resources["limits"]
    found = {"num-cpus": str(_whole(limits["cpu"])), "memory": str(_bytes(limits["memory"]))}
    gpus = [count for name, count in limits.items() if name.endswith("/gpu")]
    return found | ({"num-gpus": str(gpus[0])} if gpus else {})


def _whole(cpus: Any) -> int:
    """Rounded up."""
    text = str(cpus)
    return -(-int(text.removesuffix("m")) // 1000) if text.endswith("m") else int(text)


def _bytes(quantity: str) -> int:
    units = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}
    return int(quantity[:-2]) * units[quantity[-2:]]


def _line(parameters: dict[str, str]) -> str:
    """In the order of their names; true is a flag alone, false is left out."""
    words = []
    for name, value in sorted(parameters.items()):
        if value.lower() in ("true", "false") and name not in FLAGS:
            words += [f"--{name}"] if value.lower() == "true" else []
        else:
            words.append(f"--{name}={value}")
    return " ".join(words)
