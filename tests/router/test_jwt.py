"""Tokens of an identity provider over both faces, signed with real keys: what is not right in every respect gets no further."""

import asyncio
import base64
import hashlib
import hmac
import json
import ssl
import time
from pathlib import Path

import httpx
import jwt
import pytest
from certificates import Issued
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from diptych.client.aio import AsyncClient
from diptych.core.access import Access
from diptych.core.api_keys import ApiKeyFile, new_key
from diptych.core.config import load_config
from diptych.core.errors import ConfigError, Unauthenticated
from diptych.core.generate import Generate
from diptych.core.prefix import root_hash
from diptych.core.sampling import SamplingParams
from diptych.core.security import JwtSection
from diptych.router import jwks
from diptych.router.doors import LEEWAY_S, Doors, TokenCheck
from diptych.router.jwks import FileKeys, UrlKeys, read_keys
from diptych.rpc.inference import InferenceClient

ISSUER, AUDIENCE = "https://id.example.com/", "diptych"
BODY = {"prompt": "x" * 20, "max_tokens": 2}
MAKE = {"RS": lambda: rsa.generate_private_key(65537, 2048), "Ed": ed25519.Ed25519PrivateKey.generate}
CURVES = {"ES256": ec.SECP256R1, "ES384": ec.SECP384R1, "ES512": ec.SECP521R1}


class Signer:
    """A key pair of the identity provider's, called `kid`."""

    def __init__(self, kid="k1", algorithm="ES256"):
        self.kid, self.algorithm = kid, algorithm
        self.private = ec.generate_private_key(CURVES[algorithm]()) if algorithm in CURVES else MAKE[algorithm[:2]]()

    @property
    def jwk(self):
        found = jwt.get_algorithm_by_name(self.algorithm).to_jwk(self.private.public_key(), as_dict=True)
        return {**found, "kid": self.kid, "use": "sig", "alg": self.algorithm}

    def token(self, header=None, *, algorithm=None, **claims):
        """Good, but for what is given; a claim of None is left out."""
        now = int(time.time())
        said = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "iat": now, "nbf": now, "exp": now + 300} | claims
        said = {name: value for name, value in said.items() if value is not None}
        header = {"kid": self.kid} if header is None else header
        return jwt.encode(said, self.private, algorithm or self.algorithm, headers=header)


def write(path, *signers):
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps({"keys": [signer.jwk for signer in signers]}))
    draft.replace(path)


@pytest.fixture(scope="module")
def signer():
    return Signer()


@pytest.fixture
def section(tmp_path, signer):
    write(tmp_path / "jwks.json", signer)
    return JwtSection(issuer=ISSUER, audience=AUDIENCE, jwks=str(tmp_path / "jwks.json"))


def check(section):
    return TokenCheck(section, FileKeys(section_path(section), section.algorithms))


def section_path(section):
    return Path(section.jwks)


def bearer(shown):
    return {"authorization": f"Bearer {shown}"}


def by_hand(header, claims, sign):
    """What PyJWT would not make."""
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, claims)]
    return b".".join([*parts, base64.urlsafe_b64encode(sign(b".".join(parts))).rstrip(b"=")]).decode()


