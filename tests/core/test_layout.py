"""Cache groups and layouts: sizes, windows, and what forbids a transfer."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from diptych.core.errors import ConfigError, InvalidRequest
from diptych.core.layout import CacheGroup, CacheKind, DType, Layout, even_stages
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
    with pytest.raises(InvalidRequest) as refused:
        replace(FULL, kind=kind, window=window)
    assert refused.value.field == "layout.groups.window"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fingerprint", "xyz"),
        ("groups", (replace(FULL, head_dim=4), WINDOW)),
        ("groups[1].window", (FULL, replace(WINDOW, window=5))),
    ],
)
def test_a_difference_that_matters_is_named(name: str, value: object) -> None:
    other = replace(LAYOUT, **{name.partition("[")[0]: value})
    assert (LAYOUT.difference(other) or "").startswith(name)
    assert (other.difference(LAYOUT) or "").startswith(name)


def test_pools_of_different_size_may_exchange() -> None:
    assert LAYOUT.difference(replace(LAYOUT, num_blocks=(5, 6))) is None


def test_workers_of_different_parallelism_may_exchange() -> None:
    assert LAYOUT.difference(replace(LAYOUT, tp=2, stages=(1, 2))) is None


def test_bfloat16_and_float32_may_exchange() -> None:
    other = replace(LAYOUT, groups=(replace(FULL, dtype=DType.FLOAT32), WINDOW))
    assert LAYOUT.difference(other) is None
    assert other.difference(LAYOUT) is None


def test_what_resharding_bridges_is_no_difference() -> None:
    other = Layout("abc", tuple(replace(group, dtype=DType.FLOAT32) for group in (FULL, WINDOW)), 32, (1, 2), tp=4, stages=(1, 1, 1))
    assert LAYOUT.difference(other) is None
    assert (LAYOUT.difference(replace(other, groups=(FULL,), num_blocks=(1,))) or "").startswith("groups")
    assert (LAYOUT.difference(replace(other, fingerprint="x")) or "").startswith("fingerprint")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"block_size": 0}, "block_size"),
        ({"tp": 0}, "tp"),
        ({"tp": 3}, "tp"),
        ({"num_blocks": (1,)}, "num_blocks"),
        ({"groups": (FULL, replace(WINDOW, layers=(2,)))}, "groups.layers"),
        ({"stages": (3,)}, "stages"),
        ({"stages": (3, 0)}, "stages"),
        ({"stages": (1, 1)}, "stages"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_by_field(changes: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        replace(LAYOUT, **changes)
    assert refused.value.field == f"layout.{field}"


@pytest.mark.parametrize("field", ["kv_heads", "head_dim"])
def test_a_group_without_heads_is_refused(field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        replace(FULL, **{field: 0})
    assert refused.value.field == f"layout.groups.{field}"


@st.composite
def spread(draw: st.DrawFn) -> Layout:
    """Any layout of up to eight layers in two groups."""
    layers = draw(st.integers(2, 8))
    tp = draw(st.sampled_from([1, 2, 3, 4, 8]))
    heads = draw(st.sampled_from([count for count in (1, 2, 3, 4, 8) if count % tp == 0 or tp % count == 0]))
    cut = draw(st.permutations(range(layers)))
    full = replace(FULL, layers=tuple(sorted(cut[: layers // 2])), kv_heads=heads)
    window = replace(WINDOW, layers=tuple(sorted(cut[layers // 2 :])), kv_heads=heads)
    pp = draw(st.integers(1, layers))
    edges = [0, *sorted(draw(st.permutations(range(1, layers)))[: pp - 1]), layers]
    stages = tuple(stop - start for start, stop in pairwise(edges)) if pp > 1 else ()
    return Layout("abc", (full, window), 16, (10, 10), tp, stages)


@given(spread())
def test_every_layer_and_head_is_held_by_equally_many_ranks(layout: Layout) -> None:
    for number, group in enumerate(layout.groups):
        held = Counter(
            (layer, head) for rank in map(layout.on, range(layout.ranks)) for layer in rank.layers(number) for head in rank.heads(number)
        )
        assert held.keys() == {(layer, head) for layer in group.layers for head in range(group.kv_heads)}
        assert set(held.values()) == {max(1, layout.tp // group.kv_heads)}


@given(spread())
def test_ranks_of_a_stage_hold_the_same_layers_and_stages_follow_each_other(layout: Layout) -> None:
    ranks = [layout.on(rank) for rank in range(layout.ranks)]
    for number in range(len(layout.groups)):
        assert all(rank.layers(number) == ranks[rank.rank // layout.tp * layout.tp].layers(number) for rank in ranks)
    in_order = [sorted(rank.layers(0) + rank.layers(1)) for rank in ranks[:: layout.tp]]
    assert [layer for layers in in_order for layer in layers] == list(range(sum(map(len, in_order))))
    assert tuple(map(len, in_order)) == (layout.stages or (sum(map(len, in_order)),))


def test_the_one_rank_of_a_small_worker_holds_all() -> None:
    assert LAYOUT.on(0).layout == LAYOUT
    assert LAYOUT.on(0).heads(0) == range(2)


def test_more_ranks_than_heads_hold_them_twice() -> None:
    layout = replace(LAYOUT, tp=4, stages=(2, 1))
    assert [layout.on(rank).heads(0) for rank in range(8)] == [range(0, 1), range(0, 1), range(1, 2), range(1, 2)] * 2
    assert [layout.on(rank).layers(0) for rank in (0, 4)] == [(0,), (2,)]
    assert [layout.on(rank).layers(1) for rank in (0, 4)] == [(1,), ()]


def test_stages_are_even_and_the_first_are_the_longer_ones() -> None:
    assert even_stages(18, 4) == (5, 5, 4, 4)
    assert even_stages(18, 18) == (1,) * 18
    assert even_stages(18, 1) == ()


@pytest.mark.parametrize(("tp", "stages"), [(1, ()), (2, (1, 2)), (4, (1, 1, 1))])
def test_a_card_can_be_spread(tp: int, stages: tuple[int, ...]) -> None:
    layout = wide_card().layout(block_size=16, kv_tokens=32, tp=tp, stages=stages)
    assert (layout.tp, layout.stages, layout.num_blocks) == (tp, stages, (2, 2))


@pytest.mark.parametrize(
    ("tp", "stages", "field", "words"),
    [
        (3, (), "tp", "tp 3 does not split wide, which has 8 attention heads, 2 KV heads and an MLP of 16; the nearest that does is 2."),
        (16, (), "tp", "nearest that does is 8"),
        (0, (), "tp", "nearest that does is 1"),
        (1, (1, 1, 1, 1), "pp", "(1, 1, 1) would"),
        (1, (2, 2), "pp", "do not share out the 3 layers of wide; (2, 1) would"),
        (1, (3, 0), "pp", "(2, 1) would"),
    ],
)
def test_a_parallelism_that_does_not_fit_is_refused_with_the_nearest_that_does(
    tp: int, stages: tuple[int, ...], field: str, words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        wide_card().layout(block_size=16, kv_tokens=32, tp=tp, stages=stages)
    assert refused.value.field == field
    assert words in refused.value.message


def wide_card() -> ModelCard:
    narrow = card((0, 16, 0))
    return narrow.model_copy(update={"name": "wide", "decoder": narrow.decoder.model_copy(update={"heads": 8, "kv_heads": 2})})


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
