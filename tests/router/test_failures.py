"""Workers that die, fall silent, fail, restart or are full: the client sees one whole answer or one clear error."""

import asyncio
import logging
import secrets
import time

import grpc.aio
import httpx
import pytest
from diptych.core.config import LimitsSection
from diptych.core.errors import ConfigError, DeadlineExceeded, DiptychError, Internal, Overloaded, TransferFailed, Unavailable
from diptych.core.fleet import Fleet, LocalPrefill, WorkerState
from diptych.core.generate import Generate
from diptych.core.sampling import SamplingParams
from diptych.router.placement import Policy
from diptych.router.server import RouterSettings, start_router
from diptych.rpc.inference import InferenceClient
from diptych.rpc.router import RouterClient
from grpc_health.v1 import health_pb2, health_pb2_grpc

TEXT = "Hello, wörld! And so on."
PROMPT = "x" * 20


def generate(service, prompt=PROMPT, **sampling):
    return service.generate(Generate(prompt, sampling=SamplingParams(**{"max_tokens": 24, **sampling})))


async def answer(service, prompt=PROMPT, **sampling):
    """The text of the one choice, and the last chunk's finish."""
    chunks = [chunk async for chunk in generate(service, prompt, **sampling)]
    assert [token.index for chunk in chunks for token in chunk.tokens] == list(range(chunks[-1].finish.usage.output_tokens))
    return "".join(chunk.text for chunk in chunks), chunks[-1].finish


def test_one_token_needs_no_decode_worker(site):
    async def check():
        async with site() as s:
            text, finish = await answer(s.router.service, max_tokens=1)
            assert text == "H"
            assert finish.timing.decode_worker == ""
            assert not s.workers["d0"].seen

    asyncio.run(check())


def test_short_prompts_and_no_prefill_worker_are_local(site):
    async def check():
        async with site(prefill=1) as s:
            _, finish = await answer(s.router.service, "short")
            assert (finish.timing.prefill_worker, finish.timing.handover_gap) == ("", None)
        async with site(prefill=0) as s:
            text, finish = await answer(s.router.service)
            assert text == TEXT[:-1]
            assert s.workers["d0"].seen[0].local_prefill
            assert finish.usage.output_tokens == 24
        async with site(policy=Policy(LocalPrefill.NEVER)) as s:
            _, finish = await answer(s.router.service, "short")
            assert finish.timing.prefill_worker == "p0"
            assert finish.timing.handover_gap is not None

    asyncio.run(check())


@pytest.mark.parametrize("victim", ["p", "d"])
def test_a_worker_dies_in_the_middle(site, victim):
    async def check():
        async with site(prefill=2, decode=2) as s:
            for worker in s.workers.values():
                worker.hold.clear()
            asked = [asyncio.create_task(answer(s.router.service)) for _ in range(4)]
            await s.until(lambda: sum(len(w.books) for w in s.workers.values()) == 8)
            if victim == "d":
                for name in ("p0", "p1"):
                    s.workers[name].hold.set()
                await s.until(lambda: not s.workers["p0"].books and not s.workers["p1"].books)
            dead = s.workers.pop(f"{victim}0")
            assert dead.books
            await dead.kill()
            for worker in s.workers.values():
                worker.hold.set()
            answers = await asyncio.gather(*asked)
            assert {text for text, _ in answers} == {TEXT[:-1]}
            assert sorted(finish.timing.attempts for _, finish in answers) == [1, 1, 2, 2]

    asyncio.run(check())


def test_retries_end_and_the_last_is_local(site):
    async def check():
        async with site(prefill=2, decode=2) as s:
            s.workers["p0"].fail = s.workers["p1"].fail = TransferFailed("torn")
            text, finish = await answer(s.router.service)
            assert text == TEXT[:-1]
            assert (finish.timing.attempts, finish.timing.prefill_worker) == (3, "")
            for worker in s.workers.values():
                worker.fail = Internal("broken")
            with pytest.raises(Internal):
                await answer(s.router.service)
            assert s.recorder.values["diptych_retries_total", "transfer_failed"] == 2

    asyncio.run(check())


