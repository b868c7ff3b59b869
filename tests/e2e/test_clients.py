"""The clients people have, unchanged, against real ranks: the `openai` package always; LangChain and LiteLLM where they are named."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from e2e_harness import Family
from router_harness import idle, router

MODEL = "tiny-llama"
PROMPT = "the man in the inn"
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 7}


@pytest.fixture(scope="module")
def url(llama_ranks: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A router in a thread of its own, so that blocking clients can be called as people call them."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    template = tmp_path_factory.mktemp("asked") / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:")
    place = router([*llama_ranks.prefills, llama_ranks.decode], chat_template=template)
    running = asyncio.run_coroutine_threadsafe(place.__aenter__(), loop).result(30)
    try:
        yield f"http://{running.http}/v1"
        asyncio.run_coroutine_threadsafe(idle(running), loop).result(30)
    finally:
        asyncio.run_coroutine_threadsafe(place.__aexit__(None, None, None), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as made:
        yield made


def test_openai_completions(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "user": "me", **SAMPLING}
    whole = client.completions.create(**asked, logprobs=2)
    assert whole.usage is not None
    assert whole.choices[0].logprobs is not None
    assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.tokens or ()) == 12
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    text = whole.choices[0].text
    stop = text[3:5]
    stopped = client.completions.create(**asked, stop=stop)
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (text[: text.index(stop)], "stop")


def test_openai_chat(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 12, **SAMPLING}
    harmless: dict[str, Any] = {
        "store": False, "metadata": {"run": "1"}, "user": "me", "parallel_tool_calls": True, "response_format": {"type": "text"},
        "service_tier": "auto", "modalities": ["text"], "prompt_cache_key": "x", "safety_identifier": "y",
    }  # fmt: skip
    whole = client.chat.completions.create(**asked, **harmless, logprobs=True, top_logprobs=2)
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [len(entry.top_logprobs) for entry in logprobs.content] == [2] * 12
    text = whole.choices[0].message.content
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12


def test_openai_choices(client: openai.OpenAI) -> None:
    one = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, **SAMPLING)
    three = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, n=3, **SAMPLING)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert three.choices[0].text == one.choices[0].text
    assert len({choice.text for choice in three.choices}) == 3
    texts = ["", "", ""]
    for chunk in client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, n=3, stream=True, **SAMPLING):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in three.choices]


def test_openai_async(url: str) -> None:
    async def check() -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            whole = await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8, **SAMPLING)
            stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8, stream=True, **SAMPLING)
            texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(texts) == whole.choices[0].message.content
            names = [model.id async for model in client.models.list()]
            assert names == [MODEL]

    asyncio.run(check())


def test_openai_errors(client: openai.OpenAI) -> None:
    chat = client.chat.completions
    with pytest.raises(openai.NotFoundError, match="other"):
        chat.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="temperature") as refused:
        chat.create(model=MODEL, messages=MESSAGES, temperature=-1)
    assert (refused.value.param, refused.value.code, refused.value.type) == ("temperature", "invalid_request", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="context") as refused:
        chat.create(model=MODEL, messages=[{"role": "user", "content": PROMPT * 200}])
    assert refused.value.code == "context_length_exceeded"
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for field, value in (("tools", [tool]), ("response_format", {"type": "json_object"}), ("store", True), ("reasoning_effort", "low")):
        unserved: dict[str, Any] = {field: value}
        with pytest.raises(openai.BadRequestError, match=field) as refused:
            chat.create(model=MODEL, messages=MESSAGES, **unserved)
        assert refused.value.param == field


@pytest.mark.parametrize("program", ["langchain_calls.py", "litellm_calls.py"])
def test_other_clients(url: str, program: str) -> None:
    """They bring their own `openai`, so they live in environments of their own."""
    python = os.environ.get(f"DIPTYCH_{program.partition('_')[0].upper()}_PYTHON")
    if not python:
        pytest.skip("no environment with this client is named; docs/clients.md says how")
    ran = subprocess.run([python, Path(__file__).with_name(program), url, MODEL], capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stdout + ran.stderr
