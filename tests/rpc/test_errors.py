"""Errors cross as status + metadata and come back the same; foreign ones are translated, all of them, at one boundary."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from diptych.core import errors
from diptych.core.errors import DiptychError, Internal, InvalidRequest, Overloaded, TooLarge, to_wire
from diptych.core.generate import Generate
from diptych.rpc.errors import CODE, FIELD, FOREIGN, from_status, to_status
from diptych.rpc.inference import InferenceClient
from hypothesis import given, settings
from hypothesis import strategies as st

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DiptychError) and kind is not DiptychError]


def crossed(error: Exception) -> DiptychError:
    code, message, metadata = to_status(error)
    return from_status(code, message, dict(metadata), peer="peer")


def test_every_foreign_status_is_translated() -> None:
    assert set(FOREIGN) == set(grpc.StatusCode)
    for code in grpc.StatusCode:
        error = from_status(code, "what it said", {}, peer="worker at x:1")
        assert type(error) is FOREIGN[code]
        assert "worker at x:1" in error.message
        assert "what it said" in error.message


def test_a_foreign_status_means_what_ours_means() -> None:
    """Whatever status one of our errors is sent as, a peer without our metadata makes an error of the same kind from it."""
    for kind in KINDS:
        foreign = FOREIGN[grpc.StatusCode[kind.grpc_status]]
        assert foreign.grpc_status == kind.grpc_status


def test_a_status_without_text_still_says_something() -> None:
    assert from_status(grpc.StatusCode.UNAVAILABLE, None, {}, peer="p").message == "p: UNAVAILABLE"


def test_grpc_refusing_a_large_message_is_too_large_and_other_exhaustion_is_overload() -> None:
    said = "Received message larger than max (20 vs. 10)"
    assert type(from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, said, {}, peer="p")) is TooLarge
    assert type(from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "no more", {}, peer="p")) is Overloaded


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(message=st.text(min_size=1, max_size=80), field=st.none() | st.text(max_size=20))
def test_our_errors_cross_whole(kind: type[DiptychError], message: str, field: str | None) -> None:
    error = kind(message, field=field)
    back = crossed(error)
    assert type(back) is kind
    assert to_wire(back) == to_wire(error)


def test_long_messages_are_cut_and_metadata_is_ascii() -> None:
    code, message, metadata = to_status(InvalidRequest("é" * 10**6, field="ключ\n"))
    assert len(message.encode()) <= 1000
    assert all(value.isascii() and value.isprintable() for _, value in metadata)
    assert from_status(code, message, dict(metadata), peer="p").field == "ключ\n"


def test_a_defect_leaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    code, message, metadata = to_status(ValueError("/secret/path and a value"))
    assert (code, metadata) == (grpc.StatusCode.INTERNAL, ((CODE, "internal"),))
    assert "secret" not in message
    assert "secret" in caplog.text


@pytest.mark.parametrize("error", [kind("What went wrong.", field="prompt") for kind in KINDS] + [RuntimeError("/secret")])
def test_what_a_face_raises_reaches_the_client(error: Exception, serving: Any, parrot: Callable[[], Any]) -> None:
    async def scenario() -> DiptychError:
        face = parrot()
        face.error = error
        async with serving(inference=face) as server, InferenceClient(server.address) as client:
            chunks = client.generate(Generate("a b"))
            assert [(await anext(chunks)).text for _ in "ab"] == ["a", "b"]
            with pytest.raises(DiptychError) as raised:
                await anext(chunks)
            return raised.value

    got = asyncio.run(scenario())
    if isinstance(error, DiptychError):
        assert type(got) is type(error)
        assert to_wire(got) == to_wire(error)
    else:
        assert type(got) is Internal
        assert "secret" not in got.message


def test_a_stranger_sees_status_message_and_metadata(serving: Any, parrot: Callable[[], Any]) -> None:
    async def scenario() -> grpc.aio.AioRpcError:
        async with serving(inference=parrot()) as server, grpc.aio.insecure_channel(server.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await channel.unary_stream("/diptych.v1.Inference/Generate", None, None)(b"").read()
            return raised.value

    error = asyncio.run(scenario())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "prompt" in (error.details() or "")
    metadata = dict(error.trailing_metadata() or ())
    assert (metadata[CODE], metadata[FIELD]) == ("invalid_request", "prompt")
