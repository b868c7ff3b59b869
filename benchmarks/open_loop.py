"""An open-loop load: requests are sent when their time has come, whether or not earlier ones have been answered."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from diptych.core.generate import Finish, Generate
from diptych.core.sampling import SamplingParams
from diptych.rpc.inference import InferenceClient


@dataclass(slots=True)
class Answer:
    """One request as its client saw it. `arrivals[i]`: seconds from sending to the arrival of output token i."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def ttft(self) -> float:
        return self.arrivals[0]

    @property
    def tpot(self) -> float:
        """Mean seconds per output token after the first."""
        return (self.arrivals[-1] - self.arrivals[0]) / (len(self.arrivals) - 1)

    @property
    def gap(self) -> float:
        """Seconds between tokens 1 and 2: the hand-over gap, if the request was handed over."""
        return self.arrivals[1] - self.arrivals[0]

    @property
    def itl(self) -> list[float]:
        """Seconds between consecutive tokens, from token 2 on."""
        return [late - early for early, late in zip(self.arrivals[1:], self.arrivals[2:], strict=False)]


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of a Poisson process of `rate` per second within `seconds`."""
    draw, times, now = random.Random(seed), [], 0.0
    while (now := now + draw.expovariate(rate)) < seconds:
        times.append(now)
    return times


def prompt(tokens: int, seed: int, vocabulary: int) -> tuple[int, ...]:
    """Random token ids: no two prompts share a prefix, so nothing comes from a prefix cache."""
    draw = random.Random(seed)
    return tuple(draw.randrange(10, vocabulary) for _ in range(tokens))


async def ask(client: InferenceClient, ids: tuple[int, ...], output_tokens: int) -> Answer:
    """Send one greedy request for exactly `output_tokens` tokens."""
    answer = Answer(sent=time.perf_counter())
    call = Generate(ids, sampling=SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True))
    async for chunk in client.generate(call):
        now = time.perf_counter() - answer.sent
        answer.arrivals += [now] * len(chunk.tokens)
        answer.finish = chunk.finish or answer.finish
    if len(answer.arrivals) != output_tokens:
        raise RuntimeError(f"asked for {output_tokens} tokens, got {len(answer.arrivals)}")
    return answer


async def run(client: InferenceClient, times: Sequence[float], *, input_tokens: int, output_tokens: int, vocabulary: int) -> list[Answer]:
    """Send one request at each of `times` (seconds from now); all answers, in the order of sending."""
    begin = time.perf_counter()

    async def one(number: int, at: float) -> Answer:
        await asyncio.sleep(begin + at - time.perf_counter())
        return await ask(client, prompt(input_tokens, number, vocabulary), output_tokens)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(number, at)) for number, at in enumerate(times)]
    return [task.result() for task in tasks]
