"""The table of metrics: names follow Prometheus' conventions, none appears twice, and every label has few values."""

from __future__ import annotations

import re

import pytest
from diptych.core import errors
from diptych.core.metrics import ACROSS, BLOCK_STATES, CODES, METRICS, PATHS, VLLM, Metric
from diptych.engine.block_pool import BlockPool
from diptych.router.placement import Across, Path

VLLM_USERS_SCRAPE = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "time_to_first_token_seconds",
    "request_time_per_output_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
]


def test_names_are_distinct() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_what_vllm_has_a_name_for_is_called_that() -> None:
    assert [metric.name for metric in METRICS if metric.name.startswith(VLLM)] == [VLLM + name for name in VLLM_USERS_SCRAPE]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_metric_follows_the_conventions(metric: Metric) -> None:
    assert re.fullmatch(r"(diptych_|vllm:)[a-z0-9_]+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert (metric.kind == "histogram") == metric.name.endswith("_seconds")
    assert metric.help.endswith(".")
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert len(set(metric.label_names)) == len(metric.labels)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_only_workers_names_are_not_listed(metric: Metric) -> None:
    for label in metric.labels:
        assert label.values or label.name in ("worker", "engine"), label
        assert len(label.values) <= 32, "few values"


def test_what_labels_may_be_is_what_there_is() -> None:
    assert set(PATHS) == set(Path)
    assert set(ACROSS) == set(Across)
    assert set(BLOCK_STATES) == set(BlockPool((), (), 16).by_state())
    assert set(CODES) == {kind.code for kind in errors._BY_CODE.values()}