def forged(signer):
    """Each wrong in one respect."""
    now = int(time.time())
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": now + 300}
    public = signer.private.public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    head, body, sign = signer.token().split(".")
    other = Signer(signer.kid)
    return {
        "expired": signer.token(exp=now - LEEWAY_S - 5),
        "for ever": signer.token(exp=None),
        "not yet": signer.token(nbf=now + LEEWAY_S + 60),
        "made tomorrow": signer.token(iat=now + 86400),
        "of another issuer": signer.token(iss="https://id.example.com"),
        "of nobody": signer.token(iss=None),
        "for others": signer.token(aud=["else", "where"]),
        "for all": signer.token(aud=None),
        "by another's key": other.token(),
        "of an unknown key": Signer("k9").token(),
        "changed": ".".join([head, other.token(sub="bob").split(".")[1], sign]),
        "unsigned": f"{head}.{body}.",
        "none": jwt.encode(claims, None, "none", headers={"kid": signer.kid}),
        "None": by_hand({"alg": "None", "kid": signer.kid}, claims, lambda _: b""),
        "no algorithm": by_hand({"kid": signer.kid}, claims, lambda _: b""),
        "its public key as a secret": by_hand(
            {"alg": "HS256", "kid": signer.kid}, claims, lambda said: hmac.new(pem, said, hashlib.sha256).digest()
        ),
        "its JWK as a secret": by_hand(
            {"alg": "HS256", "kid": signer.kid}, claims, lambda said: hmac.new(signer.jwk["x"].encode(), said, hashlib.sha256).digest()
        ),
        "a key of its own": jwt.encode(claims, other.private, "ES256", headers={"kid": signer.kid, "jwk": other.jwk, "jku": "https://x/"}),
        "critical": signer.token({"kid": signer.kid, "crit": ["b64"], "b64": False}),
        "a list of algorithms": by_hand({"alg": ["ES256"], "kid": signer.kid}, claims, lambda _: b"x" * 64),
        "a number for a key": by_hand({"alg": "ES256", "kid": 1}, claims, lambda _: b"x" * 64),
        "nobody's": signer.token(sub=None),
        "two people's": signer.token(sub="alice bob"),
        "dots": "..",
        "text": "a.b.c",
        "no text": "\udcff.☂.é",
        "no object": by_hand([], [], lambda _: b""),
        "deep": "e30." + base64.urlsafe_b64encode(b"[" * 30000).decode() + ".",
    }


def test_what_is_wrong_in_any_respect_is_refused_and_the_words_tell_nothing(section, signer):
    tokens = check(section)
    assert tokens.tenant(signer.token()) == "alice"
    now = int(time.time())
    assert tokens.tenant(signer.token(exp=now - LEEWAY_S + 15, nbf=now + LEEWAY_S - 15)) == "alice", "clocks differ"
    assert tokens.tenant(signer.token(aud=["other", AUDIENCE])) == "alice"
    assert tokens.tenant(signer.token({})) == "alice", "there is one key, so it need not be named"
    said = {}
    for fault, token in forged(signer).items():
        with pytest.raises(Unauthenticated) as caught:
            tokens.tenant(token)
        said[fault] = caught.value.message
    told = {"expired": "has expired", "not yet": "not valid yet", "made tomorrow": "not valid yet"}
    told |= dict.fromkeys(("nobody's", "two people's"), "claim sub")
    assert {fault for fault, words in said.items() if told.get(fault, "The token is not good here.") not in words} == set()


@pytest.mark.parametrize("algorithm", ["RS256", "RS512", "PS256", "ES384", "ES512", "EdDSA"])
def test_every_algorithm_signs_and_only_those_of_the_config(section, algorithm):
    signer = Signer(algorithm=algorithm.replace("PS", "RS"))
    entry = {name: value for name, value in signer.jwk.items() if name != "alg"}
    section_path(section).write_text(json.dumps({"keys": [Signer("other").jwk, entry]}))
    wide = section.model_copy(update={"algorithms": (algorithm,)})
    assert check(wide).tenant(signer.token(algorithm=algorithm)) == "alice"
    with pytest.raises(Unauthenticated):
        check(section.model_copy(update={"algorithms": ("ES256",)})).tenant(signer.token(algorithm=algorithm))
    section_path(section).write_text(json.dumps({"keys": [entry | {"alg": "RS384"}]}))
    with pytest.raises(ValueError, match="no public key"):
        check(wide)


