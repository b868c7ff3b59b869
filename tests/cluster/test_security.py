"""A real cluster with keys and mutual TLS: every port as docs/security.md has it, rotation under load, tenants apart, silent logs."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest
from certificates import Issued, strangers
from cluster_harness import Cluster, wait_for
from diptych.client.aio import AsyncClient
from diptych.cluster.commands.keys import new, revoke
from diptych.cluster.process import processes
from diptych.cluster.resources import preflight
from diptych.core.api_keys import id_of
from diptych.core.config import load_config
from diptych.core.errors import DiptychError, Unauthenticated
from diptych.core.security import TlsFiles
from ports import HTTP2, Port, answers_plainly, gets_in, listening, ray_answers
from real_harness import PROMPT, UP_S, diptych, ray_of_others, up

TABLE = Path(__file__).resolve().parents[2] / "docs" / "security.md"
CANARY = "canary in the coal mine, of which no log may sing"
GET = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"


def table() -> dict[str, str]:
    """Of docs/security.md: a port's name → what a stranger gets."""
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.+) \|$", TABLE.read_text(), re.M)
    assert len(rows) == 9
    return dict(rows)


@dataclass
class Secured:
    """Where everything of a cluster is."""

    cluster: Cluster
    issued: Issued
    keys: Path
    public: TlsFiles
    internal: TlsFiles

    def key(self, tenant: str, capsys: pytest.CaptureFixture[str]) -> str:
        capsys.readouterr()
        new(tenant, self.keys)
        return capsys.readouterr().out.strip()

    @property
    def state(self) -> dict[str, Any]:
        return self.cluster.state()

    def client(self, key: str) -> httpx.AsyncClient:
        context = ssl.create_default_context(cafile=self.issued.ca)
        url, headers = f"https://{self.state['http']}", {"authorization": f"Bearer {key}"} if key else {}
        return httpx.AsyncClient(base_url=url, headers=headers, verify=context, timeout=60)

    @property
    def processes(self) -> list[int]:
        return [*processes.marked(str(self.state["id"])), self.cluster.process.pid]


@contextmanager
def secured(model: Path, runtime: Path, directory: Path, more: dict[str, Any], *flags: str) -> Iterator[Secured]:
    issued = Issued.below(directory / "ca")
    public, internal, keys = issued.public(), issued.internal(), directory / "keys.json"
    new("first", keys)
    security = {
        "api_keys": str(keys),
        "tls": {"cert": str(public.cert), "key": str(public.key), "ca": str(issued.ca)},
        "internal_tls": {"ca": str(internal.ca), "cert": str(internal.cert), "key": str(internal.key)},
    }
    config = directory / "cluster.yaml"
    config.write_text(json.dumps({"security": security, "log": {"level": "debug"}, **more}))
    with up(model, runtime, "-f", str(config), *flags) as cluster:
        cluster.expect("Ctrl-C ends it.", UP_S)
        yield Secured(cluster, issued, keys, public, internal)
        assert cluster.end() == 0


