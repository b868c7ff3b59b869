"""Nobody can take a request just now: it waits for a worker to come back, for so long, and its client sees no more than a pause. A worker
leaves: what it has not begun goes to another, and that costs a request no retry."""

import asyncio
import secrets

import httpx
import pytest
from diptych.core.config import LimitsSection
from diptych.core.errors import DeadlineExceeded, Unavailable
from diptych.core.fleet import LocalPrefill, Phase
from diptych.core.generate import Generate
from diptych.core.sampling import SamplingParams
from diptych.router.placement import Policy

TEXT = "Hello, wörld! And so on."
NEVER = Policy(LocalPrefill.NEVER)
NO_RETRIES = LimitsSection(retries=0)


class Asked:
    """A request under way and what has come of it."""

    def __init__(self, site, **sampling):
        self.text, self.indices, self.finish = "", [], None
        self.task = asyncio.create_task(self._read(site.router.service, SamplingParams(**{"max_tokens": 24, **sampling})))

    async def _read(self, service, sampling):
        async for chunk in service.generate(Generate("x" * 20, sampling=sampling)):
            self.text += chunk.text
            self.indices += [token.index for token in chunk.tokens]
            self.finish = chunk.finish

    async def whole(self):
        await asyncio.wait_for(self.task, 60)
        assert self.text == TEXT[:-1]
        assert self.indices == list(range(24))
        return self.finish.timing


async def killed(site, name):
    """The worker is gone, and the supervisor has said so."""
    dead = site.workers.pop(name)
    await dead.kill()
    if site.workers:
        await site.publish_only()
    await site.until(lambda: site.router.service.unavailable())
    return dead


async def back(site, dead):
    """Another incarnation, at another address."""
    dead.incarnation = secrets.randbits(63)
    await dead.start()
    site.workers[dead.name] = site.peers[dead.address] = dead
    await site.publish()


@pytest.mark.parametrize("victim", ["p0", "d0"])
def test_a_request_waits_for_the_only_worker_of_a_phase(site, victim):
    async def check():
        async with site(policy=NEVER) as s:
            s.workers[victim].hold.clear()
            asked = Asked(s)
            await s.until(lambda: s.workers[victim].books)
            dead = await killed(s, victim)
            late = Asked(s)
            await asyncio.sleep(0.05)
            assert not asked.task.done()
            assert not late.task.done()
            dead.hold.set()
            await back(s, dead)
            assert (await asked.whole()).attempts == 2
            assert (await late.whole()).attempts == 1
            assert s.recorder.values[("diptych_requests_held_total",)] == 2

    asyncio.run(check())


def test_who_waits_in_vain_is_told_after_a_while(site):
    async def check():
        async with site(hold_s=0.3) as s, httpx.AsyncClient(base_url=s.url) as c:
            s.workers["d0"].step_s = 0.01
            asked = Asked(s)
            await s.until(lambda: len(asked.indices) > 3)
            s.workers["d0"].hold.clear()
            await killed(s, "d0")
            refused = await c.post("/v1/completions", json={"prompt": "x" * 20})
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            assert "No decode worker is ready" in refused.json()["error"]["message"]
            assert "0.3 s" in refused.json()["error"]["message"]
            with pytest.raises(Unavailable, match="No decode worker"):
                await asked.task

    asyncio.run(check())


def test_while_the_cluster_starts_nobody_waits(site):
    async def check():
        async with site(prefill=0, decode=0) as s:
            with pytest.raises(Unavailable):
                await asyncio.wait_for(Asked(s).task, 20)
            await s.add("p0", Phase.PREFILL)
            await s.publish_only()
            with pytest.raises(Unavailable):
                await asyncio.wait_for(Asked(s).task, 20)

    asyncio.run(check())


def test_a_client_that_leaves_while_it_waits_leaves_nothing(site):
    async def check():
        async with site() as s:
            dead = await killed(s, "d0")
            asked = Asked(s)
            await s.until(lambda: s.router.service.running)
            asked.task.cancel()
            await s.until(lambda: not s.router.service.running)
            await back(s, dead)
            await Asked(s).whole()
            assert len(dead.seen) == 1

    asyncio.run(check())


def test_waiting_counts_as_running_and_ends_at_the_deadline(site):
    async def check():
        async with site(limits=LimitsSection(request_s=0.3)) as s:
            await killed(s, "d0")
            with pytest.raises(DeadlineExceeded):
                await asyncio.wait_for(Asked(s).task, 20)

    asyncio.run(check())


