"""What `nvidia-smi` says of this host's GPUs, and what to think of it. Pure: text in, findings out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .finding import Finding, note, ok, wrong

QUERY = ("index", "name", "driver_version", "memory.total", "memory.used", "compute_mode", "ecc.errors.uncorrected.volatile.total")
"""Fields for `nvidia-smi --query-gpu=… --format=csv,noheader,nounits`; memory in MiB."""
USED_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Gpu:
    """Memory in MiB, None where nvidia-smi may not see it, as a slice's in a container. `errors`: uncorrected ones since the driver was
    loaded; None where the device does not count them."""

    index: int
    name: str
    driver: str
    total: int | None
    used: int | None
    mode: str
    errors: int | None


def read_gpus(text: str) -> list[Gpu]:
    """The lines that `QUERY` gives. Raises `ValueError` for another program's."""
    return [_gpu([cell.strip() for cell in line.split(",")]) for line in text.splitlines() if line.strip()]


def _gpu(cells: list[str]) -> Gpu:
    if len(cells) != len(QUERY):
        raise ValueError(f"nvidia-smi says {', '.join(cells)!r}; {len(QUERY)} values were asked for")
    index, name, driver, total, used, mode, errors = cells
    return Gpu(int(index), name, driver, _number(total), _number(used), mode, _number(errors))


def _number(cell: str) -> int | None:
    return int(cell) if cell.isdecimal() else None


def read_cuda(text: str) -> tuple[int, int] | None:
    """The newest CUDA that the driver runs, from the head of plain `nvidia-smi`."""
    found = re.search(r"CUDA(?: UMD)? Version:\s*(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def judge_gpus(text: str | None, failure: str | None, *, usable: int = 0) -> Iterator[Finding]:
    """`text`: what the query gave; None if there is no nvidia-smi. `failure`: what it said instead of answering. `usable`: how many the
    driver has for a process, whatever nvidia-smi says."""
    if failure is not None:
        yield wrong(
            "GPUs", f"nvidia-smi fails: {failure}", "Driver and kernel module do not match, or the device is lost: reload, or reboot."
        )
        return
    if usable and (text is None or not text.strip()):
        yield note("GPUs", f"The driver has {usable}, and no nvidia-smi tells how they are.", "Install it, it comes with the driver.")
        return
    if text is None or not text.strip():
        yield ok("GPUs", "none: models are computed on CPUs")
        return
    try:
        gpus = read_gpus(text)
    except ValueError as error:
        yield wrong("GPUs", f"{error}.", "Its driver is older than these fields, or it is not NVIDIA's.")
        return
    yield ok("GPUs", ", ".join(f"{gpu.index}: {gpu.name}" + ("" if gpu.total is None else f", {gpu.total} MiB") for gpu in gpus))
    for gpu in gpus:
        yield from _judge(gpu)
    if len(drivers := {gpu.driver for gpu in gpus}) > 1:
        yield wrong("GPUs", f"They have several drivers ({', '.join(sorted(drivers))}).", "Reboot into one.")


def _judge(gpu: Gpu) -> Iterator[Finding]:
    who = f"GPU {gpu.index}"
    if gpu.mode != "Default" and not gpu.mode.startswith("["):  # [N/A], [Insufficient Permissions]
        yield wrong(who, f"Its compute mode is {gpu.mode}: a second process cannot use it.", f"nvidia-smi -i {gpu.index} -c DEFAULT")
    if gpu.errors:
        yield wrong(who, f"It had {gpu.errors} uncorrected memory errors.", f"Reset or replace it: nvidia-smi -i {gpu.index} --gpu-reset.")
    if gpu.used is not None and gpu.total is not None and gpu.used > USED_SHARE * gpu.total:
        yield note(who, f"{gpu.used} of its {gpu.total} MiB are taken by others.", "End what uses it, or lower kv_tokens.")


def judge_driver(smi: str | None, wants: str | None) -> Iterator[Finding]:
    """`smi`: the head of plain `nvidia-smi`; `wants`: the CUDA that torch was built for, None for a build without."""
    runs = read_cuda(smi) if smi else None
    if runs is None:
        return
    if wants is None:
        yield wrong("driver", "There are GPUs, and torch is a build for CPUs.", "Install torch's build for CUDA.")
        return
    major, minor = (int(part) for part in wants.split(".")[:2])
    told = f"{runs[0]}.{runs[1]}"
    if runs[0] < major:  # within a major version CUDA promises that older drivers run it
        yield wrong("driver", f"The driver runs CUDA up to {told}; torch wants {wants}.", "Install a newer driver, or torch for that CUDA.")
    else:
        yield ok("driver", f"CUDA {told}; torch has {major}.{minor}")


def judge_nccl(found: str | None, *, wanted: bool) -> Iterator[Finding]:
    """`found`: NCCL's version. `wanted`: whether KV or activations are to go over it."""
    if not wanted:
        return
    if found is None:
        remedy = "Install torch's build for CUDA from PyPI, which brings it, or have the linker find libnccl.so.2."
        yield wrong("NCCL", "It is not found, and what GPUs tell each other goes over it.", remedy, "transfer.transports")
    elif tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < (2, 28):
        yield wrong(
            "NCCL", f"It is {found}; 2.28 or newer is needed for pairs that come and go.", "Install a newer torch, which brings it."
        )
    else:
        yield ok("NCCL", found)
