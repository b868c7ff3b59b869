"""helm, unpacked once per session."""

from __future__ import annotations

from pathlib import Path

import pytest
from charts import SETS, Helm, Manifest, unpack_helm


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    try:
        binary = unpack_helm(tmp_path_factory.mktemp("helm"))
    except LookupError as error:
        pytest.skip(str(error))
    return Helm(binary, tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def rendered(helm: Helm) -> dict[str, list[Manifest]]:
    """Each set of values by its name, rendered."""
    return {path.name.removesuffix("-values.yaml"): helm.template(path) for path in SETS}


@pytest.fixture(scope="session")
def some_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("file") / "values.yaml"
