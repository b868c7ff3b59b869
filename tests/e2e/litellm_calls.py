"""LiteLLM's calls against the router at argv[1], which serves argv[2]; fails by an exception. Needs `litellm` alone."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks for prices on the network

import litellm

URL, MODEL = sys.argv[1:]
PROMPT = "the man in the inn"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
PLACE: dict[str, Any] = {"api_base": URL, "api_key": "none", "num_retries": 0, "max_tokens": 8, "temperature": 0.8, "top_p": 0.9, "seed": 7}


def main() -> None:
    whole = litellm.completion(model=f"openai/{MODEL}", messages=MESSAGES, **PLACE)
    text = whole.choices[0].message.content
    assert whole.usage.completion_tokens == 8, whole
    asked: dict[str, Any] = {"model": f"openai/{MODEL}", "messages": MESSAGES, **PLACE}
    chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage.completion_tokens == 8, chunks[-1]
    assert asyncio.run(litellm.acompletion(**asked)).choices[0].message.content == text
    assert len(litellm.completion(**asked, n=2).choices) == 2
    assert litellm.completion(**asked, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert litellm.completion(**asked | {"model": f"hosted_vllm/{MODEL}"}).choices[0].message.content == text
    assert litellm.text_completion(model=f"text-completion-openai/{MODEL}", prompt=PROMPT, **PLACE).choices[0].text
    refused(litellm.NotFoundError, **asked | {"model": "openai/other"})
    refused(litellm.ContextWindowExceededError, **asked | {"messages": [{"role": "user", "content": PROMPT * 200}]})
    refused(litellm.BadRequestError, **asked, response_format={"type": "json_object"})


def refused(kind: type[Exception], **asked: Any) -> None:
    try:
        litellm.completion(**asked)
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


if __name__ == "__main__":
    main()
