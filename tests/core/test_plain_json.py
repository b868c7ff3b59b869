"""Plain values as JSON."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from diptych.core.layout import CacheGroup, CacheKind, DType, Layout
from diptych.core.plain_json import from_json, to_json
from diptych.core.transfer import ShmEndpoint

LAYOUT = Layout("f", (CacheGroup(CacheKind.WINDOW, (0, 1), 2, 8, DType.BFLOAT16, 24),), 16, (4,), tp=2, stages=(1, 1))


@dataclass(frozen=True)
class Everything:
    number: int
    share: float
    word: DType
    data: bytes
    perhaps: tuple[int, ...] | None
    deep: tuple[tuple[tuple[int, ...], ...], ...]
    inner: Layout


@pytest.mark.parametrize(
    "value",
    [
        Everything(-(2**63), 0.1, DType.FLOAT16, bytes(range(256)), None, (((1, 2), ()), ()), LAYOUT),
        Everything(2**64, -1e300, DType.BFLOAT16, b"", (), (), LAYOUT),
        ShmEndpoint('é\n"', b"\xff\x00"),
    ],
)
def test_it_comes_back_as_it_was(value: object) -> None:
    back = from_json(type(value), to_json(value))
    assert back == value
    assert repr(back) == repr(value), "words are words and tuples are tuples"


@pytest.mark.parametrize("data", [b"", b"[1]", b"{}", b"[1,2,3]", b'[{"socket":"a","nonce":1}]', b"null"])
def test_what_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="tuple"):
        from_json(ShmEndpoint, data)


def test_what_the_constructor_refuses_is_refused() -> None:
    with pytest.raises(ValueError, match="float99"):
        from_json(Layout, to_json(LAYOUT).replace(b"bfloat16", b"float99"))
