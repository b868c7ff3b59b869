"""Every sampling option of `generate` and `chat` reaches the router, and several choices are printed one after the other."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from diptych.cluster.cli import app
from diptych.core.errors import DiptychError
from diptych.core.generate import Chunk, Finish, Generate, Model, Timing, Usage
from diptych.core.request import FinishReason, Token
from diptych.core.sampling import SamplingParams
from diptych.rpc.server import serve
from typer.testing import CliRunner

REALS = {"-t": 0.5, "--top-p": 0.9, "--min-p": 0.1, "--repetition-penalty": 1.1, "--presence-penalty": 0.5, "--frequency-penalty": -0.5}
WHOLES = {"--max-tokens": 9, "--min-tokens": 2, "--top-k": 7, "--seed": 11, "--stop-token": 8}
TEXTS = ["--logit-bias", "9=1.5", "--logit-bias", "4=-2", "--stop", "end", "--stop", "END", "--ignore-eos"]
KNOBS = [*(str(word) for pair in (REALS | WHOLES).items() for word in pair), *TEXTS]
ASKED = SamplingParams(9, 0.5, 0.9, 7, 11, (8,), True, None, 0.1, 1.1, 0.5, -0.5, ((4, -2.0), (9, 1.5)), 2)


class Mixer:
    """Answers with all choices mixed: choice c says its number three times, the last choice ends first."""

    def __init__(self) -> None:
        self.calls: list[Generate] = []

    async def generate(self, call: Generate) -> AsyncGenerator[Chunk, None]:
        self.calls.append(call)
        choices = range(call.sampling.n)
        for index in range(3):
            for choice in choices:
                token = Token(index, 40 + choice, -0.25, ((40 + choice, -0.25), (7, -1.5)), choice)
                yield Chunk("r", text=f"{choice} ", tokens=(token,), choice=choice)
        for choice in reversed(choices):
            reason = FinishReason.STOP if choice else FinishReason.LENGTH
            finish = None if choice else Finish(Usage(4, 3 * len(choices)), Timing(ttft=0.5))
            yield Chunk("r", choice=choice, reason=reason, finish=finish)

    def models(self) -> tuple[Model, ...]:
        return (Model("mixer", 10, 1000, True),)

    def refused(self, error: DiptychError) -> None:
        raise error


@pytest.fixture
def served() -> Iterator[tuple[str, Mixer]]:
    """The address of a gRPC face that runs in a thread, and who answers there."""
    mixer, started, loop = Mixer(), threading.Event(), asyncio.new_event_loop()
    address, stop = [""], asyncio.Event()

    async def run() -> None:
        server = await serve("127.0.0.1:0", inference=mixer)
        address[0] = server.address
        started.set()
        await stop.wait()
        await server.stop(0.0)

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    assert started.wait(20)
    yield address[0], mixer
    loop.call_soon_threadsafe(stop.set)
    thread.join(20)
    loop.close()


def test_generate_passes_every_option_on(served: tuple[str, Mixer]) -> None:
    address, mixer = served
    result = CliRunner().invoke(app, ["generate", "hello", "--server", address, *KNOBS])
    assert result.exit_code == 0, result.output
    assert [replace(call, request_id="") for call in mixer.calls] == [Generate("hello", sampling=ASKED, stop=("end", "END"))]
    assert result.stdout == "0 0 0 \n"


def test_choices_are_printed_in_turn(served: tuple[str, Mixer]) -> None:
    address, _ = served
    result = CliRunner().invoke(app, ["generate", "x", "--server", address, "--n", "3", "--stats"])
    assert result.stdout == "── 1 of 3 ──\n0 0 0 \n── 2 of 3 ──\n1 1 1 \n── 3 of 3 ──\n2 2 2 \n"
    assert "9 written (length, stop, stop)" in result.stderr


def test_logprobs_are_printed_behind_the_answer(served: tuple[str, Mixer]) -> None:
    address, mixer = served
    result = CliRunner().invoke(app, ["generate", "x", "--server", address, "--logprobs", "2"])
    assert mixer.calls[0].sampling.logprobs == 2
    assert result.stdout == "0 0 0 \n"
    assert result.stderr.splitlines() == ["      40    -0.250  40:-0.250  7:-1.500  '0 '"] * 3


def test_a_bias_that_is_none_is_refused(served: tuple[str, Mixer]) -> None:
    for wrong in ("5", "x=1", "5=y", "=1"):
        result = CliRunner().invoke(app, ["generate", "x", "--server", served[0], "--logit-bias", wrong])
        assert result.exit_code == 1
        assert f"--logit-bias {wrong!r} is no TOKEN=BIAS" in result.stderr
    assert not served[1].calls


class Chat(BaseHTTPRequestHandler):
    bodies: list[dict[str, object]]

    def do_GET(self) -> None:
        self._say(json.dumps({"data": [{"id": "m"}]}).encode())

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self._say(b'data: {"choices": [{"delta": {"content": "yes"}}]}\n\ndata: [DONE]\n\n')

    def _say(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[tuple[str, list[dict[str, object]]]]:
    bodies: list[dict[str, object]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Recording", (Chat,), {"bodies": bodies}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}", bodies
    server.shutdown()
    thread.join(20)
    server.server_close()


def test_chat_passes_every_option_on(web: tuple[str, list[dict[str, object]]]) -> None:
    address, bodies = web
    for options in (KNOBS, ["-t", "1"]):
        result = CliRunner().invoke(app, ["chat", "--server", address, *options], input="hi\n")
        assert (result.exit_code, result.stdout) == (0, "yes\n")
    asked, plain = bodies
    assert asked["logit_bias"] == {"4": -2.0, "9": 1.5}
    for key in ("model", "messages", "stream"):
        del asked[key], plain[key]
    names = ("temperature", "top_p", "top_k", "seed", "ignore_eos", "min_p", "repetition_penalty", "presence_penalty", "min_tokens")
    assert {name: asked.pop(name) for name in names} == {name: getattr(ASKED, name) for name in names}
    assert asked.pop("logit_bias")
    assert asked == {"max_tokens": 9, "frequency_penalty": -0.5, "stop": ["end", "END"], "stop_token_ids": [8]}
    assert plain == {"max_tokens": 512}


def test_help_has_a_panel_for_them() -> None:
    for command in ("generate", "chat"):
        said = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "140"}).stdout
        options, panel = said.split("Sampling")
        assert all(option in panel for option in KNOBS if option.startswith("--"))
        assert "--server" in options
