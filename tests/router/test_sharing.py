"""Which requests go to a decode worker that has come: those that wait for another's memory, until both have as much to do."""

from diptych.core.fleet import GRANTS_WAITING, Measure, Member, Phase, WorkerReport, WorkerState
from diptych.core.layout import CacheGroup, CacheKind, DType, Layout
from diptych.router.placement import Candidate, Snapshot
from diptych.router.sharing import elsewhere

LAYOUT = Layout("f", (CacheGroup(CacheKind.FULL, (0,), 1, 16, DType.FLOAT32),), 16, (64,))


def candidate(name, choices=0, *, offers=0, reported=0, state=WorkerState.READY, partner=None):
    phase = Phase.PREFILL if name.startswith("p") else Phase.DECODE
    report = WorkerReport(name, 1, state, 0, reported, 0, 64, 64, 0, (), (Measure(GRANTS_WAITING, offers),))
    return Candidate(Member(name, f"{name}:1", phase, 1, LAYOUT, 1024, partner), report, choices)


def asked(*decodes):
    return elsewhere(Snapshot.of([candidate("p1"), candidate("p2"), *decodes]), "p1", "d1")


def test_to_a_worker_with_less_to_do_from_the_one_that_has_the_kv():
    assert asked(candidate("d1", 6, offers=4), candidate("d2")) == {"d1", "p2"}


def test_only_until_both_have_as_much():
    assert asked(candidate("d1", 6, offers=4), candidate("d2", 4)) == {"d1", "p2"}
    assert asked(candidate("d1", 6, offers=4), candidate("d2", 5)) is None
    assert asked(candidate("d1", 6, offers=4), candidate("d2", 0, reported=5)) is None


def test_not_from_a_worker_at_which_nobody_waits():
    assert asked(candidate("d1", 6), candidate("d2")) is None


def test_not_to_one_that_leaves_nor_to_nobody():
    assert asked(candidate("d1", 6, offers=4), candidate("d2", state=WorkerState.DRAINING)) is None
    assert asked(candidate("d1", 6, offers=4)) is None
    assert asked(candidate("d2")) is None


def test_not_out_of_a_pair():
    assert asked(candidate("d1", 6, offers=4, partner="p1"), candidate("d2", partner="p2")) is None
