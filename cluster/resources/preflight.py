"""Everything that can be known to be wrong before anything is started; each refusal names the key and what to do."""

from __future__ import annotations

import os
import socket
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ...core.config import ClusterConfig
from ...core.errors import ConfigError
from ...core.fleet import Phase
from ...core.layout import DType
from ...core.model import ModelCard
from ...core.quantization import Quantization
from ...core.transfer import transports_for
from ...rpc.stranger import answers_strangers
from ..process.spec import Worker
from .devices import NO_INT8_ON_GPU
from .layouts import section_of
from .memory import available_bytes, kv_bytes, process_bytes

ROUTER_BYTES = 200 << 20
RAY_ANSWER_S = 5.0
RAY_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""Of Ray's head. It changes nothing; a head that asks for a token refuses it to who shows none (2.60)."""
RAY_BYTES = 900 << 20
"""A local Ray 2.60: head, agents and monitors, ten processes of some 80 MB."""


def check_ports(config: ClusterConfig) -> None:
    """`ConfigError` if a face's port is taken, or both want the same."""
    router = config.router
    if router.http_port and router.http_port == router.grpc_port:
        raise ConfigError(f"router.http_port and router.grpc_port are both {router.http_port}.", field="router.grpc_port")
    for key, port in (("http_port", router.http_port), ("grpc_port", router.grpc_port)):
        if port:
            _check_port(router.host, port, key)
    if not router.http_port or not router.grpc_port:
        _check_port(router.host, 0, "host")


def _check_port(host: str, port: int, key: str) -> None:
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigError(f"router.host: {host!r} is no address of this host ({error.strerror}).", field="router.host") from None
    with socket.socket(family, kind, number) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            flag = f"--{key.replace('_', '-')}"
            raise ConfigError(
                f"router.{key}: cannot listen on {host}:{port} ({error.strerror}). "
                + (f"End what uses it, or choose another with {flag} (0 takes a free one)." if port else "Choose another --host."),
                field=f"router.{key}",
            ) from None


def check_transports(config: ClusterConfig, *, on_gpu: bool) -> None:
    """`ConfigError` if `transfer.transports` names one that KV on GPUs, or in host memory, cannot move by."""
    if "transports" in config.transfer.model_fields_set:
        transports_for(config.transfer.transports, on_gpu=on_gpu)


def check_kv_dtype(config: ClusterConfig, *, on_gpu: bool) -> None:
    """`ConfigError` if GPUs are to hold KV in what their kernels cannot read."""
    if on_gpu and config.model.held_as is DType.INT8:
        raise ConfigError(f"model.kv_dtype: {NO_INT8_ON_GPU}", field="model.kv_dtype")


def check_accelerators(config: ClusterConfig) -> None:
    """`ConfigError` if workers are to be on a kind of device that nobody could choose for them."""
    for phase in Phase:
        for number, group in enumerate(config.section(phase).all_groups):
            if group.accelerator is None:
                continue
            key = f"{section_of(config, phase, number)}.accelerator"
            if not config.ray.joined:
                raise ConfigError(
                    f"{key}: there are kinds of device to choose from only on a Ray cluster that is joined. Say which with --address, or "
                    f"leave {group.accelerator} out, and workers are on what this host has.",
                    field=key,
                )
            if config.device == "auto":
                raise ConfigError(
                    f"{key}: on a Ray cluster that is joined device: auto computes on CPUs; with {group.accelerator} say device: cuda.",
                    field=key,
                )


def check_quantization(quantization: Quantization, *, on_gpu: bool) -> None:
    """`ConfigError` if GPUs are to multiply with quantised weights."""
    if on_gpu and quantization is not Quantization.NONE:
        raise ConfigError(
            f"model.quantization: {quantization} is for CPUs: there is no GPU kernel for such products. Leave it out, or say device: cpu.",
            field="model.quantization",
        )


def ray_address(config: ClusterConfig) -> str | None:
    """host:port of the head of the Ray cluster to join, `auto` as Ray itself would find it on this host; None for a Ray of our own.
    Raises `ConfigError`."""
    address = config.ray.address if config.ray.joined else None
    if address != "auto":
        return _head(address, "ray.address") if address is not None else None
    if (named := os.environ.get("RAY_ADDRESS")) is not None:
        return _head(named, "ray.address: auto is RAY_ADDRESS, which")
    noted = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray", "ray_current_cluster")
    if not noted.is_file():
        raise ConfigError(
            "ray.address: auto finds no Ray on this host. Start one with `ray start --head`, or name the host:port of its head.",
            field="ray.address",
        )
    return noted.read_text().strip()


