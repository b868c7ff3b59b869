"""model.quantization: what is refused before anything is spent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diptych.cluster.resources.preflight import check_quantization
from diptych.cluster.resources.source_check import check_spread
from diptych.cluster.supervising.models import find_model
from diptych.core.config import load_config
from diptych.core.errors import ConfigError
from diptych.core.model import CARD
from diptych.core.quantization import Quantization


def test_a_bad_value_is_refused_by_its_key() -> None:
    with pytest.raises(ConfigError, match=r"model\.quantization: .*'int8'.*int3") as refused:
        load_config({"model": {"quantization": "int3"}})
    assert refused.value.field == "model.quantization"
    assert load_config({"model": {"quantization": "int4"}}).model.quantization is Quantization.INT4


def test_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match="int8 is for CPUs"):
        check_quantization(Quantization.INT8, on_gpu=True)
    check_quantization(Quantization.INT8, on_gpu=False)
    check_quantization(Quantization.NONE, on_gpu=True)


def test_a_prepared_model_is_not_something_else(tiny_llama_dir: Path) -> None:
    source = str(tiny_llama_dir)
    assert json.loads((tiny_llama_dir / CARD).read_text())["quantization"] == "none"
    assert find_model(load_config({"model": {"source": source}})) == tiny_llama_dir
    with pytest.raises(ConfigError, match=r"model\.quantization: .* is prepared with quantization none, not int8"):
        find_model(load_config({"model": {"source": source, "quantization": "int8"}}))


def test_a_cut_through_a_group_is_refused_before_the_model_is_prepared(tiny_llama_source: Path) -> None:
    asked = {"model": {"source": str(tiny_llama_source), "quantization": "int8"}, "prefill": {"tp": 2}}
    check_spread(load_config(asked), str(tiny_llama_source))
    asked["model"]["quantization"] = "int4"
    with pytest.raises(ConfigError, match="with quantization int4"):
        check_spread(load_config(asked), str(tiny_llama_source))
