"""Faces as grpc handlers. Bytes come in and go out here; everything a face raises becomes a status, here and nowhere else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor

from ..core.errors import DeadlineExceeded, DiptychError, Internal, Unavailable
from ..core.generate import Generate
from ..core.request import request_id_of
from ..proto import inference_pb2, worker_pb2
from .channels import EOF
from .codec_fields import duration, parse
from .codec_fleet import decode_fleet, encode_fleet_status, encode_report
from .codec_inference import decode_generate, encode_chunk, encode_models
from .codec_workload import encode_window
from .errors import to_status
from .inference import InferenceFace
from .lane import Lane
from .router import RouterFace
from .spans import SpansServed, serve_spans
from .stream import Stream
from .worker import RouterStream, WorkerFace

REQUEST_ID = "x-request-id"
WORKER = worker_pb2.DESCRIPTOR.services_by_name["Worker"]
ROUTER = worker_pb2.DESCRIPTOR.services_by_name["Router"]
INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"]

Context = Any
Handler = Callable[[Any, Context], Awaitable[bytes | None]]
Active = set[asyncio.Task[Any]]
"""The tasks of the calls being served."""
S = TypeVar("S", bound=Stream[Any, Any])


class ServerCall:
    """The `ByteCall` of a bidirectional call served here. It ends when its handler does; the peer's cancel reads as its end."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def read(self) -> bytes | None:
        try:
            data = await self._context.read()
        except grpc.aio.BaseError as error:
            raise Unavailable(f"The stream has ended ({error}).") from None
        return None if data is EOF else cast(bytes, data)

    async def write(self, message: bytes) -> None:
        try:
            await self._context.write(message)
        except grpc.aio.BaseError as error:
            raise Unavailable(f"The stream has ended ({error}).") from None

    async def done_writing(self) -> None:
        return None

    def cancel(self) -> None:
        return None


def worker_handlers(face: WorkerFace, active: Active) -> grpc.GenericRpcHandler[bytes, bytes]:
    async def attach(_: Any, context: Context) -> None:
        stream = RouterStream(ServerCall(context), peer=f"router at {context.peer()}")
        await _serve_stream(stream, face.attached, context)

    async def lane(_: Any, context: Context) -> None:
        await _serve_stream(Lane(ServerCall(context), peer=f"worker at {context.peer()}"), face.lane, context)

    async def watch(request: bytes, context: Context) -> None:
        parse(worker_pb2.WatchRequest, request)
        async with aclosing(face.reports()) as reports:
            async for report in reports:
                await context.write(encode_report(report))

    async def drain(request: bytes, _: Context) -> bytes:
        timeout_s = duration(parse(worker_pb2.DrainRequest, request).timeout, "timeout")
        return worker_pb2.DrainResponse(unfinished=await face.drain(timeout_s)).SerializeToString()

    return _service(WORKER, {"Attach": attach, "Lane": lane, "Watch": watch, "Drain": drain, "Spans": _spans}, active)


def router_handlers(face: RouterFace, active: Active) -> grpc.GenericRpcHandler[bytes, bytes]:
    async def publish(request: bytes, _: Context) -> bytes:
        return worker_pb2.PublishFleetResponse(version=face.publish(decode_fleet(request))).SerializeToString()

    async def describe(request: bytes, _: Context) -> bytes:
        parse(worker_pb2.DescribeFleetRequest, request)
        return encode_fleet_status(face.describe())

    async def window(request: bytes, _: Context) -> bytes:
        return encode_window(face.window(duration(parse(worker_pb2.DescribeWorkloadRequest, request).seconds, "seconds")))

    return _service(ROUTER, {"PublishFleet": publish, "DescribeFleet": describe, "DescribeWorkload": window, "Spans": _spans}, active)


TenantOf = Callable[[str | None], str]
"""The tenant of an `authorization` (None: there is none). Raises `Unauthenticated`."""


def everybody(authorization: str | None) -> str:
    """The tenant of every call where nobody is asked who he is."""
    return ""