def _head(address: str, what: str) -> str:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise ConfigError(f"{what}: {address!r} is not host:port of a Ray head (or `auto`).", field="ray.address")
    return address


def check_ray(config: ClusterConfig) -> None:
    """`ConfigError` if the Ray cluster to join is not there; Ray itself would try for a minute. Also if it answers whoever asks, and the
    config does not say that this is wanted: Ray listens on every interface, whatever address it is joined by."""
    address = ray_address(config)
    if address is None:
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=RAY_ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"ray.address: no Ray answers at {address} ({error}). Start one there with `ray start --head`, or leave the address out.",
            field="ray.address",
        ) from None
    if not config.security.allow_unauthenticated and answers_strangers(address, RAY_ALIVE, timeout_s=RAY_ANSWER_S):
        raise ConfigError(
            f"ray.address: the Ray cluster at {address} asks nobody who he is, and whoever reaches it may run programs on its nodes. Start "
            "its nodes with RAY_AUTH_MODE=token and one token (`ray get-auth-token --generate` makes it); or, on a network where everybody "
            "may come in, say security.allow_unauthenticated: true.",
            field="ray.address",
        )


def check_memory(config: ClusterConfig, card: ModelCard, workers: Sequence[Worker]) -> None:
    """`ConfigError` if workers on this host would not fit its memory. A Ray cluster that is joined finds them nodes with enough."""
    if config.ray.joined:
        return
    kv = {worker.name: sum(kv_bytes(card, spec) for spec in worker.ranks) for worker in workers}
    own = sum(process_bytes(card, spec) for worker in workers for spec in worker.ranks)
    ray = RAY_BYTES if config.ray.enabled else 0
    weights = card.weights_bytes if any(spec.device == "cpu" for worker in workers for spec in worker.ranks) else 0
    wanted = weights + sum(kv.values()) + own + ROUTER_BYTES + ray
    available = available_bytes()
    if wanted <= available:
        return
    largest = max(workers, key=lambda worker: kv[worker.name])
    key = f"{largest.section}.kv_tokens"
    raise ConfigError(
        f"{key}: not enough memory: {_gib(wanted)} wanted ({_gib(weights)} of weights, once; "
        f"{_gib(sum(kv.values()))} of KV pools and staging in {len(workers)} workers; the rest for processes), "
        f"{_gib(available)} available. "
        + (
            f"Lower {key} (one worker has {_gib(kv[largest.name])}), or the number of workers."
            if largest.ranks[0].kv_tokens
            else f"Start fewer workers, free memory, or take a host with that much{_narrower(card)}."
        ),
        field=key,
    )


def _narrower(card: ModelCard) -> str:
    return "; with dtype bfloat16 weights take half" if card.dtype is DType.FLOAT32 else ""


def warnings(config: ClusterConfig, card: ModelCard, workers: Sequence[Worker], cores: int) -> list[str]:
    """What will work, but not well."""
    said: list[str] = []
    specs = [spec for worker in workers for spec in worker.ranks]
    threads = sum(spec.threads for spec in specs)
    if threads > cores and not config.ray.joined:
        ranks = f" of {len(specs)} ranks" if len(specs) > len(workers) else ""
        said.append(f"{len(workers)} workers{ranks} with {threads} threads share {cores} cores: they will slow each other down.")
    said += _sharing(config, workers)
    if len(config.model.chat_template or "") == 0 and not card.has_chat_template:
        said.append(f"{card.name} has no chat template: /v1/chat/completions and `diptych chat` need --chat-template FILE.")
    if card.slow_path:
        said.append(card.slow_path)
    return said


def _sharing(config: ClusterConfig, workers: Sequence[Worker]) -> list[str]:
    """Of GPUs that several workers are on, although nobody named a fraction."""
    on: defaultdict[str, list[Worker]] = defaultdict(list)
    for worker in workers:
        if config.section(worker.phase).all_groups[worker.group].memory_fraction is None:
            for spec in worker.ranks:
                on[spec.gpu or ""].append(worker)
    return [
        f"{', '.join(worker.name for worker in there)} share GPU {key}, {there[0].ranks[0].memory_fraction:g} of its memory each: there "
        "are more workers than GPUs. They slow each other down; memory_fraction says how much is whose."
        for key, there in on.items()
        if key and len(there) > 1
    ]


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.0f} MiB"
