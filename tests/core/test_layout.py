"""Cache groups and layouts: sizes, windows, and what forbids a transfer."""

from __future__ import annotations

from dataclasses import replace

import pytest
from diptych.core.layout import CacheGroup, CacheKind, DType, Layout
from diptych.core.model import Decoder, ModelCard, Rope
from hypothesis import given
from hypothesis import strategies as st

FULL = CacheGroup(CacheKind.FULL, (0, 2), kv_heads=2, head_dim=8, dtype=DType.BFLOAT16)
WINDOW = CacheGroup(CacheKind.WINDOW, (1,), kv_heads=2, head_dim=8, dtype=DType.BFLOAT16, window=4)
LAYOUT = Layout("abc", (FULL, WINDOW), block_size=16, num_blocks=(10, 10))


def test_bytes_of_a_token() -> None:
    assert FULL.token_bytes == 2 * 2 * 8 * 2  # K and V, heads, head_dim, bfloat16
    assert replace(FULL, dtype=DType.FLOAT32).token_bytes == 2 * FULL.token_bytes
    assert LAYOUT.token_bytes() == 3 * FULL.token_bytes


@given(window=st.integers(1, 40), position=st.integers(0, 200))
def test_first_needed_is_the_first_visible_key(window: int, position: int) -> None:
    group = replace(WINDOW, window=window)
    visible = [key for key in range(position + 1) if position - window < key <= position]
    assert group.first_needed(position) == visible[0]


def test_a_full_group_needs_everything() -> None:
    assert FULL.first_needed(10**6) == 0


@pytest.mark.parametrize(("kind", "window"), [(CacheKind.FULL, 4), (CacheKind.WINDOW, 0)])
def test_a_window_belongs_to_a_window_group(kind: CacheKind, window: int) -> None:
    with pytest.raises(ValueError, match="window"):
        replace(FULL, kind=kind, window=window)


@pytest.mark.parametrize(
    ("name", "value"),
    [("fingerprint", "xyz"), ("groups", (FULL,)), ("block_size", 32), ("tp", 2), ("pp", 2)],
)
def test_a_difference_that_matters_is_named(name: str, value: object) -> None:
    other = replace(LAYOUT, **{name: value})
    assert (LAYOUT.difference(other) or "").startswith(name)
    assert (other.difference(LAYOUT) or "").startswith(name)


def test_pools_of_different_size_may_exchange() -> None:
    assert LAYOUT.difference(replace(LAYOUT, num_blocks=(5, 6))) is None


def card(windows: tuple[int, ...]) -> ModelCard:
    decoder = Decoder(
        family="test",
        layers=len(windows),
        hidden=8,
        heads=2,
        kv_heads=1,
        head_dim=4,
        intermediate=16,
        activation="silu",
        norm_eps=1e-6,
        query_scale=0.5,
        tied_head=True,
        windows=windows,
        rope_full=Rope(theta=10_000.0),
    )
    return ModelCard(
        name="test",
        source="-",
        fingerprint="f" * 64,
        dtype=DType.FLOAT32,
        vocab_size=10,
        max_context=100,
        bos_token_id=None,
        eos_token_ids=(1,),
        has_chat_template=False,
        weights_bytes=1,
        decoder=decoder,
    )


@given(st.lists(st.sampled_from([0, 16, 512]), min_size=1, max_size=20))
def test_a_card_s_groups_hold_every_layer_once(windows: list[int]) -> None:
    groups = card(tuple(windows)).cache_groups()
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(windows)))
    assert [group.window for group in groups] == sorted(set(windows))
    assert all(windows[layer] == group.window for group in groups for layer in group.layers)


@pytest.mark.parametrize(("tokens", "blocks"), [(256, 16), (257, 17), (271, 17), (272, 17)])
def test_a_pool_is_rounded_up_to_whole_blocks(tokens: int, blocks: int) -> None:
    assert card((0, 16)).layout(block_size=16, kv_tokens=tokens).num_blocks == (blocks, blocks)
