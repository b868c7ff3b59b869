"""Real clusters of a tiny model, through the command line: what a user types, and that nothing is left of it."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cluster_harness import Cluster, killed_at_once, nothing_left, shared_memory, sockets_below, wait_for
from diptych.cluster.on_ray.launcher import ray_environment
from diptych.cluster.process import processes
from diptych.cluster.process.launcher import Launch, PlainLauncher
from real_harness import PROMPT, ROOT, UP_S, diptych, ray_of_others, up

HERE = Path(__file__).parent

pytestmark = pytest.mark.usefixtures("runtime")


def test_a_plain_cluster_from_up_to_down(tiny_gemma3_dir: Path, runtime: Path) -> None:
    before = shared_memory()
    with up(tiny_gemma3_dir, runtime, "--no-ray", "-v") as cluster:
        cluster.expect("Ctrl-C ends it.", UP_S)
        cluster.expect("last token", UP_S)
        for who in ("router", "prefill-0", "decode-0"):
            assert re.search(rf"{who} is ready at ", cluster.output)
        state = cluster.state()

        whole = diptych("generate", PROMPT, "--max-tokens", "12", "-t", "0", "--stats")
        assert whole.returncode == 0, whole.stderr
        assert re.search(r"path +prefill-0 → decode-0", whole.stderr)
        assert re.search(r"KV moved +[\d,]+ bytes in .* over shm", whole.stderr)
        piped = diptych("generate", "--max-tokens", "12", "-t", "0", stdin=PROMPT)
        assert piped.stdout == whole.stdout
        assert diptych("generate", PROMPT, "--max-tokens", "0").returncode == 1

        listed = json.loads(diptych("status", "--json").stdout)
        assert [(one["name"], one["ready"]) for one in listed] == [("default", True)]
        shown = diptych("status")
        assert re.search(r"decode-0 +\d+ +127.0.0.1:\d+ +ready", shown.stdout)

        refused = diptych("chat")
        assert refused.returncode == 1
        assert "has no chat template" in refused.stderr
        assert "diptych up --chat-template FILE" in refused.stderr

        metrics = httpx.get(f"http://{state['http']}/metrics").text
        assert re.search(r'diptych_requests_total\{outcome="length"\} [1-9]', metrics)
        second = diptych(
            "up", "--model", str(tiny_gemma3_dir), "--no-ray", "--name", "two", "--http-port", str(state["http"]).split(":")[1]
        )
        assert second.returncode == 2
        assert "router.http_port: cannot listen on" in second.stderr

        ended = diptych("down")
        assert ended.returncode == 0
        assert "nothing is left of it" in ended.stdout
        assert cluster.wait() == 0
    assert nothing_left(state)
    wait_for("the end of its names in shared memory", lambda: shared_memory() <= before)
    assert not list(runtime.glob("diptych/*"))


@pytest.fixture(scope="module")
def served(tiny_gemma3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One for several tests, of which the last ends it: a start takes 10 s of a core."""
    directory = tmp_path_factory.mktemp("plain")
    file = directory / "cluster.yaml"
    file.write_text("log: {level: debug}\nprefill: {threads: 1}\ndecode: {threads: 1}\n")
    with up(tiny_gemma3_dir, directory / "run", "-f", str(file), "--no-ray") as cluster:
        cluster.expect("Ctrl-C ends it.", UP_S)
        yield cluster


