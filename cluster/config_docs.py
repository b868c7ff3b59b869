"""The config file's reference, made from its schema: `python -m diptych.cluster.config_docs [--check] docs/config.md`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..core.config import ClusterConfig, section_in
from .dashboards.made import make

INTRO = """# The config file

One YAML file describes a cluster: `diptych up -f cluster.yaml`. Every key may be left out; flags of `diptych up` override the file.
A key that does not exist, a value out of range, a model that is not there, a port in use or too little memory is refused at start, by
name. `diptych config check FILE` checks a file without starting anything, `diptych config schema` prints the JSON schema, which
editors understand. A commented example is [examples/cluster.yaml](../examples/cluster.yaml).

<!-- Made by `python -m diptych.cluster.config_docs docs/config.md` from core/config.py; change it there. -->
"""


def schema_text() -> str:
    """The JSON schema of the config file."""
    return json.dumps(ClusterConfig.model_json_schema(), indent=2, ensure_ascii=False)


def reference() -> str:
    """docs/config.md, whole."""
    return INTRO + "\n".join(_section("", ClusterConfig)) + "\n"


def _section(path: str, model: type[BaseModel]) -> Iterator[str]:
    """A table of the section's own keys, then the sections in it."""
    inner: list[tuple[str, FieldInfo, type[BaseModel]]] = []
    rows = []
    for key, field in model.model_fields.items():
        if section := section_in(field.annotation):
            inner.append((key, field, section))
        else:
            rows.append(f"| `{path}{key}` | {_kind(field)} | {_default(field)} | {field.description} |")
    if rows:
        yield from ("", "| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows)
    for key, field, section in inner:
        name = f"{path}{key}[]" if get_origin(field.annotation) is tuple else f"{path}{key}"
        yield f"\n## `{name}`\n\n{field.description}"
        yield from _section(f"{name}.", section)


def _kind(field: FieldInfo) -> str:
    """The type in words, with its range."""
    if get_origin(field.annotation) is tuple:
        entry = get_args(field.annotation)[0]
        word = _word(get_args(entry)[0] if get_origin(entry) is Annotated else entry)
        return f"list of {word}" if "`" in word else f"list of {word}s"
    choices = [_word(kind) for kind in get_args(field.annotation) if kind is not NoneType and get_origin(field.annotation) is not Literal]
    words = " or ".join(choices) or _word(field.annotation)
    bounds = [f"{sign} {getattr(rule, name)}" for rule in field.metadata for name, sign in _SIGNS if hasattr(rule, name)]
    return f"{words}, {', '.join(bounds)}" if bounds else words


_SIGNS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))


def _word(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return " or ".join(f"`{member.value}`" for member in kind)
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}[kind]


def _default(field: FieldInfo) -> str:
    value = field.default
    if field.is_required():
        return "must be given"
    if value is None:
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(value)}]`"
    return f"`{value}`"


def main() -> int:
    *flags, name = sys.argv[1:]
    return make({Path(name): reference()}, f"python -m diptych.cluster.config_docs {name}", flags)


if __name__ == "__main__":
    sys.exit(main())
