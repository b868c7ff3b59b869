"""Looking at this host: every value that a check is about. Nothing is judged here."""

from __future__ import annotations

import ctypes
import email.utils
import http.client
import mmap
import os
import resource
import shutil
import socket
import subprocess
import sysconfig
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .gpus import QUERY
from .host import HostFacts

SMI_S = 60.0
"""Where nothing keeps the driver loaded (persistence mode) each call loads it anew: seconds a GPU."""
ANSWER_S = 5.0
PACKAGES = ("diptych", "torch", "grpcio", "transformers", "tokenizers")
NCCL = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")
"""PyPI's torch brings one of them, for its CUDA."""
STA_UNSYNC = 0x40
"""adjtimex(2): nobody disciplines the clock."""
_COMPILERS = ("c++", "g++", "clang++")
_C_COMPILERS = ("gcc", "clang")


def look(*, ray: bool, gpus: int) -> HostFacts:
    """`ray`: whether it is to be installed too."""
    disk = Path(os.environ.get("DIPTYCH_HOME") or Path.home() / ".cache")
    while not disk.exists():
        disk = disk.parent
    return HostFacts(
        cores=len(os.sched_getaffinity(0)),
        packages={name: installed(name) for name in (*PACKAGES, *(("ray",) if ray else ()))},
        compiler=_compiler(),
        shm_free=_free(Path("/dev/shm")),
        disk_free=_free(disk) or 0,
        disk=str(disk),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        memfd=_try_memfd(),
        loopback=_try_loopback(),
        clock_synchronised=_synchronised(),
        address=_own_address(),
        gpus=gpus,
        c_compiler=_c_compiler(),
        headers=_has_headers(),
        nccl=_nccl() if gpus else None,
        extras={name: installed(name) for name in ("nccl4py",)},
    )


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return next((path for name in ((named,) if named else _COMPILERS) if (path := shutil.which(name))), None)


def _nccl() -> str | None:
    """The version of the package that PyPI's torch brings, else of the library that others link: conda's, NVIDIA's own."""
    return next((found for name in NCCL if (found := installed(name)) is not None), None) or _linked_nccl()


def _linked_nccl() -> str | None:
    number = ctypes.c_int()
    try:
        if ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(number)):
            return None
    except (OSError, AttributeError):
        return None
    major, rest = divmod(number.value, 10_000 if number.value >= 10_000 else 1_000)  # 22809 is 2.28.9; up to 2.8 it was 2804
    return f"{major}.{rest // 100}.{rest % 100}"


def _c_compiler() -> str | None:
    """As Triton looks for it (`triton/runtime/build.py`)."""
    named = os.environ.get("CC")
    return next((path for name in ((named,) if named else _C_COMPILERS) if (path := shutil.which(name))), None)


def _has_headers() -> bool:
    """Where Triton looks for them: Debian's own scheme names a place for what an administrator installs."""
    scheme = sysconfig.get_default_scheme()
    return Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme), "Python.h").is_file()


def _free(directory: Path) -> int | None:
    try:
        found = os.statvfs(directory)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def _try_memfd() -> str | None:
    """Make memory, hand it over a Unix socket as a pool is, and read there what was written here."""
    try:
        memory = os.memfd_create("diptych-doctor")
        with closing(os.fdopen(memory, "r+b")) as file:
            os.ftruncate(memory, mmap.PAGESIZE)
            with mmap.mmap(memory, mmap.PAGESIZE) as ours:
                ours[:4] = b"here"
                return None if _read_over_socket(file.fileno()) == b"here" else "what was written did not arrive"
    except OSError as error:
        return error.strerror or str(error)


def _read_over_socket(memory: int) -> bytes:
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        socket.send_fds(one, [b"x"], [memory])
        _, (received,), _, _ = socket.recv_fds(other, 1, 1)
        try:
            with mmap.mmap(received, mmap.PAGESIZE, access=mmap.ACCESS_READ) as theirs:
                return theirs[:4]
        finally:
            os.close(received)


def _try_loopback() -> str | None:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=ANSWER_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _synchronised() -> bool | None:
    """What adjtimex(2) says; None where it may not be asked. `struct timex` begins with an unsigned int, then three longs, then the
    status."""
    words = (ctypes.c_long * 64)()
    with suppress(AttributeError, OSError):
        if ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(words)) >= 0:
            return not ctypes.c_int(words[5] & 0xFFFFFFFF).value & STA_UNSYNC
    return None


def _own_address() -> str | None:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


@dataclass(frozen=True, slots=True)
class Smi:
    """`query`: the GPUs by line; `head`: what it prints without arguments. None: there is no nvidia-smi. `failure`: why it gave nothing."""

    query: str | None = None
    head: str | None = None
    failure: str | None = None


def ask_smi() -> Smi:
    program = shutil.which("nvidia-smi")
    if program is None:
        return Smi()
    try:
        query = _run(program, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits")
        return Smi(query, _run(program))
    except subprocess.CalledProcessError as error:
        return Smi(failure=(error.stdout + error.stderr).strip().splitlines()[0] if error.stdout or error.stderr else str(error))
    except (OSError, subprocess.TimeoutExpired) as error:
        return Smi(failure=str(error))


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=SMI_S).stdout


def clock_of(address: str, *, tls: bool = False) -> tuple[float, float] | None:
    """Our clock and that of the HTTP server at `address`, as its Date says; None if it says none. The Date has whole seconds, so half of
    one is added."""
    kind = http.client.HTTPSConnection if tls else http.client.HTTPConnection
    with closing(kind(address, timeout=ANSWER_S)) as connection, suppress(OSError, http.client.HTTPException, TypeError, ValueError):
        connection.request("GET", "/health")
        date = connection.getresponse().headers["date"]
        return time.time(), email.utils.parsedate_to_datetime(date).timestamp() + 0.5
    return None
