"""With how many threads to compute. Asked before every product, since it may change from one to the next."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_answer: Callable[[], int] = torch.get_num_threads


def threads() -> int:
    """On the thread that computes: how many, itself included; torch's own ops compute with as many."""
    return _answer()


def ask(answer: Callable[[], int]) -> None:
    """Have `threads` answered by `answer`, which sets torch's number when its own changes."""
    global _answer
    _answer = answer


def by_thread_that_ends(call: Callable[[], None]) -> None:
    """Have a thread make `call`, for as long as that takes. OpenMP gives each thread that computes a team of its own, which ends with it.
    While two have one there are more threads than cores, and then all of them sleep between two products: for two threads on two cores,
    where this process computes on another thread from now on, 138 switches in a decode step in place of 2."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(call).result()
