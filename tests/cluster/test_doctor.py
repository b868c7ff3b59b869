"""`diptych doctor`: each check fires on a host that is made wrong on purpose, or over what a wrong one would say."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_harness import Start
from diptych.cluster.doctor import command, examining, host, probing
from diptych.cluster.doctor.examining import judge_fleet
from diptych.cluster.doctor.finding import Finding, State
from diptych.cluster.doctor.host import HostFacts
from diptych.cluster.doctor.links import Link, judge_link, pairs
from diptych.cluster.process import processes
from diptych.cluster.supervising import state
from diptych.core.errors import ConfigError, Unavailable
from diptych.core.fleet import Fleet, Member, Phase
from diptych.core.layout import Layout
from diptych.core.transfer import Transport
from doctor_harness import config, examined

GOOD = HostFacts(
    cores=4,
    packages={"torch": "2.13.0"},
    compiler="/usr/bin/c++",
    shm_free=1 << 30,
    disk_free=100 << 30,
    open_files=1 << 16,
    clock_synchronised=True,
    address="10.0.0.1",
    disk="/",
)
BOTH = (Transport.SHM, Transport.GLOO)


def but(**changes: Any) -> HostFacts:
    return dataclasses.replace(GOOD, **changes)


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_a_good_host_is_found_good() -> None:
    found = [
        host.judge_packages(GOOD),
        host.judge_compiler(GOOD),
        host.judge_shared_memory(GOOD, ray=True),
        host.judge_files(GOOD),
        host.judge_disk(GOOD),
        host.judge_clock(GOOD),
        host.judge_address(GOOD, joined=True),
        *host.judge_transports(BOTH, GOOD, hands_over=True),
    ]
    assert [finding.check for finding in found if finding.state is not State.OK] == []


@pytest.mark.parametrize(
    ("finding", "kind", "says"),
    [
        (host.judge_packages(but(packages={"torch": None, "ray": "2"})), State.WRONG, "torch is not installed"),
        (host.judge_compiler(but(compiler=None)), State.NOTE, "no C++ compiler"),
        (host.judge_shared_memory(but(shm_free=1 << 20), ray=True), State.WRONG, "1 MiB free"),
        (host.judge_shared_memory(but(shm_free=None), ray=True), State.WRONG, "no /dev/shm"),
        (host.judge_shared_memory(but(shm_free=None), ray=False), State.OK, "Without Ray"),
        (host.judge_files(but(open_files=256)), State.NOTE, "256 files"),
        (host.judge_disk(but(disk_free=1 << 20)), State.NOTE, "0.0 GiB free"),
        (host.judge_clock(but(clock_synchronised=False)), State.NOTE, "nobody sets"),
        (host.judge_address(but(address="127.0.1.1"), joined=True), State.NOTE, "no other host reaches it"),
        (host.judge_skew("b", 1000.0, 1000.4), State.OK, "within a second"),
        (host.judge_skew("b", 1000.0, 1005.0), State.NOTE, "5.0 s ahead"),
        (host.judge_skew("b", 1000.0, 100.0), State.WRONG, "900.0 s behind"),
    ],
)
def test_what_is_wrong_is_found_and_what_mends_it_said(finding: Finding, kind: State, says: str) -> None:
    assert finding.state is kind
    assert says in finding.said
    assert bool(finding.mend) == (kind is not State.OK)


@pytest.mark.parametrize(
    ("transports", "facts", "kind", "says"),
    [
        (BOTH, but(memfd="Operation not permitted"), State.NOTE, "over gloo alone"),
        ((Transport.SHM,), but(memfd="Operation not permitted"), State.WRONG, "computed again"),
        (BOTH, but(memfd="x", loopback="y"), State.WRONG, "No KV could move"),
        ((Transport.GLOO,), but(memfd="x"), State.OK, "gloo"),
    ],
)
def test_transports_that_cannot_work(transports: tuple[Transport, ...], facts: HostFacts, kind: State, says: str) -> None:
    finding = only(host.judge_transports(transports, facts, hands_over=True))
    assert finding.state is kind
    assert says in finding.said
    assert finding.field == ("transfer.transports" if kind is State.WRONG else None)
    assert only(host.judge_transports(transports, facts, hands_over=False)).state is State.OK


# The whole, as the command and as `up` make it.


def test_nothing_is_wrong_here(tmp_path: Path) -> None:
    assert [finding for finding in examined(config(tmp_path)).values() if finding.state is State.WRONG] == []


@pytest.mark.parametrize("port", ["http_port", "grpc_port"])
def test_a_port_that_is_taken(tmp_path: Path, port: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = examined(config(tmp_path, router={"http_port": 0, "grpc_port": 0, port: taken.getsockname()[1]}))
    assert (found["ports"].state, found["ports"].field) == (State.WRONG, f"router.{port}")


def test_a_model_that_is_not_there_or_damaged(tmp_path: Path) -> None:
    assert examined(config(tmp_path, model={"source": str(tmp_path / "none")}))["model"].state is State.WRONG
    good = config(tmp_path)
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert "tokenizer.json" in examined(good)["model"].said
    (tmp_path / "model" / "model.json").write_text("{")
    for card in (tmp_path / "model").glob("*.json"):
        card.write_text("{")
    assert "damaged" in examined(good)["model"].said


def test_more_memory_than_there_is(tmp_path: Path) -> None:
    found = examined(config(tmp_path, decode={"kv_tokens": 1 << 40}))
    assert (found["memory"].state, found["memory"].field) == (State.WRONG, "decode.kv_tokens")


def test_a_ray_that_does_not_answer(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    assert examined(config(tmp_path, ray={"address": address}))["Ray"].field == "ray.address"


def test_more_threads_than_cores_are_noted(tmp_path: Path) -> None:
    found = examining.examine(config(tmp_path, decode={"threads": 4096}), None)
    noted = [finding.said for finding in found if (finding.check, finding.state) == ("settings", State.NOTE)]
    assert any("they will slow each other down" in said for said in noted), noted


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"router": {"host": "0.0.0.0", "http_port": 0, "grpc_port": 0}}, "security.api_keys"),
        ({"security": {"tls": {"cert": "none.pem", "key": "none.key"}}}, "security.tls"),
    ],
)
def test_what_up_would_not_leave_open(tmp_path: Path, sections: dict[str, Any], field: str) -> None:
    finding = examined(config(tmp_path, **sections))["security"]
    assert (finding.state, finding.field) == (State.WRONG, field)


def test_up_refuses_what_could_not_move_kv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shm = config(tmp_path, transfer={"transports": ["shm"]})
    assert examining.before_up(shm) == [said for said in examining.before_up(shm) if "compiler" in said], (
        "a good host, perhaps without compiler"
    )
    monkeypatch.setattr(probing, "_try_memfd", lambda: "Operation not permitted")
    with pytest.raises(ConfigError, match="No KV could move") as refused:
        examining.before_up(shm)
    assert refused.value.field == "transfer.transports"
    assert any("over gloo alone" in said for said in examining.before_up(config(tmp_path)))
    colocated = config(tmp_path, prefill={"workers": 0}, router={"local_prefill": "always"}, transfer={"transports": ["shm"]})
    assert not any("KV" in said for said in examining.before_up(colocated)), "no KV is to move"


def test_the_command_says_what_is_wrong_and_fails(tmp_path: Path) -> None:
    wrong = tmp_path / "cluster.yaml"
    wrong.write_text("router: {htp_port: 1}\n")
    command = [sys.executable, "-P", "-m", "diptych.cluster.cli", "doctor", "-f", str(wrong)]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    plain = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert plain.returncode == 1
    assert "Did you mean http_port?" in plain.stdout
    assert "1 of 1 checks found something wrong." in plain.stdout
    told = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert json.loads(told.stdout)[0]["field"] == "router.htp_port"


def test_up_ends_if_no_kv_moves_between_its_workers(start: Start, orders: Path) -> None:
    (orders / "no-kv-moves").touch()
    with start() as cluster:
        assert cluster.wait() == 2
    assert "prefill-0 → decode-0: No KV moves." in cluster.output
    assert "Ctrl-C ends it." not in cluster.output, "it never said that it serves"


# A running cluster.


def running(**changes: Any) -> state.ClusterState:
    processes = tuple(state.Started(name=name, pid=1) for name in ("router", "prefill-0", "decode-0"))
    values = {"name": "x", "id": "i", "pid": os.getpid(), "started": 1, "scratch": Path("/"), "logs": Path("/logs"), "model": "m"}
    return state.ClusterState.model_validate({**values, "processes": processes, **changes})


def test_a_supervisor_that_is_gone(tmp_path: Path) -> None:
    assert only(examining.examine_cluster(running(), config(tmp_path), BOTH)).state is State.WRONG


def test_a_cluster_that_is_starting_and_a_router_that_does_not_answer(tmp_path: Path) -> None:
    ours = running(started=processes.start_ticks(os.getpid()))
    finding = only(examining.examine_cluster(ours, config(tmp_path), BOTH))
    assert (finding.check, finding.state) == ("cluster", State.NOTE)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    serves = ours.model_copy(update={"ready": True, "http": address, "grpc": address, "control": address})
    finding = only(examining.examine_cluster(serves, config(tmp_path), BOTH))
    assert (finding.check, finding.state) == ("router", State.WRONG)


def test_a_worker_nobody_hears() -> None:
    finding = judge_fleet(Fleet(3), (), running())
    assert finding.state is State.WRONG
    assert "decode-0, prefill-0" in finding.said


def member(phase: Phase, number: int) -> Member:
    return Member(f"{phase}-{number}", "a", phase, number, Layout("f", (), 16, ()), 100)


@pytest.mark.parametrize(("prefills", "decodes"), [(1, 1), (2, 3), (3, 2), (0, 2), (2, 0)])
def test_every_pair_is_tried_once(prefills: int, decodes: int) -> None:
    members = [*(member(Phase.PREFILL, n) for n in range(prefills)), *(member(Phase.DECODE, n) for n in range(decodes))]
    tried = [(a.worker_id, b.worker_id) for a, b in pairs(members)]
    assert len(tried) == len(set(tried)) == prefills * decodes


def test_after_a_change_only_pairs_with_a_new_worker_are_tried() -> None:
    tried = pairs([member(phase, n) for phase in Phase for n in range(3)], joined={"decode-2"})
    assert sorted((a.worker_id, b.worker_id) for a, b in tried) == [(f"prefill-{n}", "decode-2") for n in range(3)]


def test_of_too_many_pairs_every_worker_is_in_one() -> None:
    members = [member(phase, n) for phase in Phase for n in range(20)]
    tried = pairs(members, most=20)
    assert len({a.worker_id for a, _ in tried}) == len({b.worker_id for _, b in tried}) == 20


@pytest.mark.parametrize(
    ("link", "kind"),
    [
        (Link("p", "d", None, "shm", 1000, 0.001), State.OK),
        (Link("p", "d", None, "gloo", 1000, 0.001), State.NOTE),
        (Link("p", "d", None, "shm", 0, 0.0), State.WRONG),
        (Link("p", "d", "no transport"), State.WRONG),
        (Link("p", "d", busy=True), State.NOTE),
    ],
)
def test_a_link_is_judged(link: Link, kind: State) -> None:
    finding = judge_link(link, BOTH)
    assert finding.state is kind
    assert finding.check == "link p → d"


@pytest.mark.parametrize(
    ("transports", "says"),
    [
        (BOTH, "Between hosts gloo is needed, and"),
        ((Transport.CUDA_IPC, Transport.NCCL), "nccl is needed, .* NCCL_SOCKET_IFNAME names, and"),
    ],
)
def test_a_link_that_fails_is_told_what_it_takes_between_hosts(transports: tuple[Transport, ...], says: str) -> None:
    assert re.search(says, judge_link(Link("p", "d", "no transport"), transports).mend)


# All of them.

HERE, HOST, GPUS = "test_doctor.py", "test_doctor_host.py", "test_doctor_gpus.py"
FIRES = {
    "GPUs": f"{GPUS} test_gpus_that_are_wrong",
    "NCCL": f"{GPUS} test_drivers_and_versions",
    "Ray": f"{HERE} test_a_ray_that_does_not_answer",
    "address": f"{HOST} test_a_host_with_little_room_a_name_for_itself_alone_and_no_network",
    "clock": f"{HOST} test_a_clock_that_nobody_sets",
    "cluster": f"{HERE} test_a_supervisor_that_is_gone",
    "compiler": f"{HOST} test_no_compiler",
    "config": f"{HERE} test_the_command_says_what_is_wrong_and_fails",
    "device": f"{GPUS} test_gpus_that_auto_passes_over_are_named",
    "disk": f"{HOST} test_a_host_with_little_room_a_name_for_itself_alone_and_no_network",
    "doctor": f"{HERE} test_what_ends_the_examination_is_a_finding_too",
    "driver": f"{GPUS} test_gpus_that_are_wrong",
    "kernels": f"{GPUS} test_what_compiles_kernels_for_gpus_is_missing",
    "link": f"{HERE} test_up_ends_if_no_kv_moves_between_its_workers",
    "memory": f"{HERE} test_more_memory_than_there_is",
    "model": f"{HERE} test_a_model_that_is_not_there_or_damaged",
    "open files": f"{HOST} test_few_files",
    "packages": f"{HOST} test_a_package_that_is_missing",
    "ports": f"{HERE} test_a_port_that_is_taken",
    "router": f"{HERE} test_a_cluster_that_is_starting_and_a_router_that_does_not_answer",
    "security": f"{HERE} test_what_up_would_not_leave_open",
    "settings": f"{HERE} test_more_threads_than_cores_are_noted",
    "shared memory": f"{HOST} test_a_host_with_little_room_a_name_for_itself_alone_and_no_network",
    "transports": f"{HOST} test_a_host_with_little_room_a_name_for_itself_alone_and_no_network",
    "workers": f"{HERE} test_a_worker_nobody_hears",
}
"""Each check, and a test in which it fires on what was made wrong on purpose. (A GPU's own is named after it, a link after its pair.)"""


def test_each_check_is_seen_to_fire() -> None:
    sources = [path.read_text() for path in Path(examining.__file__).parent.glob("*.py")]
    checks = {name for source in sources for name in re.findall(r'(?:wrong|note|ok|_tried)\(\s*f?"([^"]+)"', source)}
    assert {check.partition(" {")[0] for check in checks} | {"link"} == FIRES.keys()
    for shown in FIRES.values():
        file, test = shown.split()
        assert f"def {test}(" in Path(__file__).with_name(file).read_text(), shown


def test_a_model_that_is_still_to_be_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path))
    finding = examined(config(tmp_path, model={"source": "nobody/has-prepared-it"}))["model"]
    assert (finding.state, finding.mend) == (State.NOTE, "`diptych up` does that, or `diptych prepare` beforehand.")


def test_what_ends_the_examination_is_a_finding_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> Iterator[Finding]:
        yield from ()
        raise Unavailable("The router went away.")

    monkeypatch.setattr(examining, "examine", lost)
    *_, last = command._findings(None, {})
    assert (last.check, last.state, last.said) == ("doctor", State.WRONG, "The router went away.")