@pytest.fixture
def plain(served: Cluster, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """A plain cluster, which commands ask meanwhile."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(served.runtime))
    return served


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="both workers are on the one core there is")
def test_a_prefill_worker_reads_a_prompt_with_the_core_of_an_idle_decode_worker_too(plain: Cluster) -> None:
    logs = Path(str(plain.state()["logs"]))
    answer = diptych("generate", PROMPT, "--max-tokens", "8", "-t", "0")
    assert answer.returncode == 0

    def used() -> list[tuple[int, ...]]:
        lines = (logs / "prefill-0.log").read_text().splitlines()
        return [ast.literal_eval(line.partition("computing on ")[2]) for line in lines if "computing on" in line]

    own, both, *_ = used()
    assert len(own) == 1
    assert len(both) == 2
    assert both[0] == own[0], "its own first"
    wait_for("the core to be given back", lambda: used()[-1] == own)


def test_a_stream_goes_on_when_the_only_decode_worker_is_killed(plain: Cluster) -> None:
    body = {"prompt": PROMPT, "max_tokens": 800, "temperature": 0, "ignore_eos": True}
    state = plain.state()
    url = f"http://{state['http']}/v1/completions"
    pids = {process["name"]: process["pid"] for process in state["processes"]}  # type: ignore[attr-defined]
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", url, json=streamed, headers={"x-diptych-timing": "1"}, timeout=UP_S) as response:
        lines = (line.removeprefix("data: ") for line in response.iter_lines() if line)
        events = [next(lines)]
        processes.kill(pids["decode-0"], str(state["id"]))
        events += lines
    assert events.pop() == "[DONE]"
    *pieces, last = (json.loads(event) for event in events)
    assert last["timing"]["attempts"] == 2
    assert "Starting it again" in plain.output
    whole = httpx.post(url, json=body, timeout=UP_S).json()
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole["choices"][0]["text"]


def test_down_cleans_up_after_a_supervisor_and_reaper_that_were_killed(plain: Cluster) -> None:
    """The last of those that share it."""
    state = plain.state()
    killed_at_once(plain, str(state["id"]))
    cleaned = diptych("down")
    assert cleaned.returncode == 0
    assert "had been killed; cleaned up after it" in cleaned.stdout
    assert nothing_left(state)


def test_a_source_is_prepared_by_up_and_chats_with_a_template_of_ones_own(
    tiny_llama_source: Path, runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path / "home"))
    template = tmp_path / "chat.jinja"
    template.write_text("{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:")
    flags = ("--dtype", "float32", "--no-ray", "--colocated", "1", "--chat-template", str(template))
    with up(tiny_llama_source, runtime, *flags) as cluster:
        cluster.expect("Ctrl-C ends it.", UP_S)
        assert "model: writing weights" in cluster.output
        prepared = diptych("prepare", str(tiny_llama_source), "--dtype", "float32")
        assert (prepared.returncode, Path(prepared.stdout.strip()).parent) == (0, tmp_path / "home" / "models")
        assert len(list((tmp_path / "home" / "models").iterdir())) == 1, "prepared once, by up"
        answered = diptych("chat", "--max-tokens", "5", "-t", "0", "--system", "Be brief.", stdin="hello\nand then?\n")
        assert answered.returncode == 0, answered.stderr
        assert len(answered.stdout.splitlines()) >= 2
        assert cluster.end(signal.SIGINT) == 0


def test_a_cluster_on_ray_serves_heals_and_leaves_nothing(tiny_gemma3_dir: Path, runtime: Path) -> None:
    before = shared_memory()
    with up(tiny_gemma3_dir, runtime) as cluster:
        cluster.expect("Ctrl-C ends it.", UP_S)
        assert "ray is ready" in cluster.output
        state = cluster.state()
        scratch = str(state["scratch"])
        assert sockets_below(scratch), "Ray's sockets are where we remove them"

        answer = diptych("generate", PROMPT, "--max-tokens", "8", "-t", "0", "--stats")
        assert "over shm" in answer.stderr

        pids = {process["name"]: process["pid"] for process in state["processes"]}  # type: ignore[attr-defined]
        processes.kill(pids["decode-0"], str(state["id"]))
        again = diptych("generate", PROMPT, "--max-tokens", "8", "-t", "0")
        assert again.stdout == answer.stdout, again.stderr
        assert cluster.output.count("decode-0 is ready") == 2, "it was waited for"

        cluster.process.kill()
        wait_for("the reaper", lambda: nothing_left(state), 60)
        wait_for("the end of its sockets", lambda: not sockets_below(scratch))
        wait_for("the end of its names in shared memory", lambda: shared_memory() <= before)
        assert "No cluster runs here" in diptych("status").stdout


@pytest.mark.timeout(240)
def test_a_ray_cluster_that_runs_already_is_joined_and_left(
    tiny_gemma3_dir: Path, runtime: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ray_of_others(scratch, monkeypatch, 3) as address:
        threads = runtime.parent / "threads.yaml"
        threads.write_text("prefill: {threads: 1}\ndecode: {threads: 1}\n")
        with up(tiny_gemma3_dir, runtime, "-f", str(threads), "--address", address) as cluster:
            cluster.expect("Ctrl-C ends it.", UP_S)
            state = cluster.state()
            answer = diptych("generate", PROMPT, "--max-tokens", "8", "-t", "0", "--stats")
            assert "over shm" in answer.stderr
            assert "over shm" in Path(str(state["logs"]), "decode-0.log").read_text()
            assert diptych("scale", "--decode", "2").returncode == 0
            pids = {process["name"]: process["pid"] for process in cluster.state()["processes"]}  # type: ignore[attr-defined]
            cores = [os.sched_getaffinity(pids[name]) for name in ("prefill-0", "decode-0")]
            if len(os.sched_getaffinity(0)) >= 2:
                assert [len(own) for own in cores] == [1, 1]
                assert cores[0] != cores[1], "each on cores of its own"
            assert diptych("scale", "--decode", "1").returncode == 0
            assert diptych("generate", PROMPT, "--max-tokens", "8", "-t", "0").stdout == answer.stdout
            assert cluster.end() == 0
        assert nothing_left(state)
        assert processes.marked(f"others-{scratch.name}"), "their Ray goes on"


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_a_worker_that_finds_no_node_is_refused_with_what_is_free(
    tiny_gemma3_dir: Path, runtime: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ray_of_others(scratch, monkeypatch, 3) as address, up(tiny_gemma3_dir, runtime, "--address", address) as cluster:
        cluster.expect("Ctrl-C ends it.", UP_S)
        refused = diptych("scale", "--prefill", "2", "--decode", "2", timeout_s=150)
        assert refused.returncode == 2
        assert "has joined" in refused.stdout, "there are three CPUs"
        assert re.search(r"No node of the Ray cluster has 1 CPU and [\d.]+ GiB free for \w+-1 \(free are [\d.]+: 0 CPUs", refused.stderr)
        assert re.search("prefill workers, 1 decode workers|1 prefill workers, 2", diptych("status").stdout)
        assert diptych("generate", PROMPT, "--max-tokens", "8", "-t", "0").returncode == 0
        assert cluster.end() == 0


def test_a_ray_worker_started_from_the_root_imports_other_peoples_proto(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DESIGN §4: `proto` and `kernels` at our root must not be what others find under these names."""
    monkeypatch.chdir(ROOT)
    cluster_id = "imports-" + scratch.name

    async def ask() -> dict[str, Any]:
        launcher = PlainLauncher(cluster_id, scratch, ray_environment(os.environ, local=True))
        log = scratch / "ray.log"
        running = await launcher.start(Launch("ray", (sys.executable, str(HERE / "ray_worker_imports.py")), log))
        events = [event async for event in running.lines()]
        assert await running.wait() == 0, log.read_text()
        return events[-1]

    try:
        found = asyncio.run(ask())
    finally:
        processes.sweep(cluster_id, ())
    assert "site-packages" in found["proto"]
    assert "site-packages" in found["transformers"]
    assert found["message"] == "Message"
    assert Path(found["ours"]).is_relative_to(ROOT)
    assert str(ROOT) not in found["path"]
    assert found["cwd"] != str(ROOT)
