"""Every answer over HTTP says by which id its request is found in the logs: the client's own `x-request-id`, or a fresh one."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..core.request import request_id_of

HEADER = "x-request-id"
KEY = "diptych.request_id"
"""Where in the scope it is."""


class Named:
    """Middleware, the outermost: what an inner one refuses has its id too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope[KEY] = request_id_of(Headers(scope=scope).get(HEADER))

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        await self._app(scope, receive, send_named)
