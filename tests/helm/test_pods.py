"""The rendered pods are run: head, router, prefill and decode serve a request through the Service, drain, and come back when killed."""

from __future__ import annotations

import json
import secrets
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from charts import CHART, NAMESPACE, Helm, Manifest, one
from cluster_harness import wait_for
from diptych.core.api_keys import ApiKeyFile, new_key
from hosts import Host, hosts, missing
from kubelet import Pod, Site, endpoint, slowly
from kuberay import PodSpec, head_service, pods

START_S = 600.0
PROMPT = "the thin man and the other thing in the inn; then another one, and the end of it all there"
VALUES: dict[str, Any] = {
    "model": {"from": "pvc", "source": "tiny-llama", "pvc": {"claimName": "models"}},
    "config": {"model": {"name": "tiny", "dtype": "float32"}, "prefill": {"kv_tokens": 2048}, "decode": {"kv_tokens": 2048}},
    "router": {"preStopDelaySeconds": 1},
    "security": {"allowUnauthenticated": False, "apiKeys": {"secretName": "keys", "clientSecret": "one-key"}},
}
pytestmark = [pytest.mark.root, pytest.mark.nightly, pytest.mark.skipif(missing() is not None, reason=missing() or "")]


@dataclass
class Cluster:
    """What KubeRay and the kubelets hold: a running pod for each spec, each on a host of its own (`homes`, by group)."""

    site: Site
    specs: dict[str, PodSpec]
    service: Manifest
    homes: dict[str, Host]
    key: str
    running: dict[str, Pod] = field(default_factory=dict)
    started: int = 0

    def start(self, group: str) -> Pod:
        self.started += 1
        pod = Pod(self.specs[group], self.homes[group], self.site, self.started)
        self.running[group] = pod
        pod.start(START_S)
        return pod

    def until_ready(self) -> None:
        for pod in self.running.values():
            pod.until_ready(pod.containers, START_S)

    def lose(self, group: str) -> None:
        """A pod is killed."""
        self.running.pop(group).kill()

    def open(self, path: str, body: dict[str, Any] | None = None, key: str | None = None) -> Any:
        """Through the Service; with a body it is posted."""
        url = f"http://{endpoint(self.service, list(self.running.values()), 'http')}{path}"
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key or self.key}"}
        request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers)
        return urllib.request.urlopen(request, timeout=60)

    def ask(self, tokens: int, key: str | None = None, **more: Any) -> Any:
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, **more}
        return self.open("/v1/completions", body, key)

    def text(self) -> str:
        with self.ask(12) as answer:
            return str(json.load(answer)["choices"][0]["text"])

    def close(self) -> None:
        for pod in self.running.values():
            pod.kill()


def readable(source: Path, directory: Path) -> Path:
    """A copy that every user may read, as a volume is."""
    shutil.copytree(source, directory / source.name)
    for path in (directory, *directory.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return directory


@pytest.fixture
def supervisor() -> str:
    """The pod it runs in."""
    return "router"


@pytest.fixture
def cluster(helm: Helm, tiny_llama_source: Path, tmp_path: Path, supervisor: str) -> Iterator[Cluster]:
    manifests = helm.template(CHART / "ci/laptop-values.yaml", values=VALUES | {"supervisorPod": supervisor})
    ray = one(manifests, "RayCluster")
    specs = {spec.group: spec for spec in pods(ray, NAMESPACE)}
    test = one(manifests, "Pod")
    specs["test"] = PodSpec(test["metadata"]["name"], "test", test["metadata"]["labels"], test["spec"])
    service, config = one(manifests, "Service"), one(manifests, "ConfigMap")
    claim = tmp_path / "models"
    key, kept = new_key("tests")
    with hosts("head", "router", "prefill", "decode", "test") as (_, *made), ExitStack() as stack:
        homes = {host.name: host for host in made}
        fqdn, head = head_service(ray, NAMESPACE), homes["head"].address
        names = {fqdn: head, fqdn.removesuffix(".cluster.local"): head, service["metadata"]["name"]: homes[supervisor].address}
        site = Site(
            tmp_path,
            names,
            secrets={
                ray["metadata"]["name"]: {"auth_token": secrets.token_hex(32)},  # which KubeRay makes
                "keys": {"keys.json": ApiKeyFile(keys=(kept,)).model_dump_json()},
                "one-key": {"key": key},
            },
            config_maps={config["metadata"]["name"]: config["data"]},
            claims={"models": readable(tiny_llama_source, claim)},
        )
        found = Cluster(site, specs, service, homes, key)
        stack.callback(found.close)
        yield found


@pytest.mark.timeout(1800)
def test_the_rendered_pods_serve_drain_and_come_back(cluster: Cluster) -> None:
    for group in ("head", "prefill", "decode", "router"):
        pod = cluster.start(group)
        pod.until_ready(["ray"], START_S)  # one after another: Ray gives up a node whose agent has not come up within 15 s
    cluster.until_ready()
    expected = cluster.text()
    assert expected
    with pytest.raises(urllib.error.HTTPError, match="401"):
        cluster.ask(1, key="dpt-00000000-wrong")
    with cluster.open("/metrics") as answer:
        moved = [line for line in answer.read().decode().splitlines() if line.startswith("diptych_kv_transfer_bytes_total")]
    assert any('transport="gloo"' in line and not line.endswith(" 0.0") for line in moved), moved
    generates(cluster)

    cluster.lose("decode")
    router = cluster.running["router"].containers["diptych"]
    wait_for("readiness to go", slowly(lambda: not router.passes("readinessProbe")), START_S)
    assert router.passes("livenessProbe"), "alive, not ready"
    cluster.homes["decode"] = cluster.homes["test"]
    cluster.start("decode")  # as KubeRay does, elsewhere
    cluster.until_ready()
    assert cluster.text() == expected

    cluster.lose("router")
    cluster.start("router")
    cluster.until_ready()
    assert cluster.text() == expected

    said = "".join(cluster.running.pop("prefill").end())
    assert "draining 1 workers" in said
    drains(cluster, "router")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("supervisor", ["head"])
def test_the_head_s_pod_supervises(cluster: Cluster) -> None:
    """When its supervisor is killed, the kubelet starts that container again, and the head and the workers' pods stay."""
    for group in ("head", "prefill", "decode"):
        pod = cluster.start(group)
        pod.until_ready(["ray"], START_S)
    cluster.until_ready()
    expected = cluster.text()
    assert expected
    generates(cluster)

    cluster.running["head"].containers["diptych"].kill()
    cluster.until_ready()
    assert cluster.text() == expected
    drains(cluster, "head")


def generates(cluster: Cluster) -> None:
    """The hook of `helm test`: a token comes out of the Service's gRPC port."""
    pod = Pod(cluster.specs["test"], cluster.homes["test"], cluster.site, 0)
    try:
        pod.start(START_S)
        (container,) = pod.containers.values()
        assert container.wait(60) == 0, container.log.read_text()
        assert container.log.read_text().strip("\n")  # whatever a model of random weights says
    finally:
        pod.kill()


def drains(cluster: Cluster, group: str) -> None:
    """An answer that is being written when the router's pod, `group`, is ended is written to its end."""
    with cluster.ask(400, stream=True, ignore_eos=True) as answer:
        first = answer.readline()
        assert first.startswith(b"data: ")
        ending = threading.Thread(target=cluster.running.pop(group).end)
        ending.start()
        rest = answer.read().decode()
        ending.join(120)
    assert rest.rstrip().endswith("data: [DONE]")
    assert rest.count("data: {") >= 100
    assert not ending.is_alive()
