"""Logs: one line per event in either form, to the process's own file, and nowhere once that is over."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
from diptych.cluster.process.logs import Json, Pretty, last_lines, logging_to
from diptych.core.commands import Failed, Finished, FirstTokens, HandedOver
from diptych.core.errors import Cancelled, TransferFailed
from diptych.core.notes import note
from diptych.core.request import MAX_REQUEST_ID, Request, Tokens, request_id_of
from diptych.worker.journal import Journal


def test_one_cluster_after_another_in_one_process(tmp_path: Path) -> None:
    log = logging.getLogger("diptych.test")
    for name in ("one", "two"):
        directory = tmp_path / name
        directory.mkdir()
        with logging_to(directory / "supervisor.log", "info"):
            log.info("of %s", name)
        log.warning("between")  # would make the file anew, or fail for want of its directory
        lines = last_lines(directory / "supervisor.log", 8)
        assert [line.rpartition(": ")[2] for line in lines] == [f"of {name}"]
        shutil.rmtree(directory)
        log.warning("behind")
        assert not directory.exists()


def record(message: str, fields: dict[str, object] | None = None, error: BaseException | None = None) -> logging.LogRecord:
    made = logging.LogRecord("diptych.x", logging.WARNING, __file__, 1, message, (), (type(error), error, None) if error else None)
    if fields is not None:
        made.fields = fields
    return made


def test_json_is_one_object_a_line() -> None:
    line = Json("decode-0").format(record('two\nlines "quoted"', {"request": "r-1", "seconds": 0.5, "path": Path("/x")}, ValueError("bad")))
    assert "\n" not in line
    said = json.loads(line)
    assert said["message"] == 'two\nlines "quoted"'
    assert (said["level"], said["process"], said["logger"], said["request"]) == ("warning", "decode-0", "diptych.x", "r-1")
    assert (said["seconds"], said["path"]) == (0.5, "/x")
    assert "ValueError: bad" in said["trace"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", said["time"])


def test_a_field_cannot_pass_itself_off_as_the_level() -> None:
    assert json.loads(Json("p").format(record("m", {"level": "debug"})))["level"] == "warning"


def test_pretty_is_one_line_whatever_is_said() -> None:
    line = Pretty("decode-0").format(record("a\nb\x1b[31m", {"error": "x y", "request": "r", "none": ""}))
    assert len(line.splitlines()) == 1
    assert "\x1b" not in line
    assert line.endswith('WARNING decode-0 diptych.x: a\\nb\\x1b[31m error="x y" request=r none=""')


def test_what_there_is_not_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "diptych.x"):
        note(logging.getLogger("diptych.x"), "done", ttft=None, tokens=0)
    assert caplog.records[0].__dict__["fields"] == {"tokens": 0}


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("mine-1.2:3/4+5=6@host_7", "mine-1.2:3/4+5=6@host_7"),
        ("a b\nc\x1b[31m", "abc31m"),
        ("x" * 1000, "x" * MAX_REQUEST_ID),
        ("naïve ünïcode", "navencode"),
    ],
)
def test_what_is_kept_of_a_clients_id(said: str, kept: str) -> None:
    assert request_id_of(said) == kept


@pytest.mark.parametrize("said", [None, "", " \n\t", "é"])
def test_a_request_without_an_id_gets_a_fresh_one(said: str | None) -> None:
    assert re.fullmatch(r"[0-9a-f]{24}", request_id_of(said))
    assert request_id_of(said) != request_id_of(said)


class Clock:
    def now(self) -> float:
        return 1.0


def test_an_attempt_has_one_line_with_its_requests_id(caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(Clock())
    with caplog.at_level(logging.INFO, "diptych.worker.journal"):
        for attempt in "abcd":
            journal.opened(attempt, Request(f"r-{attempt}", "", (Tokens((7, 8, 9)),)))
        journal.first(FirstTokens("a", (), (), queued=0.5, computed=0.25, cached_tokens=2))
        journal.first(FirstTokens("of another", (), ()))
        journal.ended(HandedOver("a", 100, 0.25, "shm", 0.125))
        journal.ended(Finished("b", cached_tokens=16, recomputed_tokens=3))
        journal.ended(Failed("c", TransferFailed("broken")))
        journal.lost("d")
        for attempt in "abcd":
            journal.ended(Failed(attempt, Cancelled("again")))
            journal.lost("of another")
    lines = [(made.levelname, made.message, made.__dict__["fields"]["request"]) for made in caplog.records]
    assert lines == [
        ("INFO", "handed over", "r-a"),
        ("INFO", "finished", "r-b"),
        ("WARNING", "failed", "r-c"),
        ("INFO", "stopped: the router is gone", "r-d"),
    ]
    fields = caplog.records[0].__dict__["fields"]
    assert (fields["kv_bytes"], fields["queued_seconds"], fields["computed_seconds"], fields["prompt_cached"]) == (100, 0.5, 0.25, 2)
    assert not re.search(r"\b7, 8\b", caplog.text)
