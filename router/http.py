"""The HTTP face: OpenAI's completions and chat completions, models, health and metrics.

A stream's headers are sent with its first chunk, so that what fails before has its own status. An error after that is sent as one
`data: {"error": …}` event and ends the stream without `[DONE]`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..core.errors import DiptychError, Internal, InvalidRequest, NotFound, TooLarge
from ..core.generate import Finish, Generate, Model
from ..core.notes import FIELDS
from ..core.recordings import Doing
from ..core.spans import span
from ..rpc.handlers import TenantOf, everybody
from .admission import check_call, check_model
from .answers import Answer, ChatAnswer, CompletionAnswer, StreamUsage, Whole, error_json, timing_json
from .bodies import ChatBody, CompletionBody, parse_body
from .guard import TENANT, Guard
from .openapi import document
from .request_id import KEY, Named
from .run import Run
from .service import Service

log = logging.getLogger(__name__)

TIMING_HEADER = "x-diptych-timing"
"""A request with this header at 1 is told the router's own times, with its usage."""

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for completions. A chat without a limit goes on to the end of the context."""

_compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
"""Made once: `json.dumps` makes one for each event."""


class _Gone(Exception):
    """The client left while its body was being read."""


class _Call:
    """One generation: the ASGI application behind a route."""

    def __init__(self, service: Service, *, chat: bool) -> None:
        self._service = service
        self._chat = chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        accepted = self._service.clock.now()
        request_id = scope[KEY]
        reply = _Reply(scope, receive, send)
        try:
            raw = await self._body(scope, receive)
            await _while_connected(receive, self._answer(raw, reply, request_id, accepted, scope[TENANT]))
        except _Gone:
            return
        except DiptychError as error:
            # What is inside a prompt to us came as messages from this client.
            about_prompt = self._chat and error.field == "prompt"
            await reply.error(type(error)(error.message, field="messages") if about_prompt else error)
        except Exception as error:
            # The edge: the client is owed an answer whatever went wrong.
            log.error("a defect in the router", exc_info=error, extra={FIELDS: {"request": request_id}})
            await reply.error(Internal("An internal error ended the request; the router's log has it."))

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        try:
            return await _read_body(receive, Headers(scope=scope), self._service.limits.body_bytes)
        except TooLarge as error:
            self._service.refused(error)
            raise

    async def _answer(self, raw: bytes, reply: _Reply, request_id: str, accepted: float, tenant: str) -> None:
        service = self._service
        with service.seat() as seat:
            if self._chat:
                chat = parse_body(ChatBody, raw)
                call, logprobs = await self._chat_call(chat, request_id), chat.logprobs
                body: ChatBody | CompletionBody = chat
            else:
                body = parse_body(CompletionBody, raw)
                call, logprobs = await self._completion_call(body, request_id), body.logprobs is not None
            kind = ChatAnswer if self._chat else CompletionAnswer
            assert isinstance(call.prompt, tuple)
            usage = StreamUsage(len(call.prompt), body.running_usage) if body.stream and body.include_usage else None
            answer: Answer = kind(
                service.text, answer_id=request_id, model=service.name, created=int(time.time()), choices=body.n, logprobs=logprobs,
                usage=usage,
            )  # fmt: skip
            with service.run(seat, replace(call, tenant=tenant), call.prompt, accepted) as run:
                await (_send_stream(run, answer, reply, body.include_usage) if body.stream else _send_whole(run, answer, reply, body.n))

    async def _completion_call(self, body: CompletionBody, request_id: str) -> Generate:
        wanted = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        body.check_limits(self._service.text.card.max_context)
        call = body.generate(body.prompt, request_id, max_tokens=wanted, logprobs=body.logprobs)
        check_call(call, self._service.text.card, self._service.name)
        ids = await self._service.text.encode(call.prompt) if isinstance(call.prompt, str) else call.prompt
        return self._service.fitted(call, ids)

    async def _chat_call(self, body: ChatBody, request_id: str) -> Generate:
        template = self._service.text.template
        check_model(body.model, self._service.name)
        if template is None:
            raise InvalidRequest(
                f"{self._service.name} has no chat template; use /v1/completions, or start with --chat-template FILE.", field="messages"
            )
        longest = self._service.text.card.max_context
        body.check_limits(longest)
        call = body.generate(" ", request_id, max_tokens=longest if body.limit is None else body.limit, logprobs=body.logprob_count)
        check_call(call, self._service.text.card, self._service.name)
        ids = await self._service.text.encode_chat(body.plain_messages())
        return self._service.fitted(call, ids)


class _Reply:
    """The response under way: whole or as events, and an error in whichever way is still possible."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._asgi = (scope, receive, send)
        self._send = send
        self._timing = Headers(scope=scope).get(TIMING_HEADER) == "1"
        self._streaming = False

    def timed(self, content: dict[str, Any], finish: Finish) -> dict[str, Any]:
        """The answer, or its event with the usage; with our times if the client asked for them."""
        return {**content, "timing": timing_json(finish.timing)} if self._timing else content

    async def whole(self, content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content, ensure_ascii=status >= 400).encode()
        await Response(body, status, headers, "application/json")(*self._asgi)

    async def begin_stream(self) -> None:
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})
        self._streaming = True

    async def events(self, events: list[str], *, last: bool = False) -> None:
        """In one piece: each costs a system call here and a turn of the client."""
        with span(Doing.WRITE):
            body = "".join([f"data: {data}\n\n" for data in events]).encode()
            await self._send({"type": "http.response.body", "body": body, "more_body": not last})

    async def error(self, error: DiptychError) -> None:
        if self._streaming:
            await self.events([json.dumps(error_json(error))], last=True)
        else:
            await self.whole(error_json(error), error.http_status, {"retry-after": "1"} if error.retryable else None)


