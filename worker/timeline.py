"""Time stamps of an attempt's stages at debug level, in the words of `core.stages`.

The system's monotonic clock has one origin for all processes of a host, so the lines of two workers can be laid side by side.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator

from ..core.stages import Stage

log = logging.getLogger(__name__)

_LINE = re.compile(r"stage=(\w+) attempt=(\S+) at=(\d+\.\d+)")


def stamping() -> bool:
    """Whether anybody reads the stamps; asked before taking one that costs something."""
    return log.isEnabledFor(logging.DEBUG)


def stamp(stage: Stage, attempt_id: str, at: float) -> None:
    """Note that `attempt_id` reached `stage` at `at`, seconds of the monotonic clock."""
    log.debug("stage=%s attempt=%s at=%.6f", stage.value, attempt_id, at)


def read_stamps(lines: Iterable[str]) -> Iterator[tuple[Stage, str, float]]:
    """`(stage, attempt id, seconds)` of every stamp in a log."""
    for line in lines:
        if (found := _LINE.search(line)) is not None:
            yield Stage(found[1]), found[2], float(found[3])
