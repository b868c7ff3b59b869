"""Small clusters, started as `diptych up` starts them and asked over HTTP: what serving takes that no step has, and how much longer
steps take while the other phase computes beside them. Each runs in a process of its own, which says nothing."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import statistics
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from ...core.errors import DiptychError, Unavailable
from ...core.fleet import Phase
from ..commands.up import Served
from ..commands.while_up import serve, settings
from ..load.answer import Answer
from ..load.server import Server, find_server
from ..load.workload import Arrival
from ..planner.policies import Policies
from .grid import ROWS
from .reckoning import Answers, Apart, Prompt, Read, Together
from .recorded import Ran, with_steps

ALONE = (64, 160, 256, 352, 448)
"""Lengths of prompts that are asked one after another."""
TURNS = 2
"""Times as often as anything else: one of each length takes half a second."""
SHORT = 32
"""Of the prompts of answers that are timed: long enough that a prefill worker reads them."""
TOKENS = 48
BESIDE_ROWS, BESIDE_TOKENS, BESIDE_PROMPT = (2, 6), 128, 256
HANDED_OVER = 2
"""Tokens of an answer that is not written where its prompt is read."""
LEAST_CONTEXT = max(ALONE) + HANDED_OVER
"""Of a model that answers all of this."""
READERS = 2
"""Prompts under way at once beside answers: with one a prefill worker would rest while it comes and goes."""
TIMEOUT_S = 120.0
STAGES: dict[type[Any], tuple[str, ...]] = {
    Apart: ("apart: starting", "apart: prompts", "apart: answers", "apart: both"),
    Together: ("together: starting", "together: prompts", "together: answers", "together: both"),
}
T = TypeVar("T", Apart, Together)


@dataclass(frozen=True, slots=True)
class Small:
    """What workers of small clusters are. `threads`: of each, on a CPU; None: as `up` shares the cores. `tp`: GPUs of each; 0: on a CPU."""

    model_dir: Path
    dtype: str
    threads: int | None = None
    tp: int = 0


def watched(kind: type[T], small: Small, repeats: int) -> Iterator[str | T]:
    """A cluster of that kind, in a process of its own: what is being done, one of its `STAGES` each time, and at last what was seen.
    `Unavailable` if it does not start."""
    ear, mouth = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(target=_watch_it, args=(mouth, kind, small, repeats))
    child.start()
    mouth.close()
    try:
        while not isinstance(told := ear.recv(), kind):
            if isinstance(told, DiptychError):
                raise told
            yield told
        yield told
    except EOFError:
        raise Unavailable("The process that runs a small cluster ended before it was through.") from None
    finally:
        child.terminate()  # if it has not ended: the cluster does then
        child.join()


def _watch_it(pipe: Connection, kind: type[Any], small: Small, repeats: int) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  what `up` says is not asked for here
    threading.Thread(target=_end_with_parent, daemon=True).start()
    watch = {Apart: _apart, Together: _together}[kind]
    told = iter(STAGES[kind])

    async def ask(client: _Client) -> None:
        pipe.send(await watch(client, repeats, lambda: pipe.send(next(told))))

    try:
        pipe.send(next(told))
        _serve(config_of(small, prefill=int(kind is Apart)), ask)
    except DiptychError as error:
        pipe.send(error)


def _end_with_parent() -> None:
    """As by Ctrl-C, so that the cluster ends too."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


async def _apart(client: _Client, repeats: int, begin: Callable[[], None]) -> Apart:
    begin()
    prompts = await client.prompts(repeats, Phase.PREFILL)
    begin()
    answers = tuple([await client.answers(rows, repeats) for rows in ROWS])
    begin()
    both = [await client.both(rows, repeats) for rows in BESIDE_ROWS]
    return Apart(prompts, answers, tuple(read for read, _ in both), tuple(written for _, written in both))


async def _together(client: _Client, repeats: int, begin: Callable[[], None]) -> Together:
    chunk = Policies().decode_chunk_tokens
    begin()
    prompts = await client.prompts(repeats, Phase.DECODE)
    begin()
    answers = tuple([await client.answers(rows, repeats) for rows in ROWS])
    begin()
    return Together(prompts, answers, await client.both_in_one(repeats, chunk), chunk)


def config_of(small: Small, *, prefill: int) -> dict[str, Any]:
    """The config of a cluster of one decode worker and so many for prefill."""
    config = settings(prefill=prefill, decode=1, model=str(small.model_dir), dtype=small.dtype)
    for phase in Phase:
        if small.threads is not None:
            config[phase.value]["threads"] = small.threads
        if small.tp:
            config[phase.value]["tp"] = small.tp
    return config | {"name": f"profile-{os.getpid()}", "device": "cuda" if small.tp else "cpu"}


def _serve(config: dict[str, Any], ask: Callable[[_Client], Awaitable[None]]) -> None:
    async def measure(served: Served) -> None:
        url, vocabulary = f"http://{served.http}", served.card.vocab_size
        server = await find_server(url, model=None, api_key=None, vocabulary=vocabulary, seed=0, timeout_s=TIMEOUT_S, as_text=False)
        await ask(_Client(server, config["name"]))

    serve(config, measure)


