"""API keys over both faces: who has none gets no further, rotation needs no restart, and the tenant comes from the key alone."""

import asyncio
import json
from itertools import chain

import grpc
import httpx
import openai
import pytest
from diptych.client.aio import AsyncClient
from diptych.core.access import Access
from diptych.core.api_keys import ApiKeyFile, new_key, now
from diptych.core.config import LimitsSection
from diptych.core.errors import ConfigError, Unauthenticated
from diptych.core.generate import Generate
from diptych.core.sampling import SamplingParams
from diptych.router.keys import KeyRing
from diptych.rpc.codec_inference import encode_generate
from diptych.rpc.inference import InferenceClient

CALL = Generate("x" * 20, sampling=SamplingParams(max_tokens=4))


class Keys:
    """A file of keys."""

    def __init__(self, path):
        self.path, self.kept = path, []

    def write(self):
        draft = self.path.with_suffix(".draft")
        draft.write_text(ApiKeyFile(keys=tuple(self.kept)).model_dump_json())
        draft.replace(self.path)

    def add(self, tenant="acme"):
        key, kept = new_key(tenant)
        self.kept.append(kept)
        self.write()
        return key

    def revoke(self, key):
        number = key.split("-")[1]
        self.kept = [kept.model_copy(update={"revoked": now()}) if kept.id == number else kept for kept in self.kept]
        self.write()


@pytest.fixture
def keys(tmp_path):
    return Keys(tmp_path / "keys.json")


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def test_a_ring_knows_its_keys_and_follows_the_file(keys, caplog):
    first = keys.add()
    ring = KeyRing(keys.path)
    assert ring.tenant(f"Bearer {first}") == "acme"
    second = keys.add("umbrella")
    assert ring.tenant(f"bearer  {second} ") == "umbrella"
    keys.revoke(first)
    with pytest.raises(Unauthenticated):
        ring.tenant(f"Bearer {first}")
    keys.path.write_text("not any more")
    assert ring.tenant(f"Bearer {second}") == "umbrella"
    keys.path.unlink()
    assert ring.tenant(f"Bearer {second}") == "umbrella"
    assert caplog.text.count("stays good") == 2
    keys.write()
    keys.revoke(second)
    with pytest.raises(Unauthenticated):
        ring.tenant(f"Bearer {second}")


def test_what_is_no_key_of_the_ring_is_refused(keys):
    key = keys.add()
    ring = KeyRing(keys.path)
    prefix, number, secret = key.split("-", 2)
    wrong = [None, "", "Bearer", "Bearer ", key, f"Basic {key}", f"Bearer {key}x", f"Bearer {key[:-1]}", f"Bearer {secret}", "Bearer dpt--"]
    wrong += [f"Bearer {prefix}-{number}-", f"Bearer {prefix}-00000000-{secret}", f"Bearer {key} {key}", "Bearer \udcff", "Bearer ☂"]
    wrong += [f"Bearer {keys.kept[0].sha256}", f"Bearer {prefix}-{number}-{keys.kept[0].sha256}"]
    for said in wrong:
        with pytest.raises(Unauthenticated) as caught:
            ring.tenant(said)
        assert secret not in caught.value.message


def test_a_file_without_keys_is_refused_at_the_start_and_its_content_is_not_told(tmp_path):
    path = tmp_path / "keys.json"
    for content in (None, "", "[]", '{"keys": []}', '{"keys": [{"id": "hush"}]}'):
        if content is not None:
            path.write_text(content)
        with pytest.raises(ConfigError) as caught:
            KeyRing(path)
        assert caught.value.field == "security.api_keys"
        assert "hush" not in caught.value.message


def test_over_http_who_has_no_key_gets_openais_401_and_nothing_else_but_health(site, keys):
    key = keys.add()

    async def check():
        async with site(api_keys=keys.path, open_metrics=False) as s, httpx.AsyncClient(base_url=s.url) as c:
            body = {"prompt": "x" * 20, "max_tokens": 2}
            paths = [("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/v1/models/tiny")]
            paths += [("GET", "/metrics"), ("GET", "/openapi.json"), ("GET", "/nothing"), ("GET", "/health/"), ("DELETE", "/v1/models")]
            for headers in ({}, bearer("wrong"), bearer(new_key("acme")[0])):
                for method, path in paths:
                    answer = await c.request(method, path, json=body if method == "POST" else None, headers=headers)
                    assert answer.status_code == 401, path
                    assert answer.headers["www-authenticate"] == "Bearer"
                    error = answer.json()["error"]
                    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_api_key", None)
            assert s.recorder.values["diptych_requests_total", "invalid_api_key"] == 3 * len(paths)
            assert not s.workers["p0"].seen
            assert (await c.get("/health")).status_code == 200
            assert (await c.get("/metrics", headers=bearer(key))).status_code == 200
            assert (await c.post("/v1/completions", json=body, headers=bearer(key))).status_code == 200
            async with openai.AsyncOpenAI(base_url=f"{s.url}/v1", api_key="sk-none", max_retries=0) as stranger:
                with pytest.raises(openai.AuthenticationError):
                    await stranger.models.list()
        async with site(api_keys=keys.path) as s, httpx.AsyncClient(base_url=s.url) as c:
            assert (await c.get("/metrics")).status_code == 200

    asyncio.run(check())


def test_over_grpc_who_has_no_key_is_unauthenticated(site, keys, monkeypatch):
    key = keys.add()

    async def check():
        async with site(api_keys=keys.path) as s:
            for shown in (None, "wrong"):
                async with InferenceClient(s.router.grpc, Access(shown)) as c:
                    with pytest.raises(Unauthenticated):
                        [chunk async for chunk in c.generate(CALL)]
                    with pytest.raises(Unauthenticated):
                        await c.models()
            assert refusals(s) == {"invalid_api_key": 4}
            async with AsyncClient(s.router.grpc, api_key=key) as c:
                assert (await c.generate("x" * 20, max_tokens=4)).text == "Hell"
            monkeypatch.setenv("DIPTYCH_API_KEY", key)
            async with AsyncClient(s.router.grpc) as c:
                assert len(await c.models()) == 1

    asyncio.run(check())


