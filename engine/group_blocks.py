"""The blocks of one cache group: which are free, cached, referenced or fenced."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Sequence

from .batch import NO_BLOCK


class GroupBlocks:
    """Blocks 0..count-1. Each is exactly one of:

    free        nobody needs what is in it
    cached      no reference, but found by its prefix hash; the least recently used is evicted first
    referenced  in the tables of `references[block]` sequences, hashed or not
    fenced      given back while a step in flight might touch it; free or cached once that step has completed

    A referenced block may wait to be copied from another, which the wait references too.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.references = [0] * count
        self._free = list(range(count - 1, -1, -1))
        self._cached = 0
        self._unused: deque[int] = deque()
        """The cached ones, the least recently used first, and among them others: of each block the first `_passed[block]` do not count, as
        it has been referenced since. An ordered dict says the same in ten times the memory, most of which was not in the CPU's cache."""
        self._passed: dict[int, int] = {}
        self._fenced: OrderedDict[int, int] = OrderedDict()
        self._hash_of: list[bytes | None] = [None] * count
        self._by_hash: dict[bytes, int] = {}
        self._copies: dict[int, int] = {}

    @property
    def free(self) -> int:
        """Blocks with nothing in them that anybody needs."""
        return len(self._free)

    @property
    def available(self) -> int:
        """Blocks that `take` can give now."""
        return len(self._free) + self._cached

    @property
    def fenced(self) -> int:
        """Blocks that will be available once the steps in flight have completed."""
        return len(self._fenced)

    def find(self, prefix_hash: bytes) -> int | None:
        """The block that holds the tokens hashed to `prefix_hash`; it need not be referenced."""
        return self._by_hash.get(prefix_hash)

    def is_cached(self, block: int) -> bool:
        """Whether referencing `block` would make one block fewer available."""
        return self.references[block] == 0 and self._hash_of[block] is not None and block not in self._fenced

    def take(self) -> int:
        """A block with one reference and no content: a free one, else the least recently used cached one."""
        block = self._free.pop() if self._free else self._evict(1)[0]
        self.references[block] = 1
        return block

    def _evict(self, count: int) -> list[int]:
        """The least recently used cached blocks, whose contents are forgotten."""
        blocks, unused, passed, hash_of, by_hash = [], self._unused, self._passed, self._hash_of, self._by_hash
        for _ in range(count):
            block = unused.popleft()
            while passed and self._pass(block):
                block = unused.popleft()
            prefix_hash, hash_of[block] = hash_of[block], None
            assert prefix_hash is not None, "a cached block has no hash"
            del by_hash[prefix_hash]
            blocks.append(block)
        self._cached -= count
        return blocks

    def _pass(self, block: int) -> bool:
        """Whether this, the first in `_unused` of that block, does not count."""
        left = self._passed.pop(block, 0)
        if left > 1:
            self._passed[block] = left - 1
        return left > 0

    def take_several(self, count: int) -> tuple[int, ...]:
        """As `take`, so often."""
        if count == 1:
            return (self.take(),)
        free, references = self._free, self.references
        left = max(0, len(free) - count)
        blocks = free[left:][::-1]
        del free[left:]
        if count > len(blocks):
            blocks += self._evict(count - len(blocks))
        for block in blocks:
            references[block] = 1
        return tuple(blocks)

    def take_copy(self, source: int) -> int:
        """A block with one reference that is to be copied from the referenced block `source`."""
        block = self.take()
        self.references[source] += 1
        self._copies[block] = source
        return block

    def issue_copies(self, step: int) -> list[tuple[int, int]]:
        """`(source, destination)` of the copies that wait; they are made by `step`, which is in flight now."""
        copies = [(source, block) for block, source in self._copies.items()]
        self._copies = {}
        for source, _ in copies:
            self.give_back(source, step)
        return copies

    def users(self, block: int) -> int:
        """How many tables hold `block`."""
        return self.references[block] - sum(source == block for source in self._copies.values())

    @property
    def copying(self) -> bool:
        """Whether copies wait for a step."""
        return bool(self._copies)

    def refer(self, block: int) -> None:
        """One more reference to a hashed or referenced block. A fenced one may be read at once: steps in flight only read it too."""
        if self.references[block] == 0 and self._fenced.pop(block, None) is None:
            self._cached -= 1
            self._passed[block] = self._passed.get(block, 0) + 1
            if len(self._unused) > 2 * self.count:
                self._unused = deque([each for each in self._unused if not self._pass(each)])
        self.references[block] += 1

    def give_back(self, block: int, fence: int | None) -> None:
        """One reference fewer; after the last, the block is fenced by step `fence`, or settles at once if that is None."""
        self.references[block] -= 1
        if self.references[block] > 0:
            return
        if (source := self._copies.pop(block, None)) is not None:  # nobody needs the copy any more
            self.give_back(source, fence)
        if fence is None:
            self._settle(block)
        else:
            self._fenced[block] = fence

    def give_back_several(self, blocks: Sequence[int], fence: int | None) -> None:
        """As `give_back` for each."""
        if self._copies or fence is not None:
            for block in blocks:
                self.give_back(block, fence)
            return
        references, hashed, before = self.references, self._hash_of, len(self._unused)
        for block in blocks:
            left = references[block] = references[block] - 1
            if left:
                continue
            if hashed[block] is None:
                self._free.append(block)
            else:
                self._unused.append(block)
        self._cached += len(self._unused) - before

    def publish(self, blocks: Sequence[int], hashes: Sequence[bytes]) -> None:
        """Referenced blocks (or `NO_BLOCK`) now hold the tokens hashed to `hashes`. The first block published for a hash keeps it."""
        hash_of, by_hash = self._hash_of, self._by_hash
        for block, prefix_hash in zip(blocks, hashes, strict=True):
            if block != NO_BLOCK and prefix_hash not in by_hash:
                hash_of[block] = prefix_hash
                by_hash[prefix_hash] = block

    def completed(self, step: int) -> None:
        """`step` and all before it have completed: what only they could touch settles."""
        while self._fenced:
            block, fence = next(iter(self._fenced.items()))
            if fence > step:
                return
            del self._fenced[block]
            self._settle(block)

    def _settle(self, block: int) -> None:
        if self._hash_of[block] is None:
            self._free.append(block)
        else:
            self._unused.append(block)
            self._cached += 1

    def check(self, held: Counter[int]) -> None:
        """Raise `AssertionError` unless every block is in one state; `held[block]`: how many tables hold it."""
        referenced = {block for block, count in enumerate(self.references) if count}
        cached = Counter(self._unused) - Counter(self._passed)
        assert set(cached.values()) <= {1}, "a block is cached twice"
        assert len(cached) == self._cached, "cached blocks are miscounted"
        states = (self._free, cached, self._fenced, referenced)
        assert sum(len(state) for state in states) == self.count, "a block is lost or in two states"
        assert set().union(*states) == set(range(self.count)), "a block is lost"
        assert {block: self.references[block] for block in referenced} == held + Counter(self._copies.values()), (
            "reference counts are wrong"
        )
        hashed = {block: prefix_hash for block, prefix_hash in enumerate(self._hash_of) if prefix_hash is not None}
        assert all(self.references[block] == 1 and block not in hashed for block in self._copies), "a block to be copied to is used"
        assert {h: b for b, h in hashed.items()} == self._by_hash, "hash table and block hashes differ"
        assert not any(block in hashed for block in self._free), "a free block is hashed"
        assert all(block in hashed for block in cached), "a cached block has no hash"
        fences = list(self._fenced.values())
        assert fences == sorted(fences), "fences out of order"