def test_a_chat_without_a_limit_is_not_promised_more_than_the_worker_that_comes_back_holds(site):
    async def check():
        async with site() as s, httpx.AsyncClient(base_url=s.url) as c:
            dead = await killed(s, "d0")
            body = {"messages": [{"role": "user", "content": "x" * 20}], "ignore_eos": True}
            asked = asyncio.create_task(c.post("/v1/chat/completions", json=body))
            await s.until(lambda: s.router.service.running)
            await back(s, dead)
            answer = await asked
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["total_tokens"] == dead.capacity

    asyncio.run(check())


def test_requests_that_wait_where_a_worker_leaves_are_answered_by_the_other(site):
    async def check():
        async with site(prefill=2, policy=NEVER, limits=NO_RETRIES) as s:
            leaves, stays = s.workers["p0"], s.workers["p1"]
            leaves.hold.clear()
            stays.hold.clear()
            asked = [Asked(s) for _ in range(6)]
            await s.until(lambda: len(leaves.seen) + len(stays.seen) == 6)
            assert len(leaves.seen) == 3
            leaves.leave()
            stays.hold.set()
            timings = [await each.whole() for each in asked]
            assert sorted((timing.attempts, timing.prefill_worker) for timing in timings) == [(1, "p1")] * 3 + [(2, "p1")] * 3
            await s.until(lambda: len(leaves.stopped) == 3)
            assert sum(value for (name, *_), value in s.recorder.values.items() if name == "diptych_moves_total") == 3
            assert not [name for name, *_ in s.recorder.values if name == "diptych_retries_total"]

    asyncio.run(check())


def test_requests_stay_where_there_is_no_other(site):
    async def check():
        async with site(policy=NEVER) as s:
            s.workers["p0"].hold.clear()
            asked = [Asked(s) for _ in range(3)]
            await s.until(lambda: len(s.workers["p0"].seen) == 3)
            s.workers["p0"].leave()
            await s.until(lambda: s.router.service.unavailable())
            s.workers["p0"].hold.set()
            assert {(await each.whole()).attempts for each in asked} == {1}
            assert not s.workers["p0"].stopped

    asyncio.run(check())


def test_a_request_that_comes_to_a_worker_which_has_just_left_is_answered_by_another(site):
    async def check():
        async with site(prefill=2, decode=2, limits=NO_RETRIES) as s:
            for name in ("p0", "d1"):  # and the router has not heard of it
                s.workers[name].fail = Unavailable("This worker takes nothing new: it is draining.")
            timings = [await Asked(s).whole() for _ in range(4)]
            assert {(timing.prefill_worker, timing.decode_worker) for timing in timings} == {("p1", "d0")}
            moves = sum(timing.attempts - 1 for timing in timings)
            assert moves
            assert sum(value for (name, *_), value in s.recorder.values.items() if name == "diptych_moves_total") == moves

    asyncio.run(check())


def test_a_decode_worker_that_joins_takes_half_of_what_waits_for_memory(site):
    async def check():
        async with site(prefill=2, policy=NEVER, limits=NO_RETRIES) as s:
            for name in ("p0", "p1"):
                s.workers[name].grants.clear()
            s.workers["d0"].offers = 6
            asked = [Asked(s) for _ in range(6)]
            await s.until(lambda: all(each.text for each in asked))
            await s.until(lambda: any(m.value == 6 for r in s.router.fleet.describe()[1] for m in r.measures))
            readers = [s.workers[name].seen[:] for name in ("p0", "p1")]
            await s.add("d1", Phase.DECODE, TEXT)
            await s.publish()
            await s.until(lambda: len(s.workers["d1"].seen) == 3)
            for name, before in zip(("p0", "p1"), readers, strict=True):
                moved = {command.request.request_id for command in s.workers[name].seen[len(before) :]}
                assert moved <= {command.request.request_id for command in before}, "who has the KV hands it over"
                s.workers[name].grants.set()
            timings = [await each.whole() for each in asked]
            assert sorted((timing.attempts, timing.decode_worker) for timing in timings) == [(1, "d0")] * 3 + [(2, "d1")] * 3

    asyncio.run(check())


def test_a_decode_worker_that_joins_leaves_alone_what_waits_for_nobody(site):
    async def check():
        async with site(policy=NEVER) as s:
            s.workers["p0"].grants.clear()
            asked = [Asked(s) for _ in range(4)]
            await s.until(lambda: all(each.text for each in asked))
            await s.add("d1", Phase.DECODE, TEXT)
            await s.publish()
            s.workers["p0"].grants.set()
            assert {(await each.whole()).attempts for each in asked} == {1}
            assert not s.workers["d1"].seen

    asyncio.run(check())
