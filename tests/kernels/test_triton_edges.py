"""What the Triton kernels let through is what a sort lets through: of equal logits the first, and the same whoever adds first."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from diptych.kernels.noise import Noise
from diptych.kernels.sampling import Ask, _edges_there, draw_torch, edges_sorted
from diptych.kernels.sampling import draw as draw_all
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_place import DEVICE, on_triton

pytestmark = [
    pytest.mark.usefixtures("on_triton"),
    pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered"),
]
__all__ = ["on_triton"]
NOISE = Noise(1, 0, 0)
TOLERANCE = 2.0**-18
"""Of a nucleus' mass: powers of e in fp32, summed without error. In tokens none at all, where each weighs more."""
Edges = list[tuple[float, int]]


@pytest.fixture(autouse=True)
def small_chunks(on_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from diptych.kernels.gpu import edges

    monkeypatch.setattr(edges, "CHUNK", 256)


def ask(row: int = 0, temperature: float = 0.8, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Ask:
    return Ask(row, NOISE, temperature, top_k, top_p, min_p)


def found(logits: Tensor, asks: Sequence[Ask]) -> Edges:
    floors, lasts = _edges_there(logits.to(DEVICE), asks, range(len(asks)))
    assert (floors.dtype, lasts.dtype, floors.shape, lasts.shape) == (torch.float32, torch.int64, (len(asks),), (len(asks),))
    return list(zip(floors.tolist(), lasts.tolist(), strict=True))


def let_through(row: Tensor, edge: tuple[float, int]) -> set[int]:
    floor, last = edge
    kept = (row.float() > floor) | ((row.float() == floor) & (torch.arange(len(row)) <= last))
    return set(kept.nonzero().flatten().tolist())


def by_sorting(logits: Tensor, asks: Sequence[Ask]) -> list[set[int]]:
    """What the twin lets through, of each ask alone."""
    return [let_through(logits[each.row], (float(edge[0]), int(edge[1]))) for each in asks for edge in [edges_sorted(logits, [each])]]


def kept_at(row: Tensor, asked: Ask, top_p: float) -> tuple[list[int], int]:
    """The tokens of a finite row, likeliest first, and how many are let through, in fp64 where masses are summed."""
    raw, order = row.sort(descending=True, stable=True)
    kept = min(asked.top_k or len(row), len(row))
    values = raw[:kept].double() / torch.tensor(asked.temperature).double()
    masses = (values - values[0]).exp()
    before = masses.cumsum(0) - masses
    if asked.top_p < 1.0:
        kept = min(kept, max(1, int((before < top_p * masses.sum()).sum())))
    if asked.min_p > 0.0:
        divided = raw.float() / torch.tensor(asked.temperature)
        kept = min(kept, max(1, int((divided >= divided[0] + torch.tensor(math.log(asked.min_p))).sum())))
    return order.tolist(), kept


def check(logits: Tensor, asks: Sequence[Ask]) -> None:
    for each, edge in zip(asks, found(logits, asks), strict=True):
        row, tokens = logits[each.row], let_through(logits[each.row], edge)
        least, most = (kept_at(row, each, each.top_p + sign * TOLERANCE)[1] for sign in (-1, 1))
        order, _ = kept_at(row, each, each.top_p)
        assert least <= len(tokens) <= most, (each, least, len(tokens), most)
        assert tokens == set(order[: len(tokens)]), each
        if len(tokens) < len(row) and each.min_p == 0.0:
            last = order[len(tokens) - 1]
            assert edge == (float(row[last]), last), each


def random(rows: int, vocab: int, spread: float, seed: int, banned: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * spread
    logits[torch.rand(rows, vocab, generator=generator) < banned] = -torch.inf
    logits[:, vocab // 2] = 0.5  # a row has something
    return logits


@pytest.mark.parametrize(
    ("dtype", "vocab", "spread", "banned"),
    [
        (torch.bfloat16, 1, 1.0, 0.0),
        (torch.float16, 257, 10.0, 0.3),
        (torch.bfloat16, 700, 0.05, 0.0),
        (torch.float32, 513, 3.0, 0.0),
        (torch.float32, 77, 0.05, 0.5),
    ],
    ids=str,
)
def test_the_same_as_in_double(dtype: torch.dtype, vocab: int, spread: float, banned: float) -> None:
    """Nearly flat rows and steep ones, whose edges lie in chunks anywhere; draws of one row and of rows that others do not ask for. In
    the interpreter an fp32 draw is half a second, so not every dtype meets every row."""
    logits = random(3, vocab, spread, seed=vocab, banned=banned).to(dtype)
    check(logits, [ask(2, top_k=7), ask(0, 1.3, top_p=0.9), ask(2, top_k=90, top_p=0.6), ask(1, min_p=0.3), ask(1, 0.3, 40, 0.97, 0.01)])


@pytest.mark.nightly
@pytest.mark.timeout(600)
@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**60),
    st.sampled_from([1, 2, 255, 256, 700, 1500]),
    st.sampled_from([0.01, 1.0, 3.0, 30.0]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.lists(
        st.builds(
            ask,
            row=st.integers(0, 2),
            temperature=st.sampled_from([0.05, 0.7, 1.0, 3.0]),
            top_k=st.sampled_from([0, 0, 1, 7, 250, 1499]),
            top_p=st.sampled_from([1.0, 1.0, 0.9999, 0.9, 0.5, 1e-6]),
            min_p=st.sampled_from([0.0, 0.0, 1e-9, 0.01, 0.3, 1.0]),
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_the_same_for_any_limits(seed: int, vocab: int, spread: float, dtype: torch.dtype, asks: list[Ask]) -> None:
    check(random(3, vocab, spread, seed % 2**60, banned=seed % 3 / 4).to(dtype), asks)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_of_equal_logits_the_first(dtype: torch.dtype) -> None:
    """A handful of values: every edge is in the midst of equal ones, some of them zeros of either sign."""
    generator = torch.Generator().manual_seed(dtype.itemsize)
    logits = torch.tensor([-2.0, -0.0, 0.0, 1.5, 1.75])[torch.randint(0, 5, (2, 600), generator=generator)].to(dtype)
    asks = [ask(0, top_k=200), ask(1, top_k=377), ask(0, 1.0, top_p=0.41), ask(1, 0.7, 300, 0.9), ask(1, 1.0, 500, 0.99, 0.1)]
    check(logits, asks)
    counted = [each for each in asks if each.top_p == 1.0]
    assert [let_through(logits[each.row], edge) for each, edge in zip(counted, found(logits, counted), strict=True)] == by_sorting(
        logits, counted
    )


def test_limits_at_their_ends() -> None:
    vocab = 300
    logits = torch.stack((random(1, vocab, 2.0, seed=5)[0], torch.zeros(vocab))).bfloat16()
    likeliest = int(logits[0].argmax())
    sizes = {
        ask(0, top_k=1): 1, ask(0, top_k=vocab - 1): vocab - 1, ask(0, top_k=vocab): vocab, ask(0, top_k=9 * vocab, top_p=1e-9): 1,
        ask(0, top_p=1e-6): 1, ask(0, min_p=1.0): int((logits[0] == logits[0].max()).sum()), ask(0, top_k=1, top_p=0.99, min_p=0.001): 1,
        ask(1, top_k=3): 3, ask(1, top_k=256): 256, ask(1, top_p=0.5): 150, ask(1, top_k=100, top_p=0.25): 25, ask(1, min_p=1.0): vocab,
        ask(1, 100.0, 7, 1.0, 0.5): 7,
    }  # fmt: skip
    for (asked, size), edge in zip(sizes.items(), found(logits, list(sizes)), strict=True):
        tokens = let_through(logits[asked.row], edge)
        assert len(tokens) == size, asked
        assert tokens == set(range(size)) if asked.row else likeliest in tokens
    check(logits[:1], [ask(0, top_p=0.9999), ask(0, 0.01, top_p=0.999999)])
    neighbours = torch.tensor([[1.0 - 2.0**-24, 1.0, 1.0 + 2.0**-23, -1.0, 1.0 + 2.0**-23]])
    assert let_through(neighbours[0], found(neighbours, [ask(0, 1.0, min_p=1.0)])[0]) == {2, 4}


def test_rows_without_limits_beside_them_and_who_adds_first_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: alone and together, in small chunks and in one."""
    from diptych.kernels.gpu import edges

    logits = random(3, 600, 1.0, seed=8).half()
    asks = [ask(1, top_p=0.8), ask(0, top_k=77, top_p=0.7), ask(2, top_k=5, min_p=0.2)]
    together = found(logits, asks)
    assert [found(logits, [each])[0] for each in asks] == together
    monkeypatch.setattr(edges, "CHUNK", 1024)
    assert found(logits, asks) == together
    wanted = [asks[0], Ask(0, NOISE, 1.1), asks[2], Ask(2, NOISE, 0.4)]
    limits = {0: together[0], 2: together[2]}
    expected = [
        int(draw_torch(logits[each.row], each, (*map(torch.tensor, limits[place]),) if place in limits else None))
        for place, each in enumerate(wanted)
    ]
    assert draw_all(logits.to(DEVICE), wanted).tolist() == expected


def test_the_kinds_of_limits_that_nobody_asks_for_are_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from diptych.kernels.gpu import edges

    launched: list[tuple[str, bool | None]] = []

    class Watched:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(edges, name)

        def __getitem__(self, grid: tuple[int, ...]):
            def launch(*args: object, **options: object) -> None:
                launched.append((self.name, options.get("BY_MASS")))
                self.kernel[grid](*args, **options)

            return launch

    for name in ("_largest_key", "_tally_chunk", "_found_edges", "_count_equal", "_last_equal"):
        monkeypatch.setattr(edges, name, Watched(name))
    logits, ends = random(1, 40, 1.0, seed=1).half(), [("_found_edges", None), ("_count_equal", None), ("_last_equal", None)]
    for asked, expected in (
        (ask(min_p=0.1), [("_largest_key", None), ends[0]]),
        (ask(top_k=9), [("_tally_chunk", False)] * 5 + ends),
        (ask(top_k=40, top_p=0.5), [("_largest_key", None)] + [("_tally_chunk", True)] * 5 + ends),
    ):
        launched.clear()
        check(logits, [asked])
        assert launched == expected


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    "values", [[-INF] * 240, [0.0, 3.0] * 65 + [INF] * 110, [-INF, NAN, 2.0, NAN, INF, -NAN] * 40], ids=["none", "inf", "nan"]
)
def test_a_broken_row_breaks_no_draw(values: list[float]) -> None:
    """It lets through what the twin does, but for min-p of what is no number, of which the first is drawn either way. A good row beside it
    stays as it is."""
    logits = torch.stack((torch.tensor(values), random(1, 240, 1.0, seed=3)[0])).bfloat16()
    asks = [ask(0, top_k=2), ask(0, top_k=130), ask(0, top_p=0.9), ask(0, 2.0, 4, 0.5), ask(0, min_p=0.1), ask(1, 1.0, 50, 0.9)]
    edges = found(logits, asks)
    for each, edge, tokens in zip(asks, edges, by_sorting(logits, asks), strict=True):
        if not math.isnan(edge[0]) and not (each.min_p and any(map(math.isnan, values))):
            assert let_through(logits[each.row], edge) == tokens, each
    first = next((place for place, value in enumerate(values) if math.isnan(value)), 130 if INF in values else 0)
    assert draw_all(logits.to(DEVICE), asks).tolist()[:-1] == [first] * 5
