"""Start, restart and end of workers of many ranks, of fake programs: a worker is whole or dead."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from cluster_harness import Cluster, Start, fleets, nothing_left, pid_of, scaled, wait_for
from diptych.cluster.process import processes
from diptych.core.errors import ConfigError
from diptych.core.fleet import Phase

SPREAD = {"prefill": {"kv_tokens": 256, "tp": 2}, "decode": {"kv_tokens": 256, "tp": 2, "pp": 2}}


def ranks(cluster: Cluster, worker: str) -> dict[int, int]:
    """The process id of each rank, as the state file has it."""
    processes: Any = cluster.state()["processes"]
    return {process["rank"]: process["pid"] for process in processes if process["name"] == worker}


def test_a_worker_of_many_ranks_starts_and_ends_as_one(start: Start, orders: Path) -> None:
    with start(**SPREAD) as cluster:
        cluster.expect("Ctrl-C ends it.")
        assert "1 prefill worker (tp 2 × pp 1) and 1 decode worker (tp 2 × pp 2)" in cluster.output
        assert "KV for 1,024 tokens on 4 ranks" in cluster.output
        assert "2 workers of 6 ranks with" in cluster.output or (os.cpu_count() or 0) >= 6
        found = ranks(cluster, "decode-0")
        assert found == {0: pid_of(orders, "decode-0"), **{rank: pid_of(orders, f"decode-0.rank{rank}") for rank in (1, 2, 3)}}
        assert ranks(cluster, "prefill-0").keys() == {0, 1}
        logs = Path(str(cluster.state()["logs"]))
        assert (logs / "decode-0.rank3.log").read_text() == "decode-0.rank3 began\n"
        state = cluster.state()
        assert cluster.end() == 0
    assert nothing_left(state)
    assert "was ended" not in cluster.output
    assert "Starting it again" not in cluster.output


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_dies_takes_its_worker_with_it_which_comes_back_whole(start: Start, orders: Path, rank: int) -> None:
    with start(**SPREAD) as cluster:
        cluster.expect("Ctrl-C ends it.")
        before, others = ranks(cluster, "decode-0"), ranks(cluster, "prefill-0")
        os.kill(before[rank], signal.SIGKILL)
        cluster.expect(f"decode-0{f'.rank{rank}' if rank else ''} was ended by signal 9")
        wait_for("it to come back", lambda: cluster.output.count("decode-0 is ready") == 2)
        wait_for("its state", lambda: None not in ranks(cluster, "decode-0").values() and len(ranks(cluster, "decode-0")) == 4)
        after = ranks(cluster, "decode-0")
        assert not set(after.values()) & set(before.values())
        assert [pid for pid in before.values() if processes.start_ticks(pid) is not None] == []
        assert ranks(cluster, "prefill-0") == others
        assert cluster.end() == 0


def test_a_follower_that_crashes_while_starting_is_the_reason_given(start: Start, orders: Path, tmp_path: Path) -> None:
    (orders / "crash-decode-0.rank3").touch()
    with start(**SPREAD) as cluster:
        assert cluster.wait() == 2
    log = tmp_path / "run" / "diptych" / "default" / "logs" / "decode-0.rank3.log"
    assert f"decode-0.rank3 ended with status 1. Its log: {log}" in cluster.output
    assert "RuntimeError: the disk is on fire" in cluster.output
    assert all(processes.start_ticks(int(path.read_text())) is None for path in orders.glob("pid-*"))


def test_a_follower_that_refuses_names_the_config_key(start: Start, orders: Path) -> None:
    (orders / "refuse-decode-0.rank1").touch()
    with start(decode={"groups": [{"tp": 2}]}) as cluster:
        assert cluster.wait() == 2
    assert "decode.groups.0.kv_tokens: 8192 tokens are too few." in cluster.output


def test_groups_of_workers_are_scaled_each_by_its_number(start: Start, orders: Path) -> None:
    with start(decode={"groups": [{"tp": 2}, {"workers": 2}]}) as cluster:
        cluster.expect("Ctrl-C ends it.")
        assert "3 decode workers (tp 2 × pp 1, tp 1 × pp 1)" in cluster.output
        with pytest.raises(ConfigError, match=r"2 groups \(tp 2, pp 1; tp 1, pp 1\): give a number for each, as in --decode 1,2") as caught:
            scaled(cluster, {Phase.DECODE: (3,)})
        assert caught.value.field == "decode.groups"
        with pytest.raises(ConfigError, match="of one group"):
            scaled(cluster, {Phase.PREFILL: (1, 1)})
        said = scaled(cluster, {Phase.DECODE: (2, 1)})
        assert said[-1] == "decode-2 has left"
        assert len(ranks(cluster, "decode-3")) == 2, "the newcomer is of the first group"
        with pytest.raises(ConfigError, match="nobody could write"):
            scaled(cluster, {Phase.DECODE: (0, 0)})
        assert "decode-1 has left" in scaled(cluster, {Phase.DECODE: (1, 0)})
        wait_for("the fleet", lambda: fleets(orders)[-1][1].keys() == {"prefill-0", "decode-0"})
        assert cluster.end() == 0
