"""The chart's manifests: what they are by the schemas of Kubernetes and KubeRay, by the project's own loader, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from charts import CHART, NAMESPACE, ROOT, SETS, Helm, Manifest, Refused, one
from diptych.cluster.supervising.config_file import read_config
from diptych.core.config import ClusterConfig
from kuberay import pods

KUBERAY = ROOT.parent / "shared/kuberay"
OTHERS = {"RayCluster", "HTTPRoute", "GRPCRoute", "ServiceMonitor"}
"""Kinds that Kubernetes itself does not know."""
GOOD: dict[str, Any] = {"security": {"allowUnauthenticated": True}}


def test_lint(helm: Helm) -> None:
    for path in SETS:
        helm.run("lint", "--strict", str(CHART), "--values", str(path))


def test_kubernetes_knows_every_manifest(rendered: dict[str, list[Manifest]]) -> None:
    import kubernetes_validate

    for name, manifests in rendered.items():
        for manifest in manifests:
            if manifest["kind"] not in OTHERS:
                kubernetes_validate.validate(manifest, "1.37", strict=True)
        assert {"RayCluster", "ConfigMap", "Service", "ServiceAccount", "Pod"} <= {manifest["kind"] for manifest in manifests}, name
    assert {manifest["kind"] for manifest in rendered["large"]} >= OTHERS | {
        "PodDisruptionBudget",
        "NetworkPolicy",
        "PersistentVolumeClaim",
    }
    assert {manifest["kind"] for manifest in rendered["gpu"]} >= {"Ingress"}


@cache
def crd(kind: str) -> dict[str, Any]:
    """The schema of KubeRay's v1, closed: what it does not name the API server would drop without a word."""
    text = (KUBERAY / f"ray.io_{kind.lower()}s.yaml").read_text()
    versions = yaml.load(text, yaml.CSafeLoader)["spec"]["versions"]
    (schema,) = (version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
    schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return closed(schema)


def closed(schema: Any) -> Any:
    """The same where unknown properties are errors, and int-or-string as JSON schema has it."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        key: {name: closed(each) for name, each in value.items()} if key == "properties" else closed(value) for key, value in schema.items()
    }
    if (
        isinstance(made.get("properties"), dict)
        and "additionalProperties" not in made
        and not made.get("x-kubernetes-preserve-unknown-fields")
    ):
        made["additionalProperties"] = False
    return made


@pytest.mark.skipif(not KUBERAY.exists(), reason="KubeRay's CRDs are not beside this repository")
def test_kuberay_knows_the_cluster(rendered: dict[str, list[Manifest]]) -> None:
    validator = jsonschema.Draft202012Validator(crd("RayCluster"))
    for name, manifests in rendered.items():
        errors = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(one(manifests, "RayCluster"))]
        assert errors == [], name
    wrong = json.loads(json.dumps(one(rendered["laptop"], "RayCluster")))
    wrong["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["lifecylce"] = {}
    assert [error.json_path for error in validator.iter_errors(wrong)] == ["$.spec.workerGroupSpecs[0].template.spec.containers[0]"]


def test_the_config_map_is_what_the_processes_load(rendered: dict[str, list[Manifest]], some_file: Path) -> None:
    workers = {}
    for name, manifests in rendered.items():
        some_file.write_text(one(manifests, "ConfigMap")["data"]["cluster.yaml"])
        config = read_config(some_file, {})
        assert config.ray.address == "llm-diptych-head-svc.models.svc:6379"
        assert config.router.host == "0.0.0.0"
        workers[name] = (config.prefill.all_workers, config.decode.all_workers)
        groups = {group["groupName"]: group for group in one(manifests, "RayCluster")["spec"]["workerGroupSpecs"]}
        assert groups["decode"]["replicas"] == config.decode.all_workers
        assert groups.get("prefill", {"replicas": 0})["replicas"] == config.prefill.all_workers
        ranks = config.decode.tp * config.decode.pp
        cpus = int(groups["decode"]["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
        assert (config.decode.threads or 0) * ranks <= cpus * groups["decode"]["numOfHosts"]
    assert workers == {"laptop": (1, 1), "gpu": (1, 2), "large": (2, 3), "colocated": (0, 2)}


def test_all_groups_have_one_template(helm: Helm) -> None:
    """Given the same settings, pods of prefill and decode differ in their group's name alone; all have the same rights."""
    group = {"resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": "1", "memory": "1Gi"}}}
    cluster = one(helm.template(values=GOOD | {"prefill": group, "decode": group}), "RayCluster")["spec"]
    groups = {each["groupName"]: each for each in cluster["workerGroupSpecs"]}
    assert json.loads(json.dumps(groups["prefill"]).replace("prefill", "decode")) == groups["decode"]
    for template in (cluster["headGroupSpec"]["template"], *(each["template"] for each in groups.values())):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not spec["automountServiceAccountToken"]
        for container in spec["containers"]:
            rights = container["securityContext"]
            assert rights["readOnlyRootFilesystem"]
            assert not rights["allowPrivilegeEscalation"]
            assert rights["capabilities"] == {"drop": ["ALL"]}


