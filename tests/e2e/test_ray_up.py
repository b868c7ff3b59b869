"""`ray up` with cluster/launch/local.yaml, for real: over ssh onto bare hosts, from the first command to `ray down`.

What is not as a user has it: the hosts are namespaces of one machine, and Diptych is not installed there by pip but linked, as each would
download 1 GB.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_harness import wait_for
from hosts import Host
from ssh_hosts import Site, missing, site

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
UP_S = 900.0
"""Ray gives a host 30 s to start and then tries anew: on a busy machine that takes several rounds of a minute and more."""
PROMPT = "the thin man and the other thing in the inn; then another one, and the end of it all there"
PLAIN = "--max-tokens 12"
GENERATE = f'diptych generate "{PROMPT}" -t 0'
pytestmark = [pytest.mark.root, pytest.mark.nightly, pytest.mark.skipif(missing() is not None, reason=missing() or "")]


class Office:
    """What a user has at the desk: a checkout, and the file they have edited."""

    def __init__(self, of: Site, model: Path) -> None:
        self.site, self.directory = of, of.root / "checkout"
        launch = self.directory / "cluster" / "launch"
        launch.mkdir(parents=True)
        (self.directory / "dist").mkdir()
        (self.directory / "dist" / "constraints.txt").write_bytes((ROOT / "constraints.txt").read_bytes())
        phase = {"threads": os.cpu_count(), "kv_tokens": 2048}  # one worker fills a host
        values = yaml.safe_load((ROOT / "cluster/launch/cluster.yaml").read_text())
        values |= {"model": {"source": str(model), "dtype": "float32"}, "prefill": phase, "decode": phase}
        (launch / "cluster.yaml").write_text(yaml.safe_dump(values))
        self.file = launch / "local.yaml"

    def edit(self, head: Host, prefill: Host, *decode: Host) -> None:
        """As the comments of the shipped file say."""
        text = (ROOT / "cluster/launch/local.yaml").read_text()
        for old, new in (
            ("10.0.0.1 ", f"{head.address} "),
            ("[10.0.0.2, 10.0.0.3]", str([host.address for host in (prefill, *decode)])),
            ("ssh_user: ubuntu", "ssh_user: root"),
            ("~/.ssh/id_ed25519", str(self.site.key)),
            ("prefill-only)", f"{prefill.address})"),
            ("decode-only)", "|".join(host.address for host in decode) + ")"),
        ):
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        values = yaml.safe_load(text)
        path = next(command for command in values["setup_commands"] if ".bashrc" in command)
        values["setup_commands"] = [f"ln -sfn {sys.prefix} ~/diptych", path]
        self.file.write_text(yaml.safe_dump(values, width=10_000))

    def ray(self, *arguments: str) -> str:
        done = self.site.run([str(BIN / "ray"), *arguments], self.directory, UP_S)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def state(self, head: Host) -> dict[str, Any] | None:
        """What `diptych status` there reads; None while no cluster runs."""
        path = Path(f"/proc/{head.holder}/root{self.site.home}/.local/state/diptych/default/cluster.json")
        return json.loads(path.read_text()) if path.exists() else None  # always whole: it is replaced, not written to

    def serves(self, head: Host) -> bool:
        return bool((state := self.state(head)) and state["ready"])

    def ask(self, head: Host, flags: str = PLAIN) -> str:
        """The answer, and what is said of it on stderr."""
        answer = self.site.on(head, f"{GENERATE} {flags}")
        assert answer.returncode == 0, answer.stderr
        return answer.stdout if flags == PLAIN else answer.stdout + answer.stderr


def site_of(state: dict[str, Any] | None, worker: str) -> str | None:
    """The host that a worker listens on."""
    for process in (state or {}).get("processes", ()):
        if process["name"] == worker and not process["rank"] and process["address"]:
            return str(process["address"].rpartition(":")[0])
    return None


@pytest.mark.timeout(3600)
def test_ray_up_serves_over_hosts_grows_loses_one_and_goes_down(tiny_llama_source: Path) -> None:
    with site("head", "one", "two", "three") as whole:
        head, one, two, three = whole.others
        model = whole.root / "model"
        subprocess.run(["cp", "-r", str(tiny_llama_source), str(model)], check=True, timeout=20)
        office = Office(whole, model)

        office.edit(head, one, two)
        office.ray("get-auth-token", "--generate")
        office.ray("up", "-y", str(office.file))
        wait_for("the cluster", lambda: office.serves(head), UP_S)
        first = office.state(head)
        assert (site_of(first, "prefill-0"), site_of(first, "decode-0")) == (one.address, two.address)

        before = two.received
        answer = office.ask(head, f"{PLAIN} --stats")
        moved = re.search(r"KV moved +([\d,]+) bytes in .* over gloo", answer)
        assert moved, answer
        assert two.received - before > int(moved[1].replace(",", ""))
        plain = office.ask(head)

        office.edit(head, one, two, three)
        office.ray("up", "-y", "--no-restart", str(office.file))
        scaled = whole.on(head, "diptych scale --decode 2", UP_S)
        assert scaled.returncode == 0, scaled.stderr
        grown = office.state(head)
        assert site_of(grown, "decode-1") == three.address
        assert first is not None
        assert grown is not None
        assert grown["pid"] == first["pid"], "it has served all the time"

        long = [subprocess.Popen(whole.ssh(head, f"{GENERATE} --max-tokens 700"), stdout=subprocess.PIPE, bufsize=0) for _ in range(4)]
        begun = [process.stdout.read(1) for process in long if process.stdout]
        two.crash()
        ends = [start + process.communicate(timeout=UP_S)[0] for start, process in zip(begun, long, strict=True)]
        assert [process.returncode for process in long] == [0] * 4
        assert len(set(ends)) == 1, "what was being written there goes on elsewhere, token for token"
        assert office.ask(head) == plain

        office.ray("down", "-y", str(office.file))
        wait_for("the end of Ray and Diptych on the head", lambda: not remaining(head), UP_S)
        for host in (one, three):
            wait_for(
                f"the end of Diptych on {host.name}", lambda host=host: not any("diptych.cluster" in line for line in remaining(host)), UP_S
            )
            assert whole.on(host, "ray stop").returncode == 0, "Ray leaves a log monitor and two agents on hosts that are not the head"
            assert not remaining(host)


def remaining(host: Host) -> list[str]:
    """The command lines of what runs there and is Ray's or ours."""
    lines = []
    for pid in host.processes:
        try:
            lines.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [line for line in lines if "ray" in line or "diptych" in line]
