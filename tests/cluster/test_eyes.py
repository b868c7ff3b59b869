"""What can be seen of a real cluster from outside: its metrics, its logs, `diptych top` and `diptych doctor`."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from cluster_harness import Cluster, wait_for
from diptych.cluster.top.scraped import Scrape, parse
from diptych.core.metrics import METRICS, MODEL, VLLM
from diptych.proto.inference_pb2 import GenerateRequest, Sampling
from prometheus_client.parser import text_string_to_metric_families
from real_harness import UP_S, up

SECRET = "xylophone quartz zeppelin and the other thing in the inn"
"""In every prompt, and in no log."""
KNOWN = {metric.name: metric for metric in METRICS}


@dataclass(frozen=True)
class Seen:
    cluster: Cluster
    model: Path
    state: dict[str, Any]
    url: str

    def scrape(self) -> Scrape:
        return parse(httpx.get(f"{self.url}/metrics", timeout=UP_S).text, 0.0)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "diptych.cluster.cli", *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=UP_S, check=False)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "XDG_RUNTIME_DIR": str(self.cluster.runtime), "PYTHONSAFEPATH": "1"}

    def log(self, name: str) -> list[dict[str, Any]]:
        lines = Path(self.state["logs"], f"{name}.log").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def seen(tiny_gemma3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    runtime = tmp_path_factory.mktemp("eyes")
    with up(tiny_gemma3_dir, runtime, "--no-ray", "--log-format", "json") as cluster:
        cluster.expect("Ctrl-C ends it.", UP_S)
        state = cluster.state()
        yield Seen(cluster, tiny_gemma3_dir, state, f"http://{state['http']}")
        assert cluster.end() == 0


def ask(seen: Seen, prompt: str, max_tokens: int = 8, **more: Any) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **more}
    return httpx.post(f"{seen.url}/v1/completions", json=body, headers={"x-diptych-timing": "1"}, timeout=UP_S)


def test_every_name_of_the_table_is_served_and_no_other(seen: Seen) -> None:
    assert ask(seen, SECRET).status_code == 200
    families = list(text_string_to_metric_families(httpx.get(f"{seen.url}/metrics", timeout=UP_S).text))
    served = {family.name + ("_total" if family.type == "counter" else ""): family for family in families}
    assert set(served) == set(KNOWN)
    for name, family in served.items():
        metric = KNOWN[name]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        for sample in family.samples:
            own = {*metric.label_names, *((MODEL,) if name.startswith(VLLM) else ())}
            assert set(sample.labels) - {"le"} == own
            assert sample.name in metric.series
            for label in metric.labels:
                allowed = label.values or ("prefill-0", "decode-0")
                assert sample.labels[label.name] in allowed
    assert {sample.labels["worker"] for sample in served["diptych_worker_up"].samples} == {"prefill-0", "decode-0"}


def test_the_values_add_up(seen: Seen) -> None:
    before = seen.scrape()
    prompts = [f"{SECRET} number {number} of them all" for number in range(3)]
    answers = [ask(seen, prompt).json() for prompt in prompts]
    answers += [ask(seen, "a b", 5).json(), ask(seen, f"once {SECRET}", 1).json()]
    assert ask(seen, "", 5).status_code == 400
    assert httpx.post(f"{seen.url}/v1/completions", content=b"x" * (5 << 20), timeout=UP_S).status_code == 413

    usage = [answer["usage"] for answer in answers]
    now = seen.scrape()

    def grown(name: str, **where: str) -> float:
        return now.total(name, **where) - before.total(name, **where)

    def told() -> bool:
        """Whether the workers have reported all of it: they do so behind the answers."""
        nonlocal now
        now = seen.scrape()
        computed = grown("diptych_worker_computed_tokens_total") + grown("diptych_worker_local_prefill_tokens_total")
        cached = grown("diptych_worker_cached_tokens_total", phase="prefill")
        return computed + cached == sum(each["prompt_tokens"] for each in usage) and now.total("vllm:num_requests_running") == 0

    wait_for("the workers' last reports", told)
    assert grown("vllm:prompt_tokens_total") == sum(each["prompt_tokens"] for each in usage)
    assert grown("vllm:generation_tokens_total") == sum(each["completion_tokens"] for each in usage) == 3 * 8 + 5 + 1
    assert grown("vllm:request_success_total") == grown("diptych_requests_total", outcome="length") == 5
    assert grown("diptych_requests_total") == 7
    assert grown("diptych_requests_total", outcome="too_large") == 1
    assert grown("diptych_refusals_total") == grown("diptych_refusals_total", reason="invalid_request") + 1 == 2
    for path, count in (("disaggregated", 3), ("local", 1), ("prefill_only", 1)):
        assert grown("diptych_attempts_total", path=path) == count
    timings = [answer["timing"] for answer in answers]
    assert grown("diptych_kv_transfer_bytes_total") == sum(timing["kv_bytes"] for timing in timings) > 0
    assert grown("diptych_kv_transfer_bytes_total", transport="shm") == grown("diptych_kv_transfer_bytes_total")
    for name in ("diptych_kv_transfer_seconds", "diptych_kv_transfer_exposed_seconds", "diptych_handover_gap_seconds"):
        assert grown(f"{name}_count") == 3, name
    assert grown("diptych_kv_transfer_seconds_sum") == pytest.approx(sum(timing["transfer_seconds"] for timing in timings), rel=0.01)
    for name, count in (
        ("time_to_first_token", 5), ("e2e_request_latency", 5), ("request_queue_time", 5), ("request_time_per_output_token", 4),
        ("inter_token_latency", 3 * 6 + 4),
    ):  # fmt: skip
        assert grown(f"vllm:{name}_seconds_count") == count, name
    assert grown("vllm:time_to_first_token_seconds_sum") == pytest.approx(sum(timing["ttft"] for timing in timings), rel=0.01)
    for phase in ("prefill", "decode"):
        states = now.by("diptych_worker_blocks", "state", phase=phase)
        assert states.get("referenced", 0) == states.get("fenced", 0) == 0
        assert sum(states.values()) > 0
        assert now.total("vllm:kv_cache_usage_perc", phase=phase) == 0
    assert now.total("diptych_worker_grants_waiting") == now.total("diptych_worker_leases") == 0


def test_one_requests_id_is_in_every_process_s_log_and_no_prompt_is(seen: Seen) -> None:
    body = {"prompt": SECRET + " again", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{seen.url}/v1/completions", json=body, headers={"X-Request-Id": "trace me/42"}, timeout=UP_S)
    assert answer.headers["x-request-id"] == "traceme/42"

    def found(name: str) -> list[dict[str, Any]]:
        return [line for line in seen.log(name) if line.get("request") == "traceme/42"]

    names = ("router", "prefill-0", "decode-0")
    wait_for("a line in each log", lambda: all(found(name) for name in names))
    router, prefill, decode = (found(name) for name in names)
    assert [line["message"] for line in router] == ["request ended"]
    assert [line["message"] for line in prefill] == ["handed over"]
    assert [line["message"] for line in decode] == ["finished"]
    assert prefill[0]["attempt"] == decode[0]["attempt"]
    assert prefill[0]["kv_bytes"] == router[0]["kv_bytes"] > 0
    assert (prefill[0]["process"], decode[0]["process"]) == ("prefill-0", "decode-0")
    for path in Path(seen.state["logs"]).glob("*.log"):
        assert "xylophone" not in path.read_text(), path


def test_every_answer_has_an_id(seen: Seen) -> None:
    for path in ("/health", "/v1/models", "/metrics", "/nothing"):
        assert re.fullmatch(r"[0-9a-f]{24}", httpx.get(seen.url + path, timeout=UP_S).headers["x-request-id"]), path
        assert httpx.get(seen.url + path, headers={"x-request-id": "mine"}, timeout=UP_S).headers["x-request-id"] == "mine"


def test_grpc_has_it_in_its_metadata(seen: Seen) -> None:
    request = GenerateRequest(text="hello there", sampling=Sampling(max_tokens=2))
    with grpc.insecure_channel(seen.state["grpc"]) as channel:
        method = channel.unary_stream("/diptych.v1.Inference/Generate", GenerateRequest.SerializeToString, lambda data: data)
        for metadata, wanted in (((), r"[0-9a-f]{24}"), ((("x-request-id", "grpc one"),), "grpcone")):
            call = method(request, metadata=metadata, timeout=UP_S)
            list(call)
            assert re.fullmatch(wanted, dict(call.initial_metadata())["x-request-id"])
    wait_for("the router's line", lambda: any(line.get("request") == "grpcone" for line in seen.log("router")))


def test_top_shows_what_the_metrics_say(seen: Seen) -> None:
    assert ask(seen, SECRET + " top").status_code == 200
    wait_for("the workers' last reports", lambda: seen.scrape().total("vllm:num_requests_running") == 0)
    shown = json.loads(seen.run("top", "--once", "--json", "--slo", "ttft=60s,tpot=60s").stdout)
    now = seen.scrape()
    assert [(worker["name"], worker["phase"], worker["up"]) for worker in shown["workers"]] == [
        ("prefill-0", "prefill", True),
        ("decode-0", "decode", True),
    ]
    assert shown["transfers"][0]["bytes"] == now.total("diptych_kv_transfer_bytes_total")
    assert shown["ttft"]["met"] == shown["tpot"]["met"] == 1.0
    assert 0 < shown["ttft"]["p50"] <= shown["ttft"]["p99"]
    plain = seen.run("top", "--once")
    assert plain.returncode == 0, plain.stderr
    assert re.search(r"decode-0 +up +0 +0 +░", plain.stdout)
    assert re.search(r"shm +\d+ +[\d.]+ (k?B|MB)", plain.stdout)


def test_top_of_nobody_says_so(seen: Seen) -> None:
    refused = seen.run("top", "--once", "--server", "127.0.0.1:9")
    assert refused.returncode == 1
    assert "does not tell its metrics" in refused.stderr
    assert seen.run("top", "--once", "--name", "nobody").returncode == 1


def test_top_lives_in_a_terminal_until_q(seen: Seen) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "diptych.cluster.cli", "top", "--every", "0.1"]
    environment = {**seen.environment, "COLUMNS": "140", "LINES": "40", "TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True)
    os.close(theirs)
    try:
        output = read_until(ours, "the last ")
        assert "prefill-0" in output
        os.write(ours, b"q")
        output += read_until(ours, "\x1b[?1049l")
        assert process.wait(30) == 0, "it ends, and the screen is as it was"
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read_until(terminal: int, text: str, within_s: float = 30.0) -> str:
    """What is written to a terminal until `text` comes."""
    end, output = time.monotonic() + within_s, ""
    while text not in output:
        ready, _, _ = select.select([terminal], [], [], max(0.0, end - time.monotonic()))
        assert ready, f"no {text!r} within {within_s} s: {output!r}"
        output += os.read(terminal, 65536).decode(errors="replace")
    return output


def test_doctor_tries_the_link_between_the_workers(seen: Seen) -> None:
    whole = seen.run("doctor", "--no-ray", "--json", "-m", str(seen.model))
    found = {finding["check"]: finding for finding in json.loads(whole.stdout)}
    assert found["link prefill-0 → decode-0"]["state"] == "ok", whole.stdout
    assert "over shm" in found["link prefill-0 → decode-0"]["said"]
    assert found["workers"]["state"] == "ok"
    assert found["clock"]["state"] in ("ok", "note")
