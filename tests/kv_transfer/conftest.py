"""What tests of this room ask for that make pools and pairs in their own process."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from kv_rig import left_behind


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No thread, file descriptor, mapping or communicator outlives the test."""
    yield
    if left_behind():
        gc.collect()  # half a second in a process with torch
    assert left_behind() == []