async def _send_whole(run: Run, answer: Answer, reply: _Reply, choices: int) -> None:
    wholes = [Whole() for _ in range(choices)]
    async for chunk in run:
        wholes[chunk.choice].take(chunk)
        if chunk.finish:
            await reply.whole(reply.timed(answer.whole(wholes, chunk.finish), chunk.finish))


async def _send_stream(run: Run, answer: Answer, reply: _Reply, include_usage: bool) -> None:
    chunk = await anext(run)
    await reply.begin_stream()
    events = [_compact(piece) for piece in answer.opening()]
    while True:
        with span(Doing.FORMAT):
            events += [_compact(piece) for piece in answer.pieces(chunk)]
        if chunk.finish:
            break
        if events:
            await reply.events(events)
        chunk, events = await anext(run), []
    if include_usage:
        events.append(_compact(reply.timed(answer.usage(chunk.finish.usage), chunk.finish)))
    await reply.events([*events, "[DONE]"], last=True)


async def _read_body(receive: Receive, headers: Headers, limit: int) -> bytes:
    """The body, at most `limit` bytes: a longer one is refused before it is read. How long it may take is the connection's limit."""
    announced = headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise TooLarge(f"The body has {announced} bytes; the limit is {limit}.", field="body")
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        body += message.get("body", b"")
        if len(body) > limit:
            raise TooLarge(f"The body has more than {limit} bytes, the limit.", field="body")
        if not message.get("more_body", False):
            return bytes(body)


async def _while_connected(receive: Receive, work: Awaitable[None]) -> None:
    """Do `work`, or cancel it when the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def make_app(
    service: Service, metrics_text: Callable[[], bytes], tenant_of: TenantOf = everybody, *, open_metrics: bool = True
) -> Starlette:
    """The ASGI application. `metrics_text`: all metrics in Prometheus' text format. `tenant_of` says whose a request is, or refuses it; it
    is not asked at `/health` and `/live`, nor at `/metrics` if these are open."""

    async def models(request: Request) -> Response:
        return _json({"object": "list", "data": [_model_json(model) for model in service.models()]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        found = next((model for model in service.models() if model.id == name), None)
        if found is None:
            raise NotFound(f"There is no model {name[:200]!a} here; this cluster serves {service.name!r}.", field="model")
        return _json(_model_json(found))

    async def health(request: Request) -> Response:
        reason = service.unavailable()
        return _json({"status": "ok"}) if reason is None else _json({"status": "unavailable", "reason": reason}, 503)

    async def live(request: Request) -> Response:
        return _json({"status": "ok"})

    async def metrics(request: Request) -> Response:
        return Response(metrics_text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    has_template, running = service.text.template is not None, service.limits.running
    keys = tenant_of is not everybody
    described = json.dumps(document(service.text.card, service.name, chat=has_template, running=running, keys=keys)).encode()

    async def openapi(request: Request) -> Response:
        return Response(described, media_type="application/json")

    routes = [
        Route("/v1/completions", _Call(service, chat=False), methods=["POST"]),
        Route("/v1/chat/completions", _Call(service, chat=True), methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/live", live),
        Route("/metrics", metrics),
        Route("/openapi.json", openapi),
    ]
    open_paths = ("/health", "/live", "/metrics") if open_metrics else ("/health", "/live")
    guard = Middleware(Guard, tenant_of=tenant_of, open_paths=open_paths, refused=service.refused)
    handlers: Any = {DiptychError: _on_error, HTTPException: _on_http_error}
    return Starlette(routes=routes, exception_handlers=handlers, middleware=[Middleware(Named), guard])


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, DiptychError)
    return _json(error_json(error), error.http_status)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """No such path, or not with this method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]!a}: {error.detail}."
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    return _json(body, error.status_code, dict(error.headers or {}))


def _json(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(content), status, headers, "application/json")


def _model_json(model: Model) -> dict[str, Any]:
    return {"id": model.id, "object": "model", "created": 0, "owned_by": "diptych", "max_model_len": model.max_context}
