"""The HTTP face through the `openai` package, over fake workers and real gRPC."""

import asyncio
import json

import httpx
import openai
import pytest

TEXT = "Hello, wörld! And so on."


def client(site, **options):
    return openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0, **options)


def test_completion(site):
    async def check():
        async with site() as s, client(s) as c:
            answer = await c.completions.create(model="tiny", prompt="Say hello to the whole world", max_tokens=14)
            assert answer.choices[0].text == "Hello, wörld!"
            assert answer.choices[0].finish_reason == "length"
            assert answer.usage.prompt_tokens == 29
            assert answer.usage.completion_tokens == 14
            assert answer.usage.prompt_tokens_details.cached_tokens == 3
            assert answer.id.startswith("cmpl-")
            (prefill,), (decode,) = s.workers["p0"].seen, s.workers["d0"].seen
            assert prefill.attempt_id == decode.attempt_id
            assert prefill.destination == s.workers["d0"].address
            counted = s.recorder.values
            assert counted["diptych_requests_total", "length"] == 1
            assert counted["diptych_attempts_total", "disaggregated"] == 1
            assert counted["diptych_kv_transfer_bytes_total", "shm"] == 1000
            assert counted["vllm:generation_tokens_total",] == 14
            assert counted["diptych_worker_up", "d0", "decode"] == 1
            assert counted["diptych_worker_steps_total", "d0", "decode"] == 7

    asyncio.run(check())


def test_what_workers_report_is_recorded_when_somebody_looks_and_when_they_go(site):
    async def check():
        async with site() as s, httpx.AsyncClient(base_url=s.url) as c:
            worker, counted = s.workers["d0"], s.recorder.values
            steps = ("diptych_worker_steps_total", "d0", "decode")
            worker.steps = 9
            await s.until(lambda: s.router.fleet.describe()[1][1].counters[0][1] == 9)
            assert counted[steps] == 7, "nobody has looked"
            assert (await c.get("/metrics")).status_code == 200
            assert counted[steps] == 9
            worker.steps = 11
            await s.until(lambda: s.router.fleet.describe()[1][1].counters[0][1] == 11)
            await worker.kill()
            await s.until(lambda: counted["diptych_worker_up", "d0", "decode"] == 0)
            assert counted[steps] == 11

    asyncio.run(check())


