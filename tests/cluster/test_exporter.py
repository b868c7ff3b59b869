"""The Prometheus exporter: every metric of the table, and nothing that is not in it."""

from __future__ import annotations

import pytest
from diptych.cluster.exporter import Exporter
from diptych.core.metrics import METRICS, Metric, Recorder


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_metric_of_the_table_is_recorded_under_its_own_name(metric: Metric) -> None:
    exporter = Exporter()
    recorder: Recorder = exporter
    labels = dict.fromkeys(metric.labels, "x")
    record = {"counter": recorder.inc, "gauge": recorder.set, "histogram": recorder.observe}[metric.kind]
    record(metric.name, 2.0, **labels)
    text = exporter.text().decode()
    assert f"# HELP {metric.name} {metric.help}" in text
    assert f"# TYPE {metric.name} {metric.kind}" in text
    inside = ",".join(f'{label}="x"' for label in sorted(metric.labels))
    sample = metric.name + ("_sum" if metric.kind == "histogram" else "") + (f"{{{inside}}}" if inside else "")
    assert any(line.rpartition(" ")[0] in (sample, _unsorted(metric)) and line.endswith(" 2.0") for line in text.splitlines())
    assert "_created" not in text


def _unsorted(metric: Metric) -> str:
    inside = ",".join(f'{label}="x"' for label in metric.labels)
    return metric.name + ("_sum" if metric.kind == "histogram" else "") + (f"{{{inside}}}" if inside else "")


def test_counters_add_and_gauges_replace() -> None:
    exporter = Exporter()
    exporter.inc("diptych_output_tokens_total")
    exporter.inc("diptych_output_tokens_total", 4)
    exporter.set("diptych_requests_running", 7)
    exporter.set("diptych_requests_running", 3)
    lines = exporter.text().decode().splitlines()
    assert "diptych_output_tokens_total 5.0" in lines
    assert "diptych_requests_running 3.0" in lines


def test_what_is_not_in_the_table_is_a_defect() -> None:
    exporter = Exporter()
    with pytest.raises(KeyError):
        exporter.inc("diptych_nonsense_total")
    with pytest.raises(KeyError):
        exporter.inc("diptych_requests_total")
    with pytest.raises(KeyError):
        exporter.inc("diptych_output_tokens_total", worker="x")
    with pytest.raises(KeyError):
        exporter.inc("diptych_requests_total", result="stop")


def test_two_exporters_do_not_meet() -> None:
    one, other = Exporter(), Exporter()
    one.set("diptych_requests_running", 1)
    assert "diptych_requests_running 0.0" in other.text().decode()
