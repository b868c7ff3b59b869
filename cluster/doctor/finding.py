"""What one check found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """`wrong`: `up` refuses it, or something does not work. `note`: it works, but not as well as it could."""

    OK = "ok"
    NOTE = "note"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """`said`: what is so. `mend`: what to do about it, if anything. `field`: the config's key it is about."""

    check: str
    state: State
    said: str
    mend: str = ""
    field: str | None = None


def ok(check: str, said: str) -> Finding:
    return Finding(check, State.OK, said)


def note(check: str, said: str, mend: str) -> Finding:
    return Finding(check, State.NOTE, said, mend)


def wrong(check: str, said: str, mend: str, field: str | None = None) -> Finding:
    return Finding(check, State.WRONG, said, mend, field)
