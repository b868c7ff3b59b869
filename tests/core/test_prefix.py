"""Two requests share a cached block only if everything that decides its KV is equal."""

from __future__ import annotations

import pytest
from diptych.core.prefix import HASH_TOKENS, chain, extend, root_hash
from hypothesis import given
from hypothesis import strategies as st

NAMES = ("fingerprint", "dtype", "tenant", "adapter", "media")
FIELDS = st.fixed_dictionaries({name: st.text("ab\0é", max_size=3) for name in NAMES})
ROOT = root_hash(fingerprint="f", dtype="float32")
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=5 * HASH_TOKENS)


@given(FIELDS, FIELDS)
def test_different_lists_of_fields_never_collide(ours: dict[str, str], theirs: dict[str, str]) -> None:
    assert (root_hash(**ours) == root_hash(**theirs)) == (ours == theirs)


@pytest.mark.parametrize("name", NAMES)
def test_every_field_counts(name: str) -> None:
    fields = {"fingerprint": "f", "dtype": "float32"}
    assert root_hash(**{**fields, name: "other"}) != ROOT


def test_a_value_does_not_leak_into_the_next_field() -> None:
    assert root_hash(fingerprint="f", dtype="d", tenant="ab", adapter="") != root_hash(fingerprint="f", dtype="d", tenant="a", adapter="b")


@given(TOKENS)
def test_a_chain_has_one_hash_per_whole_block(tokens: list[int]) -> None:
    hashes = chain(ROOT, tokens)
    assert len(hashes) == len(tokens) // HASH_TOKENS
    assert len(set(hashes)) == len(hashes)
    parent = ROOT
    for i, found in enumerate(hashes):
        parent = extend(parent, tokens[i * HASH_TOKENS : (i + 1) * HASH_TOKENS])
        assert found == parent


@given(TOKENS, TOKENS)
def test_chains_agree_exactly_on_the_common_whole_blocks(ours: list[int], theirs: list[int]) -> None:
    common = 0
    while ours[common : common + HASH_TOKENS] == theirs[common : common + HASH_TOKENS] and common + HASH_TOKENS <= min(
        len(ours), len(theirs)
    ):
        common += HASH_TOKENS
    same = [a == b for a, b in zip(chain(ROOT, ours), chain(ROOT, theirs), strict=False)]
    assert same == [i < common // HASH_TOKENS for i in range(len(same))]


@pytest.mark.parametrize("count", [0, HASH_TOKENS - 1, HASH_TOKENS + 1])
def test_a_partial_block_has_no_hash(count: int) -> None:
    with pytest.raises(ValueError, match="16 tokens"):
        extend(ROOT, [1] * count)


def test_a_hash_stays_what_it_is() -> None:
    """Hashes are compared across processes and versions; a change of the recipe needs a new tag in the root."""
    assert ROOT.hex() == "2f46571654a236dfa26fc1cfdba0345a1c74903768c54c4c0c88e1c88e273297"
    assert extend(ROOT, range(HASH_TOKENS)).hex() == "6f55caad794c64906d62597df322f66003bc4c11c2b6d2e371d3b33ecdedb86b"
