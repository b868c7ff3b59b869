"""The Prometheus exporter: every metric of the table, and nothing that is not in it."""

from __future__ import annotations

import pytest
from diptych.cluster.programs.exporter import TOGETHER, Exporter
from diptych.cluster.top.scraped import parse
from diptych.core.metrics import METRICS, MODEL, VLLM, Metric, Recorder


def labels_of(metric: Metric) -> dict[str, str]:
    return {label.name: label.values[0] if label.values else "w-0" for label in metric.labels}


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_metric_of_the_table_is_recorded_under_its_own_name(metric: Metric) -> None:
    exporter = Exporter("tiny")
    recorder: Recorder = exporter
    record = {"counter": recorder.inc, "gauge": recorder.set, "histogram": recorder.observe}[metric.kind]
    record(metric.name, 2.0, **labels_of(metric))
    text = exporter.text().decode()
    assert f"# HELP {metric.name} {metric.help}" in text
    assert f"# TYPE {metric.name} {metric.kind}" in text
    assert "_created" not in text
    shown = {**labels_of(metric), **({MODEL: "tiny"} if metric.name.startswith(VLLM) else {})}
    name = metric.name + ("_sum" if metric.kind == "histogram" else "")
    assert parse(text, 0.0).values[name, tuple(sorted(shown.items()))] == 2.0


def test_counters_add_and_gauges_replace() -> None:
    exporter = Exporter("tiny")
    exporter.inc("vllm:generation_tokens_total")
    exporter.inc("vllm:generation_tokens_total", 4)
    exporter.set("diptych_requests_running", 7)
    exporter.set("diptych_requests_running", 3)
    lines = exporter.text().decode().splitlines()
    assert 'vllm:generation_tokens_total{model_name="tiny"} 5.0' in lines
    assert "diptych_requests_running 3.0" in lines


def test_what_is_not_in_the_table_is_a_defect() -> None:
    exporter = Exporter("tiny")
    with pytest.raises(KeyError):
        exporter.inc("diptych_nonsense_total")
    with pytest.raises(KeyError):
        exporter.inc("diptych_requests_total")
    with pytest.raises(KeyError):
        exporter.inc("vllm:generation_tokens_total", worker="x")
    with pytest.raises(KeyError):
        exporter.inc("diptych_requests_total", result="stop")
    with pytest.raises(KeyError, match="outcome"):
        exporter.inc("diptych_requests_total", outcome="a reason that a client made up")


def test_what_has_no_worker_is_there_from_the_start() -> None:
    lines = Exporter("tiny").text().decode().splitlines()
    assert 'diptych_requests_total{outcome="too_large"} 0.0' in lines
    assert 'diptych_kv_transfer_bytes_total{transport="gloo"} 0.0' in lines
    assert not [line for line in lines if 'phase="' in line]


def test_a_worker_that_has_left_takes_its_series_along() -> None:
    exporter = Exporter("tiny")
    before = len(exporter.text().splitlines())
    for worker in ("d-0", "d-1"):
        for metric in METRICS:
            if metric.of_worker:
                labels = {**labels_of(metric), metric.label_names[0]: worker, "phase": "decode"}
                (exporter.inc if metric.kind == "counter" else exporter.set)(metric.name, 1.0, **labels)
    exporter.forget("d-1", "decode")
    text = exporter.text().decode()
    assert '"d-0"' in text
    assert '"d-1"' not in text
    exporter.forget("d-0", "decode")
    exporter.forget("never-there", "decode")
    assert len(exporter.text().splitlines()) == before


def test_two_exporters_do_not_meet() -> None:
    one, other = Exporter("tiny"), Exporter("tiny")
    one.set("diptych_requests_running", 1)
    assert "diptych_requests_running 0.0" in other.text().decode()


def test_what_is_recorded_is_seen_by_who_looks_and_nothing_is_lost_when_a_worker_goes() -> None:
    exporter = Exporter("tiny")
    for number in range(3 * TOGETHER + 5):
        exporter.inc("vllm:generation_tokens_total")
        exporter.observe("vllm:inter_token_latency_seconds", number % 2)
        if number in (0, TOGETHER, 200):
            lines = exporter.text().decode().splitlines()
            assert f'vllm:generation_tokens_total{{model_name="tiny"}} {number + 1}.0' in lines
            assert f'vllm:inter_token_latency_seconds_count{{model_name="tiny"}} {number + 1}.0' in lines
    exporter.inc("diptych_worker_steps_total", 7, worker="a", phase="decode")
    exporter.inc("diptych_worker_steps_total", 7, worker="b", phase="decode")
    exporter.forget("a", "decode")
    lines = exporter.text().decode().splitlines()
    assert [line for line in lines if line.startswith("diptych_worker_steps_total{")] == [
        'diptych_worker_steps_total{phase="decode",worker="b"} 7.0'
    ]
    assert f'vllm:inter_token_latency_seconds_sum{{model_name="tiny"}} {(3 * TOGETHER + 5) // 2}.0' in lines