def test_a_file_of_keys_is_followed_and_a_broken_one_changes_nothing(section, signer, caplog):
    tokens, second = check(section), Signer("k2")
    with pytest.raises(Unauthenticated):
        tokens.tenant(second.token())
    write(section_path(section), signer, second)
    assert [tokens.tenant(key.token()) for key in (signer, second)] == ["alice", "alice"]
    with pytest.raises(Unauthenticated):
        tokens.tenant(second.token({}))  # there are two, and it names none
    write(section_path(section), second)
    with pytest.raises(Unauthenticated):
        tokens.tenant(signer.token())
    for broken in ("", "{}", '{"keys": []}', json.dumps({"keys": [{"kty": "oct", "k": "aHVzaA", "kid": "k1"}]})):
        section_path(section).write_text(broken)
        assert tokens.tenant(second.token()) == "alice"
    assert caplog.text.count("stays good") == 4
    assert "aHVzaA" not in caplog.text


def test_what_is_no_set_of_public_keys_is_refused_by_name(section, signer):
    private = jwt.get_algorithm_by_name("ES256").to_jwk(signer.private, as_dict=True)
    entries = [{"kty": "oct", "k": "aHVzaA"}, private, signer.jwk | {"use": "enc"}, signer.jwk | {"alg": "HS256"}, {"kty": []}]
    entries += [{"kty": "RSA", "n": 5}, {"kty": "RSA", "n": "", "e": ""}, {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}]
    entries += [{"kty": "OKP", "crv": None, "x": 1}, {"kty": "EC", "crv": "P-256", "x": None}, {"kty": "RSA", "alg": []}, {"alg": 1}]
    for content in ["", "[]", "{}", '{"keys": 1}', '{"keys": [1]}', "[" * 100_000, *(json.dumps({"keys": [entry]}) for entry in entries)]:
        with pytest.raises(ValueError, match=r"it (is no|has)") as caught:
            read_keys(content.encode(), section.algorithms)
        assert "aHVzaA" not in str(caught.value)
        assert private["d"] not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"issuer": None}, "issuer"),
        ({"audience": ""}, "audience"),
        ({"jwks": None}, "jwks"),
        ({"jwks": "http://id.example.com/keys"}, "jwks"),
        ({"jwks": "file:///etc/keys"}, "jwks"),
        ({"jwks": "https://"}, "jwks"),
        ({"jwks": "https://h:99999/keys"}, "jwks"),
        ({"algorithms": ["HS256"]}, "algorithms.0"),
        ({"algorithms": ["RS256", "none"]}, "algorithms.1"),
        ({"algorithms": []}, "algorithms"),
        ({"tenant_claim": ""}, "tenant_claim"),
        ({"secret": "x"}, "secret"),
    ],
)
def test_a_config_that_is_wrong_is_refused_by_name(values, field):
    whole = {"issuer": ISSUER, "audience": AUDIENCE, "jwks": "https://id.example.com/keys"} | values
    with pytest.raises(ConfigError) as caught:
        load_config({"security": {"jwt": {name: value for name, value in whole.items() if value is not None}}})
    assert caught.value.field == f"security.jwt.{field}"


