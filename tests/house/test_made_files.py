"""What is made from the table of metrics is what the table says: the page, the dashboard, the alert rules; and promtool takes them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from diptych.cluster import metrics_docs
from diptych.cluster.dashboards import __main__ as dashboards
from diptych.cluster.dashboards.alerts import ALERTS, Alert
from diptych.cluster.dashboards.grafana import dashboard
from diptych.core.metrics import METRICS
from house_rules import ROOT

FOLDER = ROOT / "cluster" / "dashboards"
SERIES = {name for metric in METRICS for name in metric.series}
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: apt install prometheus)")


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:diptych_|vllm:)[a-z0-9_]+", expression))


def test_the_page_of_metrics_is_what_the_table_says() -> None:
    assert (ROOT / "docs/metrics.md").read_text() == metrics_docs.reference(), "python -m diptych.cluster.metrics_docs docs/metrics.md"


@pytest.mark.parametrize("name", dashboards.files())
def test_a_made_file_is_what_the_table_says(name: str) -> None:
    assert (FOLDER / name).read_text() == dashboards.files()[name], "python -m diptych.cluster.dashboards"


def test_a_check_says_what_is_stale(tmp_path: Path) -> None:
    page = tmp_path / "metrics.md"
    command = [sys.executable, "-P", "-m", "diptych.cluster.metrics_docs"]
    page.write_text("old")
    assert subprocess.run([*command, "--check", str(page)], capture_output=True, check=False).returncode == 1
    assert subprocess.run([*command, str(page)], capture_output=True, check=False).returncode == 0
    assert subprocess.run([*command, "--check", str(page)], capture_output=True, check=False).returncode == 0


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    shown = {name for panel in dashboard()["panels"] for target in panel.get("targets", ()) for name in names_in(target["expr"])}
    assert shown <= SERIES
    assert not [metric.name for metric in METRICS if not shown & set(metric.series)]


def test_no_panel_lies_on_another() -> None:
    taken: dict[tuple[int, int], int] = {}
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["id"]) == panel["id"]


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_an_alert_speaks_of_metrics_that_exist(alert: Alert) -> None:
    assert names_in(alert.expr)
    assert names_in(" ".join((alert.expr, *alert.fires, *alert.quiet))) <= SERIES
    assert alert.summary.endswith(".")
    assert alert.mend.endswith(".")


@needs_promtool
def test_promtool_takes_the_rules() -> None:
    checked = subprocess.run([str(PROMTOOL), "check", "rules", str(FOLDER / "alerts.yaml")], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(ALERTS)} rules found" in checked.stdout


@needs_promtool
def test_every_rule_fires_when_it_should_and_not_else() -> None:
    tested = subprocess.run([str(PROMTOOL), "test", "rules", "alerts_test.yaml"], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stdout + tested.stderr


@needs_promtool
def test_promtool_would_tell(tmp_path: Path) -> None:
    for name in ("alerts.yaml", "alerts_test.yaml"):
        shutil.copy(FOLDER / name, tmp_path)
    rules = tmp_path / "alerts.yaml"
    rules.write_text(rules.read_text().replace("> 0.95", "> 0.995"))
    assert subprocess.run([str(PROMTOOL), "test", "rules", "alerts_test.yaml"], cwd=tmp_path, capture_output=True, check=False).returncode
