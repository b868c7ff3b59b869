"""`diptych keys`, `diptych certs`, and what may not be left open."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Issued
from cryptography import x509
from diptych.cluster.cli import app
from diptych.cluster.process.certs import write_all
from diptych.cluster.process.identities import from_environment, internal_files, to_environment
from diptych.cluster.process.spec import RouteSpec
from diptych.cluster.resources import preflight
from diptych.cluster.supervising import exposure
from diptych.cluster.supervising.posts import route_spec
from diptych.core.config import load_config
from diptych.core.errors import ConfigError
from diptych.core.security import INTERNAL_NAME
from diptych.core.tls import client_context, read_pems, server_context
from diptych.router.keys import KeyRing
from typer.testing import CliRunner


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_a_key_is_printed_once_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key, other = (run("keys", "new", "--tenant", tenant, "--file", str(file)).output.strip() for tenant in ("acme", "umbrella"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert key not in file.read_text()
    assert key.split("-", 2)[2] not in file.read_text()
    assert KeyRing(file).tenant(f"Bearer {key}") == "acme"
    listed = run("keys", "list", "-f", str(file)).output.splitlines()
    number = key.split("-")[1]
    assert listed[0].startswith(f"{number}  acme  made ")
    assert all("good" in line for line in listed)

    assert run("keys", "revoke", number, "-f", str(file)).exit_code == 0
    assert "revoked" in run("keys", "list", "-f", str(file)).output.splitlines()[0]
    ring = KeyRing(file)
    assert ring.tenant(f"Bearer {other}") == "umbrella"
    with pytest.raises(Exception, match="no longer"):
        ring.tenant(f"Bearer {key}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("new", "--tenant", "a b", "-f", "FILE"), "no tenant's name"),
        (("new", "--tenant", "a", "-f", "FILE/x/y"), "cannot be written"),
        (("revoke", "12345678", "-f", "FILE"), "has no key '12345678'"),
        (("list", "-f", "NONE"), "cannot be read"),
        (("list", "-f", "BAD"), "is not what `diptych keys` writes"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    file, bad = tmp_path / "keys.json", tmp_path / "bad.json"
    run("keys", "new", "--tenant", "t", "-f", str(file))
    bad.write_text('{"keys": 3}')
    places = {"FILE": str(file), "NONE": str(tmp_path / "none"), "BAD": str(bad)}
    done = run("keys", *(places.get(word, word.replace("FILE", str(file))) for word in arguments))
    assert done.exit_code == 2
    assert words in " ".join(done.output.split())


def test_of_many_who_make_keys_at_once_none_is_lost(tmp_path: Path) -> None:
    from diptych.cluster.commands.keys import new, show

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: new(f"t{i}", tmp_path / "keys.json"), range(24)))
    assert {entry["tenant"] for entry in json.loads((tmp_path / "keys.json").read_text())["keys"]} == {f"t{i}" for i in range(24)}
    show(tmp_path / "keys.json")


def test_certs_makes_what_the_config_asks_for_and_renews_it(tmp_path: Path) -> None:
    out = tmp_path / "tls"
    assert run("certs", "--out", str(out), "--host", "llm.example.com", "--host", "10.0.0.7").exit_code == 0
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()}
    assert {name for name, mode in modes.items() if mode == 0o600} == {"ca.key", "internal.key", "server.key"}
    config = load_config({"security": security(out)})
    exposure.check(config)
    files = internal_files(config, tmp_path)
    assert files is not None
    server_context(files)
    client_context(files)
    server = x509.load_pem_x509_certificate((out / "server.pem").read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["llm.example.com", "localhost"]
    assert "10.0.0.7" in map(str, names.get_values_for_type(x509.IPAddress))

    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "(kept)" in "".join(write_all(out, [], days=30))
    changed = {path.name for path in out.iterdir() if path.read_bytes() != before[path.name]}
    assert changed == {"internal.pem", "internal.key", "server.pem", "server.key"}
    (out / "ca.key").write_text("lost")
    with pytest.raises(ConfigError, match="authority"):
        write_all(out, [], days=30)


def security(out: Path) -> dict[str, Any]:
    internal = {"ca": str(out / "ca.pem"), "cert": str(out / "internal.pem"), "key": str(out / "internal.key")}
    return {"internal_tls": internal, "tls": {"cert": str(out / "server.pem"), "key": str(out / "server.key")}}


def test_a_cluster_of_several_hosts_gets_an_authority_of_its_own_which_crosses_in_memory(tmp_path: Path) -> None:
    assert internal_files(load_config({}), tmp_path) is None
    assert internal_files(load_config({"ray": {"address": "h:1"}, "security": {"internal": "plain"}}), tmp_path) is None
    made = internal_files(load_config({"ray": {"address": "h:1"}}), tmp_path)
    assert made is not None
    assert sorted(path.name for path in (tmp_path / "tls").iterdir()) == ["ca.pem", "internal.key", "internal.pem"]
    environment = {"PATH": "x"} | to_environment(made)
    there = from_environment(environment)
    assert there is not None
    assert environment == {"PATH": "x"}
    assert read_pems(there) == read_pems(made)
    assert str(there.key).startswith("/proc/self/fd/")
    assert from_environment(environment) is None


OPEN = {"router": {"host": "0.0.0.0"}}
ASKS = {"security": {"api_keys": "keys.json"}}
TOKENS = {"security": {"jwt": {"issuer": "https://id.example.com/", "audience": "us", "jwks": "https://id.example.com/keys"}}}
ANYBODY = {"security": {"allow_unauthenticated": True}}


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({}, None),
        ({"router": {"host": "localhost"}}, None),
        ({"router": {"host": "::1"}}, None),
        ({"router": {"host": "127.0.0.2"}}, None),
        (OPEN, "security.api_keys"),
        ({"router": {"host": "::"}}, "security.api_keys"),
        ({"router": {"host": "10.1.2.3"}}, "security.api_keys"),
        (OPEN | ASKS, None),
        (OPEN | TOKENS, None),
        (OPEN | ANYBODY, None),
        ({"ray": {"address": "10.1.2.3:6379"}}, None),
        ({"ray": {"address": "10.1.2.3:6379"}, "security": {"internal": "plain"}}, "security.internal"),
        ({"ray": {"address": "10.1.2.3:6379"}, "security": {"internal": "plain", "allow_unauthenticated": True}}, None),
        ({"security": {"internal": "plain"}}, None),
    ],
)
def test_nothing_is_left_open_unless_the_config_says_so(values: dict[str, Any], field: str | None) -> None:
    config = load_config(values)
    if field is None:
        exposure.check(config)
        return
    with pytest.raises(ConfigError) as caught:
        exposure.check(config)
    assert caught.value.field == field
    assert "allow_unauthenticated: true" in caught.value.message


def test_the_router_is_told_of_tokens_and_then_its_metrics_are_not_open() -> None:
    spec = route_spec(load_config(TOKENS), Path("model"))
    assert spec.jwt is not None
    assert (spec.jwt.jwks, spec.open_metrics) == ("https://id.example.com/keys", False)
    file = load_config({"security": {"jwt": TOKENS["security"]["jwt"] | {"jwks": "jwks.json"}}})
    there = route_spec(file, Path("model"))
    assert there.jwt is not None
    assert there.jwt.jwks == str(Path("jwks.json").absolute())
    assert RouteSpec.model_validate_json(there.model_dump_json()) == there


def test_plain_and_files_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="internal is plain"):
        load_config({"security": security(tmp_path) | {"internal": "plain"}})


def test_a_certificate_that_nobody_would_accept_is_refused_at_the_start(tmp_path: Path) -> None:
    issued = Issued.below(tmp_path / "ca")

    def config(cert: str) -> Any:
        files = {"ca": str(issued.ca), "cert": str(issued.directory / f"{cert}.pem"), "key": str(issued.directory / f"{cert}.key")}
        return load_config({"security": {"internal_tls": files}})

    issued.internal("good")
    issued.internal("old", days=-0.01)
    issued.internal("named", name="elsewhere")
    exposure.check(config("good"))
    for name, days, said in (("week", 7.5, "7 days"), ("today", 0.9, "21 hours"), ("now", 0.05, "less than two hours")):
        issued.internal(name, days=days)
        assert f"ends in {said}," in "".join(exposure.warnings(config(name)))
    for name, words in (("old", "ended on"), ("named", f"must be for {INTERNAL_NAME}"), ("none", "no certificate and its key")):
        with pytest.raises(ConfigError, match=words) as caught:
            exposure.check(config(name))
        assert (caught.value.field or "").startswith("security.internal_tls")


def test_what_works_and_should_be_known_is_said() -> None:
    assert exposure.warnings(load_config({})) == []
    assert "whoever reaches" in "".join(exposure.warnings(load_config(OPEN | ANYBODY)))
    assert "unencrypted" in "".join(exposure.warnings(load_config(OPEN | ASKS)))
    joined = {"ray": {"address": "10.1.2.3:6379"}}
    assert exposure.warnings(load_config(joined)) == []
    assert "unless Ray asks for a token" in "".join(exposure.warnings(load_config(joined | ANYBODY)))


@contextmanager
def head(code: grpc.StatusCode) -> Iterator[str]:
    """The address of what answers whoever asks it anything."""

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        context.set_code(code)
        return b""

    class Anything(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(ThreadPoolExecutor(1), handlers=(Anything(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def test_a_ray_cluster_that_asks_nobody_is_joined_only_if_the_config_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with head(grpc.StatusCode.OK) as address:
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
        for joined in (address, "auto"):
            with pytest.raises(ConfigError, match="RAY_AUTH_MODE=token") as caught:
                preflight.check_ray(load_config({"ray": {"address": joined}}))
            assert caught.value.field == "ray.address"
            assert "security.allow_unauthenticated: true" in caught.value.message
            preflight.check_ray(load_config({"ray": {"address": joined}} | ANYBODY))
        preflight.check_ray(load_config({"ray": {"address": address, "enabled": False}}))
    with head(grpc.StatusCode.UNAUTHENTICATED) as address:
        preflight.check_ray(load_config({"ray": {"address": address}}))


def test_where_auto_leads_is_known_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = load_config({"ray": {"address": "auto"}})
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="finds no Ray on this host"):
        preflight.ray_address(auto)
    monkeypatch.setenv("RAY_ADDRESS", "10.1.2.3:6379")
    assert preflight.ray_address(auto) == "10.1.2.3:6379"
    monkeypatch.setenv("RAY_ADDRESS", "ray://10.1.2.3:10001")
    with pytest.raises(ConfigError, match="RAY_ADDRESS"):
        preflight.ray_address(auto)
    assert preflight.ray_address(load_config({})) is None


def test_an_authority_of_the_clusters_own_outlives_it() -> None:
    from diptych.cluster.process.certs import Authority

    assert Authority.new("x", days=3650).cert.not_valid_after_utc > datetime.now(UTC) + timedelta(days=3600)
