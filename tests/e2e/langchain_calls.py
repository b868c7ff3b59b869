"""LangChain's calls against the router at argv[1], which serves argv[2]; fails by an exception. Needs `langchain-openai` alone."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import openai
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI

URL, MODEL = sys.argv[1:]
PROMPT = "the man in the inn"
PLACE: dict[str, Any] = {"base_url": URL, "api_key": "none", "model": MODEL, "max_tokens": 8, "max_retries": 0}
SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 7}


def main() -> None:
    chat = ChatOpenAI(**PLACE, **SAMPLING)
    whole = chat.invoke(PROMPT)
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 8, whole
    assert whole.response_metadata["finish_reason"] == "length"
    pieces = list(chat.stream(PROMPT, stream_usage=True))
    assert "".join(str(piece.content) for piece in pieces) == whole.content
    assert sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata) == 8
    assert asyncio.run(chat.ainvoke(PROMPT)).content == whole.content
    assert [answer.content for answer in chat.batch([PROMPT] * 3)] == [whole.content] * 3
    talk = [("system", "Be brief."), ("human", PROMPT), ("ai", "Yes."), ("human", "And?")]
    assert chat.invoke(talk).content
    assert len(ChatOpenAI(**PLACE, **SAMPLING, n=2).generate([[HumanMessage(PROMPT)]]).generations[0]) == 2
    assert chat.bind(logprobs=True, top_logprobs=2).invoke(PROMPT).response_metadata["logprobs"]["content"]
    stop = str(whole.content)[2:4]
    assert chat.invoke(PROMPT, stop=[stop]).content == str(whole.content)[: str(whole.content).index(stop)]
    completions = OpenAI(**PLACE, **SAMPLING)
    assert "".join(completions.stream(PROMPT)) == completions.invoke(PROMPT)
    assert refused(chat, response_format={"type": "json_object"}) == "response_format"
    assert refused(chat, reasoning_effort="low") == "reasoning_effort"


def refused(chat: ChatOpenAI, **unserved: Any) -> str | None:
    """The field the router names."""
    try:
        chat.bind(**unserved).invoke(PROMPT)
    except openai.BadRequestError as error:
        return error.param
    return None


if __name__ == "__main__":
    main()
