"""What is known of this host once it was looked at, and what to think of it. Pure: values in, findings out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ...core.transfer import Transport
from .finding import Finding, note, ok, wrong

RAY_STORE_BYTES = 80 << 20
"""What a cluster's own Ray keeps in /dev/shm."""
FEW_FILES = 4096
"""Each client's connection is a file, as is each end of a stream between workers; `router.limits.connections` is as many by default."""
DISK_BYTES = 2 << 30
SKEW_S, GREAT_SKEW_S = 1.0, 60.0
"""Between two hosts: what logs notice, and what certificates do. What workers tell each other are durations, so no clock stops serving."""


@dataclass(frozen=True, slots=True)
class HostFacts:
    """Sizes in bytes. `packages`: installed version or None, by name. `compiler`: of C++, its path. `c_compiler`: of C, as Triton
    finds it. `headers`: whether Python's are there. `nccl`: its version, on a host with GPUs. `memfd`, `loopback`: what failed when one was
    made and handed over, or when a connection was tried; None: it worked. `address`: what this host's name stands for."""

    cores: int
    packages: Mapping[str, str | None]
    compiler: str | None
    shm_free: int | None
    disk_free: int
    open_files: int
    memfd: str | None = None
    loopback: str | None = None
    clock_synchronised: bool | None = None
    address: str | None = None
    disk: str = ""
    gpus: int = 0
    c_compiler: str | None = None
    headers: bool = False
    nccl: str | None = None
    extras: Mapping[str, str | None] = field(default_factory=dict)


def judge_packages(facts: HostFacts) -> Finding:
    missing = [name for name, version in facts.packages.items() if version is None]
    if missing:
        return wrong("packages", f"{', '.join(missing)} is not installed.", "Install Diptych with its dependencies: pip install diptych.")
    return ok("packages", ", ".join(f"{name} {version}" for name, version in facts.packages.items()))


def judge_compiler(facts: HostFacts) -> Finding:
    if facts.compiler is None:
        return note(
            "compiler",
            "There is no C++ compiler: bf16 on CPUs is computed with torch alone, and a decode step takes about twice as long.",
            "Install g++ (Debian: apt install g++) or name a compiler in CXX.",
        )
    return ok("compiler", facts.compiler)


def judge_kernels(facts: HostFacts) -> Finding:
    """On GPUs. Triton compiles a kernel's start in C, with Python's headers, when the kernel first runs: after all weights are loaded."""
    missing = [
        *(() if facts.c_compiler else ("a C compiler (Debian: apt install gcc; or name one in CC)",)),
        *(() if facts.headers else ("Python.h (Debian: apt install python3-dev)",)),
    ]
    if missing:
        return wrong("kernels", "Those for GPUs are compiled here, when they first run.", f"What is missing: {' and '.join(missing)}.")
    return ok("kernels", f"compiled by {facts.c_compiler}")


def judge_shared_memory(facts: HostFacts, *, ray: bool) -> Finding:
    """/dev/shm is Ray's; KV moves through memory of its own (memfd)."""
    if not ray:
        return ok("shared memory", "Without Ray nothing is kept in /dev/shm.")
    if facts.shm_free is None:
        return wrong("shared memory", "There is no /dev/shm, where Ray keeps its objects.", "Mount a tmpfs there, or start with --no-ray.")
    free = f"{facts.shm_free >> 20} MiB free in /dev/shm"
    if facts.shm_free < RAY_STORE_BYTES:
        return wrong(
            "shared memory",
            f"{free}: Ray wants {RAY_STORE_BYTES >> 20}.",
            "Make it larger (containers: --shm-size=256m; else: mount -o remount,size=256m /dev/shm), or start with --no-ray.",
        )
    return ok("shared memory", free)


def judge_files(facts: HostFacts) -> Finding:
    if facts.open_files < FEW_FILES:
        return note(
            "open files",
            f"A process may have {facts.open_files} files open, and every connection is one.",
            f"Raise it where the cluster is started: ulimit -n {FEW_FILES * 4}.",
        )
    return ok("open files", f"{facts.open_files} a process")


def judge_disk(facts: HostFacts) -> Finding:
    free = f"{facts.disk_free / (1 << 30):.1f} GiB free below {facts.disk}"
    if facts.disk_free < DISK_BYTES:
        return note(
            "disk", f"{free}: a model that is still to be prepared may not fit.", "Free some, or set DIPTYCH_HOME to a larger disk."
        )
    return ok("disk", free)


def judge_clock(facts: HostFacts) -> Finding:
    if facts.clock_synchronised is False:
        return note(
            "clock",
            "The kernel says that nobody sets this host's clock.",
            "Run chrony or systemd-timesyncd, so that the logs of several hosts can be laid side by side and certificates are believed.",
        )
    return ok("clock", "is set by somebody" if facts.clock_synchronised else "cannot be asked who sets it")


def judge_skew(who: str, ours: float, theirs: float) -> Finding:
    """Two readings of clocks at one moment, in seconds since the epoch."""
    skew = theirs - ours
    said = f"The clock of {who} is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} this host's."
    mend = "Run chrony or systemd-timesyncd on both."
    if abs(skew) >= GREAT_SKEW_S:
        return wrong("clock", f"{said} Certificates may be refused.", mend)
    return note("clock", f"{said} Their log lines do not sort.", mend) if abs(skew) > SKEW_S else ok("clock", f"{who}: within a second")


def judge_address(facts: HostFacts, *, joined: bool) -> Finding:
    if joined and facts.address is not None and facts.address.startswith("127."):
        return note(
            "address",
            f"This host's own name stands for {facts.address}, by which no other host reaches it.",
            "Start Ray with --node-ip-address, or take the name out of the 127.0.1.1 line of /etc/hosts.",
        )
    return ok("address", facts.address or "this host's name stands for none")


def obstacles(facts: HostFacts) -> dict[str, str]:
    """Why a transport cannot work here, by its name; those that can are not in it."""
    found: dict[str, str] = {}
    if facts.memfd is not None:
        found["shm"] = f"memory cannot be shared between processes ({facts.memfd})"
    if facts.loopback is not None:
        found["gloo"] = f"no connection can be made ({facts.loopback})"
    if not facts.gpus:
        found |= dict.fromkeys(("nccl", "cuda_ipc"), "this host has no GPU")
    elif facts.extras.get("nccl4py") is None:
        found["nccl"] = "the package nccl4py is not installed"
    return found


def judge_transports(transports: tuple[Transport, ...], facts: HostFacts, *, hands_over: bool) -> Iterator[Finding]:
    """Whether KV can move as `transfer.transports` says. `hands_over`: whether any is to move at all."""
    if not hands_over:
        yield ok("transports", "No KV is to move: there are no prefill workers.")
        return
    why = obstacles(facts)
    lame = {transport.value: why[transport.value] for transport in transports if transport.value in why}
    told = "; ".join(f"{name}: {reason}" for name, reason in lame.items())
    if len(lame) == len(transports):
        yield wrong(
            "transports",
            f"No KV could move, and every prompt would be computed again where it is decoded. {told}.",
            "Name a transport that works in transfer.transports, or serve without prefill workers (--colocated).",
            field="transfer.transports",
        )
    elif lame:
        others = ", ".join(transport.value for transport in transports if transport.value not in lame)
        yield note("transports", f"KV moves over {others} alone. {told}.", "Leave out of transfer.transports what cannot work, or mend it.")
    else:
        yield ok("transports", ", ".join(transports))
