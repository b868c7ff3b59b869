"""Every result that is stored has a picture that can be drawn from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diptych.benchmarks.pictures import PICTURES, Panel, draw
from diptych.benchmarks.record import RESULTS

STORED = [name for name in PICTURES if (RESULTS / f"{name}.json").exists()]


@pytest.mark.parametrize("name", STORED)
def test_a_stored_result_has_something_to_show(name: str) -> None:
    panels = PICTURES[name](json.loads((RESULTS / f"{name}.json").read_text())["results"])
    assert panels
    assert all(any(value is not None for bar in panel.bars.values() for value in bar.values()) for panel in panels)


def test_all_that_is_stored_and_drawn_is_known() -> None:
    assert {path.stem for path in RESULTS.glob("*.png")} <= {*PICTURES, "autoplan", "ourselves"}


def test_a_picture_is_drawn_where_values_are_lacking(tmp_path: Path) -> None:
    draw(
        tmp_path / "p.png",
        "title",
        [Panel("a", {"x": {"ours": 1.0, "theirs": None}, "y": {"theirs": 2.0}}, (1.5,)), Panel("b", {"z": {"": None}})],
    )
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