def test_a_silent_worker_is_lost_and_comes_back(site):
    async def check():
        async with site(decode=2, silence_s=0.4) as s:
            s.workers["d0"].hold.clear()
            s.workers["d1"].hold.clear()
            asked = asyncio.create_task(answer(s.router.service))
            await s.until(lambda: s.workers["d0"].books or s.workers["d1"].books)
            silent = next(w for w in s.workers.values() if w.books and w.name != "p0")
            silent.silent = True
            await s.until(lambda: s.recorder.values["diptych_worker_up", silent.name, "decode"] == 0)
            for worker in s.workers.values():
                worker.hold.set()
            text, finish = await asked
            assert text == TEXT[:-1]
            assert finish.timing.attempts == 2
            assert finish.timing.decode_worker != silent.name
            await s.until(lambda: not silent.books)

    asyncio.run(check())


def test_a_router_that_was_held_up_takes_nobody_for_lost(site):
    async def check():
        async with site(silence_s=0.4) as s:
            s.workers["d0"].hold.clear()
            asked = asyncio.create_task(answer(s.router.service))
            await s.until(lambda: s.workers["d0"].books)
            time.sleep(1.0)  # noqa: ASYNC251  what it is about: nothing runs here meanwhile
            await asyncio.sleep(0.2)
            s.workers["d0"].hold.set()
            _, finish = await asked
            assert finish.timing.attempts == 1

    asyncio.run(check())


def test_a_restarted_worker_is_another_incarnation(site):
    async def check():
        async with site(hold_s=0.2) as s:
            old = s.workers["d0"]
            await old.kill()
            await s.until(lambda: s.router.service.unavailable())
            old.incarnation = secrets.randbits(63)
            await old.start(old.address)
            with pytest.raises(Unavailable):
                await asyncio.wait_for(answer(s.router.service), 20)
            await s.publish()
            text, _ = await answer(s.router.service)
            assert text == TEXT[:-1]

    asyncio.run(check())


def test_a_lost_connection_comes_back_by_itself(site):
    async def check():
        async with site() as s:
            await s.workers["d0"].kill()
            await s.until(lambda: s.router.service.unavailable())
            await s.workers["d0"].start(s.workers["d0"].address)
            await s.until(lambda: not s.router.service.unavailable())
            assert (await answer(s.router.service))[0] == TEXT[:-1]

    asyncio.run(check())


def test_health_over_grpc_says_whether_a_request_could_be_served(site):
    async def status(channel):
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="diptych.v1.Inference"))
        return answer.status

    async def check():
        async with site() as s, grpc.aio.insecure_channel(s.router.grpc) as channel:
            assert await status(channel) == health_pb2.HealthCheckResponse.SERVING
            await s.workers["d0"].kill()
            async with asyncio.timeout(60):
                while await status(channel) != health_pb2.HealthCheckResponse.NOT_SERVING:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)

    asyncio.run(check())


def test_draining_workers_get_nothing_new(site):
    async def check():
        async with site(decode=2) as s:
            s.workers["d0"].state = WorkerState.DRAINING
            await s.until(lambda: any(r.state is WorkerState.DRAINING for r in s.router.fleet.describe()[1]))
            for _ in range(4):
                await answer(s.router.service)
            assert not s.workers["d0"].seen
            assert len(s.workers["d1"].seen) == 4

    asyncio.run(check())


def test_load_is_spread(site):
    async def check():
        async with site(prefill=3, decode=3) as s:
            for worker in s.workers.values():
                worker.hold.clear()
            asked = [asyncio.create_task(answer(s.router.service)) for _ in range(12)]
            await s.until(lambda: sum(len(w.seen) for w in s.workers.values()) == 24)
            assert {len(w.seen) for w in s.workers.values()} == {4}
            for worker in s.workers.values():
                worker.hold.set()
            await asyncio.gather(*asked)

    asyncio.run(check())