def inference_handlers(
    face: InferenceFace, active: Active, write_timeout_s: float, tenant_of: TenantOf = everybody
) -> grpc.GenericRpcHandler[bytes, bytes]:
    async def generate(request: bytes, context: Context) -> None:
        with _telling(face):
            tenant = tenant_of(_authorization(context))
            asked = replace(decode_generate(request), tenant=tenant)
        call = await _named(asked, context)
        async with aclosing(face.generate(call)) as chunks:
            async for chunk in chunks:
                await _write_within(write_timeout_s, context, encode_chunk(chunk))
                if chunk.finish is not None:
                    return
        raise Internal("The answer ended without a finish.")

    async def models(request: bytes, context: Context) -> bytes:
        with _telling(face):
            tenant_of(_authorization(context))
        parse(inference_pb2.ListModelsRequest, request)
        return encode_models(face.models())

    return _service(INFERENCE, {"Generate": generate, "ListModels": models}, active)


@contextmanager
def _telling(face: InferenceFace) -> Iterator[None]:
    """What is refused here, before the face has it, the face is told of: it counts refusals."""
    try:
        yield
    except DiptychError as error:
        face.refused(error)
        raise


def _authorization(context: Context) -> str | None:
    """The call's `authorization`, as HTTP's header of that name."""
    said = (value for key, value in context.invocation_metadata() or () if key == "authorization")
    value = next(said, None)
    return value.decode(errors="replace") if isinstance(value, bytes) else value


async def _named(call: Generate, context: Context) -> Generate:
    """The call with its id, which the client is told before anything else: its own, its metadata's, or a fresh one."""
    said = (value for key, value in context.invocation_metadata() or () if key == REQUEST_ID and isinstance(value, str))
    request_id = request_id_of(call.request_id or next(said, None))
    await context.send_initial_metadata(((REQUEST_ID, request_id),))
    return call if call.request_id else replace(call, request_id=request_id)


async def _write_within(seconds: float, context: Context, message: bytes) -> None:
    # Not cancelled with its call: grpc.aio never frees a message whose write nobody awaits any more (grpc issue 43360).
    write = asyncio.ensure_future(context.write(message))
    write.add_done_callback(lambda done: done.cancelled() or done.exception())  # of a client that has left: nobody asks for it
    try:
        async with asyncio.timeout(seconds):
            await asyncio.shield(write)
    except TimeoutError:
        raise DeadlineExceeded(f"The client read nothing for {seconds:g} s.") from None


async def _serve_stream(stream: S, serve: Callable[[S], Coroutine[Any, Any, None]], context: Context) -> None:
    """Run a face on `stream` until it returns. When the peer goes away grpc cancels the handler; the face sees its iteration end."""
    await context.send_initial_metadata(())  # tells the dialling end that it was accepted
    task = asyncio.create_task(serve(stream))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        stream.end()
        await task
        raise
    finally:
        await stream.finish()


async def _spans(_: Any, context: Context) -> None:
    """Of this process, whoever serves here."""
    await _serve_stream(SpansServed(ServerCall(context), peer=f"profiler at {context.peer()}"), serve_spans, context)


def _service(service: ServiceDescriptor, handlers: dict[str, Handler], active: Active) -> grpc.GenericRpcHandler[bytes, bytes]:
    """Handlers for every method of `service`, as its descriptor says they stream."""
    kinds = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    return grpc.method_handlers_generic_handler(
        service.full_name,
        {
            method.name: kinds[method.client_streaming, method.server_streaming](_translated(handlers[method.name], active))
            for method in service.methods
        },
    )


def _translated(handler: Handler, active: Active) -> Any:
    """`handler` with what it raises told to the peer as a status; its task is in `active` while it runs."""

    async def run(request: Any, context: Context) -> bytes | None:
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        active.add(task)
        try:
            return await handler(request, context)
        except Exception as error:  # the boundary: grpc would tell the peer whatever a face raises
            await context.abort(*to_status(error))
            raise
        finally:
            active.discard(task)

    return run
