"""`diptych prepare`: convert a model in this process, with a progress bar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ...core.errors import ModelError
from ...core.layout import DType
from ...core.quantization import Quantization
from ...engine.location import demo_source
from ..supervising.models import NO_DEMO


def prepare_here(
    source: str, dtype: str, out: Path | None, name: str | None, chat_template: Path | None, quantization: Quantization = Quantization.NONE
) -> Path:
    """The directory of the prepared model, made unless it is there already."""
    from ...engine.prepared import find_or_prepare, prepare

    if source == "demo":
        found = demo_source()
        if found is None:
            raise ModelError(NO_DEMO)
        source = found
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=1.0)

        def progress(what: str, share: float) -> None:
            bar.update(task, description=what, completed=share)

        chosen = {"dtype": DType(dtype), "quantization": quantization}
        options: dict[str, Any] = {**chosen, "name": name, "chat_template": chat_template, "progress": progress}
        if out is None:
            return find_or_prepare(source, **options)
        prepare(source, out.absolute(), **options)
        return out.absolute()
