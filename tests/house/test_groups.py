"""The gate's processes share out files, not tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def starts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a line for each time this fixture was made in this run, whatever the process."""
    run: dict[str, str] = getattr(request.config, "workerinput", {})
    own = tmp_path_factory.getbasetemp()
    path = (own.parent if run else own) / f"starts-{run.get('testrunuid')}"
    with path.open("a") as file:
        file.write("one\n")
    return path


@pytest.mark.parametrize("number", range(8))
def test_what_a_file_starts_is_started_once(starts: Path, number: int) -> None:
    assert starts.read_text() == "one\n"
