"""A process's log goes to its file, and nowhere once that is over."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from diptych.cluster.logs import last_lines, logging_to


def test_one_cluster_after_another_in_one_process(tmp_path: Path) -> None:
    log = logging.getLogger("diptych.test")
    for name in ("one", "two"):
        directory = tmp_path / name
        directory.mkdir()
        with logging_to(directory / "supervisor.log", "info"):
            log.info("of %s", name)
        log.warning("between")  # would make the file anew, or fail for want of its directory
        lines = last_lines(directory / "supervisor.log", 8)
        assert [line.rpartition(": ")[2] for line in lines] == [f"of {name}"]
        shutil.rmtree(directory)
        log.warning("behind")
        assert not directory.exists()
