"""The error tree is its module's docstring, and every error crosses a process whole."""

from __future__ import annotations

import pickle
import re

import pytest
from diptych.core import errors
from diptych.core.errors import DiptychError, Internal, from_wire, to_wire


def tree(cls: type[DiptychError] = DiptychError) -> list[type[DiptychError]]:
    return [found for child in cls.__subclasses__() for found in (child, *tree(child))]


@pytest.mark.parametrize("cls", tree())
@pytest.mark.parametrize("field", [None, "sampling.top_p"])
def test_round_trip(cls: type[DiptychError], field: str | None) -> None:
    error = cls("A sentence with é and \n.", field=field)
    for back in (from_wire(*to_wire(error)), pickle.loads(pickle.dumps(error))):
        assert type(back) is cls
        assert (back.message, back.field, str(back)) == (error.message, field, error.message)


def test_codes_are_distinct() -> None:
    codes = [cls.code for cls in tree()]
    assert len(set(codes)) == len(codes)


def test_an_unknown_code_is_internal_and_is_kept_in_the_text() -> None:
    error = from_wire("from_the_future", "What?", "x")
    assert type(error) is Internal
    assert error.message == "from_the_future: What?"


def documented() -> dict[str, tuple[int, str, str]]:
    """Name → (depth, HTTP status, gRPC status) of every error drawn in the docstring."""
    rows = {}
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"^    ([│├└─ ]*)(\w+)(?:  +.*?(?:(\d{3}) ([A-Z_]+)|–))?$", line):
            rows[match[2]] = (len(match[1]) // 4, match[3] or "", match[4] or "")
    return rows


def test_the_docstring_is_the_tree() -> None:
    rows = documented()
    assert set(rows) == {"DiptychError", *(cls.__name__ for cls in tree())}
    for cls in tree():
        depth, http, grpc = rows[cls.__name__]
        assert depth == len(cls.__mro__) - len(DiptychError.__mro__)
        if http:
            assert (int(http), grpc) == (cls.http_status, cls.grpc_status)