def test_the_supervisor_may_run_in_the_head_s_pod(helm: Helm, rendered: dict[str, list[Manifest]]) -> None:
    """Then there is no other for the router: the Service, the rule for clients and the model's volume go where it is."""
    manifests = helm.template(CHART / "ci/large-values.yaml", values={"supervisorPod": "head"})
    cluster = one(manifests, "RayCluster")
    assert list(jsonschema.Draft202012Validator(crd("RayCluster")).iter_errors(cluster)) == [] if KUBERAY.exists() else True
    before, spec = one(rendered["large"], "RayCluster")["spec"], cluster["spec"]
    alone = next(group for group in before["workerGroupSpecs"] if group["groupName"] == "router")
    assert spec["workerGroupSpecs"] == [group for group in before["workerGroupSpecs"] if group is not alone]
    head = spec["headGroupSpec"]["template"]
    container, other = head["spec"]["containers"][1], alone["template"]["spec"]["containers"][1]
    assert container["command"][2].endswith("done; exec " + " ".join(other["command"]))
    assert {**container, "command": other["command"]} == other
    assert head["spec"]["volumes"] == alone["template"]["spec"]["volumes"]
    labels = head["metadata"]["labels"].items()
    assert one(manifests, "Service")["spec"]["selector"].items() <= labels
    clients = next(each for each in manifests if each["kind"] == "NetworkPolicy" and each["metadata"]["name"].endswith("-router"))
    assert clients["spec"]["podSelector"]["matchLabels"].items() <= labels
    budgets = [each["metadata"]["name"] for each in manifests if each["kind"] == "PodDisruptionBudget"]
    assert budgets == ["llm-diptych-head", "llm-diptych-prefill", "llm-diptych-decode"]


