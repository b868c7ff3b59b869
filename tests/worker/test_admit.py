"""What a worker refuses, by field, of requests that nobody validated."""

from __future__ import annotations

from typing import Any

import pytest
from diptych.core.request import Request, Tokens
from diptych.core.sampling import SamplingParams
from diptych.worker.admit import refusal


def asked(n: int, **fields: Any) -> Request:
    return Request("r", "", (Tokens((1, 2)),), SamplingParams(temperature=0.0, max_tokens=3, n=n), **fields)


@pytest.mark.parametrize(
    "request_",
    [asked(1), asked(2), asked(2, generated=((), (4,))), asked(3, generated=((1, 2, 3), (), ()), finished=frozenset({0, 2}))],
)
def test_choices_that_can_be_written_are_taken(request_: Request) -> None:
    assert refusal(request_, 10) is None


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (asked(17), "n"),
        (asked(0), "n"),
        (asked(2, generated=((4,),)), "generated"),
        (asked(2, generated=((4,), (11,))), "prompt"),
        (asked(2, finished=frozenset({0, 1})), "finished"),
        (asked(2, finished=frozenset({2})), "finished"),
        (asked(2, generated=((4, 5, 6), ())), "max_tokens"),
    ],
)
def test_choices_that_make_no_sense_are_refused_by_field(request_: Request, field: str) -> None:
    error = refusal(request_, 10)
    assert error is not None
    assert error.field == field
