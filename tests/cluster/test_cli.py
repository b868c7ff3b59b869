"""The command line with nothing running: help, refusals, exit statuses, what it imports."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from cluster_harness import write_card
from diptych.cluster.cli import app
from typer.testing import CliRunner

COMMANDS = ("up", "demo", "status", "down", "generate", "chat", "prepare", "config")


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster of the machine is seen."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("COLUMNS", "140")


def diptych(*arguments: str, stdin: str | None = None) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments), input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_help_names_every_command() -> None:
    status, out, _ = diptych("--help")
    assert status == 0
    assert all(command in out for command in COMMANDS)


def test_it_says_its_version() -> None:
    assert diptych("--version") == (0, f"diptych {version('diptych')}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    status, out, _ = diptych(command, "--help")
    assert status == 0
    assert f"diptych {command}" in out or "Usage" in out


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["up", "--model", "/nowhere"], 2, "model.source: /nowhere does not exist."),
        (["up", "-f", "/nowhere.yaml"], 2, "There is no config file /nowhere.yaml."),
        (["up", "--decode", "0"], 2, "decode.workers"),
        (["up", "--prefill", "-1"], 2, "prefill.workers"),
        (["up", "--decode-tp", "0"], 2, "decode.tp"),
        (["up", "--prefill-pp", "-2"], 2, "prefill.pp"),
        (["scale"], 2, "Say how many workers there shall be"),
        (["scale", "--decode", "two"], 2, "--decode two: is no number of workers"),
        (["scale", "--prefill", "1,"], 2, "--prefill 1,: is no number of workers"),
        (["scale", "--decode", "1,2"], 1, "Start one with `diptych up`"),
        (["up", "--http-port", "70000"], 2, "router.http_port"),
        (["up", "--colocated", "1", "--prefill", "1"], 2, "--colocated takes the place of --prefill and --decode"),
        (["up", "--address", "x:1", "--no-ray"], 2, "--address joins a Ray cluster and --no-ray does without"),
        (["up", "--name", "Bad Name"], 2, "name:"),
        (["up", "--dtype", "int4"], 2, "int4"),
        (["up", "--kv-cache-dtype", "fp8"], 2, "fp8"),
        (["up", "--chat-template", "/nowhere.jinja"], 2, "there is no file /nowhere.jinja"),
        (["config", "check", "/nowhere.yaml"], 2, "There is no config file"),
        (["down"], 2, "No cluster named 'default' runs here."),
        (["generate", "x"], 1, "Start one with `diptych up`"),
        (["chat"], 1, "Start one with `diptych up`"),
        (["generate", "x", "--name", "other"], 1, "No cluster named 'other'"),
        (["prepare", "/nowhere/model"], 1, "/nowhere/model"),
    ],
)
def test_a_mistake_gets_one_plain_line(arguments: list[str], status: int, says: str) -> None:
    code, _, err = diptych(*arguments)
    assert (code, says in err) == (status, True), err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--prefill-tp", "3"), "prefill.tp: tp 3 does not split tiny"),
        (("--decode-pp", "9"), "decode.pp: pp 9 is more than the 4 layers of tiny"),
    ],
)
def test_a_parallelism_the_model_cannot_have_is_refused_before_anything_starts(tmp_path: Path, flags: tuple[str, ...], says: str) -> None:
    ports = ("--http-port", "0", "--grpc-port", "0")
    code, out, err = diptych("up", "--model", str(write_card(tmp_path / "model")), *ports, *flags)
    assert code == 2
    assert says in err
    assert out == ""
    assert not (tmp_path / "run").exists()


def test_status_and_down_of_nothing() -> None:
    assert diptych("status") == (1, "No cluster runs here. Start one with `diptych up`.\n", "")
    assert diptych("status", "--json") == (1, "[]\n", "")
    assert diptych("down", "--all") == (0, "No cluster runs here.\n", "")


def test_generate_refuses_what_is_not_utf8() -> None:
    result = CliRunner().invoke(app, ["generate", "--server", "127.0.0.1:1"], input=b"caf\xe9")
    assert result.exit_code == 1
    assert "not UTF-8" in result.stderr


def test_generate_says_when_nobody_answers() -> None:
    code, _, err = diptych("generate", "x", "--server", "127.0.0.1:1")
    assert code == 1
    assert "127.0.0.1:1" in err


def test_chat_says_when_nobody_answers() -> None:
    code, _, err = diptych("chat", "--server", "127.0.0.1:1")
    assert code == 1
    assert "127.0.0.1:1" in err


def test_config_schema_and_check(tmp_path: Path) -> None:
    status, out, _ = diptych("config", "schema")
    assert status == 0
    assert "prefill" in json.loads(out)["properties"]
    file = tmp_path / "cluster.yaml"
    file.write_text("decode:\n  workers: 2\n")
    assert diptych("config", "check", str(file))[0] == 0
    file.write_text("decode:\n  wrokers: 2\n")
    code, _, err = diptych("config", "check", str(file))
    assert code == 2
    assert "decode.wrokers: no such key. Did you mean workers?" in err


def test_what_a_crash_left_is_cleaned_and_said(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    home = tmp_path / "run" / "diptych" / "default"
    home.mkdir(parents=True)
    state = {
        "name": "default",
        "id": "00",
        "pid": 2**22 - 1,
        "started": 1,
        "scratch": str(scratch),
        "logs": str(home / "logs"),
        "model": "m",
    }
    (home / "cluster.json").write_text(json.dumps(state))
    status, out, _ = diptych("status")
    assert status == 1
    assert "had been killed; cleaned up after it" in out
    assert not scratch.exists()
    assert not home.exists()
    (home).mkdir(parents=True)
    (home / "cluster.json").write_text("not json")
    assert diptych("status")[0] == 1


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "x", "--server", "127.0.0.1:1"], ["status"], ["config", "schema"]])
def test_light_commands_load_neither_torch_nor_ray(arguments: list[str]) -> None:
    code = (
        "import sys; from diptych.cluster.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit: print(sorted({'torch', 'ray', 'transformers', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert result.stderr.splitlines()[-1] == "[]"


def test_up_refuses_before_anything_is_started(tmp_path: Path) -> None:
    model = write_card(tmp_path / "model", weights_bytes=1 << 60)
    code, out, err = diptych("up", "--model", str(model), "--http-port", "0", "--grpc-port", "0")
    assert code == 2
    assert "not enough memory" in err
    assert not (tmp_path / "run").exists()
    assert "Serving" not in out