def test_what_is_asked_for_is_there(rendered: dict[str, list[Manifest]]) -> None:
    spec = one(rendered["large"], "RayCluster")["spec"]
    decode = next(group for group in spec["workerGroupSpecs"] if group["groupName"] == "decode")
    container = decode["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"cpu": "64", "memory": "512Gi", "nvidia.com/gpu": 8, "rdma/hca": 8}
    assert container["image"] == "diptych:0.1.0-cuda"
    assert (decode["numOfHosts"], decode["replicas"], decode["maxReplicas"]) == (2, 3, 12)
    assert decode["rayStartParams"]["resources"] == "'{\"diptych-decode\": 1}'"
    spread = decode["template"]["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"]
    assert spread["app.kubernetes.io/component"] == "decode"
    fault_tolerance = spec["gcsFaultToleranceOptions"]
    assert fault_tolerance["redisPassword"] == {"valueFrom": {"secretKeyRef": {"name": "ray-redis", "key": "password"}}}
    assert "nodeSelector" not in spec["headGroupSpec"]["template"]["spec"]
    text = json.dumps(rendered)
    assert '"Secret"' not in text, "secrets are made by others"


def test_more_workers_are_more_pods_and_nothing_else(helm: Helm) -> None:
    """Then KubeRay adds pods, and keeps those that are there; any other change makes the cluster anew."""
    counts = ("replicas", "minReplicas", "maxReplicas")

    def groups(**config: Any) -> list[dict[str, Any]]:
        found = one(helm.template(values=GOOD | {"config": config}), "RayCluster")["spec"]
        return [
            found["headGroupSpec"],
            *({key: value for key, value in each.items() if key not in counts} for each in found["workerGroupSpecs"]),
        ]

    assert groups(decode={"workers": 3}) == groups()
    assert groups(decode={"max_running": 3})[0] != groups()[0]


def test_what_kuberay_starts(rendered: dict[str, list[Manifest]]) -> None:
    found = pods(one(rendered["large"], "RayCluster"), NAMESPACE)
    assert [pod.group for pod in found] == ["head", "router", *["prefill"] * 2, *["decode"] * 6], (
        "two pods for each of three decode workers"
    )
    (line,) = found[-1].spec["containers"][0]["args"]
    assert "; ray start --address=llm-diptych-head-svc.models.svc.cluster.local:6379 --block " in line
    assert "--num-cpus=64 --num-gpus=8 --object-store-memory=83886080 --resources='{\"diptych-decode\": 1}'" in line
    assert "--head" in found[0].spec["containers"][0]["args"][0]


def wrong(**values: Any) -> dict[str, Any]:
    return GOOD | values


WORKER = {"requests": {"cpu": "2"}, "limits": {"cpu": "2", "memory": "4Gi"}}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("no keys", {}, "security.apiKeys.secretName names no secret"),
    ("a misspelled value", wrong(servce={}), "additional properties 'servce' not allowed"),
    ("a misspelled inner value", wrong(model={"claim": "x"}), "additional properties 'claim' not allowed"),
    ("a misspelled section", wrong(config={"decod": {}}), "at '/config': additional properties 'decod' not allowed"),
    ("no such source", wrong(model={"from": "ftp"}), "value must be one of 'image', 'hub', 'pvc', 'objectStore'"),
    ("a hub without a name", wrong(model={"from": "hub"}), "model.source: a model from hub has to be named"),
    ("a path for a hub's name", wrong(model={"from": "hub", "source": "a/b/c"}), "a/b/c is no name of the hub"),
    ("a volume without a claim", wrong(model={"from": "pvc", "source": "x"}), "model.pvc.claimName: the model comes from a volume"),
    ("a store without a secret", wrong(model={"from": "objectStore", "source": "b/m"}), "model.objectStore.secretName: name the secret"),
    ("a cache of one pod", wrong(cache={"type": "pvc", "accessModes": ["ReadWriteOnce"]}), "it has to be ReadWriteMany"),
    ("a key of the chart's", wrong(config={"ray": {"address": "x:1"}}), "config.ray.address is filled in by the chart"),
    ("another", wrong(config={"router": {"host": "::"}}), "config.router.host is filled in by the chart"),
    ("pairs in pods of one phase", wrong(config={"paired": True}), "a pair of workers shares a node of the Ray cluster"),
    ("nobody to read", wrong(config={"prefill": {"workers": 0}, "router": {"local_prefill": "never"}}), "nobody could read a prompt"),
    ("idle prefill workers", wrong(config={"router": {"local_prefill": "always"}}), "set config.prefill.workers to 0"),
    ("nobody to write", wrong(config={"decode": {"workers": 0}}), "nobody could write an answer"),
    ("two faces, one port", wrong(config={"router": {"grpc_port": 8000}}), "both faces would listen on 8000"),
    ("a port for root", wrong(config={"router": {"http_port": 80}}), "has no rights for ports below 1024"),
    ("pods that share unevenly", wrong(config={"decode": {"tp": 3}}, decode={"podsPerWorker": 2}), "they cannot be shared evenly"),
    ("half a CPU", wrong(prefill={"resources": {**WORKER, "limits": {"cpu": "500m", "memory": "1Gi"}}}), "Ray counts whole CPUs"),
    ("no limit of memory", wrong(prefill={"resources": {"limits": {"memory": None}}}), "missing property 'memory'"),
    ("more threads than CPUs", wrong(config={"prefill": {"threads": 4}}), "with config.prefill.threads 4 do not fit"),
    ("GPUs for nobody", wrong(decode={"gpus": 2}), "decode.gpus is 2, and a pod has 1 ranks"),
    ("an authority in no secret", wrong(security={"allowUnauthenticated": True, "tls": {"caKey": "ca.crt"}}), "no secret is named"),
    ("a port of Ray's", wrong(config={"router": {"http_port": 8080}}), "which Ray uses in every pod"),
    ("a state without Redis", wrong(ray={"gcsFaultTolerance": {"enabled": True}}), "has no Redis to keep the state in"),
    ("an Ingress for nothing", wrong(ingress={"enabled": True}), "ingress.host: the Ingress is enabled and has no host"),
    (
        "an Ingress for both",
        wrong(ingress={"enabled": True, "host": "a", "grpc": {"enabled": True, "host": "a"}}),
        "gRPC needs a host of its own",
    ),
    ("routes of no gateway", wrong(gateway={"enabled": True}), "belong to no gateway"),
    (
        "fewer than at the start",
        wrong(autoscaling={"enabled": True, "decode": {"maxWorkers": 1}}, config={"decode": {"workers": 2}}),
        "asks for 2",
    ),
    ("a pod there is not", wrong(supervisorPod="worker"), "value must be one of 'router', 'head'"),
    ("no time for the router to drain", wrong(supervisorPod="head", head={"terminationGracePeriodSeconds": 60}), "head.terminationGrace"),
    ("no time to drain", wrong(pod={"terminationGracePeriodSeconds": 20}), "draining and ending takes up to"),
    ("a long name", wrong(fullnameOverride="x" * 41), "give one of at most 40"),
    ("a name too long for the release", wrong(nameOverride="y" * 38), "give one of at most 40"),
    ("root", wrong(securityContext={"runAsUser": 0}), "minimum: got 0, want 1"),
    ("GPUs for one phase", wrong(prefill={"gpus": 1}), "decode.gpus is 0, and the other phase has GPUs"),
    ("no digest", wrong(image={"digest": "sha256:abc"}), "'sha256:abc' does not match pattern"),
]