@pytest.fixture(scope="module")
def served(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """One for two tests: a start takes 15 s of a core."""
    directory = tmp_path_factory.mktemp("secured")
    more = {"prefill": {"tp": 2, "kv_tokens": 2048}, "decode": {"kv_tokens": 2048}, "transfer": {"transports": ["gloo"]}}
    with secured(tiny_llama_dir, directory / "run", directory, more, "--no-ray") as found:
        yield found


@pytest.fixture
def here(served: Secured, monkeypatch: pytest.MonkeyPatch) -> Secured:
    """A secured cluster, which commands ask meanwhile."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(served.cluster.runtime))
    return served


def owner(here: Secured, port: Port) -> str:
    """The row of the table that a port is in."""
    state = here.state
    known = {str(state[name]).rsplit(":", 1)[1]: name for name in ("http", "grpc", "control")}
    workers = (process["address"] for process in state["processes"] if process["name"] != "router" and process["address"])
    known |= {address.rsplit(":", 1)[1]: "worker" for address in workers}
    if name := known.get(str(port.port)):
        return name
    return "gloo" if port.program == "diptych.cluster.programs.rank" else f"nobody's: {port}"


def test_every_port_is_in_the_table_and_strangers_get_what_it_says(
    here: Secured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, revoked = here.key("acme", capsys), here.key("acme", capsys)
    revoke(id_of(revoked), here.keys)
    asked = diptych("generate", PROMPT, "--max-tokens", "8", "-t", "0", "--stats", "--api-key", key)
    assert asked.returncode == 0, asked.stderr
    assert "over gloo" in asked.stderr
    ports = {port: owner(here, port) for port in listening(here.processes)}
    assert sorted(set(ports.values())) == ["control", "gloo", "grpc", "http", "worker"], ports
    assert set(ports.values()) <= table().keys()
    assert all(port.on_loopback for port in ports)

    outside: dict[str, TlsFiles | None] = {"nothing": None, **strangers(tmp_path, here.issued)}
    for port, name in ports.items():
        address = f"{port.host}:{port.port}"
        assert answers_plainly(address, GET) == b"" or name == "gloo", name
        if name in ("control", "worker"):
            assert answers_plainly(address, HTTP2) == b""
            assert {fault: gets_in(address, shown) for fault, shown in outside.items()} == dict.fromkeys(outside, False), name
            assert gets_in(address, here.internal, within_s=UP_S)
    asyncio.run(faces_ask(here, key, [revoked, "", "wrong"]))

    shown = diptych("status")
    assert "decode workers" in shown.stdout, "over mutual TLS"
    assert "KV moved: the router tells who has an API key" in shown.stdout
    assert "over gloo" in diptych("status", "--api-key", key).stdout
    again = diptych("generate", PROMPT, "--max-tokens", "8", "-t", "0", "--api-key", key)
    assert again.stdout == asked.stdout, "who knocked at gloo's ports has broken nothing"
    refused = diptych("generate", PROMPT, "--api-key", revoked)
    assert refused.returncode == 1
    assert "API key" in refused.stderr


async def faces_ask(here: Secured, key: str, wrong: list[str]) -> None:
    """Both public faces: by key, and nobody without our authority speaks with them unknowingly."""
    grpc, ca = str(here.state["grpc"]), str(here.issued.ca)
    async with here.client(key) as c:
        assert (await c.get("/v1/models")).status_code == 200
        assert (await c.get("/metrics", headers={"authorization": ""})).status_code == 401
        assert (await c.get("/health", headers={"authorization": ""})).status_code == 200
    for bad in wrong:
        async with here.client(bad) as c:
            assert (await c.get("/v1/models")).status_code == 401
        async with AsyncClient(grpc, api_key=bad or None, ca=ca) as g:
            with pytest.raises(Unauthenticated):
                await g.models()
    async with AsyncClient(grpc, api_key=key, ca=ca) as g:
        assert await g.models()
    for access in ({"tls": True}, {}):
        async with AsyncClient(grpc, api_key=key, **access) as g:
            with pytest.raises(DiptychError):
                await g.generate(PROMPT, timeout_s=2)


def test_tenants_share_no_blocks_and_everything_can_be_rotated_under_load(here: Secured, capsys: pytest.CaptureFixture[str]) -> None:
    acme, umbrella = here.key("acme", capsys), here.key("umbrella", capsys)
    assert asyncio.run(cached(here, [acme, acme, umbrella, here.key("acme", capsys), umbrella])) == [False, True, False, True, True]
    asyncio.run(rotated(here, acme, capsys))
    logs = Path(str(here.state["logs"]))
    told = "".join(path.read_text() for path in logs.iterdir()) + here.cluster.output + json.dumps(here.state)
    assert told.count("read again") >= 6, "keys and certificates"
    started = "".join(Path(f"/proc/{pid}/{what}").read_text() for pid in here.processes for what in ("cmdline", "environ"))
    secrets = [acme.split("-", 2)[2], umbrella.split("-", 2)[2], here.internal.key.read_text().splitlines()[1], CANARY[:20]]
    for secret in secrets:
        assert secret not in told
        assert secret not in started


async def cached(here: Secured, keys: list[str]) -> list[bool]:
    """Whether any token of the same prompt was found in a cache, asked with each key in turn."""
    found = []
    for key in keys:
        async with here.client(key) as c:
            answer = await c.post("/v1/completions", json={"prompt": CANARY * 2, "max_tokens": 2, "temperature": 0})
            found.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0)
    return found


async def rotated(here: Secured, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys and all certificates three times while clients ask, on old connections and on new ones; no request is dropped."""
    current, statuses, stop = [key], ([], []), asyncio.Event()

    async def client(fresh: bool, statuses: list[int]) -> None:
        while not stop.is_set():
            async with here.client("") as c:
                for _ in range(1 if fresh else 20):
                    headers = {"authorization": f"Bearer {current[0]}"}
                    answer = await c.post("/v1/completions", json={"prompt": CANARY, "max_tokens": 4}, headers=headers)
                    statuses.append(answer.status_code)

    async def more(count: int) -> None:
        """Of each: what one began before may have been asked with the old key."""
        wanted = [len(each) + count for each in statuses]
        while any(len(each) < least for each, least in zip(statuses, wanted, strict=True)):  # noqa: ASYNC110  it watches what has no event
            await asyncio.sleep(0.02)

    running = [asyncio.create_task(client(fresh, of_one)) for fresh, of_one in zip((True, False), statuses, strict=True)]
    for number in range(3):
        for files, renewed in ((here.public, here.issued.public(f"s{number}")), (here.internal, here.issued.internal(f"i{number}"))):
            for path, by in ((files.key, renewed.key), (files.cert, renewed.cert)):
                shutil.copy(by, path.with_suffix(".draft"))
                os.replace(path.with_suffix(".draft"), path)
        old, current[0] = current[0], here.key("acme", capsys)
        await more(3)
        revoke(id_of(old), here.keys)
        await more(3)
    stop.set()
    await asyncio.gather(*running)
    assert set(chain(*statuses)) == {200}


def test_up_refuses_to_be_open_to_strangers(tiny_llama_dir: Path, runtime: Path, tmp_path: Path) -> None:
    done = diptych("up", "--model", str(tiny_llama_dir), "--no-ray", "--host", "0.0.0.0", "--http-port", "0", "--grpc-port", "0")
    assert done.returncode == 2
    for words in ("nobody is asked who he is", "diptych keys new", "security.allow_unauthenticated: true"):
        assert words in " ".join(done.stderr.split())


@pytest.mark.nightly
def test_a_ray_of_its_own_is_the_hosts_alone_and_refuses_who_has_no_token(tiny_llama_dir: Path, runtime: Path) -> None:
    with up(tiny_llama_dir, runtime) as cluster:
        cluster.expect("Ctrl-C ends it.", UP_S)
        ours = ("diptych.cluster.programs.rank", "diptych.cluster.programs.route")
        pids = [*processes.marked(str(cluster.state()["id"])), cluster.process.pid]
        ports = [port for port in listening(pids) if port.program not in ours]
        assert len(ports) >= 5
        assert [port for port in ports if not port.on_loopback] == []
        answers = {f"{port.program} {port.port}": ray_answers(f"{port.host}:{port.port}") for port in ports}
        # 405: what Ray's metrics ports say to anything but a GET, which they answer to everybody.
        assert {name: answer for name, answer in answers.items() if answer - {"UNAUTHENTICATED", "401", "403", "405"}} == {}
        assert sum("UNAUTHENTICATED" in answer for answer in answers.values()) >= 5
        assert cluster.end() == 0


@pytest.mark.nightly
def test_a_joined_ray_cluster_is_under_mutual_tls_without_being_told_so(
    tiny_llama_source: Path, runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    issued = Issued.below(tmp_path / "ca")
    with (
        tempfile.TemporaryDirectory(prefix="d") as short,  # a path to a Unix socket has at most 107 bytes
        ray_of_others(Path(short), monkeypatch, 2, 2) as address,
        up(tiny_llama_source, runtime, "--address", address) as cluster,
    ):
        cluster.expect("Ctrl-C ends it.", UP_S)
        state = cluster.state()
        made: dict[str, str] = state["internal_tls"]  # type: ignore[assignment]
        ours = TlsFiles(Path(made["cert"]), Path(made["key"]), Path(made["ca"]))
        workers = [process for process in state["processes"] if process["address"] and process["name"] not in ("router", "ray")]  # type: ignore[attr-defined]
        assert len(workers) == 2
        for process in workers:
            assert gets_in(process["address"], ours)
            for shown in (None, *strangers(tmp_path / process["name"], replace(issued)).values()):
                assert not gets_in(process["address"], shown)
        asked = diptych("generate", PROMPT, "--max-tokens", "8", "-t", "0", "--stats")
        assert asked.returncode == 0, asked.stderr
        secret = ours.key.read_text().splitlines()[1]
        for pid in processes.marked(str(state["id"])):
            assert secret not in Path(f"/proc/{pid}/cmdline").read_text()
        assert cluster.end() == 0
        wait_for("the end of its files", lambda: not ours.key.exists())


@pytest.mark.nightly
def test_a_ray_cluster_that_asks_for_no_token_is_not_joined(tiny_llama_dir: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="d") as short, ray_of_others(Path(short), monkeypatch, 1, asks="disabled") as address:
        ports = ("--http-port", "0", "--grpc-port", "0")
        done = diptych("up", "--model", str(tiny_llama_dir), "--address", address, *ports)
        assert done.returncode == 2
        for words in ("ray.address", "asks nobody who he is", "RAY_AUTH_MODE=token", "security.allow_unauthenticated: true"):
            assert words in " ".join(done.stderr.split())
        preflight.check_ray(load_config({"ray": {"address": address}, "security": {"allow_unauthenticated": True}}))
