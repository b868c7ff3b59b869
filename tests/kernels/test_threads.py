"""Teams of threads."""

from __future__ import annotations

import os
import threading
from array import array
from pathlib import Path

import pytest
from diptych.kernels.native import native
from diptych.kernels.threads import by_thread_that_ends


@pytest.mark.skipif(not Path("/proc/self/task").exists() or native() is None, reason="needs Linux and the C++ kernels")
def test_a_team_ends_with_the_thread_that_computed() -> None:
    kernels = native()
    assert kernels is not None
    cores = array("q", [min(os.sched_getaffinity(0))] * 3)
    team: set[str] = set()

    def compute() -> None:
        me = str(threading.get_native_id())
        Path("/proc/self/task", me, "comm").write_text("a team of tests")  # the threads it begins are called so too
        kernels.bind(cores.buffer_info()[0], len(cores))
        tasks = [task for task in Path("/proc/self/task").iterdir() if task.name != me]
        team.update(task.name for task in tasks if _name(task) == "a team of tests")

    by_thread_that_ends(compute)
    assert len(team) == len(cores) - 1
    waited = threading.Event()
    for _ in range(500):
        if not any(Path("/proc/self/task", thread).exists() for thread in team):
            return
        waited.wait(0.01)  # nobody tells that a thread of OpenMP has ended
    pytest.fail("the team outlived its thread")


def _name(task: Path) -> str | None:
    """None: it has ended meanwhile."""
    try:
        return (task / "comm").read_text().strip()
    except OSError:
        return None


def test_what_it_raises_is_raised() -> None:
    def fail() -> None:
        raise ValueError("here")

    with pytest.raises(ValueError, match="here"):
        by_thread_that_ends(fail)
