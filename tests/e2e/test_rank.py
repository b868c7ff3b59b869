"""The rank process by itself: what it says, how it refuses, how it ends."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from diptych.cluster.process import child
from diptych.core.commands import Decode, Finished, NewTokens
from diptych.core.errors import Unavailable
from diptych.core.fleet import Phase, WorkerState
from diptych.core.request import new_attempt_id
from diptych.rpc.worker import WorkerClient
from e2e_harness import Rank, attached, rank_spec, ranks, request, wait_idle


@pytest.fixture
def rank(tiny_llama_dir: Path, tmp_path: Path) -> Iterator[Rank]:
    with ranks(tmp_path, rank_spec(tiny_llama_dir, Phase.DECODE, "d0")) as (one,):
        yield one


def test_it_tells_its_start_and_finishes_its_work_when_asked_to_end(rank: Rank) -> None:
    ready = rank.wait_for("ready")
    assert set(ready) == {"event", "address", "incarnation", "layout", "capacity_tokens"}
    assert ready["capacity_tokens"] == 1024
    progress = [(event["what"], event["seconds"]) for event in rank.events if event["event"] == "progress"]
    assert [what for what, _ in progress] == ["started", "imported", "model mapped", "warm", "pool allocated", "serving"]
    assert [at for _, at in progress] == sorted(at for _, at in progress)

    async def main() -> None:
        async with attached(None, rank) as workers:
            assert workers.decode is not None
            attempt_id = new_attempt_id()
            workers.decode.send(Decode(attempt_id, request(range(3, 20), max_tokens=800), local_prefill=True))
            assert isinstance(await workers.decode.next(attempt_id), NewTokens)
            rank.process.send_signal(signal.SIGTERM)
            async for report in workers.clients["d0"].watch():
                if report.state is WorkerState.DRAINING:
                    break
            refused = await workers.local(request([3, 4]))
            assert isinstance(refused.error, Unavailable)
            events = await workers.decode.until_terminal(attempt_id)
            assert isinstance(events[-1], Finished)
            assert 1 + sum(len(event.tokens) for event in events if isinstance(event, NewTokens)) == 800

    asyncio.run(main())
    assert rank.process.wait(timeout=60) == 0


def test_drain_waits_for_the_work_and_tells_what_is_unfinished(rank: Rank) -> None:
    async def main() -> None:
        async with attached(None, rank) as workers:
            assert workers.decode is not None
            attempt_id = new_attempt_id()
            workers.decode.send(Decode(attempt_id, request(range(3, 20))))  # nobody will offer it
            client: WorkerClient = workers.clients["d0"]
            async with aclosing(client.watch()) as reports:
                async for report in reports:  # drain and the stream are different calls: only the report says that the Decode came first
                    if report.waiting + report.running:
                        break
            assert await client.drain(0.2) == 1
            event = await workers.local(request([3, 4]))
            assert isinstance(event.error, Unavailable)
            await workers.decode.close()
            assert await client.drain(60.0) == 0
            await wait_idle(client)

    asyncio.run(main())


def test_it_reports_at_least_once_a_second(rank: Rank) -> None:
    async def main() -> None:
        async with WorkerClient(rank.address) as client, asyncio.timeout(20):
            seen = 0
            async for report in client.watch():
                assert report.worker_id == "d0"
                seen += 1
                if seen == 3:
                    return

    asyncio.run(main())


def test_the_leash_ends_it_with_its_parent(rank: Rank) -> None:
    assert rank.process.stdin is not None
    rank.process.stdin.close()
    assert rank.process.wait(timeout=60) == child.UNLEASHED


def refused(spec_json: str) -> dict[str, object]:
    """What a rank that cannot start says."""
    run = subprocess.run(
        [sys.executable, "-m", "diptych.cluster.programs.rank", "--spec", spec_json], capture_output=True, timeout=60, cwd="/", check=False
    )
    assert run.returncode == child.FAILED, run.stderr.decode()
    event = json.loads(run.stdout.splitlines()[-1])
    assert event["event"] == "failed"
    assert b"Traceback" not in run.stderr
    return event


def test_what_it_cannot_start_with_is_named(tiny_llama_dir: Path, tmp_path: Path) -> None:
    spec = json.loads(rank_spec(tiny_llama_dir, Phase.DECODE, "d0").model_dump_json())
    assert refused("{")["field"] == "spec"
    assert refused(json.dumps({**spec, "kv_token": 5}))["field"] == "kv_token"
    assert refused(json.dumps({**spec, "cpus": [4096]}))["field"] == "cpus"
    event = refused(json.dumps({**spec, "model_dir": str(tmp_path)}))
    assert "diptych prepare" in str(event["message"])
    event = refused(json.dumps({**spec, "kv_tokens": 10**9}))
    assert event["field"] == "kv_tokens"
    assert "GiB" in str(event["message"])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        event = refused(json.dumps({**spec, "listen": f"127.0.0.1:{taken.getsockname()[1]}"}))
        assert "in use" in str(event["message"])


def test_a_serving_process_imports_neither_transformers_nor_ray() -> None:
    heavy = ("transformers", "ray", "starlette", "typer")
    look = f"import sys, diptych.cluster.programs.serving; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-P", "-c", look], capture_output=True, timeout=60, check=True, cwd="/")
    assert run.stdout.strip() == b"[]"


def test_an_engine_that_fails_fails_its_requests_and_a_broken_one_ends_the_process(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """The engine's weights are made unreadable behind its back: every step fails."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        "import diptych.engine.engine as engine\n"
        "run = engine.Engine.run\n"
        "def slip(self, batch, on_layer=None):\n"
        "    if batch.step >= 0 and any(token == 99 for row in batch.rows for token in row.token_ids):\n"
        "        raise ArithmeticError('the engine slipped')\n"
        "    return run(self, batch, on_layer)\n"
        "engine.Engine.run = slip\n"
    )
    rank = Rank.start(rank_spec(tiny_llama_dir, Phase.DECODE, "d0"), tmp_path, environment={"PYTHONPATH": str(broken)})
    try:

        async def main() -> None:
            async with attached(None, rank) as workers:
                assert workers.decode is not None
                for _ in range(2):
                    failed = await workers.local(request([3, 99]))
                    assert failed.error is not None
                    assert "the engine slipped" in failed.error.message
                    assert (await workers.local(request([3, 98]))).error is None
                await workers.idle()
                doomed = [new_attempt_id() for _ in range(10)]
                for attempt_id in doomed:  # 30 tokens each, 32 a step: no step without the bad one
                    workers.decode.send(Decode(attempt_id, request([99] * 30), local_prefill=True))
                with pytest.raises(Unavailable):
                    await asyncio.gather(*(workers.decode.until_terminal(attempt_id) for attempt_id in doomed))

        asyncio.run(main())
        assert rank.process.wait(timeout=60) == 70
        assert "steps in a row failed" in rank.log.read_text()
    finally:
        rank.kill()
