"""A cluster that takes the tokens of an identity provider, which is a real HTTPS server with a JWK set and signs with a real key."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from certificates import Issued
from cryptography.hazmat.primitives.asymmetric import rsa
from diptych.client.aio import AsyncClient
from diptych.core.errors import Unauthenticated
from http_peer import Handler, serving
from real_harness import PROMPT, UP_S, diptych, up

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("runtime")]


@dataclass
class Provider:
    """Signs for `issuer`, where its keys are. `asked`: for which paths."""

    issuer: str = ""
    asked: list[str] = field(default_factory=list)
    key: rsa.RSAPrivateKey = field(default_factory=lambda: rsa.generate_private_key(65537, 2048))

    @property
    def keys(self) -> bytes:
        public = jwt.get_algorithm_by_name("RS256").to_jwk(self.key.public_key(), as_dict=True)
        return json.dumps({"keys": [{**public, "kid": "1", "use": "sig", "alg": "RS256"}]}).encode()

    def token(self, **claims: Any) -> str:
        now = int(time.time())
        said = {"iss": self.issuer, "aud": "diptych", "sub": "5f0c", "org_id": "acme", "iat": now, "exp": now + 600} | claims
        return jwt.encode(said, self.key, "RS256", {"kid": "1"})


@contextmanager
def provider(issued: Issued) -> Iterator[Provider]:
    provider = Provider()

    class Keys(Handler):
        def do_GET(self) -> None:
            provider.asked.append(self.path)
            self.answer(200, provider.keys)

    files, context = issued.public("provider"), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.cert, files.key)
    with serving(Keys, context) as address:
        provider.issuer = f"https://{address}/"
        yield provider


def test_up_takes_the_tokens_of_an_identity_provider(
    tiny_llama_dir: Path, runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    issued = Issued.below(tmp_path / "ca")
    monkeypatch.setenv("SSL_CERT_FILE", str(issued.ca))
    monkeypatch.setenv("NO_PROXY", "*")
    config = tmp_path / "cluster.yaml"
    with provider(issued) as ours:
        section = {"issuer": ours.issuer, "audience": "diptych", "jwks": f"{ours.issuer}keys", "tenant_claim": "org_id"}
        pools = {"prefill": {"kv_tokens": 2048}, "decode": {"kv_tokens": 2048}}
        config.write_text(json.dumps({"security": {"jwt": section}, **pools}))
        with up(tiny_llama_dir, runtime, "-f", str(config), "--no-ray") as cluster:
            cluster.expect("Ctrl-C ends it.", UP_S)
            assert ours.asked == ["/keys"]
            state = cluster.state()
            asyncio.run(faces_ask(str(state["http"]), str(state["grpc"]), ours))
            asked = diptych("generate", PROMPT, "--max-tokens", "4", "-t", "0", "--api-key", ours.token())
            assert asked.returncode == 0, asked.stderr
            assert cluster.end() == 0
    gone = diptych("up", "-f", str(config), "--no-ray", "--model", str(tiny_llama_dir), "--http-port", "0", "--grpc-port", "0")
    assert gone.returncode == 2
    assert "security.jwt.jwks" in gone.stderr, "who does not answer is named at the start"


async def faces_ask(http_face: str, grpc_face: str, ours: Provider) -> None:
    """Both faces take good tokens alone; the claim that the config names is the tenant."""
    stranger = Provider(ours.issuer)
    late = int(time.time()) - 120
    wrong = [ours.token(exp=late), ours.token(aud="others"), ours.token(iss="https://else.where/"), ours.token(org_id=None)]
    wrong += [stranger.token(), "dpt-00000000-none"]

    async def cached(token: str) -> bool:
        headers, body = {"authorization": f"Bearer {token}"}, {"prompt": PROMPT, "max_tokens": 2, "temperature": 0}
        answer = await c.post("/v1/completions", json=body, headers=headers)
        return bool(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    async with httpx.AsyncClient(base_url=f"http://{http_face}", timeout=UP_S) as c:
        for bad in wrong:
            assert (await c.get("/v1/models", headers={"authorization": f"Bearer {bad}"})).status_code == 401
            async with AsyncClient(grpc_face, api_key=bad) as g:
                with pytest.raises(Unauthenticated):
                    await g.models()
        assert (await c.get("/metrics")).status_code == 401, "with tokens it is not open"
        asked = [ours.token(), ours.token(sub="a colleague"), ours.token(org_id="umbrella")]
        assert [await cached(token) for token in asked] == [False, True, False]
        metrics = (await c.get("/metrics", headers={"authorization": f"Bearer {ours.token()}"})).text
    async with AsyncClient(grpc_face, api_key=ours.token()) as g:
        assert await g.models()
    refused = 2 * len(wrong) + 1
    assert f'diptych_refusals_total{{reason="invalid_api_key"}} {refused}.0' in metrics
