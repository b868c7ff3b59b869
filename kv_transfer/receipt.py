"""What has come of one grant: pieces in order and without holes, copies under way, bytes counted, the Commit."""

from __future__ import annotations

from ..core.layout import Layout
from ..core.transfer import Commit, Epoch, GroupGrant, Ready
from .coverage import Coverage, Span
from .faults import piece_fault
from .slices import Route, first_positions


class Receipt:
    """Complete when the Commit has come and every rank has counted its every piece. The methods that take a message answer with what is
    wrong with it, or None."""

    def __init__(
        self, ours: Layout, source: Layout, routes: tuple[Route, ...], epoch: Epoch, groups: tuple[GroupGrant, ...], prompt_tokens: int
    ) -> None:
        self._block_size = ours.block_size
        self._routes = routes
        self._blocks = groups
        firsts = first_positions(source, groups, prompt_tokens)
        self.lacking = tuple(g for g, (grant, first) in enumerate(zip(groups, firsts, strict=True)) if grant.first_position < first)
        """The groups whose first granted block lacks its beginning, which the source no longer holds."""
        self._covered = tuple(Coverage(route.groups, firsts, prompt_tokens) for route in routes)
        self._copying: dict[int, int] = {}
        """The bytes of each piece under way."""
        self._pieces = 0
        self.epoch = epoch
        self.commit: Commit | None = None
        self.kv_bytes = 0
        self.first_piece_at: float | None = None

    @property
    def complete(self) -> bool:
        return self.commit is not None and not self._copying

    def copying(self, seq: int) -> bool:
        return seq in self._copying

    def piece(self, ready: Ready, now: float) -> str | None:
        fault = piece_fault(ready, self._routes)
        if fault is not None:
            return fault
        if self.commit is not None or ready.seq != self._pieces:
            return f"piece {self._pieces} was due" if self.commit is None else "it came after the Commit"
        try:
            self._covered[ready.route].extend(ready.layers, ready.start, ready.stop)
        except ValueError as error:
            return str(error)
        span = Span(ready.group, ready.layers, ready.start, ready.stop)
        self._copying[ready.seq] = span.bytes(self._routes[ready.route].groups)
        self._pieces += 1
        if self.first_piece_at is None:
            self.first_piece_at = now
        return None

    def into(self, span: Span) -> tuple[int, ...]:
        """The granted blocks that hold `span`."""
        granted, size = self._blocks[span.group], self._block_size
        first = granted.first_position // size
        return granted.blocks[span.start // size - first : -(-span.stop // size) - first]

    def count(self, seq: int) -> None:
        """The copy of piece `seq` has ended well."""
        self.kv_bytes += self._copying.pop(seq)

    def close(self, commit: Commit) -> str | None:
        if self.commit is not None:
            return "a second Commit came"
        if commit.pieces != self._pieces or not all(covered.complete for covered in self._covered):
            return f"Commit speaks of {commit.pieces} pieces; the {self._pieces} that came leave holes"
        self.commit = commit
        return None
