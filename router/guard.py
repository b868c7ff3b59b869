"""What stands before every HTTP path: who has no key gets no further, and who has one is known by its tenant."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ..core.errors import Unauthenticated
from ..rpc.handlers import TenantOf
from .answers import error_json

TENANT = "diptych.tenant"
"""Where the tenant is in a request's scope."""


class Guard:
    """ASGI middleware. `open_paths` need no key."""

    def __init__(self, app: ASGIApp, tenant_of: TenantOf, open_paths: Collection[str], refused: Callable[[Unauthenticated], None]) -> None:
        """`refused`: told of each request that had no good key."""
        self._app = app
        self._tenant_of = tenant_of
        self._open = frozenset(open_paths)
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in self._open:
            try:
                scope[TENANT] = self._tenant_of(Headers(scope=scope).get("authorization"))
            except Unauthenticated as error:
                self._refused(error)
                await _refusal(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _refusal(error: Unauthenticated) -> Response:
    return Response(json.dumps(error_json(error)), error.http_status, {"www-authenticate": "Bearer"}, "application/json")
