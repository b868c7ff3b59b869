"""The config file: every key described, unknown ones refused by name, defaults valid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from diptych.core.config import ClusterConfig, load_config
from diptych.core.errors import ConfigError
from pydantic import BaseModel


def keys(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, str | None]]:
    """Every key below `section` with its description."""
    for name, field in section.model_fields.items():
        yield f"{path}{name}", field.description
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{path}{name}.")


def nested(path: str, value: object) -> dict[str, Any]:
    name, _, rest = path.partition(".")
    return {name: nested(rest, value) if rest else value}


def test_an_empty_file_is_a_valid_config() -> None:
    config = load_config({})
    assert (config.prefill.workers, config.decode.workers) == (1, 1)


def test_every_key_is_described_in_a_sentence() -> None:
    assert [path for path, description in keys(ClusterConfig) if not (description or "").endswith(".")] == []


SECTIONS = sorted({"", *(path.rpartition(".")[0] for path, _ in keys(ClusterConfig))})


@pytest.mark.parametrize("section", SECTIONS)
def test_an_unknown_key_is_refused_by_its_path(section: str) -> None:
    path = f"{section}.wrokers".lstrip(".")
    with pytest.raises(ConfigError) as caught:
        load_config(nested(path, 1))
    assert caught.value.field == path
    assert path in caught.value.message
    assert "diptych config schema" in caught.value.message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("prefill.workers", -1),
        ("decode.workers", 0),
        ("decode.max_running", 10**6),
        ("router.http_port", 70_000),
        ("router.local_prefill", "sometimes"),
        ("router.limits.retries", 3),
        ("model.dtype", "int3"),
        ("name", "Not A Name"),
        ("transfer.lease_s", 0),
        ("prefill", 7),
    ],
)
def test_a_wrong_value_is_refused_by_its_path(path: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(nested(path, value))
    assert caught.value.field == path
    assert repr(value) in caught.value.message


def test_somebody_must_read_prompts() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"prefill": {"workers": 0}, "router": {"local_prefill": "never"}})
    assert caught.value.field == "prefill.workers"


def test_a_config_does_not_change_after_it_is_loaded() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config({}).name = "other"  # type: ignore[misc]
