"""A parallelism that a model cannot have is refused before the model is converted, in the words of a prepared one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diptych.cluster.commands.up import Up
from diptych.cluster.resources.source_check import FAMILIES, check_spread, sketch
from diptych.core.config import load_config
from diptych.core.errors import ConfigError
from diptych.core.layout import DType
from diptych.core.model import ForeignDecoder
from diptych.engine.location import demo_source

SIZES: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2,
    "intermediate_size": 96,
}  # fmt: skip


def source(directory: Path, **changes: Any) -> str:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(SIZES | changes))
    return str(directory)


@pytest.mark.parametrize(
    ("decode", "field", "says"),
    [
        (
            {"tp": 3},
            "decode.tp",
            "tp 3 does not split big, which has 8 attention heads, 2 KV heads and an MLP of 96; the nearest that does is 2",
        ),
        ({"pp": 5}, "decode.pp", "pp 5 is more than the 4 layers of big; at most 4"),
        ({"groups": [{"stages": [1, 2]}]}, "decode.groups.0.stages", "the 4 layers of big; (2, 2) would"),
    ],
)
def test_it_is_refused_by_model_value_and_what_works(tmp_path: Path, decode: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_spread(load_config({"decode": decode}), source(tmp_path / "big"))
    assert caught.value.field == field
    assert says in caught.value.message


def test_up_refuses_it_before_it_prepares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path / "home"))
    config = load_config(
        {
            "model": {"source": source(tmp_path / "big")},
            "prefill": {"tp": 3},
            "router": {"http_port": 0, "grpc_port": 0},
            "ray": {"enabled": False},
        }
    )
    with pytest.raises(ConfigError, match=r"prefill.tp: tp 3 does not split big"):
        Up(config).run()
    assert not (tmp_path / "home" / "models").exists()


def test_what_works_is_left_alone(tmp_path: Path) -> None:
    check_spread(load_config({"decode": {"tp": 8, "pp": 4}}), source(tmp_path / "big"))


def test_a_model_of_the_slow_path_is_not_spread(tmp_path: Path) -> None:
    path = source(tmp_path / "phi", model_type="phi", architectures=["PhiForCausalLM"])
    check_spread(load_config({}), path)
    with pytest.raises(ConfigError, match=r"decode.pp: phi \(PhiForCausalLM\) has no fast path here.*cannot be spread"):
        check_spread(load_config({"decode": {"pp": 2}}), path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model_type": "llama"}', '{"model_type": "llama", "num_attention_heads": 0}'])
def test_what_does_not_tell_is_left_to_the_preparation(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    check_spread(load_config({"decode": {"tp": 7}}), str(tmp_path))
    check_spread(load_config({"decode": {"tp": 7}}), "owner/name")


def test_the_demo_model_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    found = demo_source()
    if found is None:
        pytest.skip("the demo model's package is not installed")
    with pytest.raises(ConfigError, match=r"tp 3 does not split gemma-3-270m, which has 4 attention heads, 1 KV heads and an MLP of 2048"):
        check_spread(load_config({"decode": {"tp": 3}}), found)


def test_the_families_are_those_of_the_engine() -> None:
    from diptych.engine.families import FAMILIES as ENGINES

    assert frozenset(ENGINES) == FAMILIES


def test_a_sketch_splits_as_the_prepared_model_does(tiny_gemma3_source: Path, tiny_gemma3_dir: Path) -> None:
    from diptych.core.model import read_card

    card, drawn = read_card(tiny_gemma3_dir), sketch("x", json.loads((tiny_gemma3_source / "config.json").read_bytes()))
    assert drawn is not None
    assert not isinstance(drawn.decoder, ForeignDecoder)
    assert drawn.dtype is DType.FLOAT32
    for key in ("layers", "heads", "kv_heads", "head_dim", "intermediate"):
        assert getattr(drawn.decoder, key) == getattr(card.decoder, key)
