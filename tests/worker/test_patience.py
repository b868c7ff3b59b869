"""How long a core must have been idle before it is borrowed."""

from __future__ import annotations

import pytest
from diptych.core.fleet import Phase
from diptych.worker.patience import CALM_NS, LATE_NS, MANY_ROWS, SOON_NS, Patience

NOW = 7_000_000_000


@pytest.mark.parametrize("phase", Phase)
def test_who_was_never_disturbed_borrows_soon(phase: Phase) -> None:
    assert Patience(phase).rest_ns(1, NOW) == SOON_NS[phase]


def test_an_answer_between_whose_tokens_a_prompt_came_borrows_late_for_a_while() -> None:
    patience = Patience(Phase.DECODE)
    patience.disturbed(NOW)
    assert patience.rest_ns(1, NOW + CALM_NS - 1) == LATE_NS
    assert patience.rest_ns(1, NOW + CALM_NS) == SOON_NS[Phase.DECODE]


def test_many_answers_borrow_soon_all_the_same() -> None:
    patience = Patience(Phase.DECODE)
    patience.disturbed(NOW)
    assert patience.rest_ns(MANY_ROWS - 1, NOW) == LATE_NS
    assert patience.rest_ns(MANY_ROWS, NOW) == SOON_NS[Phase.DECODE]


def test_a_prompt_borrows_soon_whoever_comes() -> None:
    patience = Patience(Phase.PREFILL)
    patience.disturbed(NOW)
    assert patience.rest_ns(1, NOW) == SOON_NS[Phase.PREFILL]
