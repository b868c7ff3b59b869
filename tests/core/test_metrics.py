"""The table of metrics: names follow Prometheus' conventions, and none appears twice."""

from __future__ import annotations

import re

import pytest
from diptych.core.metrics import METRICS, Metric


def test_names_are_distinct() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_metric_follows_the_conventions(metric: Metric) -> None:
    assert re.fullmatch(r"diptych_[a-z_]+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert (metric.kind == "histogram") == metric.name.endswith("_seconds")
    assert metric.help.endswith(".")
    assert list(metric.buckets) == sorted(set(metric.buckets))
