"""One event, one line: a message for people with its values beside it, which the process's log writes in its own form."""

from __future__ import annotations

import logging

FIELDS = "fields"
"""The attribute of a log record that holds the values."""


def note(log: logging.Logger, message: str, *, level: int = logging.INFO, **fields: object) -> None:
    """Log `message` with `fields` that JSON can say. None stands for what there is not, and is left out. Never a prompt or an answer."""
    if log.isEnabledFor(level):
        log.log(level, message, extra={FIELDS: {name: value for name, value in fields.items() if value is not None}})
