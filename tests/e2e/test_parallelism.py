"""Any parallelism to any, a process for each rank: the tokens of a worker of one rank, whatever both ends are and whatever carries the KV.

One cluster holds workers of seven parallelisms, 16 ranks, so that every prefill worker hands over to every decode worker.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from diptych.core.commands import Decode, Finished, NewTokens, Stop
from diptych.core.errors import Cancelled
from diptych.core.fleet import Phase
from diptych.core.request import new_attempt_id
from diptych.core.transfer import Transport
from e2e_harness import Answer, Rank, Workers, attached, rank_spec, ranks, request
from spread_harness import LENGTHS, TOKENS, Pair, alone, cases, judged, prompt, same

SHM, GLOO = Transport.SHM, Transport.GLOO
PREFILLS: dict[str, dict[str, Any]] = {
    "P tp1": {"transports": (SHM,)},
    "P tp2": {"tp": 2},
    "P pp2": {"stages": (2, 2)},
    "P tp2 pp2": {"tp": 2, "stages": (1, 3), "transports": (GLOO,)},
}
DECODES: dict[str, dict[str, Any]] = {
    "D tp1": {"transports": (SHM, GLOO)},
    "D pp2": {"stages": (3, 1), "transports": (GLOO, SHM)},  # its last stage has nothing of the full cache group
    "D tp4": {"tp": 4, "transports": (SHM, GLOO)},  # two ranks for each of the two KV heads
}
PAIRS = {
    ("P tp1", "D tp1"): SHM,
    ("P tp1", "D pp2"): SHM,
    ("P tp1", "D tp4"): SHM,
    ("P tp2", "D tp1"): SHM,
    ("P tp2", "D pp2"): GLOO,
    ("P tp2", "D tp4"): SHM,
    ("P pp2", "D tp1"): SHM,
    ("P pp2", "D pp2"): GLOO,
    ("P pp2", "D tp4"): SHM,
    ("P tp2 pp2", "D tp1"): GLOO,
    ("P tp2 pp2", "D pp2"): GLOO,
    ("P tp2 pp2", "D tp4"): GLOO,
}
"""What carries the KV: of what P may use, what D likes best."""
pytestmark = pytest.mark.timeout(600)  # 16 processes that import torch first, on a machine that may be busy


@dataclass
class Cluster:
    workers: dict[str, Rank]
    expected: list[Answer]
    """What the worker of one rank answers to the cases."""

    def pair(self, prefill: str, decode: str) -> Pair:
        return Pair(self.workers[prefill], self.workers[decode], PAIRS[prefill, decode], self.expected)


@pytest.fixture(scope="module")
def cluster(tiny_gemma3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    specs = [
        rank_spec(tiny_gemma3_dir, phase, name, kv_tokens=2048, drain_s=60.0, **spread)
        for group, phase in ((PREFILLS, Phase.PREFILL), (DECODES, Phase.DECODE))
        for name, spread in group.items()
    ]
    with ranks(tmp_path_factory.mktemp("parallelism"), *specs) as started:
        workers = {rank.spec.worker_id: rank for rank in started}
        assert sum(len(rank.members) for rank in started) == 16
        yield Cluster(workers, asyncio.run(judged(workers["D tp1"])))
        assert [rank.stop() for rank in started] == [0] * len(started)
    assert not [rank for rank in started if "Traceback" in rank.logs()]


def test_the_worker_of_one_rank_says_what_transformers_generates(cluster: Cluster, tiny_gemma3_source: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_gemma3_source, dtype=torch.float32).eval()
    for length, answer in zip(LENGTHS, cluster.expected, strict=False):
        ids = prompt(length, 0)
        with torch.inference_mode():
            out = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        assert answer.tokens == tuple(out[0, length:].tolist())


@pytest.mark.parametrize("pair", list(PAIRS), ids=" to ".join)
def test_any_parallelism_to_any(cluster: Cluster, pair: tuple[str, str]) -> None:
    asyncio.run(cluster.pair(*pair).check())


@pytest.mark.parametrize("decode", [name for name in DECODES if name != "D tp1"])
def test_a_decode_worker_of_many_ranks_reads_prompts_itself(cluster: Cluster, decode: str) -> None:
    asyncio.run(alone(cluster.workers[decode], cluster.expected))


@pytest.mark.parametrize("prefill", list(PREFILLS))
def test_a_prefill_worker_of_many_ranks_answers_alone(cluster: Cluster, prefill: str) -> None:
    """Whoever draws it, its leader has the first token of every choice."""

    async def main() -> None:
        async with attached(cluster.workers[prefill], None) as workers:
            asked = [replace(each, sampling=replace(each.sampling, max_tokens=1)) for each in cases("alone")]
            answers = await asyncio.gather(*(workers.prefill_only(each) for each in asked))
            for answer, whole in zip(answers, cluster.expected, strict=True):
                assert answer.error is None
                assert {choice: written.tokens for choice, written in answer.choices.items()} == {
                    choice: written.tokens[:1] for choice, written in whole.choices.items()
                }
            await workers.idle()

    asyncio.run(main())


@pytest.mark.parametrize("pair", [("P tp2", "D pp2"), ("P tp2 pp2", "D tp4"), ("P pp2", "D tp4")], ids=" to ".join)
def test_neighbours_and_their_cancels_change_nothing(cluster: Cluster, pair: tuple[str, str]) -> None:
    here = cluster.pair(*pair)

    async def main() -> None:
        async with attached(here.prefill, here.decode) as workers:
            order = random.Random(7)
            asked = cases(f"beside cancels at {here.tenant}")
            neighbours = [asyncio.create_task(_cancelled(workers, order.random() * 0.2, number)) for number in range(8)]
            same(await asyncio.gather(*(workers.disaggregated(each) for each in asked)), here.expected)
            assert any(await asyncio.gather(*neighbours))
            await workers.idle()

    asyncio.run(main())


async def _cancelled(workers: Workers, after_s: float, number: int) -> bool:
    """A long request, with two choices or one, apart or local, that is stopped at some moment; whether it was still under way."""
    asked = request(prompt(60 + 20 * number, 100 + number), max_tokens=300, temperature=1.0, seed=number, n=1 + number % 2)
    attempt_id = new_attempt_id()
    task = asyncio.create_task((workers.local if number % 4 == 3 else workers.disaggregated)(asked, attempt_id))
    await asyncio.sleep(after_s)
    for stream in (workers.prefill, workers.decode):
        assert stream is not None
        stream.send(Stop(attempt_id))
    error = (await task).error
    assert error is None or isinstance(error, Cancelled)
    return error is not None


def test_workers_of_many_ranks_finish_their_work_when_they_are_asked_to_end(cluster: Cluster) -> None:
    """The last of this file: nobody serves afterwards."""

    async def ends(rank: Rank) -> None:
        async with attached(None, rank) as workers:
            assert workers.decode is not None
            attempt_id = new_attempt_id()
            workers.decode.send(Decode(attempt_id, request(prompt(20, 99), max_tokens=50), local_prefill=True))
            events = [await workers.decode.next(attempt_id)]
            rank.process.send_signal(signal.SIGTERM)
            events += await workers.decode.until_terminal(attempt_id)
            assert isinstance(events[-1], Finished)
            assert sum(len(event.tokens) for event in events if isinstance(event, NewTokens)) == 50

    async def main() -> None:
        await asyncio.gather(*(ends(cluster.workers[name]) for name in DECODES))

    asyncio.run(main())
    assert {rank.ended() for name in DECODES for rank in cluster.workers[name].members} == {0}
