"""What a worker accepts: the router has validated every request, but a worker must not die of one that nobody validated."""

from __future__ import annotations

from itertools import chain

from ..core.errors import DiptychError, InvalidRequest
from ..core.request import Request


def refusal(request: Request, vocab_size: int) -> DiptychError | None:
    """Why no worker can serve this request, whatever its memory; None if one can. (Lengths are the schedulers' to judge.)"""
    ids = [*request.prompt_ids, *chain(*request.generated)]
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        return InvalidRequest(f"A token id is out of range: the vocabulary has {vocab_size} tokens.", field="prompt")
    try:
        request.sampling.validate(vocab_size)
    except InvalidRequest as error:
        return error
    if request.sampling.seed is None and not request.sampling.greedy:
        return InvalidRequest("A worker draws no seeds: the router does.", field="seed")
    choices = request.sampling.n
    if len(request.generated) not in (0, choices):
        return InvalidRequest(f"There are generated tokens of {len(request.generated)} choices, not of {choices}.", field="generated")
    if not request.live or any(choice >= choices for choice in request.finished):
        return InvalidRequest(f"Of {choices} choices, {sorted(request.finished)} are not the finished ones.", field="finished")
    if any(len(request.generated_by(choice)) >= request.sampling.max_tokens for choice in request.live):
        return InvalidRequest("Every token asked for has been generated already.", field="max_tokens")
    return None
