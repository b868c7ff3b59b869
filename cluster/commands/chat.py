"""`diptych chat`: a conversation over the OpenAI face, where the router applies the model's chat template."""

from __future__ import annotations

import json
import ssl
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from ...core.access import Access
from ...core.errors import ConfigError, InvalidRequest, Unavailable
from ...rpc.inference import SyncInferenceClient
from .reach import server_of

CONNECT_S, READ_S = 5.0, 600.0


@dataclass(slots=True)
class Conversation:
    """All turns so far; each question is sent with them."""

    url: str
    access: Access
    model: str
    options: dict[str, Any]
    turns: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def begin(cls, name: str, server: str | None, access: Access, *, system: str | None, options: dict[str, Any]) -> Conversation:
        """With the cluster `name`, or the HTTP face at `server`. `InvalidRequest` if its model cannot chat."""
        if server is None:
            faces = server_of(name, access)
            access = faces.access
            with SyncInferenceClient(faces.grpc, access) as client:
                model = client.models()[0]
            if not model.has_chat_template:
                raise InvalidRequest(
                    f"{model.id} has no chat template, so it cannot take turns; `diptych generate` continues a text. "
                    "To chat all the same, serve it with a template of your own: `diptych up --chat-template FILE`.",
                    field="chat_template",
                )
            server, model_id = faces.http, model.id
        else:
            model_id = _first_model(server, access)
        turns = [{"role": "system", "content": system}] if system else []
        return cls(f"{access.scheme}://{server}/v1/chat/completions", access, model_id, options, turns)

    def run(self) -> None:
        """Question and answer until the end of input. Ctrl-C ends an answer, or the conversation if there is none under way."""
        if sys.stdin.isatty():
            sys.stderr.write(f"Chatting with {self.model}. Ctrl-D ends.\n")
        while (question := _ask()) is not None:
            if question:
                self._turn(question)

    def _turn(self, question: str) -> None:
        self.turns.append({"role": "user", "content": question})
        text = ""
        try:
            for piece in self._stream():
                text += piece
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            sys.stdout.write(" …")
        sys.stdout.write("\n")
        self.turns.append({"role": "assistant", "content": text})

    def _stream(self) -> Iterator[str]:
        body = {"model": self.model, "messages": self.turns, "stream": True, **self.options}
        try:
            limit = httpx.Timeout(READ_S, connect=CONNECT_S)
            with httpx.stream(
                "POST", self.url, json=body, timeout=limit, headers=self.access.headers, verify=verify(self.access)
            ) as response:
                if response.status_code != httpx.codes.OK:
                    response.read()
                    raise InvalidRequest(_message(response))
                for line in response.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield _piece(json.loads(line[len("data: ") :]))
        except httpx.TransportError as error:
            raise Unavailable(f"The router at {self.url} does not answer: {error}.") from error


def _ask() -> str | None:
    """The next question, None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _piece(event: dict[str, Any]) -> str:
    """The new text in an event of the stream; an error sent in the middle of it is raised."""
    if "error" in event:
        raise Unavailable(str(event["error"]["message"]))
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"The router answered {response.status_code}."


def _first_model(server: str, access: Access) -> str:
    url = f"{access.scheme}://{server}"
    try:
        response = httpx.get(f"{url}/v1/models", timeout=CONNECT_S, headers=access.headers, verify=verify(access))
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise InvalidRequest(_message(response))
        return str(response.raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
        raise Unavailable(f"No Diptych answers at {url} (--server wants the HTTP port here): {error}.") from error


def verify(access: Access) -> ssl.SSLContext | bool:
    """By what a server over TLS is known. Raises `ConfigError` for an authority that cannot be read."""
    if access.ca is None:
        return True
    try:
        return ssl.create_default_context(cafile=access.ca)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"The authority {access.ca} cannot be read: {error.strerror or error}.", field="ca") from None
