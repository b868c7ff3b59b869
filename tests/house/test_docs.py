"""Docs that name code are checked: paths, modules, make targets, commands and their options, config keys, relative links.

What a page names in `backticks` or in a fenced block must exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any, get_origin

import typer.main
from diptych.core.config import ClusterConfig, section_in
from house_rules import ROOMS, ROOT
from pydantic import BaseModel

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md"), *(ROOT / "helm").rglob("*.md")])
TOP = {*ROOMS, "tests", "benchmarks", "docs", "examples", "helm", ".ci"}
NOT_BUILT: set[str] = set()
"""Commands the design speaks of and nobody has built."""


def spans(text: str) -> Iterator[str]:
    """What a page shows as code: inline spans, and the lines of fenced blocks without a prompt."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    yield from (line.removeprefix("$ ").strip() for block in blocks for line in block.splitlines())
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def paths(span: str) -> Iterator[str]:
    """Words of a span that claim to be paths of this repository."""
    for word in re.findall(r"(?<![\w/.:~$-])[\w.-]+(?:/[\w.*-]*)+", span):
        if word.partition("/")[0] in TOP:
            yield word


def exists(path: str) -> bool:
    return any(ROOT.glob(path.rstrip("/"))) if "*" in path else (ROOT / path).exists()


def test_pages_name_paths_that_exist() -> None:
    missing = [(page.name, path) for page in PAGES for span in spans(page.read_text()) for path in paths(span) if not exists(path)]
    assert missing == []


def test_links_lead_somewhere() -> None:
    missing = [
        (page.name, target)
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert missing == []


def test_pages_name_modules_that_exist() -> None:
    named = [(page.name, name) for page in PAGES for span in spans(page.read_text()) for name in re.findall(r"\bdiptych(?:\.\w+)+", span)]
    assert [(page, name) for page, name in named if not resolves(name)] == []


def resolves(name: str) -> bool:
    """Whether `diptych.a.b` is a module, or `diptych.a.b.Name` something a module defines; `diptych.v1.…` are names of protobuf's."""
    parts = name.split(".")[1:]
    if parts[0] == "v1":
        return f" {parts[1]} " in (ROOT / "proto/inference.proto").read_text()
    path = ROOT.joinpath(*parts)
    if path.is_dir() or path.with_suffix(".py").exists():
        return True
    module = path.parent.with_suffix(".py")
    return (
        module.exists()
        and re.search(rf"^(class|def|async def) {parts[-1]}\b|^{parts[-1]}\b.*=", module.read_text(), re.MULTILINE) is not None
    )


def test_pages_name_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {(page.name, target) for page in PAGES for span in spans(page.read_text()) for target in re.findall(r"^make ([a-z]+)", span)}
    assert {entry for entry in named if entry[1] not in targets} == set()


@cache
def command_line() -> Any:
    """The root of typer's command tree."""
    from diptych.cluster import cli

    return typer.main.get_command(cli.app)


def wrong_in(words: list[str]) -> str | None:
    """What a `diptych …` command line names that does not exist: a command or an option."""
    command = command_line()
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        name, *words = words
        if name not in command.commands:
            return f"command {name}"
        command = command.commands[name]
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    for word in words:
        option = word.strip("[],.").partition("=")[0]
        if option.startswith("-") and option not in options:
            return f"option {option} of {command.name}"
    return None


def test_pages_name_commands_that_exist() -> None:
    commands = [
        (page.name, match[1]) for page in PAGES for span in spans(page.read_text()) if (match := re.match(r"diptych ([a-z-].*)", span))
    ]
    wrong = [
        (page, line, what) for page, line in commands if (what := wrong_in(re.sub(r"(#| \| | > |&).*|[\"'].*[\"']", "", line).split()))
    ]
    assert [entry for entry in wrong if entry[1].split()[0] not in NOT_BUILT] == []


def test_the_command_check_finds_what_is_wrong() -> None:
    assert wrong_in(["upp"])
    assert wrong_in(["up", "--modle", "x"])
    assert wrong_in(["up", "--help"]) is None


def keys(section: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    inner = {name: section_in(field.annotation) for name, field in section.model_fields.items()}
    return {name: None if get_origin(section.model_fields[name].annotation) is tuple else found for name, found in inner.items()}


def test_pages_name_config_keys_that_exist() -> None:
    sections = {name: section for name, section in keys(ClusterConfig).items() if section}
    pattern = re.compile(rf"^({'|'.join(sections)})((?:\.[a-z_]+)+)$")
    missing = []
    for page in PAGES:
        for span in spans(page.read_text()):
            if match := pattern.match(span):
                section: type[BaseModel] | None = sections[match[1]]
                for key in match[2].split(".")[1:]:
                    if section is None or key not in keys(section):
                        missing.append((page.name, span))
                        break
                    section = keys(section)[key]
    assert missing == []


def test_what_is_not_built_is_not_there() -> None:
    assert NOT_BUILT & set(command_line().commands) == set()


def test_the_path_check_finds_what_is_wrong() -> None:
    text = "See `core/nothing.py`, `make nothing`.\n```\n$ diptych up --nothing\ncurl http://localhost/core/x\n```\n"
    assert [path for span in spans(text) for path in paths(span)] == ["core/nothing.py"]
    assert "diptych up --nothing" in list(spans(text))
    assert not exists("core/nothing.py")
    assert exists("proto/*.proto")
