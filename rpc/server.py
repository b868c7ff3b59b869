"""The server: any of the three faces on one port, with health and reflection where the public service is served."""

from __future__ import annotations

from .channels import INTERNAL_MESSAGE_BYTES
from .inference import InferenceFace
from .router import RouterFace
from .worker import WorkerFace


class Server:
    """A server that listens. `address` is host:port as bound, `port` its number (the one taken, if 0 was asked for)."""

    address: str
    port: int

    async def set_serving(self, serving: bool) -> None:
        """What `grpc.health.v1` answers for "" and for `diptych.v1.Inference`; NOT_SERVING until told otherwise."""
        raise NotImplementedError

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, let those under way end for up to `grace_s` seconds, then end them. The port is free afterwards."""
        raise NotImplementedError


async def serve(
    address: str,
    *,
    worker: WorkerFace | None = None,
    router: RouterFace | None = None,
    inference: InferenceFace | None = None,
    max_message_bytes: int = INTERNAL_MESSAGE_BYTES,
    write_timeout_s: float = 30.0,
) -> Server:
    """Serve the faces given at `address` (host:port; port 0 takes a free one).

    Messages from clients larger than `max_message_bytes` are refused. A client of Generate that takes nothing for
    `write_timeout_s` seconds is cut. Raises `ConfigError` with field "address" if the port is in use or the host unknown.
    """
    raise NotImplementedError
