"""Pods as local processes, in place of the kubelet: every container with its command, environment, mounts, user and rights.

A pod has a host of its own (`hosts.Host`: network, mount, IPC and UTS namespaces, an address) and a process namespace. A container has a
root of its own, this machine's files under an overlay, with the pod's volumes mounted at the paths its spec says, read-only if its spec
says so. What is left out: images (the files are this machine's), limits of CPU and memory, seccomp. Needs root.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from charts import ROOT as REPOSITORY
from cluster_harness import wait_for
from hosts import Host
from kuberay import PodSpec

PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""In place of the image's."""
PROBE_S = 5.0
SANDBOX = (
    'mount --make-rprivate / && mount -t proc proc /proc && hostname "$1" && ip route replace default dev eth0 && echo ready && exec cat'
)
ROOT = """
set -e
mkdir -p "$1/upper/etc" "$1/work" "$1/root"
cp "$1/hosts" "$1/upper/etc/hosts"
echo nameserver 127.0.0.1 > "$1/upper/etc/resolv.conf"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
mount -t proc proc "$1/root/proc"
mount --rbind /dev "$1/root/dev"
mount --rbind /sys "$1/root/sys"
"""


@dataclass(frozen=True)
class Site:
    """What a cluster has around pods. `secrets` and `config_maps`: name → key → text; `claims`: name → directory; `names`: of hosts →
    address."""

    directory: Path
    names: Mapping[str, str]
    secrets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    config_maps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    claims: Mapping[str, Path] = field(default_factory=dict)


