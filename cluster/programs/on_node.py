"""A rank on a node that is perhaps not the supervisor's host: it sees to the model there, and becomes the rank.

    python -m diptych.cluster.programs.on_node --spec '<RankSpec as JSON>' --source SOURCE --dtype DTYPE --quantization Q --fingerprint F
        --host ADDRESS --threads N [--cores FIRST:COUNT] [--leader HOST:PORT] [--leash]

The prepared model is the spec's directory if the node has it (the supervisor's own host, or a shared disk); else `source` is found or
prepared on the node, once for all its ranks, and must be the same model. Then the rank's own command takes the place of this process:
what preparing took of memory is given back, and the leash and stdout stay as they are.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from ...core.errors import ConfigError, DiptychError
from ...core.layout import OF_WEIGHTS, DType
from ...core.model import CARD, read_card
from ...core.quantization import Quantization
from ...rpc.channels import join_address
from ..process.child import FAILED, hold_leash, log_to_stderr, progress, say
from ..process.identities import from_environment
from ..process.spec import RankSpec, rank_name, read_spec


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m diptych.cluster.programs.on_node", description="Run one rank process on a node of a cluster."
    )
    parser.add_argument("--spec", required=True, help="RankSpec as JSON")
    parser.add_argument("--source", required=True, help="what the model is prepared from, if it is not there")
    parser.add_argument("--dtype", required=True, choices=OF_WEIGHTS)
    parser.add_argument("--quantization", required=True, choices=list(Quantization))
    parser.add_argument("--fingerprint", required=True, help="of the model the others serve")
    parser.add_argument("--host", required=True, help="the node's address, to listen on")
    parser.add_argument("--threads", required=True, type=int)
    parser.add_argument("--cores", metavar="FIRST:COUNT", help="which of the node's cores are the rank's own, in order; by default all")
    parser.add_argument("--leader", metavar="HOST:PORT", help="where the worker's rank 0 awaits this one")
    parser.add_argument("--leash", action="store_true", help="end with the process that started this one")
    arguments = parser.parse_args()
    if arguments.leash:
        hold_leash()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # half a model is removed on the way out
    try:
        spec = read_spec(RankSpec, arguments.spec)
        log_to_stderr(spec.log_level, rank_name(spec), spec.log_format)
        _become(
            spec.model_copy(
                update={
                    "model_dir": model_here(
                        spec.model_dir,
                        arguments.source,
                        DType(arguments.dtype),
                        Quantization(arguments.quantization),
                        arguments.fingerprint,
                        arguments.host,
                    ),
                    "listen": join_address(arguments.host, 0),
                    "threads": arguments.threads,
                    "internal_tls": from_environment() or spec.internal_tls,
                    "cpus": own_cores(sorted(os.sched_getaffinity(0)), arguments.cores),
                }
            ),
            ["--leader", arguments.leader] if arguments.leader else [],
            leash=arguments.leash,
        )
    except DiptychError as error:
        say("failed", message=error.message, field=error.field)
    return FAILED


def model_here(known: Path, source: str, dtype: DType, quantization: Quantization, fingerprint: str, host: str) -> Path:
    """The directory of the model with `fingerprint` on this node. Raises `ConfigError` if it is not there and cannot be made."""
    if (known / CARD).is_file() and read_card(known).fingerprint == fingerprint:
        return known
    from ...engine.prepared import find_or_prepare

    try:
        directory = find_or_prepare(source, dtype=dtype, quantization=quantization, progress=_Telling(host))
    except DiptychError as error:
        raise ConfigError(f"On node {host} the model cannot be had: {error.message}", field="model.source") from None
    if read_card(directory).fingerprint != fingerprint:
        raise ConfigError(f"On node {host} {source} is another model than here.", field="model.source")
    return directory


class _Telling:
    """Says each step of preparing, and every tenth of it."""

    def __init__(self, host: str) -> None:
        self._host, self._said = host, ""

    def __call__(self, what: str, share: float) -> None:
        text = f"{what} on {self._host}, {int(share * 10) * 10} %"
        if text != self._said:
            self._said = text
            progress(text)


def own_cores(cores: list[int], places: str | None) -> tuple[int, ...] | None:
    """The cores at `places` (first:count) of the node's `cores`; None, any, if the node has not so many: Ray was told of more."""
    if places is None:
        return None
    first, count = map(int, places.split(":"))
    return tuple(cores[first : first + count]) if first + count <= len(cores) else None


def _become(spec: RankSpec, options: list[str], *, leash: bool) -> NoReturn:
    sys.stdout.flush()
    command = [sys.executable, "-m", "diptych.cluster.programs.rank", "--spec", spec.model_dump_json(), *options]
    os.execv(sys.executable, [*command, "--leash"] if leash else command)


if __name__ == "__main__":
    sys.exit(main())