def test_over_both_faces_a_token_is_its_tenants_and_a_forged_one_nobodys(site, section, signer, caplog):
    async def run():
        async with site(jwt=section, open_metrics=False) as s, httpx.AsyncClient(base_url=s.url) as c:
            wrong = {"a key": new_key("acme")[0], "nothing": "x"}
            wrong |= {fault: token for fault, token in forged(signer).items() if token.isascii() and len(token) < 4000}
            for fault, token in wrong.items():
                answer = await c.post("/v1/completions", json=BODY, headers=bearer(token))
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), fault
                assert answer.json()["error"]["code"] == "invalid_api_key"
                async with InferenceClient(s.router.grpc, Access(token)) as g:
                    with pytest.raises(Unauthenticated):
                        await g.models()
            assert (await c.get("/metrics")).status_code == 401
            assert s.recorder.values["diptych_refusals_total", "invalid_api_key"] == 2 * len(wrong) + 1
            assert not s.workers["p0"].seen
            assert (await c.get("/metrics", headers=bearer(signer.token()))).status_code == 200
            said = {"x-tenant": "bob"} | bearer(signer.token())
            assert (await c.post("/v1/completions", json=BODY, headers=said)).status_code == 200
            async with InferenceClient(s.router.grpc, Access(signer.token(sub="bob"))) as g:
                [chunk async for chunk in g.generate(Generate("x" * 20, sampling=SamplingParams(max_tokens=4), tenant="alice"))]
            async with AsyncClient(s.router.grpc, api_key=signer.token(sub="carol")) as g:
                assert (await g.generate("x" * 20, max_tokens=4)).text == "Hell"
            tenants = [command.request.tenant for command in s.workers["p0"].seen]
            assert tenants == [command.request.tenant for command in s.workers["d0"].seen] == ["alice", "bob", "carol"]
            assert len({root_hash(fingerprint="f", dtype="float32", tenant=tenant) for tenant in tenants}) == 3
        assert not [token for token in wrong.values() if len(token) > 9 and token in caplog.text]

    with caplog.at_level("DEBUG", logger="diptych"):
        asyncio.run(run())


def test_keys_and_tokens_stand_side_by_side_and_the_claim_is_the_configs(site, section, signer, tmp_path):
    key, kept = new_key("acme")
    (tmp_path / "keys.json").write_text(ApiKeyFile(keys=(kept,)).model_dump_json())
    section = section.model_copy(update={"tenant_claim": "org_id"})

    async def run():
        async with site(api_keys=tmp_path / "keys.json", jwt=section) as s, httpx.AsyncClient(base_url=s.url) as c:
            shown = [key, signer.token(org_id="umbrella"), signer.token(org_id="acme")]
            wrong = [key + "x", signer.token(), signer.token(org_id=["acme"]), signer.token(org_id="acme\n"), f"{key}.{key}.{key}"]
            statuses = [(await c.post("/v1/completions", json=BODY, headers=bearer(each))).status_code for each in shown + wrong]
            assert statuses == [200] * 3 + [401] * 5
            assert [command.request.tenant for command in s.workers["p0"].seen] == ["acme", "umbrella", "acme"]
        async with site(api_keys=tmp_path / "keys.json") as s, httpx.AsyncClient(base_url=s.url) as c:
            assert (await c.get("/v1/models", headers=bearer(signer.token()))).status_code == 401

    asyncio.run(run())