def test_too_many_requests(site):
    async def check():
        async with site(limits=LimitsSection(running=2)) as s, httpx.AsyncClient(base_url=s.url) as c:
            s.workers["p0"].hold.clear()
            asked = [asyncio.create_task(answer(s.router.service)) for _ in range(2)]
            await s.until(lambda: len(s.workers["p0"].books) == 2)
            with pytest.raises(Overloaded):
                await answer(s.router.service)
            refused = await c.post("/v1/completions", json={"prompt": PROMPT})
            assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
            s.workers["p0"].hold.set()
            await asyncio.gather(*asked)

    asyncio.run(check())


def test_a_request_has_a_deadline(site):
    async def check():
        async with site(limits=LimitsSection(request_s=0.2)) as s:
            s.workers["d0"].hold.clear()
            with pytest.raises(DeadlineExceeded):
                await answer(s.router.service)
            await s.idle()

    asyncio.run(check())


def test_graceful_stop_finishes_what_runs_and_ends_the_rest(site):
    async def check():
        async with site() as s, InferenceClient(s.router.grpc) as c:
            s.workers["d0"].step_s = 0.01
            runs = asyncio.create_task(answer(c))
            await s.until(lambda: s.workers["d0"].books)
            stopping = asyncio.create_task(s.router.stop(60.0))
            await s.until(lambda: s.router.service.unavailable())
            with pytest.raises(Unavailable):
                await answer(s.router.service)
            assert (await runs)[0] == TEXT[:-1]
            await stopping
        async with site() as s:
            s.workers["d0"].hold.clear()
            runs = asyncio.create_task(answer(s.router.service))
            await s.until(lambda: s.workers["d0"].books)
            await s.router.stop(0.1)
            with pytest.raises(Unavailable, match="shutting down"):
                await runs

    asyncio.run(check())


def test_one_line_is_logged_per_request_without_its_text(site, caplog):
    async def check():
        async with site() as s:
            await answer(s.router.service)
            s.workers["d0"].fail = s.workers["p0"].fail = Internal("broken")
            with pytest.raises(DiptychError):
                await answer(s.router.service)

    with caplog.at_level(logging.INFO, "diptych.router.run"):
        asyncio.run(check())
    done, failed = (record.fields for record in caplog.records if record.message == "request ended")
    assert (done["outcome"], done["output_tokens"], done["attempts"], done["transport"]) == ("length", 24, 1, "shm")
    assert (failed["outcome"], failed["error"]) == ("internal", "broken")
    assert PROMPT not in caplog.text


def test_ports_in_use_are_named(site, prepared):
    async def check():
        async with site(prefill=0, decode=0) as s:
            http, grpc = (int(address.rsplit(":", 1)[1]) for address in (s.router.http, s.router.grpc))
            for field, settings in (
                ("router.http_port", RouterSettings(prepared, http_port=http)),
                ("router.grpc_port", RouterSettings(prepared, grpc_port=grpc)),
                ("router.host", RouterSettings(prepared, host="no.such.host.invalid")),
            ):
                with pytest.raises(ConfigError) as refused:
                    await start_router(settings, recorder=s.recorder, metrics_text=lambda: b"")
                assert refused.value.field == field

    asyncio.run(check())


def test_a_thousand_tokens_cost_little(site):
    """200 requests of 24 tokens through fakes at both ends, some 10,000 messages, in 1 s of a core: of this process alone, whatever else
    the machine does."""

    async def check():
        async with site(prefill=2, decode=2) as s:
            began = time.process_time()
            answers = await asyncio.gather(*(answer(s.router.service) for _ in range(200)))
            assert {text for text, _ in answers} == {TEXT[:-1]}
            assert time.process_time() - began < 15

    asyncio.run(check())


def test_the_public_port_does_not_take_a_fleet(site):
    async def check():
        async with site() as s, RouterClient(s.router.grpc) as stranger:
            with pytest.raises(DiptychError):
                await stranger.publish(Fleet(10**6))
            assert s.router.fleet.describe()[0].version < 10**6

    asyncio.run(check())
