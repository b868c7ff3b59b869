"""Find or make a prepared model, as a process of its own: torch and transformers take 1 GB that the supervisor should not keep.

    python -m diptych.cluster.programs.prepare --source SOURCE --dtype DTYPE [--quantization Q] [--leash]

It says `progress` (what, share), then `ready` (directory) or `failed` (message).
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from ...core.errors import DiptychError
from ...core.layout import OF_WEIGHTS, DType
from ...core.quantization import Quantization
from ..process.child import FAILED, hold_leash, log_to_stderr, say


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m diptych.cluster.programs.prepare", description="Find or make a prepared model.")
    parser.add_argument("--source", required=True, help="what to prepare")
    parser.add_argument("--dtype", required=True, choices=OF_WEIGHTS)
    parser.add_argument("--quantization", default=Quantization.NONE, choices=list(Quantization))
    parser.add_argument("--leash", action="store_true", help="end with the process that started this one")
    arguments = parser.parse_args()
    if arguments.leash:
        hold_leash()
    log_to_stderr("warning", "prepare")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # half a model is removed on the way out
    try:
        say("ready", directory=str(find_or_make(arguments.source, DType(arguments.dtype), Quantization(arguments.quantization))))
    except DiptychError as error:
        say("failed", message=error.message)
        return FAILED
    return 0


def find_or_make(source: str, dtype: DType, quantization: Quantization) -> Path:
    """The prepared model of `source`, made now if there is none."""
    from ...engine.prepared import find_or_prepare

    return find_or_prepare(
        source, dtype=dtype, quantization=quantization, progress=lambda what, share: say("progress", what=what, share=share)
    )


if __name__ == "__main__":
    sys.exit(main())
