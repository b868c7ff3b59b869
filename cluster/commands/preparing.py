"""`diptych prepare`: convert a model in this process, with a progress bar."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ...core.errors import ModelError
from ...core.layout import DType
from ...engine.location import demo_source
from ..supervising.models import NO_DEMO


def prepare_here(source: str, dtype: str, out: Path | None, name: str | None, chat_template: Path | None) -> Path:
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

        if out is None:
            return find_or_prepare(source, dtype=DType(dtype), name=name, chat_template=chat_template, progress=progress)
        prepare(source, out.absolute(), dtype=DType(dtype), name=name, chat_template=chat_template, progress=progress)
        return out.absolute()