def test_what_is_wrong_is_refused_with_a_sentence(helm: Helm) -> None:
    def said(values: dict[str, Any]) -> str:
        try:
            helm.template(values=values)
        except Refused as error:
            return str(error)
        return "nothing"

    helm.template(values=GOOD)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(said, [values for _, values, _ in REFUSED]))
    assert [(what, answer) for (what, _, sentence), answer in zip(REFUSED, answers, strict=True) if sentence not in answer] == []
    assert len(REFUSED) >= 15


def test_the_schema_names_the_config_s_keys() -> None:
    named = json.loads((CHART / "values.schema.json").read_text())["properties"]["config"]["properties"]
    assert set(named) == set(ClusterConfig.model_fields), "a key that is new belongs there too"


def test_the_reference_is_what_the_comments_say() -> None:
    subprocess.run([sys.executable, ROOT / "helm/reference.py", "--check"], check=True, timeout=60)


def test_the_image_is_one_that_the_dockerfile_builds() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    stages = {line.rpartition(" AS ")[2]: number for number, line in enumerate(lines) if line.startswith("FROM ")}
    for target in ("cpu", "cuda"):
        body = lines[stages[target] + 1 :]
        end = next((number for number, line in enumerate(body) if line.startswith("FROM ")), len(body))
        assert [line for line in body[:end] if line.startswith("USER ")] == ["USER 10001:10001"]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    arguments = dict(line.removeprefix("ARG ").split("=") for line in lines if line.startswith("ARG ") and "=" in line)
    assert arguments["PIP_VERSION"] == pins["pip"]
    assert arguments["SETUPTOOLS_VERSION"] == pins["setuptools"]
    rooms = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {room for room in rooms if not (ROOT / room).exists()} == set()
    chart = yaml.safe_load((CHART / "values.yaml").read_text())
    assert chart["ray"]["version"] == pins["ray"]


def test_the_page_installs_the_kuberay_that_the_chart_is_checked_against() -> None:
    wanted = yaml.safe_load((CHART / "Chart.yaml").read_text())["annotations"]["diptych/kuberay"].removeprefix(">=")
    assert f"kuberay-operator --version {wanted}." in (ROOT / "docs/deploy/kubernetes.md").read_text()
