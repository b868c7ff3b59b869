"""Make the reference of the chart's values from its comments: `python helm/reference.py` writes it, `--check` only compares.

A comment that begins with `# --` describes the key below it; one without describes a section. Every key has a description.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

CHART = Path(__file__).resolve().parent / "diptych"
KEY = re.compile(r"( *)([A-Za-z]+):(.*)")
INTRO = """# Values of the chart

What `helm install --set` and `--values` take. [docs/deploy/kubernetes.md](../../docs/deploy/kubernetes.md) goes through an
install; the files in [ci/](ci) are whole examples: a laptop, small GPU, large multi-node, colocated.

<!-- Made by `python helm/reference.py` from values.yaml; change it there. -->
"""


@dataclass(frozen=True)
class Value:
    """One key, by its path. `default` is YAML on one line."""

    path: tuple[str, ...]
    default: str
    meaning: str


def values(text: str) -> Iterator[Value]:
    """What is described in `text`, in its order. Raises `ValueError` for a key that nothing describes."""
    tree = yaml.safe_load(text)
    path: list[str] = []
    comment: list[str] = []
    described: list[tuple[str, ...]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#"):
            comment.append(line.strip().removeprefix("#").strip())
        elif match := KEY.fullmatch(line):
            depth = len(match[1]) // 2
            path[depth:] = [match[2]]
            if any(tuple(path[: len(above)]) == above for above in described):
                continue  # inside a value that is described as a whole
            if comment and comment[0].startswith("-- "):
                described.append(tuple(path))
                yield Value(tuple(path), _default(tree, path), " ".join(comment).removeprefix("-- "))
            elif match[3].strip():
                raise ValueError(f"values.yaml:{number}: nothing describes {'.'.join(path)}")
            comment = []
        elif not line.strip():
            comment = []


def _default(tree: object, path: list[str]) -> str:
    for key in path:
        assert isinstance(tree, dict)
        tree = tree[key]
    text: str = yaml.safe_dump(tree, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("\n...\n").strip()


def reference(text: str) -> str:
    """The page, whole."""
    rows = [f"| {'.'.join(value.path)} | `{value.default}` | {value.meaning} |" for value in values(text)]
    return "\n".join([INTRO, "| value | default | meaning |", "| --- | --- | --- |", *rows]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the reference of the chart's values from values.yaml.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is not what the comments say")
    page, fresh = CHART / "README.md", reference((CHART / "values.yaml").read_text())
    if not parser.parse_args().check:
        page.write_text(fresh)
    elif not page.exists() or page.read_text() != fresh:
        print("helm/diptych/README.md is not what values.yaml says; run `python helm/reference.py`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
