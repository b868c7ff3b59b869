"""`diptych doctor` looks at this host, which is made wrong on purpose: each thing it looks at is seen as it is."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

import pytest
from diptych.cluster.doctor import examining, host, probing
from diptych.cluster.doctor.finding import State
from diptych.cluster.doctor.host import HostFacts
from diptych.core.errors import ConfigError
from doctor_harness import config, fake_program
from http_peer import Handler, serving


def look() -> HostFacts:
    return probing.look(ray=False, gpus=0)


def test_this_host_is_looked_at() -> None:
    facts = look()
    assert facts.packages["torch"]
    assert (facts.memfd, facts.loopback) == (None, None)
    assert facts.disk_free > 0


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert host.judge_compiler(look()).state is State.NOTE
    fake_program(tmp_path, "g++", "")
    assert host.judge_compiler(look()).said == str(tmp_path / "g++")


def test_few_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        assert host.judge_files(look()).state is State.NOTE
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_memory_that_cannot_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> int:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "memfd_create", refuse)
    assert look().memfd == "Operation not permitted"


def test_a_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "PACKAGES", ("diptych", "nobody-has-written-it"))
    finding = host.judge_packages(look())
    assert (finding.state, finding.said) == (State.WRONG, "nobody-has-written-it is not installed.")
    with pytest.raises(ConfigError, match="nobody-has-written-it"):
        examining.before_up(config(tmp_path))


elsewhere = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="a host made wrong takes root and unshare")


def found_elsewhere(prepare: str, *namespaces: str) -> dict[str, tuple[str, str]]:
    """State and words of each check, on this host with namespaces of its own and what the shell then does to them."""
    probe = (
        "from diptych.cluster.doctor import probing, host; from diptych.core.transfer import Transport; "
        "facts = probing.look(ray=True, gpus=0); "
        "found = [host.judge_shared_memory(facts, ray=True), host.judge_disk(facts), host.judge_address(facts, joined=True), "
        "host.judge_clock(facts), *host.judge_transports((Transport.GLOO,), facts, hands_over=True)]; "
        "import json; print(json.dumps({f.check: (f.state, f.said) for f in found}))"
    )
    script = f'{prepare} && exec "{sys.executable}" -P -c "{probe}"'
    command = ["unshare", *namespaces, "sh", "-c", script] if namespaces else ["sh", "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "unshare failed" in ran.stderr or "permission denied" in ran.stderr.lower():
        pytest.skip("no namespaces here")
    assert ran.returncode == 0, ran.stderr
    told: dict[str, tuple[str, str]] = json.loads(ran.stdout)
    return told


@pytest.mark.root
@elsewhere
def test_a_host_with_little_room_a_name_for_itself_alone_and_no_network(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("127.0.1.1 alone\n")
    disk = tmp_path / "disk"
    disk.mkdir()
    found = found_elsewhere(
        f"mount -t tmpfs -o size=1m none /dev/shm && mount -t tmpfs -o size=8m none {disk} && export DIPTYCH_HOME={disk} "
        f"&& mount --bind {tmp_path}/hosts /etc/hosts && hostname alone",
        "--mount", "--uts", "--net",
    )  # fmt: skip
    assert {check: state for check, (state, _) in found.items() if check != "clock"} == {
        "shared memory": "wrong", "disk": "note", "address": "note", "transports": "wrong",
    }  # fmt: skip
    assert "127.0.1.1" in found["address"][1]
    assert "no connection can be made" in found["transports"][1]


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize(("status", "kind"), [("0x40", "note"), ("0", "ok")])
def test_a_clock_that_nobody_sets(tmp_path: Path, status: str, kind: str) -> None:
    """The system's word on its clock, spoken by a library that is loaded before it."""
    shim = f"#include <sys/timex.h>\nint adjtimex(struct timex *t) {{ t->status = {status}; return 0; }}\n"
    subprocess.run(["cc", "-shared", "-fPIC", "-xc", "-", "-o", str(tmp_path / "clock.so")], input=shim, text=True, check=True)
    assert found_elsewhere(f"export LD_PRELOAD={tmp_path}/clock.so")["clock"][0] == kind


@contextmanager
def peer_with_a_clock(ahead_s: float) -> Iterator[str]:
    class Peer(Handler):
        def do_GET(self) -> None:
            self.answer(200, Date=formatdate(time.time() + ahead_s, usegmt=True))

    with serving(Peer) as address:
        yield address


@pytest.mark.parametrize(("ahead_s", "kind"), [(0.0, State.OK), (30.0, State.NOTE), (-3600.0, State.WRONG)])
def test_a_peer_whose_clock_is_wrong(ahead_s: float, kind: State) -> None:
    with peer_with_a_clock(ahead_s) as address:
        clocks = probing.clock_of(address)
    assert clocks is not None
    assert host.judge_skew("the peer", *clocks).state is kind


def test_a_peer_that_is_not_there_has_no_clock() -> None:
    assert probing.clock_of("127.0.0.1:9") is None
