"""The comparison with peers: servers are started and ended whole, the transformers server says what transformers says, the table."""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from diptych.benchmarks.peers.goals import GOALS, PEER
from diptych.benchmarks.peers.loads import ALONE, SEARCH, STEADY
from diptych.benchmarks.peers.servers import NotStarted, Peer, peers
from diptych.benchmarks.peers.table import table
from diptych.benchmarks.peers.transformers_server import Model, make_app
from starlette.testclient import TestClient

SERVER = """
import os, sys, time, http.server
child = os.fork()
if not child:
    time.sleep(600)
open("pids", "w").write(f"{os.getpid()} {child}")
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": []}')
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_server_is_started_and_ended_with_all_it_started(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    peer = Peer("fake", (sys.executable, "{model}/server.py", "{port}"), "1")
    with peer.serving(tmp_path, tmp_path / "log") as url:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
            assert json.load(answer) == {"data": []}
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert all(map(alive, pids))
    end = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def test_a_server_that_ends_at_once_is_told_with_its_log(tmp_path: Path) -> None:
    peer = Peer("broken", (sys.executable, "-c", "raise SystemExit('no such model')"), "1")
    with pytest.raises(NotStarted, match="no such model"), peer.serving(tmp_path, tmp_path / "log"):
        raise AssertionError("it serves nothing")


def test_all_four_are_there_and_what_is_missing_says_how_to_get_it() -> None:
    found = {peer.name: peer for peer in peers()}
    assert list(found) == ["diptych, apart", "diptych, colocated", "vLLM", "transformers"]
    assert found["diptych, apart"].missing is None
    if not Path(os.environ.get("DIPTYCH_VLLM", "~/.venvs/vllm/bin/vllm")).expanduser().exists():
        assert "pip install" in (found["vLLM"].missing or "")


def test_the_transformers_server_streams_what_transformers_generates(tiny_gemma3_source: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ids = [2, 40, 41, 42, 43]
    reference = AutoModelForCausalLM.from_pretrained(tiny_gemma3_source, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        out = reference.generate(torch.tensor([ids]), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    model = Model(tiny_gemma3_source)
    with TestClient(make_app(model)) as client:
        assert client.get("/v1/models").json()["data"] == [{"id": "tiny-gemma3"}]
        answer = client.post("/v1/completions", json={"prompt": ids, "max_tokens": 6, "stream": True})
    events = [json.loads(line[6:]) for line in answer.text.strip().split("\n\n")[:-1]]
    assert answer.text.endswith("data: [DONE]\n\n")
    assert [event["choices"][0]["text"] for event in events[:-1]] == [model.text(int(token)) for token in out[0, len(ids) :]]
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 4, 5, 6, 6]
    assert events[-1]["usage"]["prompt_tokens"] == 5


def measured(ms: float) -> dict[str, Any]:
    figures = {"p50": ms / 1000, "p99": 2.5 * ms / 1000}
    report: dict[str, Any] = {
        "times": {"ttft": figures, "tpot": figures, "itl": figures, "handover_gap": figures},
        "itl_p99_over_p50": 2.5,
        "output_tokens_per_s": 4000 / ms,
        "attainment": {"share": 0.9},
        "errors": {"timeout": 2} if ms > 50 else {},
    }
    return {"start_s": ms, STEADY: report, ALONE: report, SEARCH: {"goodput": {"rate": 150 / ms, "proven": None}}}


def test_the_tables_have_what_was_measured_and_a_line_for_the_rest() -> None:
    results = {"ours": measured(50.0), PEER: measured(100.0), "other": {"skipped": "pip install other"}, "last": {"failed": "no"}}
    heading, ours, theirs, empty, *rest = table(results, {"ttft": 0.02, "tpot": 0.01}).splitlines()
    assert ours.split() == ["ours", "50.0", "125.0", "50.0", "125.0", "50.0", "125.0", "2.50", "50.0", "125.0", "80.0", "90%", "3.00", "-"]
    assert len(heading) == len(ours) == len(theirs)
    assert (empty, rest[0].split()) == ("", ["goal", "ours", PEER, "bound", "wanted", "reached", "by"])
    assert rest[1].split() == ["TTFT", "alone", "50", "ms", "100", "ms", "20", "ms", "≤", "0.6", "×", PEER, "-"]
    assert rest[len(GOALS) + 1 :] == [
        f"{PEER}: steady: errors: {{'timeout': 2}}",
        f"{PEER}: alone: errors: {{'timeout': 2}}",
        "other: skipped: pip install other",
        "last: failed: no",
    ]


def test_goals_are_reached_beside_the_peer_and_say_nothing_of_what_was_not_measured() -> None:
    reached = {goal.name: goal.reached(measured(50.0), measured(100.0)) for goal in GOALS}
    assert reached == {
        "TTFT alone": True,
        "TPOT alone": True,
        "16 at once": None,
        "ITL p99 / p50": False,
        "tokens 1 to 2, p99": False,
        "goodput": True,
        "ITL p99, long prompts": None,
        "start to first token": False,
    }
