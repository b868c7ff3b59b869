"""transformers behind OpenAI's completions: `generate` as it is, streamed token by token, one request after another.

    python -m diptych.benchmarks.peers.transformers_server --model DIRECTORY --port PORT [--threads N]

`generate` answers a batch only as a whole, so requests wait for their turn, first come first served: what a plain program around
transformers does. It serves only what the benchmark asks: greedy completions with `ignore_eos`, as a stream with usage.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer


class Tokens(BaseStreamer):
    """Hands every new token's id over as it is drawn; the prompt, which comes first, is left out."""

    def __init__(self, hand_over: Callable[[int], object]) -> None:
        self._hand_over = hand_over
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt:
            self._hand_over(int(value.flatten()[-1]))
        self._prompt = False

    def end(self) -> None:
        """Nothing: `generate` returns, or raises, right behind it."""


class Model:
    """One model, one thread that runs it."""

    def __init__(self, directory: Path) -> None:
        self.name = directory.name
        self._model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)  # in eval mode, as it comes
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def tokens(self, ids: list[int], count: int) -> AsyncIterator[int]:
        """Greedy tokens as they come. A request whose reader has gone is computed to its end all the same: `generate` is not asked
        to stop in between."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[int | None]()
        streamer = Tokens(lambda token: loop.call_soon_threadsafe(queue.put_nowait, token))
        work = loop.run_in_executor(self._thread, self._generate, ids, count, streamer)
        work.add_done_callback(lambda done: queue.put_nowait(None))
        while (token := await queue.get()) is not None:
            yield token
        await work

    def _generate(self, ids: list[int], count: int, streamer: Tokens) -> None:
        prompt = torch.tensor([ids])
        with torch.inference_mode():
            self._model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, min_new_tokens=count, do_sample=False,
                streamer=streamer,
            )  # fmt: skip

    def encode(self, prompt: str | list[int]) -> list[int]:
        return list(prompt) if isinstance(prompt, list) else list(self._tokenizer.encode(prompt))

    def text(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))


def make_app(model: Model) -> Starlette:
    async def completions(request: Request) -> Response:
        body = await request.json()
        ids = model.encode(body["prompt"])
        return StreamingResponse(_events(model, ids, body["max_tokens"]), media_type="text/event-stream")

    async def models(request: Request) -> Response:
        return JSONResponse({"data": [{"id": model.name}]})

    return Starlette(routes=[Route("/v1/completions", completions, methods=["POST"]), Route("/v1/models", models)])


async def _events(model: Model, ids: list[int], count: int) -> AsyncIterator[str]:
    written = 0
    async for token in model.tokens(ids, count):
        written += 1
        yield _event({"choices": [{"index": 0, "text": model.text(token)}], "usage": _usage(ids, written)})
    yield _event({"choices": [], "usage": _usage(ids, written)})
    yield "data: [DONE]\n\n"


def _usage(ids: list[int], written: int) -> dict[str, int]:
    return {"prompt_tokens": len(ids), "completion_tokens": written}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diptych.benchmarks.peers.transformers_server", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    uvicorn.run(make_app(Model(options.model)), host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
