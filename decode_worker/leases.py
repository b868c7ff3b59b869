"""Which transfers hold blocks of a decode worker: from grant to commit, or to the fence that follows a failure."""

from __future__ import annotations

from .sequence import Sequence


class Leases:
    """A granted transfer commits, or is lost (failed, cancelled); a lost one keeps its blocks until no copy can touch them."""

    def __init__(self) -> None:
        self._granted: dict[str, Sequence] = {}
        self._lost: dict[str, Sequence] = {}

    def __len__(self) -> int:
        return len(self._granted) + len(self._lost)

    @property
    def granted(self) -> int:
        """Transfers that may still commit: each will need a place in the batch."""
        return len(self._granted)

    def __contains__(self, transfer_id: str) -> bool:
        return transfer_id in self._granted or transfer_id in self._lost

    def grant(self, sequence: Sequence) -> None:
        """Its table holds the blocks lent."""
        self._granted[sequence.attempt_id] = sequence

    def commit(self, transfer_id: str) -> Sequence | None:
        """The sequence to run. None for one lost meanwhile: a commit ends all copying, so its blocks return."""
        sequence = self._granted.pop(transfer_id, None)
        if sequence is None:
            self.fenced(transfer_id)
        return sequence

    def get(self, transfer_id: str) -> Sequence | None:
        """The sequence of a transfer that may still commit."""
        return self._granted.get(transfer_id)

    def lose(self, transfer_id: str) -> Sequence | None:
        """The sequence, if its transfer was granted and not yet lost."""
        sequence = self._granted.pop(transfer_id, None)
        if sequence is not None:
            self._lost[transfer_id] = sequence
        return sequence

    def fenced(self, transfer_id: str) -> None:
        """Give the blocks of a lost transfer back. Unknown ids are ignored."""
        sequence = self._lost.pop(transfer_id, None)
        if sequence is not None:
            sequence.table.close()

    def check(self) -> None:
        """Raise `AssertionError` if an invariant does not hold."""
        assert not self._granted.keys() & self._lost.keys(), "a transfer is granted and lost"
        assert all(not sequence.ended for sequence in self._granted.values()), "an ended attempt may still commit"
        assert all(sequence.ended for sequence in self._lost.values()), "a lost transfer's attempt lives"
