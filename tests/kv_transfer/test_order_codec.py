"""Every order and every answer survives the channel."""

from __future__ import annotations

from typing import get_args

import pytest
from diptych.core.transfer import Hello
from diptych.kv_transfer.answers import DestinationAnswer, SourceAnswer
from diptych.kv_transfer.order_codec import decode, encode
from diptych.kv_transfer.ranks import DestinationOrder, SourceOrder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv_world import LAYOUT

KINDS = sorted(
    {kind for said in (SourceOrder, DestinationOrder, SourceAnswer, DestinationAnswer) for kind in get_args(said)}, key=lambda k: k.__name__
)
HELLOS = st.builds(Hello, layout=st.just(LAYOUT))  # a layout of random fields is none


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_is_decoded_is_what_was_encoded(kind: type) -> None:
    st.register_type_strategy(Hello, HELLOS)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.from_type(kind))
    def same(value: object) -> None:
        back = decode(encode(value))  # type: ignore[arg-type]
        assert type(back) is kind
        assert back == value
        assert repr(back) == repr(value)

    same()


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(KeyError):
        decode(b'Popen\n[["ls"]]')
