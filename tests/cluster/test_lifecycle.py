"""Start, restart and end of a cluster of fake programs: what is shown, what the router is told, and that nothing is left."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from cluster_harness import (
    Start,
    fleets,
    killed_at_once,
    nothing_left,
    pid_of,
    scaled,
    shared_memory,
    sockets_below,
    wait_for,
)
from diptych.cluster.process import processes
from diptych.cluster.supervising.control import ask
from diptych.core.errors import ConfigError, Unavailable
from diptych.core.fleet import Phase


def test_up_shows_each_process_and_the_addresses_and_ends_cleanly(start: Start, orders: Path, tmp_path: Path) -> None:
    with start() as cluster:
        cluster.expect("Ctrl-C ends it.")
        state = cluster.state()
        assert {process["name"] for process in state["processes"]} == {"router", "prefill-0", "decode-0"}  # type: ignore[attr-defined]
        assert state["ready"] is True
        assert cluster.end(signal.SIGINT) == 0
    for expected in ("prefill-0 is ready", "decode-0 is ready", "router is ready", "curl -N http://127.0.0.1:", "no chat template"):
        assert expected in cluster.output
    version, members = fleets(orders)[-1] if fleets(orders)[-1][1] else fleets(orders)[-2]
    assert version >= 1
    assert set(members) <= {"prefill-0", "decode-0"}
    assert nothing_left(state)
    assert not (tmp_path / "run" / "diptych").exists()


def test_versions_rise_and_a_worker_that_dies_comes_back_as_another_incarnation(start: Start, orders: Path) -> None:
    with start() as cluster:
        cluster.expect("Ctrl-C ends it.")
        told = len(fleets(orders))
        first = fleets(orders)[-1][1]["decode-0"]
        os.kill(pid_of(orders, "decode-0"), signal.SIGKILL)
        cluster.expect("decode-0 was ended by signal 9")
        cluster.expect("Starting it again in 0.1 s")
        wait_for("another incarnation", lambda: fleets(orders)[-1][1].get("decode-0", first) != first)
        assert any("decode-0" not in members for _, members in fleets(orders)[told:])
        versions = [version for version, _ in fleets(orders)]
        assert versions == list(range(1, len(versions) + 1))
        assert cluster.end() == 0


def test_a_router_that_dies_comes_back_and_is_told_the_fleet(start: Start, orders: Path) -> None:
    with start() as cluster:
        cluster.expect("Ctrl-C ends it.")
        told = len(fleets(orders))
        os.kill(pid_of(orders, "router"), signal.SIGKILL)
        cluster.expect("router was ended by signal 9")
        wait_for("the fleet again", lambda: len(fleets(orders)) > told and len(fleets(orders)[-1][1]) == 2)
        assert cluster.end() == 0


def test_workers_join_and_leave_while_it_serves(start: Start, orders: Path) -> None:
    with start() as cluster:
        cluster.expect("Ctrl-C ends it.")
        before = fleets(orders)[-1][1]
        said = scaled(cluster, {Phase.PREFILL: (2,), Phase.DECODE: (3,)})
        assert sorted(line for line in said if "joined" in line) == [f"{name} has joined" for name in ("decode-1", "decode-2", "prefill-1")]
        version, now = fleets(orders)[-1]
        assert now.keys() == {"prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2"}
        assert before.items() <= now.items(), "nobody else was disturbed"

        leaving = pid_of(orders, "decode-2")
        said = scaled(cluster, {Phase.PREFILL: (0,), Phase.DECODE: (1,)})
        assert said[-1].endswith("has left")
        assert processes.start_ticks(leaving) is None
        assert len((orders / "drained").read_text().splitlines()) == 4, "each was drained first"
        wait_for("the fleet", lambda: fleets(orders)[-1][1] == {"decode-0": before["decode-0"]})
        assert fleets(orders)[-1][0] > version
        assert {process["name"] for process in cluster.state()["processes"]} == {"router", "decode-0"}  # type: ignore[attr-defined]
        assert scaled(cluster, {Phase.PREFILL: (1,)})[-1] == "prefill-0 has joined"
        assert cluster.end() == 0
    assert "decode-2 has left" in cluster.output
    assert "Starting it again" not in cluster.output


def test_a_worker_changes_its_role_in_place_or_is_started_again_for_it(start: Start, orders: Path) -> None:
    with start(prefill={"workers": 2}) as cluster:
        cluster.expect("Ctrl-C ends it.")
        before, logs = fleets(orders)[-1][1], Path(str(cluster.state()["logs"]))
        flipping, pids = pid_of(orders, "prefill-1"), {name: pid_of(orders, name) for name in ("prefill-0", "decode-0")}
        said = scaled(cluster, {Phase.PREFILL: (1,), Phase.DECODE: (2,)})
        assert said == ["prefill-1 finishes what it has, and becomes decode-1", "decode-1 has joined, in the processes of prefill-1"]
        assert pid_of(orders, "decode-1") == flipping
        assert len((orders / "drained").read_text().splitlines()) == 1
        now = fleets(orders)[-1][1]
        assert now.keys() == {"prefill-0", "decode-0", "decode-1"}
        assert {name: now[name] for name in ("prefill-0", "decode-0")} == {name: before[name] for name in ("prefill-0", "decode-0")}
        known: Any = cluster.state()["processes"]
        assert {each["name"]: each["pid"] for each in known if each["name"] != "router"} == {**pids, "decode-1": flipping}
        assert not (logs / "prefill-1.log").exists()
        assert (logs / "decode-1.log").read_text() == "prefill-1 began\ndecode-1 goes on\n"

        (orders / "no-flip-prefill-1").touch()
        said = scaled(cluster, {Phase.PREFILL: (2,), Phase.DECODE: (1,)})
        assert said[-1].startswith("prefill-1 has joined, started again: decode-1 could not change its role in place.")
        assert pid_of(orders, "prefill-1") != flipping
        assert fleets(orders)[-1][1].keys() == {"prefill-0", "prefill-1", "decode-0"}
        assert (logs / "prefill-1.log").read_text().count("prefill-1 began") == 2

        (orders / "refuse-decode-1").touch()
        with pytest.raises(ConfigError, match=r"decode.kv_tokens: 8192 tokens are too few"):
            scaled(cluster, {Phase.PREFILL: (1,), Phase.DECODE: (2,)})
        wait_for("the fleet without it", lambda: fleets(orders)[-1][1].keys() == {"prefill-0", "decode-0"})
        assert scaled(cluster, {Phase.PREFILL: (2,), Phase.DECODE: (1,)})[-1] == "prefill-1 has joined"
        assert cluster.end() == 0


def test_workers_of_other_threads_do_not_become_each_other(start: Start, orders: Path) -> None:
    (orders / "cores").write_text("4")
    with start(prefill={"workers": 2, "threads": 1}, decode={"threads": 2}) as cluster:
        cluster.expect("Ctrl-C ends it.")
        flipping = pid_of(orders, "prefill-1")
        assert "decode-1 has joined" in scaled(cluster, {Phase.PREFILL: (1,), Phase.DECODE: (2,)})
        assert pid_of(orders, "decode-1") != flipping
        log = Path(str(cluster.state()["logs"]), "supervisor.log").read_text()
        assert "prefill-1 cannot become decode-1 in place, and ends: decode-1 is to have other threads" in log
        assert cluster.end() == 0


def test_a_number_that_cannot_be_is_refused_by_key(start: Start, orders: Path) -> None:
    with start() as cluster:
        cluster.expect("Ctrl-C ends it.")
        with pytest.raises(ConfigError) as caught:
            scaled(cluster, {Phase.DECODE: (0,)})
        assert caught.value.field == "decode.workers"
        assert len(fleets(orders)[-1][1]) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_not_heard(start: Start, orders: Path) -> None:
    with start() as cluster:
        cluster.expect("Ctrl-C ends it.")
        cluster_id = str(cluster.state()["id"])
        child = os.fork()
        if child == 0:
            os.setresuid(65534, 65534, 65534)
            try:
                list(ask(cluster_id, {Phase.DECODE: (2,)}))
            except Unavailable:
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert len(fleets(orders)[-1][1]) == 2


def test_a_worker_that_cannot_join_says_why_and_changes_nothing(start: Start, orders: Path) -> None:
    (orders / "refuse-prefill-1").touch()
    (orders / "crash-decode-1").touch()
    with start() as cluster:
        cluster.expect("Ctrl-C ends it.")
        with pytest.raises(ConfigError, match=r"prefill.kv_tokens: 8192 tokens are too few"):
            scaled(cluster, {Phase.PREFILL: (2,)})
        with pytest.raises(Unavailable, match="the disk is on fire"):
            scaled(cluster, {Phase.DECODE: (2,)})
        assert {process["name"] for process in cluster.state()["processes"]} == {"router", "prefill-0", "decode-0"}  # type: ignore[attr-defined]
        (orders / "crash-decode-1").unlink()
        assert scaled(cluster, {Phase.DECODE: (2,)})[-1] == "decode-1 has joined"
        assert cluster.end() == 0


def test_one_that_was_given_up_is_replaced_when_as_many_are_asked_for(start: Start, orders: Path) -> None:
    with start(decode={"kv_tokens": 256, "workers": 2}) as cluster:
        cluster.expect("Ctrl-C ends it.")
        (orders / "crash-decode-1").touch()
        os.kill(pid_of(orders, "decode-1"), signal.SIGKILL)
        cluster.expect("It died too often and is not started again.")
        (orders / "crash-decode-1").unlink()
        assert scaled(cluster, {Phase.DECODE: (2,)})[-1] == "decode-1 has joined"
        os.kill(pid_of(orders, "decode-1"), signal.SIGKILL)
        wait_for("it to come back", lambda: cluster.output.count("decode-1 is ready") == 3)
        assert cluster.end() == 0


def test_a_worker_that_has_joined_is_kept_like_the_others(start: Start, orders: Path) -> None:
    with start() as cluster:
        cluster.expect("Ctrl-C ends it.")
        scaled(cluster, {Phase.DECODE: (2,)})
        os.kill(pid_of(orders, "decode-1"), signal.SIGKILL)
        wait_for("it to come back", lambda: cluster.output.count("decode-1 is ready") == 2)
        os.kill(pid_of(orders, "decode-0"), signal.SIGKILL)
        wait_for("the other too", lambda: cluster.output.count("decode-0 is ready") == 2)
        assert cluster.end() == 0


def test_a_cluster_that_ends_tells_who_waits_for_a_change(start: Start, orders: Path) -> None:
    (orders / "slow-decode-1").touch()
    with start() as cluster:
        cluster.expect("Ctrl-C ends it.")
        waiting = ask(str(cluster.state()["id"]), {Phase.DECODE: (2,)})
        assert next(waiting) == "decode-1 is starting"
        state = cluster.state()
        assert cluster.end() == 0
        with pytest.raises(Unavailable):
            next(waiting)
    assert nothing_left(state)


def test_a_crash_while_starting_is_shown_with_its_last_lines_and_ends_the_cluster(start: Start, orders: Path, tmp_path: Path) -> None:
    (orders / "crash-decode-0").touch()
    with start() as cluster:
        assert cluster.wait() == 2
        log = tmp_path / "run" / "diptych" / "default" / "logs" / "decode-0.log"
        assert f"decode-0 ended with status 1. Its log: {log}" in cluster.output
        assert "RuntimeError: the disk is on fire" in cluster.output
        assert "the disk is on fire" in log.read_text()
        assert not (log.parent.parent / "cluster.json").exists()
    assert all(processes.start_ticks(int(path.read_text())) is None for path in orders.glob("pid-*"))


def test_a_refusal_names_the_config_key(start: Start, orders: Path) -> None:
    (orders / "refuse-prefill-0").touch()
    with start() as cluster:
        assert cluster.wait() == 2
    assert "prefill.kv_tokens: 8192 tokens are too few." in cluster.output


def test_a_worker_that_dies_too_often_is_given_up_and_the_last_decode_worker_ends_the_cluster(start: Start, orders: Path) -> None:
    with start() as cluster:
        cluster.expect("Ctrl-C ends it.")
        state = cluster.state()
        (orders / "crash-decode-0").touch()
        os.kill(pid_of(orders, "decode-0"), signal.SIGKILL)
        assert cluster.wait(60) == 2
    assert "died too often and is not started again" in cluster.output
    assert "decode-0 died too often; the cluster ends" in cluster.output
    assert nothing_left(state)


def test_one_ctrl_c_waits_for_what_is_stubborn_a_second_kills_it(start: Start, orders: Path) -> None:
    (orders / "stubborn-decode-0").touch()
    with start() as cluster:
        cluster.expect("Ctrl-C ends it.")
        state = cluster.state()
        cluster.process.send_signal(signal.SIGINT)
        cluster.expect("Ctrl-C again to end at once")
        wait_for("prefill-0 to end", lambda: processes.start_ticks(pid_of(orders, "prefill-0")) is None)
        assert processes.start_ticks(pid_of(orders, "decode-0")) is not None
        assert cluster.end(signal.SIGINT, within_s=12) == 0, "what is stubborn alone would take 15 s"
    assert nothing_left(state)


def test_ctrl_c_while_it_starts_ends_at_once(start: Start, orders: Path) -> None:
    (orders / "slow-decode-0").touch()
    with start() as cluster:
        cluster.expect("decode-0: imports")
        state = cluster.state()
        assert cluster.end(signal.SIGINT) == 0
    assert nothing_left(state)


def test_nothing_is_left_of_a_killed_supervisor(start: Start, orders: Path) -> None:
    (orders / "stubborn-prefill-0").touch()
    with start() as cluster:
        cluster.expect("Ctrl-C ends it.")
        state = cluster.state()
        cluster.process.kill()
        wait_for("the reaper", lambda: nothing_left(state))
        assert not (cluster.runtime / "diptych" / "default" / "cluster.json").exists()


def test_a_second_cluster_of_the_same_name_is_refused_and_the_first_goes_on(start: Start) -> None:
    with start() as first:
        first.expect("Ctrl-C ends it.")
        with start() as second:
            assert second.wait() == 2
        assert "A cluster named 'default' runs already" in second.output
        assert first.state()["ready"] is True
        assert first.end() == 0


def test_what_a_crash_of_everything_left_is_cleaned_by_the_next_start(start: Start) -> None:
    with start() as cluster:
        cluster.expect("Ctrl-C ends it.")
        state = cluster.state()
        killed_at_once(cluster, str(state["id"]))
        assert Path(str(state["scratch"])).exists()
        with start() as following:
            following.expect("Ctrl-C ends it.")
            assert nothing_left(state)
            assert following.end() == 0


def test_not_even_ray_leaves_a_socket_when_every_process_is_killed_at_once(start: Start) -> None:
    before = shared_memory()
    with start(ray={"enabled": True}) as cluster:
        cluster.expect("Ctrl-C ends it.", 90)
        state = cluster.state()
        scratch = Path(str(state["scratch"]))
        assert sockets_below(str(scratch))
        if any((scratch / "ray").iterdir()):
            pytest.skip("this host allows no mount namespace; the reaper cleans up, as other tests show")
        killed_at_once(cluster, str(state["id"]))
        assert not sockets_below(str(scratch))
        assert [path.name for path in scratch.rglob("*")] == ["ray"]
        assert str(scratch) not in Path("/proc/mounts").read_text()
        wait_for("the end of its names in shared memory", lambda: shared_memory() <= before)


@pytest.mark.nightly
@pytest.mark.parametrize("daemon", ["raylet/raylet", "gcs/gcs_server"])
def test_when_ray_dies_the_cluster_ends_and_says_so(start: Start, daemon: str) -> None:
    """Without fault tolerance of Ray's head, nothing could be placed again; Ray itself takes up to a minute to notice."""
    with start(ray={"enabled": True}) as cluster:
        cluster.expect("Ctrl-C ends it.", 90)
        state = cluster.state()
        pids = processes.marked(str(state["id"]))
        victim = next(pid for pid in pids if daemon in Path(f"/proc/{pid}/cmdline").read_text())
        processes.kill(victim, str(state["id"]))
        assert cluster.wait(100) == 2
        assert "decode-0 died too often; the cluster ends. The last reason: Ray" in cluster.output
        assert nothing_left(state)