def refusals(site):
    """By reason; each is an ended request, too."""
    values = site.recorder.values
    found = {name[1]: count for name, count in values.items() if name[0] == "diptych_refusals_total"}
    assert {reason: values["diptych_requests_total", reason] for reason in found} == found
    return found


def test_both_faces_count_what_they_refuse(site):
    """What is no call, what could never be served, and what comes when there is no room."""

    async def check():
        full = LimitsSection(running=1)
        async with site(limits=full) as s, httpx.AsyncClient(base_url=s.url) as h, grpc.aio.insecure_channel(s.router.grpc) as channel:
            s.workers["p0"].hold.clear()
            generate = channel.unary_stream("/diptych.v1.Inference/Generate")

            async def over_http(content):
                return (await h.post("/v1/completions", content=content)).status_code

            async def over_grpc(request):
                return (await generate(request).code()).name

            assert [await over_http(b"{"), await over_grpc(b"\xff")] == [400, "INVALID_ARGUMENT"]
            assert refusals(s) == {"invalid_request": 2}
            first = asyncio.create_task(h.post("/v1/completions", json={"prompt": "x" * 20, "max_tokens": 2}))
            await s.until(lambda: s.workers["p0"].seen)
            assert [await over_http(b"{}"), await over_grpc(encode_generate(CALL))] == [429, "RESOURCE_EXHAUSTED"]
            assert refusals(s) == {"invalid_request": 2, "overloaded": 2}
            s.workers["p0"].hold.set()
            assert (await first).status_code == 200

    asyncio.run(check())


def test_the_tenant_is_the_keys_and_no_client_can_say_another(site, keys):
    ours, theirs = keys.add("acme"), keys.add("umbrella")

    async def check():
        async with site(api_keys=keys.path) as s, httpx.AsyncClient(base_url=s.url) as c:
            said = {"prompt": "x" * 20, "max_tokens": 2}
            for extra, headers in (({}, {}), ({"user": "umbrella"}, {"x-tenant": "umbrella", "openai-organization": "umbrella"})):
                assert (await c.post("/v1/completions", json=said | extra, headers=bearer(ours) | headers)).status_code == 200
            assert (await c.post("/v1/completions", json=said | {"tenant": "umbrella"}, headers=bearer(ours))).status_code == 400
            async with InferenceClient(s.router.grpc, Access(theirs)) as g:
                [chunk async for chunk in g.generate(Generate("x" * 20, sampling=CALL.sampling, tenant="acme"))]
            assert [command.request.tenant for command in s.workers["p0"].seen] == ["acme", "acme", "umbrella"]
            assert [command.request.tenant for command in s.workers["d0"].seen] == ["acme", "acme", "umbrella"]
        async with site() as s, httpx.AsyncClient(base_url=s.url) as c:
            assert (await c.post("/v1/completions", json=said, headers=bearer(ours))).status_code == 200
            assert s.workers["p0"].seen[0].request.tenant == ""

    asyncio.run(check())


def test_keys_change_under_load_and_no_request_is_dropped(site, keys):
    """Each client goes over to its new key once the file has it, as in a rotation; the old one is revoked when nobody uses it any more."""

    async def check():
        current = [keys.add() for _ in range(3)]
        async with site(api_keys=keys.path, text="Hello" * 8) as s, httpx.AsyncClient(base_url=s.url) as c:
            stop, statuses = asyncio.Event(), [[], [], []]

            async def client(i):
                while not stop.is_set():
                    body = {"prompt": "x" * 20, "max_tokens": 8, "stream": i == 0}
                    answer = await c.post("/v1/completions", json=body, headers=bearer(current[i]))
                    statuses[i].append(answer.status_code)
                    assert i or answer.text.rstrip().endswith("[DONE]")

            running = [asyncio.create_task(client(i)) for i in range(3)]
            for _ in range(5):
                old, current[:] = list(current), [keys.add() for _ in range(3)]
                seen = [len(each) for each in statuses]
                await s.until(lambda seen=seen: all(len(each) >= then + 2 for each, then in zip(statuses, seen, strict=True)))
                for key in old:
                    keys.revoke(key)
                assert (await c.get("/v1/models", headers=bearer(old[0]))).status_code == 401
            stop.set()
            await asyncio.gather(*running)
            assert set(chain(*statuses)) == {200}

    asyncio.run(check())


def test_neither_keys_nor_prompts_are_in_the_log(site, keys, caplog):
    canary, key = "canary-prompt-text", keys.add()

    async def check():
        async with site(api_keys=keys.path) as s, httpx.AsyncClient(base_url=s.url) as c:
            with caplog.at_level("DEBUG", logger="diptych"):
                for headers in (bearer(key), bearer(key + "x"), {}):
                    await c.post("/v1/completions", json={"prompt": canary, "max_tokens": 2}, headers=headers)
                    await c.post("/v1/completions", content=json.dumps({"prompt": canary, "n": "many"}), headers=headers)
                async with InferenceClient(s.router.grpc, Access(key)) as g:
                    [chunk async for chunk in g.generate(Generate(canary, sampling=CALL.sampling))]

    asyncio.run(check())
    told = "".join(str(vars(record)) for record in caplog.records)
    assert "prompt_tokens" in told
    assert canary not in told
    assert key not in told
    assert key.split("-", 2)[2] not in told
