"""Rank processes shared by the tests of a session: a start costs two seconds of both cores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from diptych.core.fleet import Phase
from e2e_harness import Family, rank_spec, ranks


def _family(model: Path, directory: Path) -> Iterator[Family]:
    specs = [
        rank_spec(model, Phase.PREFILL, "p0", chunk_tokens=32),
        rank_spec(model, Phase.PREFILL, "p1", chunk_tokens=200),
        rank_spec(model, Phase.DECODE, "d0", chunk_tokens=24),
    ]
    with ranks(directory, *specs) as (one, other, decode):
        yield Family([one, other], decode)


@pytest.fixture(scope="session")
def gemma3_ranks(tiny_gemma3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    yield from _family(tiny_gemma3_dir, tmp_path_factory.mktemp("gemma3-ranks"))


@pytest.fixture(scope="session")
def llama_ranks(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    yield from _family(tiny_llama_dir, tmp_path_factory.mktemp("llama-ranks"))


@pytest.fixture(params=["gemma3", "llama"])
def family(request: pytest.FixtureRequest) -> Family:
    return request.getfixturevalue(f"{request.param}_ranks")
