"""`diptych up --address` over two hosts with a Ray node each: KV crosses between them, workers join, and a host that dies is survived."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cluster_harness import Cluster, running, wait_for
from hosts import Host, hosts, missing

RAY = str(Path(sys.executable).with_name("ray"))
UP_S = 150.0
PORT = 6379
PROMPT = "the thin man and the other thing in the inn; then another one, and the end of it all there"
pytestmark = [pytest.mark.root, pytest.mark.skipif(missing() is not None, reason=missing() or "")]


@contextmanager
def directories(*names: str) -> Iterator[list[Path]]:
    """Short paths: one to a Unix socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="d") as root:
        made = [Path(root, name) for name in names]
        for path in made:
            path.mkdir()
        yield made


class Site:
    """Hosts that share the source of a model and nothing else: a disk of its own for Ray, and one for prepared models, on each."""

    def __init__(self, ray: Path, home: Path, run: Path) -> None:
        self.ray, self.home, self.run = ray, home, run
        self.environment = {
            "DIPTYCH_HOME": str(home),
            "XDG_RUNTIME_DIR": str(run),
            "PYTHONSAFEPATH": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_prestart_worker_first_driver": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }

    def start_ray(self, host: Host, cpus: int, head: Host) -> None:
        for disk in (self.ray, self.home):
            subprocess.run([*host.prefix, "mount", "-t", "tmpfs", "tmpfs", str(disk)], check=True, timeout=20)
        where = (
            ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={self.ray}"]
            if host is head
            else [f"--address={head.address}:{PORT}"]
        )
        limits = [f"--num-cpus={cpus}", "--object-store-memory=83886080", f"--node-ip-address={host.address}"]
        command = [*host.prefix, RAY, "start", *where, *limits]
        environment = {**os.environ, **self.environment}
        started = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
        assert started.returncode == 0, started.stdout + started.stderr

    def diptych(self, host: Host, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*host.prefix, sys.executable, "-m", "diptych.cluster.cli", *arguments]
        environment = {**os.environ, **self.environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=UP_S, check=False)
        assert done.returncode == 0, done.stderr
        return done

    def begin(self, host: Host, *arguments: str) -> subprocess.Popen[bytes]:
        command = [*host.prefix, sys.executable, "-m", "diptych.cluster.cli", *arguments]
        # Without a buffer: `communicate` would leave out what had been read into one.
        return subprocess.Popen(command, env={**os.environ, **self.environment}, stdout=subprocess.PIPE, bufsize=0)

    def prepared(self, host: Host) -> list[str]:
        """The models on the host's own disk."""
        disk = Path(f"/proc/{host.holder}/root{self.home}/models")
        return sorted(path.name for path in disk.iterdir()) if disk.exists() else []


def site_of(cluster: Cluster, worker: str) -> str:
    """The host a worker has last said it listens on."""
    return re.findall(rf"{worker} is ready at ([\d.]+):", cluster.output)[-1]


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_cluster_over_two_hosts_hands_over_grows_and_survives_one(tiny_llama_source: Path, tmp_path: Path) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text(
        f"model: {{source: {tiny_llama_source}, dtype: float32}}\n"
        "prefill: {threads: 1, kv_tokens: 2048}\n"
        "decode: {threads: 1, kv_tokens: 2048}\n"
        "router: {http_port: 0, grpc_port: 0}\n"
        "ray: {placement: spread}\n"
    )
    with hosts("one", "two") as (_, one, two), directories("ray", "home", "run") as disks:
        site = Site(*disks)
        site.start_ray(one, 3, one)
        site.start_ray(two, 2, one)
        argv = ["-m", "diptych.cluster.cli", "up", "-f", str(config), "--address", f"{one.address}:{PORT}"]
        with running(argv, site.environment, prefix=one.prefix) as cluster:
            cluster.expect("Ctrl-C ends it.", UP_S)
            assert (site_of(cluster, "prefill-0"), site_of(cluster, "decode-0")) == (one.address, two.address)
            assert len(site.prepared(one)) == 1
            assert site.prepared(one) == site.prepared(two), "prepared on each"
            assert f"decode-0: writing weights on {two.address}" in cluster.output

            before = two.received
            answer = site.diptych(one, "generate", PROMPT, "--max-tokens", "12", "-t", "0", "--stats")
            moved = re.search(r"KV moved +([\d,]+) bytes in .* over gloo", answer.stderr)
            assert moved, answer.stderr
            assert two.received - before > int(moved[1].replace(",", ""))
            assert "MB over gloo" in site.diptych(one, "status").stdout
            log = Path(str(cluster.state()["logs"]), "decode-0.log").read_text()
            assert "KV comes from prefill-0 over gloo" in log, "its log is here, though it runs there"

            site.diptych(one, "scale", "--decode", "2")
            assert site_of(cluster, "decode-1") == one.address
            assert "1 prefill workers, 2 decode workers" in site.diptych(one, "status").stdout

            begun = [site.begin(one, "generate", PROMPT, "--max-tokens", "700", "-t", "0") for _ in range(4)]
            firsts = [process.stdout.read(1) for process in begun if process.stdout]
            two.crash()
            ends = [first + process.communicate(timeout=UP_S)[0] for first, process in zip(firsts, begun, strict=True)]
            assert [process.returncode for process in begun] == [0] * 4
            assert len(set(ends)) == 1, "those that were being written there go on elsewhere, token for token"
            for _ in range(5):
                again = site.diptych(one, "generate", PROMPT, "--max-tokens", "12", "-t", "0", "--stats")
                assert again.stdout == answer.stdout
            assert "decode-1" in again.stderr
            wait_for("it on the other host", lambda: cluster.output.count("decode-0 is ready") == 2, UP_S)
            assert site_of(cluster, "decode-0") == one.address
            assert cluster.end() == 0