def test_completion_streams(site):
    async def check():
        async with site() as s, client(s) as c:
            stream = await c.completions.create(
                model="tiny", prompt=[[1, 300, 301]], max_tokens=24, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == TEXT[:-1]
            assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
            assert chunks[-1].usage.completion_tokens == 24
            assert chunks[-1].choices == []
            assert all(chunk.usage is None for chunk in chunks[:-1])

    asyncio.run(check())


def test_usage_in_every_event_tells_when_tokens_come_even_without_text(site):
    async def check():
        async with site() as s, client(s) as c:
            options = {"include_usage": True, "continuous_usage_stats": True}
            stream = await c.completions.create(model="tiny", prompt=[1, 300, 301], max_tokens=24, stream=True, stream_options=options)
            chunks = [chunk async for chunk in stream]
            counts = [chunk.usage.completion_tokens for chunk in chunks]
            assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == TEXT[:-1]
            assert counts == sorted(counts)
            assert counts[-1] == counts[-2] == 24
            assert {chunk.usage.prompt_tokens for chunk in chunks} == {3}
            assert any(chunk.choices and not chunk.choices[0].text for chunk in chunks)  # the first byte of ö
            messages = [{"role": "user", "content": "Hi"}]
            stream = await c.chat.completions.create(model="tiny", messages=messages, stream=True, max_tokens=9, stream_options=options)
            counts = [chunk.usage.completion_tokens async for chunk in stream]
            assert counts == sorted(counts)
            assert (counts[0], counts[-1]) == (0, 9)

    asyncio.run(check())


def test_the_router_s_times_come_only_if_asked_for(site):
    async def check():
        body = {"prompt": [1, *range(300, 330)], "max_tokens": 5}
        async with site() as s, httpx.AsyncClient(base_url=s.url) as c:
            asked = (await c.post("/v1/completions", json=body, headers={"x-diptych-timing": "1"})).json()["timing"]
            assert 0 < asked["ttft"] <= asked["ttft"] + asked["handover_gap"]
            assert asked["transport"] == "shm"
            assert "timing" not in (await c.post("/v1/completions", json=body)).json()
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            for headers, times in (({"x-diptych-timing": "1"}, 1), ({"x-diptych-timing": "0"}, 0)):
                lines = (await c.post("/v1/completions", json=body, headers=headers)).text.split("\n\n")
                assert [json.loads(line[6:])["usage"] is not None for line in lines if '"timing"' in line] == [True] * times

    asyncio.run(check())


def test_limits_on_the_output_give_way_to_what_fits(site):
    async def check():
        async with site() as s, client(s) as c:
            for asked in ({"max_tokens": 256}, {"max_tokens": 195, "extra_body": {"min_tokens": 256}}):
                answer = await c.completions.create(model="tiny", prompt=[1] * 10, **asked)
                assert answer.usage.completion_tokens == 190  # the pools hold 200
                assert answer.choices[0].finish_reason == "length"
            answer = await c.completions.create(model="tiny", prompt="x", max_tokens=3, extra_body={"min_tokens": 9})
            assert answer.usage.completion_tokens == 3

    asyncio.run(check())


def test_chat(site):
    async def check():
        async with site() as s, client(s) as c:
            for worker in s.workers.values():
                worker.end_after = 5
            messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": "Yes"}]
            answer = await c.chat.completions.create(model="tiny", messages=messages, temperature=0, logprobs=True, top_logprobs=2)
            assert answer.choices[0].message.content == "Hello"
            assert answer.choices[0].finish_reason == "stop"
            assert [entry.token for entry in answer.choices[0].logprobs.content] == list("Hello")
            assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
            prompt = s.workers["d0"].seen[0].request
            assert prompt.prompt_ids == (1, *s.tokenizer.encode("user:Hi\nassistant:Yes\nassistant:", add_special_tokens=False).ids)
            assert prompt.sampling.max_tokens == 200 - len(prompt.prompt_ids)
            stream = await c.chat.completions.create(model="tiny", messages=messages, stream=True, max_completion_tokens=9)
            chunks = [chunk async for chunk in stream]
            assert chunks[0].choices[0].delta.role == "assistant"
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello"
            assert chunks[-1].choices[0].finish_reason == "stop"
            again = [*messages, answer.choices[0].message.model_dump(exclude_unset=False)]
            assert (await c.chat.completions.create(model="tiny", messages=again)).choices[0].message.content == "Hello"

    asyncio.run(check())


def test_the_synchronous_client(site):
    def ask(url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as c:
            assert c.models.list().data[0].id == "tiny"
            assert c.models.retrieve("tiny").id == "tiny"
            with pytest.raises(openai.NotFoundError):
                c.models.retrieve("other")
            whole = c.completions.create(model="tiny", prompt="x" * 20, max_tokens=5).choices[0].text
            streamed = c.completions.create(model="tiny", prompt="x" * 20, max_tokens=5, stream=True)
            return whole, "".join(chunk.choices[0].text for chunk in streamed)

    async def check():
        async with site() as s:
            assert await asyncio.to_thread(ask, s.url) == ("Hello", "Hello")

    asyncio.run(check())


def test_logprobs_of_completions(site):
    async def check():
        async with site() as s, client(s) as c:
            answer = await c.completions.create(model="tiny", prompt="x" * 20, max_tokens=10, logprobs=2)
            logprobs = answer.choices[0].logprobs
            assert logprobs.tokens == [*"Hello, w", "bytes:\\xc3", "bytes:\\xb6"]
            assert logprobs.text_offset == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]
            assert logprobs.token_logprobs == [-0.5] * 10
            assert logprobs.top_logprobs[0] == {"H": -0.5, "I": -1.5}

    asyncio.run(check())


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_request_on_the_workers_too(site, stream):
    async def check():
        async with site() as s, client(s) as c:
            s.workers["d0"].step_s = 0.02
            answer = await c.completions.create(model="tiny", prompt="x" * 20, max_tokens=100, stop=["ld! A", "zz"], stream=stream)
            if stream:
                text = "".join([chunk.choices[0].text async for chunk in answer])
            else:
                text = answer.choices[0].text
                assert answer.choices[0].finish_reason == "stop"
            assert text == "Hello, wör"
            await s.idle()
            assert s.workers["d0"].stopped

    asyncio.run(check())


def test_stop_strings_are_not_looked_for_before_min_tokens(site):
    async def check():
        async with site(text="abcabcabc") as s, client(s) as c:
            for min_tokens, text in ((0, "a"), (1, "a"), (2, "abca"), (4, "abca"), (5, "abcabcab"), (8, "abcabcab")):
                extra = {"min_tokens": min_tokens}
                answer = await c.completions.create(model="tiny", prompt="x", max_tokens=8, stop="bc", extra_body=extra)
                assert (min_tokens, answer.choices[0].text) == (min_tokens, text)

    asyncio.run(check())


def test_all_that_sampling_takes_reaches_the_workers(site):
    async def check():
        async with site() as s, client(s) as c:
            asked = {"presence_penalty": 0.5, "frequency_penalty": -1, "logit_bias": {"70": -5, "9": 1.5}}
            extra = {"min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "top_k": 7}
            await c.completions.create(model="tiny", prompt="x" * 20, max_tokens=3, extra_body=extra, **asked)
            sampling = s.workers["p0"].seen[0].request.sampling
            assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.logit_bias) == (0.5, -1.0, ((9, 1.5), (70, -5.0)))
            assert (sampling.min_p, sampling.repetition_penalty, sampling.min_tokens, sampling.top_k) == (0.1, 1.2, 2, 7)

    asyncio.run(check())


def test_a_client_that_goes_away_is_stopped_everywhere(site):
    async def check():
        async with site() as s, client(s) as c:
            s.workers["p0"].hold.clear()
            for stream in (True, False):
                task = asyncio.create_task(c.completions.create(model="tiny", prompt="x" * 20, max_tokens=100, stream=stream))
                await s.until(lambda: s.workers["p0"].books)
                task.cancel()
                await s.idle()
            s.workers["p0"].hold.set()
            s.workers["d0"].step_s = 0.05
            stream = await c.completions.create(model="tiny", prompt="x" * 20, max_tokens=100, stream=True)
            await anext(aiter(stream))
            await stream.close()
            await s.idle()
            assert s.recorder.values["diptych_requests_total", "cancelled"] == 3

    asyncio.run(check())


def test_errors_have_openai_bodies(site):
    async def check():
        async with site(prefill=0, decode=0) as s, httpx.AsyncClient(base_url=s.url) as c:
            health = await c.get("/health")
            assert health.status_code == 503
            assert "decode worker" in health.json()["reason"]
            answer = await c.post("/v1/completions", json={"prompt": "x"})
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert answer.headers["x-request-id"]
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("server_error", "unavailable")
            assert (await c.get("/nowhere")).json()["error"]["type"] == "invalid_request_error"
            assert (await c.get("/v1/completions")).status_code == 405
            assert (await c.get("/metrics")).text == "diptych_up 1\n"

    asyncio.run(check())


def test_an_error_after_the_stream_began_is_its_last_event(site):
    async def check():
        async with site() as s, client(s) as c:
            from diptych.core.errors import InvalidRequest

            s.workers["d0"].fail, s.workers["d0"].fail_after = InvalidRequest("no more", field="prompt"), 5
            stream = await c.completions.create(model="tiny", prompt="x" * 20, max_tokens=100, stream=True)
            texts = []

            async def read():
                async for chunk in stream:
                    texts.append(chunk.choices[0].text)

            with pytest.raises(openai.APIError, match="no more"):
                await read()
            assert "".join(texts) == "Hello"

    asyncio.run(check())
