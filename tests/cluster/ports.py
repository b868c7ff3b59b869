"""What listens, from /proc, and what somebody gets who comes to it."""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import grpc
from diptych.core.security import TlsFiles

LISTEN = "0A"
ANSWERS_S = 2.0
"""Longer only where nobody ever answers, which is what most of them shall do."""
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What a gRPC client says first; a server that takes it answers."""


@dataclass(frozen=True, order=True)
class Port:
    """`program`: the last words of the owner's command line, without what it was told."""

    port: int
    host: str
    pid: int
    program: str

    @property
    def on_loopback(self) -> bool:
        return ipaddress.ip_address(self.host).is_loopback


def listening(pids: Iterable[int]) -> list[Port]:
    """Every TCP port on which one of these processes listens."""
    sockets = dict(_sockets())
    return sorted(Port(port, host, pid, _program(pid)) for pid in pids for inode in _inodes(pid) for host, port in sockets.get(inode, ()))


def _sockets() -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Inode → where it listens."""
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTEN:
                host, port = words[1].split(":")
                yield words[9], [(_address(host), int(port, 16))]


def _address(text: str) -> str:
    """Written as 32-bit words of the machine's byte order."""
    raw = b"".join(int(text[at : at + 8], 16).to_bytes(4, "little") for at in range(0, len(text), 8))
    address = ipaddress.ip_address(raw)
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def _inodes(pid: int) -> Iterator[str]:
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(entry.path)
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            yield target[8:-1]


def _program(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    if "-m" in words:
        return words[words.index("-m") + 1]
    return " ".join(Path(word).name for word in words[:2])


def gets_in(address: str, shown: TlsFiles | None, within_s: float = ANSWERS_S) -> bool:
    """Whether a server under TLS answers who shows this certificate (None: none)."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if shown is not None:
        context.load_cert_chain(shown.cert, shown.key)
    try:
        with connected(address, within_s) as plain, context.wrap_socket(plain) as secure:
            secure.sendall(HTTP2)
            return secure.recv(100) != b""
    except OSError:  # ssl.SSLError is one
        return False


def answers_plainly(address: str, said: bytes) -> bytes:
    """What comes back to these bytes, without TLS; b"" if it hangs up, or says nothing."""
    try:
        with connected(address) as plain:
            plain.sendall(said)
            return plain.recv(1000)
    except OSError:
        return b""


RAY_METHODS = (
    "NodeInfoGcsService/CheckAlive",
    "CoreWorkerService/PushTask",
    "NodeManagerService/GetNodeStats",
    "ObjectManagerService/Pull",
)
"""One of each service that a port of Ray's may have."""


def ray_answers(address: str) -> set[str]:
    """What somebody without a token gets at a port of Ray's, by gRPC's and HTTP's names."""
    found = set()
    with grpc.insecure_channel(address) as channel:
        for method in RAY_METHODS:
            try:
                channel.unary_unary(f"/ray.rpc.{method}", None, None)(b"", timeout=ANSWERS_S)
                found.add("OK")
            except grpc.RpcError as error:
                found.add(cast(grpc.Call, error).code().name)
    if found == {"UNAVAILABLE"}:  # no gRPC
        words = answers_plainly(address, b"POST /get_or_create_runtime_env HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n").split()
        return {words[1].decode() if len(words) > 1 else "hung up on"}
    return found - {"UNIMPLEMENTED"}


def connected(address: str, within_s: float = ANSWERS_S) -> socket.socket:
    host, port = address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=within_s)
