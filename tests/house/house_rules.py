"""The rules of the house as functions from a source tree to a list of violations, so that tests can prove they find some.

A `Tree` is a directory that holds the rooms. Every violation is one sentence that starts with `path:line`.
"""

from __future__ import annotations

import ast
import gc
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# DESIGN §4. Room: (rooms it may import, third-party packages it may import).
ROOMS: dict[str, tuple[set[str], set[str]]] = {
    "core": (set(), {"pydantic"}),
    "kernels": (set(), {"torch", "triton", "numpy"}),
    "proto": (set(), {"google"}),
    "rpc": ({"core", "proto"}, {"grpc", "grpc_health", "grpc_reflection", "google"}),
    "engine": ({"core", "kernels"}, {"torch", "transformers", "safetensors", "numpy", "tokenizers", "huggingface_hub"}),
    "kv_transfer": ({"core", "kernels", "rpc"}, {"torch", "nccl", "cuda"}),
    "worker": ({"core", "rpc", "engine", "kv_transfer"}, set()),
    "prefill_worker": ({"core", "rpc", "engine", "kv_transfer", "worker"}, set()),
    "decode_worker": ({"core", "rpc", "engine", "kv_transfer", "worker"}, set()),
    "router": ({"core", "rpc"}, {"starlette", "uvicorn", "h11", "tokenizers", "jinja2", "pydantic", "jwt", "httpx"}),
    "client": ({"core", "rpc"}, set()),
    "cluster": (
        {"core", "kernels", "proto", "rpc", "engine", "kv_transfer", "worker", "prefill_worker", "decode_worker", "router", "client"},
        {
            "ray",
            "typer",
            "click",
            "rich",
            "yaml",
            "prometheus_client",
            "cryptography",
            "httpx",
            "h11",
            "matplotlib",
            "pydantic",
            "torch",
            "numpy",
        },
    ),
}

# The rooms of cluster/, in the order of DESIGN §4: each imports only those before it.
CLUSTER_STAIRS = [
    "process",
    "resources",
    "programs",
    "load",
    "planner",
    "autoplan",
    "spans",
    "supervising",
    "on_ray",
    "dashboards",
    "doctor",
    "commands",
    "profiling",
    "top",
]

FORBIDDEN_WORDS = {"manager", "helper", "helpers", "util", "utils", "base", "info", "common", "impl", "obj"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
POLICY_FORBIDS = {"torch", "grpc", "ray", "asyncio", "threading", "time", "datetime", "socket", "subprocess", "numpy", "transformers"}


@dataclass(frozen=True)
class Import:
    """One imported name. `module` is absolute: `diptych.core.errors`, `torch.nn`."""

    module: str
    line: int
    relative: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


@dataclass(frozen=True)
class Source:
    """One module of a tree."""

    name: str  # diptych.core.errors
    path: Path
    text: str
    is_package: bool

    @cached_property
    def syntax(self) -> ast.Module:
        gc.disable()  # what is collected within may say why, which parses, too: Python 3.11 cannot do both at once
        try:
            return ast.parse(self.text, str(self.path))
        finally:
            gc.enable()

    @property
    def room(self) -> str:
        parts = self.name.split(".")
        return parts[1] if len(parts) > 1 else ""

    @property
    def generated(self) -> bool:
        return self.room == "proto" and "_pb2" in self.name

    @cached_property
    def imports(self) -> tuple[Import, ...]:
        """Every import anywhere in the file: in functions, under TYPE_CHECKING, and import_module("literal")."""
        return tuple(found for node in ast.walk(self.syntax) for found in self._imports_of(node))

    def _imports_of(self, node: ast.AST) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, relative=False)
        elif isinstance(node, ast.ImportFrom):
            origin = self._absolute(node)
            for alias in node.names:
                yield Import(f"{origin}.{alias.name}" if alias.name != "*" else origin, node.lineno, relative=node.level > 0)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (Import(name.value, node.lineno, relative=False) for name in node.args[:1] if isinstance(name, ast.Constant))

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = self.name.split(".") if self.is_package else self.name.split(".")[:-1]
        return ".".join([*package[: len(package) - node.level + 1], *((node.module or "").split(".") if node.module else [])])