class Provider:
    """An https server with a JWK set, in the test's own loop, so that a router which waited for it in place of its loop would hang."""

    def __init__(self, files, *signers):
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.load_cert_chain(files.cert, files.key)
        self.signers, self.status, self.asked, self.port = signers, "200 OK", 0, 0

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.answer, "127.0.0.1", self.port, ssl=self.context)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self.server.close()
        await self.server.wait_closed()

    @property
    def url(self):
        return f"https://127.0.0.1:{self.port}/keys"

    async def answer(self, reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        self.asked += 1
        body = json.dumps({"keys": [signer.jwk for signer in self.signers]}).encode()
        head = f"HTTP/1.1 {self.status}\r\nlocation: {self.url}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        writer.close()


@pytest.fixture
def provider(tmp_path, signer, monkeypatch):
    issued = Issued.below(tmp_path / "ca")
    monkeypatch.setenv("SSL_CERT_FILE", str(issued.ca))
    monkeypatch.setenv("NO_PROXY", "*")
    return Provider(issued.public(), signer)


def test_a_url_is_asked_again_for_an_unknown_key_and_when_it_goes_away_its_keys_stay(site, section, signer, provider, monkeypatch, caplog):
    monkeypatch.setattr(jwks, "LEAST_S", 0.2)

    async def statuses(c, *signers):
        return [(await c.get("/v1/models", headers=bearer(each.token()))).status_code for each in signers]

    async def run():
        second, third = Signer("k2"), Signer("k3")
        async with provider:
            there = section.model_copy(update={"jwks": provider.url})
            async with site(prefill=0, decode=0, jwt=there) as s, httpx.AsyncClient(base_url=s.url) as c:
                assert await statuses(c, signer, second) == [200, 401]
                await s.until(lambda: provider.asked == 2)
                provider.signers = (signer, second)
                await statuses(c, third)
                await s.until(lambda: "had from" in caplog.text)
                assert await statuses(c, signer, second) == [200, 200]
                for status in ("500 Broken", "302 Found"):
                    provider.status = status
                    await statuses(c, third)
                    await s.until(lambda status=status: f"the answer is {status[:3]}" in caplog.text)
                await provider.__aexit__()
                await s.until(lambda: caplog.text.count("stay good") >= 3)
                assert await statuses(c, signer, second) == [200, 200]
                provider.status, provider.signers = "200 OK", (third,)
                async with provider:
                    await s.until(lambda: caplog.text.count("had from") >= 2)
                    assert await statuses(c, signer, second, third) == [401, 401, 200]

    with caplog.at_level("INFO"):
        asyncio.run(run())


def test_a_url_is_asked_no_sooner_however_many_tokens_name_a_key_that_is_not_there(section, signer, monkeypatch):
    asked = asyncio.Event()

    async def fetch(*_):
        asked.set()
        return section_path(section).read_bytes()

    async def run(least_s):
        monkeypatch.setattr(jwks, "LEAST_S", least_s)
        keys = UrlKeys(section, ssl.create_default_context(), read_keys(await fetch(), section.algorithms))
        asked.clear()
        following = asyncio.create_task(keys.follow())
        for _ in range(100):
            with pytest.raises(Unauthenticated):
                TokenCheck(section, keys).tenant(Signer("k9").token())
            await asyncio.sleep(0)
        if not least_s:
            await asyncio.wait_for(asked.wait(), 8)
        following.cancel()
        return asked.is_set()

    monkeypatch.setattr(jwks, "_fetch", fetch)
    assert [asyncio.run(run(least_s)) for least_s in (3600.0, 0.0)] == [False, True]


def test_a_url_without_keys_is_refused_at_the_start(site, section, provider, monkeypatch, tmp_path):
    async def refusal(url):
        with pytest.raises(ConfigError) as caught:
            async with site(prefill=0, decode=0, jwt=section.model_copy(update={"jwks": url})):
                pass
        assert caught.value.field == "security.jwt.jwks"
        return caught.value.message

    async def run():
        async with provider:
            url = provider.url
            monkeypatch.setenv("SSL_CERT_FILE", str(Issued.below(tmp_path / "others").ca))
            assert "certificate" in (await refusal(url)).lower()
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca" / "ca.pem"))
            provider.status = "404 Not Found"
            assert "404" in await refusal(url)
            provider.status, provider.signers = "200 OK", ()
            assert "no public key" in await refusal(url)
        await refusal(url)
        await refusal(str(tmp_path / "nothing.json"))

    asyncio.run(run())


def test_a_defect_in_what_follows_keys_is_told(site, section, monkeypatch, caplog):
    async def follow(self):
        raise RuntimeError("a defect")

    async def run():
        async with site(prefill=0, decode=0, jwt=section) as s:
            await s.until(lambda: "follows something no more" in caplog.text)

    monkeypatch.setattr(Doors, "follow", follow)
    asyncio.run(run())


def test_doors_without_a_ring_take_tokens_alone(section, signer):
    doors = Doors(None, check(section))
    assert doors.tenant(f"bearer  {signer.token()} ") == "alice"
    for shown in (None, "", "Bearer", f"Basic {signer.token()}", signer.token(), f"Bearer {new_key('acme')[0]}"):
        with pytest.raises(Unauthenticated):
            doors.tenant(shown)