class Container:
    """One container of a running pod. Its `root` is in the pod's mount namespace."""

    def __init__(self, pod: Pod, spec: dict[str, Any]) -> None:
        self.pod, self.spec = pod, spec
        self.directory = pod.directory / spec["name"]
        self.directory.mkdir(parents=True)
        self.log = self.directory / "log"
        self.starts = 0
        self._running: subprocess.Popen[bytes] | None = None
        self._make_root()

    def _make_root(self) -> None:
        names = {"localhost": "127.0.0.1", self.pod.spec.name: self.pod.host.address, **self.pod.site.names}
        (self.directory / "hosts").write_text("".join(f"{address} {name}\n" for name, address in names.items()))
        above = [f'"$1/root{directory}"' for directory in Path(sys.executable).resolve().parents]
        lines = [ROOT, f"chmod o+x {' '.join(above)}"]  # the interpreter may be in a directory of root's
        for mount in self.spec["volumeMounts"]:
            source, target = self.pod.volume(mount["name"]), f'"$1/root{mount["mountPath"]}"'
            lines += [f"mkdir -p {target}", f"mount --bind {source} {target}"]
            lines += [f"mount -o remount,bind,ro {target}"] if mount.get("readOnly") else []
        for directory in (REPOSITORY, Path(sys.prefix)):  # which may be on disks of their own, or below /tmp, where a volume is
            lines += [f'mkdir -p "$1/root{directory}"', f'mount --bind {directory} "$1/root{directory}"']
        lines += ['mount -o remount,bind,ro "$1/root"'] if self.spec["securityContext"]["readOnlyRootFilesystem"] else []
        subprocess.run([*self.pod.inside(), "sh", "-c", "\n".join(lines), "sh", str(self.directory)], check=True, timeout=20)

    def command(self, *words: str) -> list[str]:
        """To run `words` in it, as its user, with its environment and no rights."""
        user = self.pod.spec.spec["securityContext"]
        rights = ["--clear-groups", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]
        who = ["setpriv", f"--reuid={user['runAsUser']}", f"--regid={user['runAsGroup']}", *rights]
        environment = [f"{name}={value}" for name, value in self._environment().items()]
        return [*self.pod.inside(), "chroot", str(self.directory / "root"), *who, "env", "-i", "-C", "/tmp", *environment, *words]

    def _environment(self) -> dict[str, str]:
        found = {"PATH": PATH, "HOSTNAME": self.pod.spec.name}
        for each in self.spec.get("env", []):
            reference = each.get("valueFrom", {}).get("secretKeyRef")
            found[each["name"]] = self.pod.site.secrets[reference["name"]][reference["key"]] if reference else each["value"]
        return found

    def start(self) -> None:
        self.starts += 1
        with self.log.open("ab") as log:
            words = [*self.spec.get("command", []), *self.spec.get("args", [])]
            self._running = subprocess.Popen(self.command(*words), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def run(self, within_s: float) -> None:
        """To its end, as an init container."""
        self.start()
        assert self.wait(within_s) == 0, self.log.read_text()

    def wait(self, within_s: float) -> int:
        """Until it ends by itself; its exit status."""
        assert self._running is not None
        return self._running.wait(within_s)

    @property
    def runs(self) -> bool:
        return self._running is not None and self._running.poll() is None

    def execute(self, *words: str, within_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """`kubectl exec`."""
        return subprocess.run(self.command(*words), capture_output=True, text=True, timeout=within_s, check=False)

    def passes(self, probe: str) -> bool:
        """A probe of its spec, once. Startup and liveness are not told from each other here: a container is restarted when it ends."""
        get = self.spec[probe]["httpGet"]
        port = get["port"] if isinstance(get["port"], int) else self.port(get["port"])
        try:
            with urllib.request.urlopen(f"http://{self.pod.host.address}:{port}{get['path']}", timeout=PROBE_S) as answer:
                return bool(200 <= answer.status < 400)
        except (urllib.error.URLError, OSError):
            return False

    def port(self, name: str) -> int:
        return int(next(port["containerPort"] for port in self.spec["ports"] if port["name"] == name))

    def end(self, within_s: float) -> str:
        """preStop, SIGTERM, and after `within_s` SIGKILL; what preStop said."""
        said, until = "", time.monotonic() + within_s
        if hook := self.spec.get("lifecycle", {}).get("preStop"):
            done = self.execute(*map(str, hook["exec"]["command"]), within_s=within_s)
            said = done.stdout + done.stderr
            assert done.returncode == 0, said
        if self._running is not None:
            for child in _children(self._running.pid):
                os.kill(child, signal.SIGTERM)
            self._running.wait(max(1.0, until - time.monotonic()))
        return said

    def kill(self) -> None:
        """Its first process dies; `Pod.tend` starts it again."""
        assert self._running is not None
        for child in _children(self._running.pid):
            os.kill(child, signal.SIGKILL)
        self._running.wait(20)

    def close(self) -> None:
        if self._running is not None:
            self._running.wait(20)


class Pod:
    """A running pod; `kill` or `end` it."""

    def __init__(self, spec: PodSpec, host: Host, site: Site, number: int) -> None:
        self.spec, self.host, self.site = spec, host, site
        self.directory = site.directory / f"{spec.name}-{number}"
        self._uid = spec.spec["securityContext"]["runAsUser"]
        self._pause = subprocess.Popen(
            [*host.prefix, "unshare", "--mount", "--pid", "--fork", "--kill-child=SIGKILL", "sh", "-c", SANDBOX, "sh", spec.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._pause.stdout is not None
        assert self._pause.stdout.readline() == b"ready\n"
        (self._first,) = _children(self._pause.pid)
        self._volumes = {volume["name"]: volume for volume in spec.spec["volumes"]}
        self.containers: dict[str, Container] = {}

    def start(self, init_s: float) -> None:
        for spec in self.spec.spec.get("initContainers", []):
            Container(self, spec).run(init_s)
        for spec in self.spec.spec["containers"]:
            self.containers[spec["name"]] = Container(self, spec)
        for container in self.containers.values():
            container.start()

    def inside(self) -> list[str]:
        """Runs a command in its namespaces."""
        return ["nsenter", f"--target={self._first}", "--mount", "--ipc", "--uts", "--net", "--pid", "--"]

    def volume(self, name: str) -> Path:
        """Where the volume is on this machine."""
        volume, directory = self._volumes[name], self.directory / "volumes" / name
        if volume.get("emptyDir", {}).get("medium") == "Memory":
            return Path("/dev/shm")  # the host's own
        if claim := volume.get("persistentVolumeClaim"):
            return self.site.claims[claim["claimName"]]
        directory.mkdir(parents=True, exist_ok=True)
        texts = self.site.config_maps[volume["configMap"]["name"]] if "configMap" in volume else {}
        texts = self.site.secrets[volume["secret"]["secretName"]] if "secret" in volume else texts
        for key, text in texts.items():
            (directory / key).write_text(text)
        for path in (directory, *directory.iterdir()):
            os.chown(path, self._uid, self._uid)
        return directory

    def tend(self) -> None:
        """Start again what has ended, as restartPolicy Always does."""
        for container in self.containers.values():
            if not container.runs:
                container.start()

    def ready(self, names: Iterable[str] = ()) -> bool:
        """Whether these containers are, by default all."""
        return all(self.containers[name].runs and self.containers[name].passes("readinessProbe") for name in names or self.containers)

    def until_ready(self, names: Iterable[str], within_s: float) -> None:
        """Tend the pod meanwhile; fails with its logs."""

        def is_ready() -> bool:
            self.tend()
            return self.ready(names)

        try:
            wait_for(f"{self.spec.name} is ready", slowly(is_ready), within_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def end(self) -> list[str]:
        """As the API server ends a pod: preStop of each container, SIGTERM, and what is left is killed."""
        grace = float(self.spec.spec["terminationGracePeriodSeconds"])
        said = [container.end(grace) for container in reversed(self.containers.values())]
        self.kill()
        return said

    def kill(self) -> None:
        """At once: its first process ends, and with it all others."""
        if self._pause.poll() is None:
            os.kill(self._first, signal.SIGKILL)
            self._pause.wait(20)
        for container in self.containers.values():
            container.close()
        for stream in (self._pause.stdin, self._pause.stdout):
            assert stream is not None
            stream.close()

    def logs(self) -> str:
        return "".join(
            f"--- {self.spec.name} {name} (started {each.starts} times)\n{each.log.read_text()[-3000:]}\n"
            for name, each in self.containers.items()
        )


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def slowly(condition: Callable[[], bool], every_s: float = 1.0) -> Callable[[], bool]:
    """Asked at most so often, as a kubelet probes."""
    last = [-every_s]

    def ask() -> bool:
        if time.monotonic() - last[0] < every_s:
            return False
        last[0] = time.monotonic()
        return condition()

    return ask


def matches(pod: Pod, selector: Mapping[str, str]) -> bool:
    return selector.items() <= pod.spec.labels.items()


def endpoint(service: dict[str, Any], pods: list[Pod], port: str, within_s: float = 60.0) -> str:
    """host:port behind a Service's port: that of a pod it selects, once it is ready. (A kubelet forgives a probe or two that come late.)"""
    (pod,) = (pod for pod in pods if matches(pod, service["spec"]["selector"]))
    pod.until_ready((), within_s)
    target = next(each["targetPort"] for each in service["spec"]["ports"] if each["name"] == port)
    (number,) = (each.port(target) for each in pod.containers.values() if any(p["name"] == target for p in each.spec.get("ports", [])))
    return f"{pod.host.address}:{number}"