class Tree:
    """The modules of the rooms below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sources = {source.name: source for source in self._read()}

    def _read(self) -> Iterator[Source]:
        for path in sorted([*self.root.glob("*.py"), *(path for room in ROOMS for path in (self.root / room).rglob("*.py"))]):
            parts = ["diptych", *path.relative_to(self.root).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            yield Source(".".join(parts[:-1] if is_package else parts), path, path.read_text(), is_package)

    def where(self, source: Source, line: int) -> str:
        return f"{source.path.relative_to(self.root)}:{line}"

    def module_of(self, imported: str) -> str:
        """The module of this tree that `imported` (a module, or a name in one) comes from."""
        name = imported
        while name and name not in self.sources:
            name = name.rpartition(".")[0]
        return name

    def edges(self, source: Source) -> set[str]:
        """Modules of this tree that `source` imports."""
        return {self.module_of(found.module) for found in source.imports if found.top == "diptych"} - {source.name, ""}

    def closure(self, name: str) -> set[str]:
        """`name` and every module of this tree that importing it imports."""
        seen: set[str] = set()
        ahead = [name]
        while ahead:
            module = ahead.pop()
            if module not in seen:
                seen.add(module)
                ahead.extend(self.edges(self.sources[module]))
        return seen


def check_table(tree: Tree) -> list[str]:
    """A room imports only the rooms and packages the table names; inside the package imports are relative."""
    wrong = []
    for source in tree.sources.values():
        rooms, packages = ROOMS.get(source.room, (set(), set()))
        for found in source.imports:
            where = tree.where(source, found.line)
            if found.top == "diptych":
                other = found.module.removeprefix("diptych.").partition(".")[0]
                if other in ROOMS and other != source.room and other not in rooms:
                    wrong.append(f"{where}: {source.room or 'the root'} may not import {other}")
                if not found.relative and not source.generated:
                    wrong.append(f"{where}: imports inside the package are relative, not {found.module}")
            elif found.top not in packages and found.top not in sys.stdlib_module_names:
                wrong.append(f"{where}: {source.room or 'the root'} may not import {found.top}")
    return wrong


def check_stairs(tree: Tree) -> list[str]:
    """A room of cluster/ imports only rooms before it in `CLUSTER_STAIRS`; every module in a folder of cluster/ is in one of them."""
    wrong = []
    for source in tree.sources.values():
        step = _step(source.name if not source.is_package else f"{source.name}.__init__")
        if step == -1:
            wrong.append(f"{tree.where(source, 1)}: {source.name} is in no room of cluster/ that CLUSTER_STAIRS names")
        for found in source.imports:
            above = _step(tree.module_of(found.module))
            if step is not None and above is not None and above > step:
                wrong.append(f"{tree.where(source, found.line)}: {CLUSTER_STAIRS[step]} may not import {found.module}")
    return wrong


def _step(name: str) -> int | None:
    """Which stair a module of cluster/ stands on: the landing above all of them if it is in no folder; -1 if its folder is not listed;
    None outside cluster/."""
    match name.split("."):
        case ["diptych", "cluster", room, _, *_]:
            return CLUSTER_STAIRS.index(room) if room in CLUSTER_STAIRS else -1
        case ["diptych", "cluster", _]:
            return len(CLUSTER_STAIRS)
    return None


def check_quiet_packages(tree: Tree) -> list[str]:
    """A package's `__init__` imports nothing."""
    return [
        f"{tree.where(source, found.line)}: a package's __init__ imports nothing, not {found.module}"
        for source in tree.sources.values()
        if source.is_package
        for found in source.imports
    ]


PICKLES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "xmlrpc"}
PICKLE_CALLS = re.compile(r"\b((?:send|recv|broadcast|scatter)_object_list|(?:all_)?gather_object|torch\.load)\(")
"""Of torch: what reads pickle, and what sends it between ranks."""


