"""The config file on disk, and the flags that override it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ...core.config import ClusterConfig, load_config
from ...core.errors import ConfigError


def read_config(path: Path | None, overrides: dict[str, Any]) -> ClusterConfig:
    """The config in `path` (all defaults without one), with `overrides` (key path → value; None: not given) put over it."""
    values = _read_yaml(path) if path else {}
    for key, value in overrides.items():
        if value is not None:
            _put(values, key, value)
    return load_config(values)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except FileNotFoundError:
        raise ConfigError(f"There is no config file {path}.", field="file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The config file {path} cannot be read: {error}.", field="file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}.", field="file") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, not a {type(values).__name__}.", field="file")
    return values


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not the last one's victory."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not a word", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        if inner is None:
            inner = values[section] = {}
        elif not isinstance(inner, dict):
            return  # the file is wrong there, and validation says so
        values = inner
    values[last] = value
