"""The Python client and its examples against a real server with a face of our own."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
from diptych.client.aio import AsyncClient
from diptych.client.call import Answer, Choice
from diptych.client.sync import Client
from diptych.core.errors import Cancelled, DeadlineExceeded, DiptychError, InvalidRequest, Unavailable
from diptych.core.generate import Chunk, Finish, Generate, Model, Timing, Usage
from diptych.core.request import FinishReason, Token
from diptych.core.sampling import SamplingParams
from diptych.rpc.server import serve

ROOT = Path(next(iter(importlib.util.find_spec("diptych").submodule_search_locations)))  # type: ignore[union-attr,arg-type]


class Parrot:
    """Repeats the prompt word by word; holds before the word "wait" for ever; tells when an answer has ended."""

    def __init__(self) -> None:
        self.calls: list[Generate] = []
        self.ended = threading.Semaphore(0)

    async def generate(self, call: Generate) -> AsyncGenerator[Chunk, None]:
        self.calls.append(call)
        words = call.prompt.split() if isinstance(call.prompt, str) else [str(token) for token in call.prompt]
        try:
            call.sampling.validate(1000)
            choices = range(call.sampling.n)
            for index, word in enumerate(words):
                if word == "wait":
                    await asyncio.get_running_loop().create_future()
                for choice in choices:
                    yield Chunk("r1", text=f" {word}", tokens=(Token(index, index, choice=choice),), choice=choice)
            for choice in reversed(choices):
                finish = None if choice else Finish(Usage(1, len(words) * len(choices)), Timing(ttft=0.5))
                yield Chunk("r1", text="!" * (choice + 1), choice=choice, reason=FinishReason.LENGTH, finish=finish)
        finally:
            self.ended.release()

    def models(self) -> tuple[Model, ...]:
        return (Model("parrot", 10, 1000, True),)

    def refused(self, error: DiptychError) -> None:
        raise error


class Served:
    """A parrot served from a thread of its own, as a client without asyncio meets it."""

    def __init__(self) -> None:
        self.face = Parrot()
        self.address = ""
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._ready.wait(20)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await serve("127.0.0.1:0", inference=self.face)
        self.address = server.address
        self._ready.set()
        await self._stop.wait()
        await server.stop(0.0)

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)


@pytest.fixture
def served() -> Iterator[Served]:
    server = Served()
    yield server
    server.stop()


WHOLE = Answer(
    choices=(Choice(" a b!", (Token(0, 0), Token(1, 1)), FinishReason.LENGTH),),
    usage=Usage(1, 2),
    timing=Timing(ttft=0.5),
    request_id="r1",
)


def test_a_whole_answer(served: Served) -> None:
    with Client(served.address) as client:
        assert client.generate("a b") == WHOLE
        assert (WHOLE.text, WHOLE.tokens, WHOLE.finish) == (" a b!", (Token(0, 0), Token(1, 1)), FinishReason.LENGTH)
        assert client.generate([5, 6]).text == " 5 6!"
        assert client.models() == (Model("parrot", 10, 1000, True),)

    async def scenario() -> None:
        async with AsyncClient(served.address) as client:
            assert await client.generate("a b") == WHOLE
            assert await client.models() == (Model("parrot", 10, 1000, True),)

    asyncio.run(scenario())


def test_several_choices(served: Served) -> None:
    with Client(served.address) as client:
        answer = client.generate("a b", n=3)
        assert [choice.text for choice in answer.choices] == [" a b!", " a b!!", " a b!!!"]
        assert [token.choice for choice in answer.choices for token in choice.tokens] == [0, 0, 1, 1, 2, 2]
        assert answer.usage.output_tokens == 6


def test_every_option_reaches_the_server(served: Served) -> None:
    with Client(served.address) as client:
        client.generate(
            [1, 2],
            model="m",
            max_tokens=3,
            temperature=0.5,
            top_p=0.9,
            top_k=7,
            seed=11,
            stop="end",
            stop_token_ids=[8],
            ignore_eos=True,
            logprobs=2,
            min_p=0.1,
            repetition_penalty=1.1,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            logit_bias={9: 1.0, 4: -2.0},
            min_tokens=1,
            n=2,
            request_id="mine",
            timeout_s=60.0,
        )
        client.generate("a")
    sampling = SamplingParams(3, 0.5, 0.9, 7, 11, (8,), True, 2, 0.1, 1.1, 0.5, -0.5, ((4, -2.0), (9, 1.0)), 1, 2)
    first, second = served.face.calls
    assert first == Generate((1, 2), "m", sampling, ("end",), "mine")
    assert second.request_id, "who names none is given one"
    assert replace(second, request_id="") == Generate("a")


def test_an_option_that_does_not_exist_is_a_type_error(served: Served) -> None:
    with Client(served.address) as client, pytest.raises(TypeError, match="max_token"):
        client.generate("a", max_token=3)  # type: ignore[call-arg]


def test_mistakes_name_their_field(served: Served) -> None:
    with Client(served.address) as client:
        for prompt, options, field in (("", {}, "prompt"), ("a", {"max_tokens": 0}, "max_tokens"), ("\ud800", {}, "prompt")):
            with pytest.raises(InvalidRequest) as raised:
                client.generate(prompt, **options)  # type: ignore[arg-type]
            assert raised.value.field == field


def test_chunks_come_as_they_are_said_and_leaving_early_cancels(served: Served) -> None:
    with Client(served.address) as client:
        chunks = client.stream("a b wait")
        assert [next(chunks).text, next(chunks).text] == [" a", " b"]
        chunks.close()
        assert served.face.ended.acquire(timeout=60)
        for chunk in client.stream("a wait"):
            assert chunk.text == " a"
            break
        assert served.face.ended.acquire(timeout=60)


def test_leaving_an_asynchronous_answer_early_cancels(served: Served) -> None:
    async def scenario() -> None:
        async with AsyncClient(served.address) as client:
            async with aclosing(client.stream("a wait")) as chunks:
                assert (await anext(chunks)).text == " a"
            assert await asyncio.to_thread(served.face.ended.acquire, timeout=10)
            before = len(served.face.calls)
            waiting = asyncio.create_task(client.generate("wait"))
            async with asyncio.timeout(60):
                while len(served.face.calls) == before:  # noqa: ASYNC110  the server is another thread's
                    await asyncio.sleep(0.01)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert await asyncio.to_thread(served.face.ended.acquire, timeout=10)

    asyncio.run(scenario())


def test_a_time_limit(served: Served) -> None:
    within_s = 0.2
    with Client(served.address) as client:
        while not served.face.calls:  # a call may end before it has come to the server
            with pytest.raises(DeadlineExceeded):
                client.generate("wait", timeout_s=within_s)
            within_s *= 2
    assert served.face.ended.acquire(timeout=60)


def test_closing_the_client_ends_what_is_under_way(served: Served) -> None:
    client = Client(served.address)
    chunks = client.stream("a wait")
    next(chunks)
    threading.Timer(0.1, client.close).start()
    with pytest.raises(Cancelled):
        next(chunks)
    assert served.face.ended.acquire(timeout=60)
    with pytest.raises(Cancelled, match="closed"):
        client.models()
    with pytest.raises(Cancelled, match="closed"):
        client.generate("a")


def test_a_server_that_goes_away_is_unavailable(served: Served) -> None:
    with Client(served.address) as client:
        chunks = client.stream("a wait")
        next(chunks)
        stopping = threading.Timer(0.1, served.stop)
        stopping.start()
        with pytest.raises(Unavailable):
            next(chunks)
        with pytest.raises(Unavailable):
            client.generate("a", timeout_s=60.0)
        stopping.join()


def test_one_client_serves_many_threads(served: Served) -> None:
    with Client(served.address) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda index: client.generate(f"w{index}").text, range(40)))
    assert answers == [f" w{index}!" for index in range(40)]


@pytest.mark.parametrize(("example", "prompts"), [("client_sync.py", ["once upon"]), ("client_async.py", ["once upon", "a time"])])
def test_the_examples_run(example: str, prompts: list[str], served: Served) -> None:
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, str(ROOT / "examples" / example), "--address", served.address, *prompts]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for prompt in prompts:
        assert f" {prompt}!" in done.stdout
    assert "2 tokens, the first after 0.500 s" in done.stdout


def test_an_example_without_a_server_says_so_in_one_line() -> None:
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, str(ROOT / "examples" / "client_sync.py"), "--address", "127.0.0.1:1", "hello"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("unavailable: ")
    assert done.stderr.count("\n") == 1