def check_no_pickle(tree: Tree) -> list[str]:
    """No port of ours takes pickle: no module can make or read it. (Ray does between its own processes, behind its token.)"""
    wrong = []
    for source in tree.sources.values():
        named = [(found.line, found.module) for found in source.imports if found.top in PICKLES]
        called = [(source.text.count("\n", 0, found.start()) + 1, found[1]) for found in PICKLE_CALLS.finditer(source.text)]
        wrong += [f"{tree.where(source, line)}: {what} speaks pickle" for line, what in [*named, *called]]
    return wrong


def check_circles(tree: Tree) -> list[str]:
    """No module imports itself, however long the way round."""
    graph = {name: tree.edges(source) for name, source in tree.sources.items()}
    wrong = []
    while graph:
        leaves = [name for name, after in graph.items() if not after & graph.keys()]
        if not leaves:
            wrong.append(f"import circle among: {', '.join(_on_circle(graph))}")
            break
        for name in leaves:
            del graph[name]
    return wrong


def _on_circle(graph: dict[str, set[str]]) -> list[str]:
    path = [min(graph)]
    while True:
        following = min(name for name in graph[path[-1]] if name in graph)
        if following in path:
            return path[path.index(following) :]
        path.append(following)


def check_policy(tree: Tree, name: str) -> list[str]:
    """A policy and all it imports from the package take time and randomness as values and do no I/O."""
    wrong = []
    for module in sorted(tree.closure(name)):
        source = tree.sources[module]
        if module == "diptych.core.clock":
            wrong.append(f"{name} is policy and reaches core.clock: it is given `now`")
            continue
        wrong += [
            f"{tree.where(source, found.line)}: {name} is policy and reaches {found.top}"
            for found in source.imports
            if found.top in POLICY_FORBIDS
        ]
    return wrong


def check_names(tree: Tree) -> list[str]:
    """No class or module is called Manager, Helper, Utils, Base, Info, Common, Impl or Obj, nor is any word of its name."""
    wrong = []
    for source in tree.sources.values():
        if FORBIDDEN_WORDS & set(source.name.rpartition(".")[2].split("_")):
            wrong.append(f"{tree.where(source, 1)}: module name {source.name}")
        for node in ast.walk(source.syntax):
            if isinstance(node, ast.ClassDef) and not source.generated:
                words = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", node.name)}
                if words & FORBIDDEN_WORDS:
                    wrong.append(f"{tree.where(source, node.lineno)}: class name {node.name}")
    return wrong


def check_handlers(tree: Tree) -> list[str]:
    """No bare except, no handler that only passes, no suppression of everything."""
    return [
        f"{tree.where(source, node.lineno)}: {what}"
        for source in tree.sources.values()
        if not source.generated
        for node in ast.walk(source.syntax)
        if (what := _swallows(node))
    ]


def _swallows(node: ast.AST) -> str | None:
    if isinstance(node, ast.ExceptHandler):
        if node.type is None:
            return "bare except"
        if all(isinstance(line, ast.Pass) or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)) for line in node.body):
            return "except that only passes"
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
        broad = {"Exception", "BaseException"} & {ast.unparse(argument) for argument in node.args}
        if broad:
            return f"suppress({broad.pop()})"
    return None


def check_sizes(tree: Tree, allowed: dict[str, str]) -> list[str]:
    """Files of at most 400 lines, functions of at most 60. `allowed`: `path` or `path::function` → why it may be longer."""
    wrong = []
    for source in tree.sources.values():
        if source.generated:
            continue
        path = str(source.path.relative_to(tree.root))
        lines = source.text.count("\n")
        if lines > MAX_FILE_LINES and path not in allowed:
            wrong.append(f"{path}:1: {lines} lines; the limit is {MAX_FILE_LINES}")
        for node in ast.walk(source.syntax):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES and f"{path}::{node.name}" not in allowed:
                    wrong.append(f"{path}:{node.lineno}: {node.name} has {length} lines; the limit is {MAX_FUNCTION_LINES}")
    return wrong
