"""With how many threads to compute. Asked before every product, since it may change from one to the next."""

from __future__ import annotations

from collections.abc import Callable

import torch

_answer: Callable[[], int] = torch.get_num_threads


def threads() -> int:
    """On the thread that computes: how many, itself included; torch's own ops compute with as many."""
    return _answer()


def ask(answer: Callable[[], int]) -> None:
    """Have `threads` answered by `answer`, which sets torch's number when its own changes."""
    global _answer
    _answer = answer
