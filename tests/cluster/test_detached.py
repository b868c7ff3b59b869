"""`diptych up --detach`: what keeps a cluster running in the background, and when it stops doing so."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_harness import nothing_left, wait_for
from diptych.cluster.commands import detached
from diptych.cluster.supervising import state
from diptych.cluster.supervising.restarts import RestartBudget
from diptych.core.config import ClusterConfig, load_config
from diptych.core.errors import ConfigError
from real_harness import PROMPT, UP_S, diptych


@pytest.fixture
def stop() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    os.close(read)
    os.close(write)


def third_time_lucky(directory: Path) -> list[str]:
    return ["sh", "-c", f"echo begun >> {directory}/lives; test $(wc -l < {directory}/lives) -ge 3 || exit 7"]


def test_what_fails_is_started_again_until_it_ends_as_it_was_told_to(tmp_path: Path, stop: tuple[int, int]) -> None:
    assert detached.keep(third_time_lucky(tmp_path), lambda: True, RestartBudget(first_s=0.01), stop[0]) == 0
    assert (tmp_path / "lives").read_text() == "begun\n" * 3


@pytest.mark.parametrize(
    ("answers", "most", "said"),
    [(False, 5, "ended with status 7, and the Ray cluster answers no more"), (True, 1, "ended with status 7, too often")],
)
def test_it_gives_up_without_ray_or_after_too_many_failures(
    tmp_path: Path, stop: tuple[int, int], capsys: pytest.CaptureFixture[str], answers: bool, most: int, said: str
) -> None:
    assert detached.keep(third_time_lucky(tmp_path), lambda: answers, RestartBudget(most=most, first_s=0.01), stop[0]) == 7
    assert said in capsys.readouterr().out


def test_it_ends_its_cluster_when_told_to_and_starts_no_other(tmp_path: Path, stop: tuple[int, int]) -> None:
    os.write(stop[1], b"!")
    forever = [sys.executable, "-c", "import signal; signal.pause()"]
    assert detached.keep(forever, lambda: True, RestartBudget(), stop[0]) == -signal.SIGTERM


def test_there_is_no_giving_up_while_ray_lives() -> None:
    budget, now = detached.patience(load_config({"ray": {"address": "10.0.0.1:6379"}})), 0.0
    for _ in range(500):
        delay = budget.delay(now)
        assert delay is not None
        now += delay
    assert delay == 30.0


def test_state_that_a_logout_removes_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", f"/run/user/{os.getuid()}")
    monkeypatch.setattr(detached, "SEATS", tmp_path)
    monkeypatch.setattr(detached, "LINGER", tmp_path / "linger")
    with pytest.raises(ConfigError, match="loginctl enable-linger"):
        detached.detach(ClusterConfig())


@pytest.mark.nightly
@pytest.mark.usefixtures("runtime")
def test_a_cluster_in_the_background_comes_back_and_goes_down(tiny_llama_dir: Path, runtime: Path) -> None:
    flags = ["up", "--detach", "--no-ray", "--model", str(tiny_llama_dir), "--http-port", "0", "--grpc-port", "0"]
    try:
        begun = diptych(*flags)
        assert begun.returncode == 0, begun.stderr
        assert str(detached.directory("default") / detached.OUTPUT) in begun.stdout
        wait_for("it serves", lambda: (found := state.read("default")) and found.ready, UP_S)
        assert diptych("generate", PROMPT, "--max-tokens", "4").returncode == 0
        again = diptych(*flags)
        assert again.returncode == 2
        assert "runs in the background already" in again.stderr

        first = state.running("default")
        os.kill(first.pid, signal.SIGKILL)
        wait_for("it serves again", lambda: (found := state.read("default")) and found.ready and found.id != first.id, UP_S)
        assert "ended with status -9; it starts again" in (detached.directory("default") / detached.OUTPUT).read_text()
        last = state.running("default")
    finally:
        ended = diptych("down")
    assert ended.returncode == 0, ended.stderr
    assert "nothing is left of it" in ended.stdout
    assert nothing_left(last.model_dump(mode="json"))
    assert list(detached.keepers(None)) == []
    assert not list(runtime.glob("diptych/*"))
