"""What runs beside what, with `-n 2 --dist loadgroup`: a file stays whole, since its fixtures are servers, and each process would start
its own; so does a room whose every test starts many processes.

xdist's own groups do not outlive pytest 9.2: it marks a test by writing to its `_nodeid`, which is nothing there any more, and without a
word hands out every test by itself.
"""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

CLUSTERS = ("cluster", "e2e")
LONG = (
    "cluster",
    "e2e",
    "tests/kv_transfer/test_contract.py",
    "tests/worker/test_rank_processes.py",
    "tests/kernels/test_native.py",
    "tests/fuzz/test_fuzz.py",
    "tests/decode_worker/test_decode_random.py",
    "tests/benchmarks/test_peers.py",
    "tests/benchmarks/test_links.py",
    "tests/kv_transfer/test_processes.py",
)
"""They take longest, 10 s and more, and are begun first, so that the last minutes have something for both processes to do."""


def group_of(nodeid: str) -> str:
    """The room, or the file."""
    path = nodeid.partition("::")[0]
    room = path.split("/")[-2]
    return room if room in CLUSTERS else path


class Grouped(LoadScopeScheduling):
    """Hands out groups, those of `LONG` first and then those of many tests."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)

    def _assign_work_unit(self, node: WorkerController) -> None:
        longest = min(self.workqueue, key=lambda group: LONG.index(group) if group in LONG else len(LONG))
        self.workqueue.move_to_end(longest, last=False)
        super()._assign_work_unit(node)
