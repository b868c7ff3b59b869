"""DESIGN §4, enforced: who may import whom, no circles, quiet packages. Each rule is also shown to find a violation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from house_rules import ROOMS, ROOT, Tree, check_circles, check_no_pickle, check_quiet_packages, check_stairs, check_table


@pytest.fixture(scope="module")
def house() -> Tree:
    return Tree(ROOT)


def small(root: Path, files: dict[str, str]) -> Tree:
    """A tree of the given files; every directory on the way is a package."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text)
    return Tree(root)


def test_rooms_import_only_what_the_table_allows(house: Tree) -> None:
    assert check_table(house) == []


def test_the_rooms_of_cluster_are_stairs(house: Tree) -> None:
    assert check_stairs(house) == []


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("cluster/process/spec.py", "from ..supervising import post\n", "process may not import diptych.cluster.supervising.post"),
        ("cluster/commands/up.py", "from .. import cli\n", "commands may not import diptych.cluster.cli"),
        ("cluster/misc/odds.py", "", "diptych.cluster.misc.odds is in no room"),
    ],
)
def test_the_stairs_are_checked(tmp_path: Path, path: str, text: str, expected: str) -> None:
    tree = small(tmp_path, {"cluster/supervising/post.py": "", "cluster/cli.py": "", path: text})
    assert any(expected in violation for violation in check_stairs(tree)), check_stairs(tree)


def test_packages_import_nothing(house: Tree) -> None:
    assert check_quiet_packages(house) == []


def test_nobody_speaks_pickle(house: Tree, tmp_path: Path) -> None:
    assert check_no_pickle(house) == []
    spoken = small(tmp_path, {"worker/post.py": "import pickle\n", "engine/groups.py": "def f(dist):\n    dist.all_gather_object([])\n"})
    assert sorted(check_no_pickle(spoken)) == [
        "engine/groups.py:2: all_gather_object speaks pickle",
        "worker/post.py:1: pickle speaks pickle",
    ]


def test_there_is_no_import_circle(house: Tree) -> None:
    assert check_circles(house) == []


def test_every_package_is_listed_in_pyproject(house: Tree) -> None:
    listed = set(re.findall(r'"(diptych[\w.]*)"', (ROOT / "pyproject.toml").read_text().partition("packages = [")[2].partition("]")[0]))
    assert listed == {source.name for source in house.sources.values() if source.is_package}


def test_every_room_of_the_table_exists(house: Tree) -> None:
    assert {source.room for source in house.sources.values()} - {""} == set(ROOMS)


def reach(room: str, rooms: dict[str, tuple[set[str], set[str]]] = ROOMS) -> set[str]:
    """Rooms that `room` may come to import, directly or through others."""
    seen: set[str] = set()
    ahead = [room]
    while ahead:
        for other in rooms[ahead.pop()][0] - seen:
            seen.add(other)
            ahead.append(other)
    return seen


def test_what_the_table_itself_promises() -> None:
    assert "decode_worker" not in reach("prefill_worker")
    assert "prefill_worker" not in reach("decode_worker")
    assert "engine" not in reach("kv_transfer")
    assert all("cluster" not in reach(room) for room in ROOMS)
    assert all(room not in reach(room) for room in ROOMS)
    for room in ("router", "client"):
        packages = set().union(*(ROOMS[other][1] for other in {room, *reach(room)}))
        assert not packages & {"torch", "ray", "transformers"}
    assert [room for room in ROOMS if "grpc" in ROOMS[room][1]] == ["rpc"]


@pytest.mark.parametrize(
    ("file", "text", "wrong"),
    [
        ("router/place.py", "import torch\n", "router may not import torch"),
        ("router/place.py", "def f():\n    import ray.util\n", "router may not import ray"),
        (
            "router/place.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import Tensor\n",
            "router may not import torch",
        ),
        ("router/place.py", "import importlib\nimportlib.import_module('torch')\n", "router may not import torch"),
        ("prefill_worker/role.py", "from ..decode_worker import role\n", "prefill_worker may not import decode_worker"),
        ("decode_worker/role.py", "from ..prefill_worker.role import x\n", "decode_worker may not import prefill_worker"),
        ("kv_transfer/transports/shm.py", "from ...engine.block_pool import BlockPool\n", "kv_transfer may not import engine"),
        ("kv_transfer/pool.py", "from .. import engine\n", "kv_transfer may not import engine"),
        ("worker/loop.py", "from ..cluster.process.spec import RankSpec\n", "worker may not import cluster"),
        ("worker/face.py", "import grpc\n", "worker may not import grpc"),
        ("router/http.py", "from ..proto import inference_pb2\n", "router may not import proto"),
        ("core/x.py", "import numpy as np\n", "core may not import numpy"),
        ("core/x.py", "from diptych.core import errors\n", "imports inside the package are relative"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, file: str, text: str, wrong: str) -> None:
    violations = check_table(small(tmp_path, {file: text}))
    assert len(violations) == 1
    assert wrong in violations[0]
    assert violations[0].startswith(f"{file}:")


def test_an_allowed_import_is_not_found(tmp_path: Path) -> None:
    tree = small(tmp_path, {"worker/loop.py": "import queue\nfrom ..engine.batch import Batch\nfrom .. import core\nfrom . import face\n"})
    assert check_table(tree) == []


def test_a_loud_package_is_found(tmp_path: Path) -> None:
    tree = small(tmp_path, {"core/x.py": ""})
    (tmp_path / "core/__init__.py").write_text("from .x import y\n")
    assert check_quiet_packages(tree) == []
    assert len(check_quiet_packages(Tree(tmp_path))) == 1


def test_a_circle_is_found_even_in_a_function_and_across_rooms(tmp_path: Path) -> None:
    files = {
        "core/a.py": "from ..rpc import b\n",
        "rpc/b.py": "from .c import x\n",
        "rpc/c.py": "def f():\n    from ..core.a import y\n",
        "rpc/leaf.py": "from . import b\n",
    }
    assert check_circles(small(tmp_path, files)) == ["import circle among: diptych.core.a, diptych.rpc.b, diptych.rpc.c"]