class _Client:
    """Asks, and times what comes."""

    def __init__(self, server: Server, cluster: str) -> None:
        self._server, self._cluster, self._asked = server, cluster, 0

    async def _ask(self, prompt: int, output: int) -> Answer:
        self._asked += 1
        arrival = Arrival(self._asked, 0.0, prompt, output)
        answer = await self._server.ask(arrival, self._server.prepare(arrival), 0.0)
        if answer.error is not None:
            raise Unavailable(f"A small cluster did not answer: {answer.error}.")
        return answer

    async def prompts(self, repeats: int, phase: Phase) -> tuple[Prompt, ...]:
        """One after another, read by the worker of that phase; their KV is handed over if there is another. All lengths by turns: what
        stands in the machine's way for some seconds would else be in the median of one of them."""
        for tokens in ALONE:
            await self._ask(tokens, HANDED_OVER)
        answers, steps = await with_steps(self._cluster, self._by_turns(TURNS * repeats))
        return tuple(_prompt(tokens, answers, steps[phase.value]) for tokens in ALONE)

    async def _by_turns(self, count: int) -> list[Answer]:
        return [await self._ask(tokens, HANDED_OVER) for _ in range(count) for tokens in ALONE]

    async def answers(self, rows: int, repeats: int) -> Answers:
        """So many at once, timed from when all have begun until one ends. Nobody reads prompts then, so the cores of whoever does are
        lent."""
        found = []
        for _ in range(repeats):
            answers = await asyncio.gather(*(self._ask(SHORT, TOKENS) for _ in range(rows)))
            found.append(_answers(answers, *_all_answer(answers)))
        return _median(found)

    async def both(self, rows: int, repeats: int) -> tuple[Read, Answers]:
        """So many answers, and prompts that another worker reads and hands over: its steps of one whole prompt, and what all answers do."""
        answers, ran = await self._both(rows, repeats, HANDED_OVER)
        read = [step.seconds for step in ran[Phase.PREFILL] if step.attempts == 1]
        mean = statistics.fmean(step.attempts for step in ran[Phase.DECODE])
        written = Answers(mean, answers.context + round((mean - rows) * BESIDE_PROMPT), _mean([step.seconds for step in ran[Phase.DECODE]]))
        return Read(BESIDE_PROMPT, 0, rows, written.context, _mean(read)), written

    async def both_in_one(self, repeats: int, chunk: int) -> Read:
        """The same of a worker for both: its steps with a chunk of a prompt beside all answers."""
        rows = max(BESIDE_ROWS)
        answers, ran = await self._both(rows, repeats, 1)
        read = [step.seconds for step in ran[Phase.DECODE] if step.attempts == rows + 1]
        return Read(chunk, (BESIDE_PROMPT - chunk) / 2, rows, answers.context, _mean(read))

    async def _both(self, rows: int, repeats: int, tokens: int) -> tuple[Answers, dict[Phase, list[Ran]]]:
        """What `rows` answers did, and the steps that ran while there were prompts too; these are answered with so many tokens."""
        ran: dict[Phase, list[Ran]] = {phase: [] for phase in Phase}
        found = []
        for _ in range((repeats + 1) // 2):
            answers, steps = await with_steps(self._cluster, self._beside(rows, tokens))
            begin, end = _all_answer(answers)
            found.append(_answers(answers, begin, end))
            for phase in Phase:
                ran[phase] += [step for step in steps.get(phase.value, ()) if begin <= step.began and step.ended <= end]
        return _median(found), ran

    async def _beside(self, rows: int, tokens: int) -> Sequence[Answer]:
        writing = asyncio.gather(*(self._ask(SHORT, BESIDE_TOKENS) for _ in range(rows)))

        async def read() -> None:
            while not writing.done():
                await self._ask(BESIDE_PROMPT, tokens)

        await asyncio.gather(*(read() for _ in range(READERS)))
        return await writing


def _mean(seconds: Sequence[float]) -> float:
    """Without the tenth at either end: something else on the machine may have stood in a step's way. `Unavailable` if there are none."""
    if not seconds:
        raise Unavailable(
            "No prompt was read while answers were written. Was the machine busy with something else? Measure again when it is idle, or "
            "use --no-clusters."
        )
    ends = len(seconds) // 10
    return statistics.fmean(sorted(seconds)[ends : len(seconds) - ends])


def _prompt(tokens: int, answers: Sequence[Answer], steps: Sequence[Ran]) -> Prompt:
    """Those of that length."""
    these = [answer for answer in answers if answer.arrival.prompt_tokens == tokens]
    computed = [
        sum(step.seconds for step in steps if step.began >= answer.sent and step.ended <= answer.sent + _ttft(answer)) for answer in these
    ]
    return Prompt(tokens, statistics.median(map(_ttft, these)), statistics.median(computed))


def _ttft(answer: Answer) -> float:
    return answer.token_times[0]


def _all_answer(answers: Sequence[Answer]) -> tuple[float, float]:
    """From when each has its second token until the first of them ends."""
    return (
        max(answer.sent + answer.token_times[1] for answer in answers),
        min(answer.sent + answer.token_times[-1] for answer in answers),
    )


def _answers(answers: Sequence[Answer], begin: float, end: float) -> Answers:
    """What they do between these moments."""
    gaps, behind = [], []
    for answer in answers:
        within = [(number, answer.sent + at) for number, at in enumerate(answer.token_times) if begin <= answer.sent + at <= end]
        if len(within) > 1:
            gaps.append((within[-1][1] - within[0][1]) / (len(within) - 1))
            behind.append(SHORT + (within[0][0] + within[-1][0]) / 2)
    if not gaps:
        raise Unavailable(
            f"Of {len(answers)} answers at once the first ended before the last began: this machine is busy; profile it idle."
        )
    return Answers(len(answers), round(len(answers) * statistics.fmean(behind)), statistics.fmean(gaps))


def _median(found: Sequence[Answers]) -> Answers:
    return sorted(found, key=lambda each: each.gap)[len(found) // 2]
