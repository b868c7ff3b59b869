"""Stand-ins for the rank and route programs: the same command line and the same words on stdout, no model."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

LAYOUT = {
    "fingerprint": "f" * 64,
    "groups": [{"kind": "full", "layers": [0, 1, 2, 3], "kv_heads": 2, "head_dim": 8, "dtype": "float32", "window": 0}],
    "block_size": 16,
    "num_blocks": [64],
    "tp": 1,
    "stages": [],
}


def say(**event: object) -> None:
    print(json.dumps(event), flush=True)


def hold_leash() -> None:
    def watch() -> None:
        while line := os.read(0, 4096):
            obey(json.loads(line))
        os._exit(3)

    threading.Thread(target=watch, daemon=True).start()


def obey(role: dict[str, str]) -> None:
    """The order to be another worker, which it is at once."""
    name, orders = role["worker_id"], Path(os.environ["FAKES"])
    if (orders / f"no-flip-{name}").exists():
        os._exit(1)
    if (orders / f"refuse-{name}").exists():
        refuse()
    print(f"{name} goes on", file=sys.stderr, flush=True)
    say(event="left")
    (orders / f"pid-{name}").write_text(str(os.getpid()))
    ready(socket.create_server(("127.0.0.1", 0)), {})


def refuse() -> None:
    say(event="failed", message="8192 tokens are too few.", field="kv_tokens")
    os._exit(2)


def ready(listener: socket.socket, layout: dict[str, object]) -> None:
    kept.append(listener)
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    say(event="ready", address=address, incarnation=time.monotonic_ns(), layout=LAYOUT | layout, capacity_tokens=1024)


kept: list[socket.socket] = []
"""Where workers listen, or listened."""


def end(channels: list[socket.socket]) -> None:
    for channel in channels:
        channel.sendall(b"end")
    sys.exit(0)


def lead(others: int) -> list[socket.socket]:
    """Meet the followers; this rank dies with any of them."""
    if others == 0:
        return []
    listener = socket.create_server(("127.0.0.1", 0))
    say(event="meeting", address=f"127.0.0.1:{listener.getsockname()[1]}")
    channels = [listener.accept()[0] for _ in range(others)]
    for channel in channels:
        threading.Thread(target=listen, args=(channel,), daemon=True).start()
    return channels


def follow() -> None:
    """Until the leader says that it is over, or dies."""
    host, port = sys.argv[sys.argv.index("--leader") + 1].split(":")
    listen(socket.create_connection((host, int(port))))


def listen(channel: socket.socket) -> None:
    os._exit(0 if channel.recv(64) == b"end" else 70)


def main() -> None:
    """`kind` rank or route, then the options of the real ones. What goes wrong is told by files in $FAKES: `crash-<name>` (crash
    while starting), `refuse-<name>` (say why), `no-flip-<name>` (end when told to be that worker), `stubborn-<name>` (SIGTERM is
    ignored), `slow-<name>` (never ready)."""
    kind, spec = sys.argv[1], json.loads(sys.argv[sys.argv.index("--spec") + 1])
    rank, tp, stages = spec.get("rank", 0), spec.get("tp", 1), spec.get("stages", [])
    name = spec.get("worker_id", "router") + (f".rank{rank}" if rank else "")
    orders = Path(os.environ["FAKES"])
    hold_leash()
    print("a library's greeting", flush=True)
    print(f"{name} began", file=sys.stderr, flush=True)
    say(event="progress", what="imports")
    (orders / f"pid-{name}").write_text(str(os.getpid()))
    if (orders / f"crash-{name}").exists():
        raise RuntimeError("the disk is on fire")
    if (orders / f"refuse-{name}").exists():
        refuse()
    if (orders / f"slow-{name}").exists():
        time.sleep(100)
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        follow()
    channels = lead(tp * max(1, len(stages)) - 1)
    if (orders / f"stubborn-{name}").exists():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: end(channels))
    listener = socket.create_server(("127.0.0.1", 0))
    if kind == "route":
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        say(event="ready", http=address, grpc=address, control=address)
    else:
        ready(listener, {"tp": tp, "stages": stages})
    while True:
        time.sleep(100)


if __name__ == "__main__":
    main()
