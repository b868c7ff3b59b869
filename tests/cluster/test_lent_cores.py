"""Threads and the cores they are bound to."""

from __future__ import annotations

import pytest
from diptych.cluster.programs import lent_cores

NOWHERE = 1023
"""The last core that a set of cores has a place for."""


@pytest.mark.parametrize(("by_kernels", "core"), [(True, NOWHERE), (False, NOWHERE - 1)])
def test_a_core_to_which_no_thread_can_be_bound_is_named_once(
    by_kernels: bool, core: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not by_kernels:
        monkeypatch.setattr(lent_cores, "native", lambda: None)
    for _ in range(2):
        lent_cores.compute_on((core,))
    assert [record.message.partition(":")[0] for record in caplog.records] == [f"No thread can be bound to core {core}"]
