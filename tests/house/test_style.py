"""Names, handlers and sizes; each rule is also shown to find a violation."""

from __future__ import annotations

from pathlib import Path

import pytest
from house_rules import ROOT, Tree, check_handlers, check_names, check_sizes

LONGER: dict[str, str] = {}
"""`path` or `path::function` → why it may be longer than the limit."""


@pytest.fixture(scope="module")
def house() -> Tree:
    return Tree(ROOT)


def one(root: Path, text: str, name: str = "x") -> Tree:
    (root / "core").mkdir()
    (root / "core" / f"{name}.py").write_text(text)
    return Tree(root)


def test_names(house: Tree) -> None:
    assert check_names(house) == []


def test_handlers(house: Tree) -> None:
    assert check_handlers(house) == []


def test_sizes(house: Tree) -> None:
    assert check_sizes(house, LONGER) == []


def test_every_longer_thing_still_is_longer(house: Tree) -> None:
    wrong = {line.partition(":")[0] for line in check_sizes(house, {})}
    assert {entry.partition("::")[0] for entry in LONGER} <= wrong


@pytest.mark.parametrize("name", ["KvManager", "RequestInfo", "BaseWorker", "HTTPHelper", "EngineImpl"])
def test_a_forbidden_class_name_is_found(tmp_path: Path, name: str) -> None:
    assert check_names(one(tmp_path, f"class {name}:\n    x = 1\n"))


@pytest.mark.parametrize("name", ["utils", "block_utils", "common", "base"])
def test_a_forbidden_module_name_is_found(tmp_path: Path, name: str) -> None:
    assert check_names(one(tmp_path, "", name))


def test_a_name_that_only_contains_the_letters_is_not_found(tmp_path: Path) -> None:
    assert check_names(one(tmp_path, "class Informed: ...\nclass Database: ...\n", "commons")) == []


@pytest.mark.parametrize(
    "text",
    [
        "try:\n    f()\nexcept:\n    raise\n",
        "try:\n    f()\nexcept ValueError:\n    pass\n",
        "try:\n    f()\nexcept ValueError:\n    ...\n",
        "import contextlib\nwith contextlib.suppress(Exception):\n    f()\n",
    ],
)
def test_a_swallowed_error_is_found(tmp_path: Path, text: str) -> None:
    assert check_handlers(one(tmp_path, text))


def test_long_things_are_found(tmp_path: Path) -> None:
    tree = one(tmp_path, "def f():\n" + "    x = 1\n" * 60 + "\n" * 340)
    assert len(check_sizes(tree, {})) == 2
    assert check_sizes(tree, {"core/x.py": "", "core/x.py::f": ""}) == []
