"""Findings for people: a line as each comes on a terminal, else a table; then the verdict."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from .finding import Finding, State

_SIGNS = {State.OK: ("✓", "green"), State.NOTE: ("!", "yellow"), State.WRONG: ("✗", "bold red")}


def line(finding: Finding) -> Text:
    sign, style = _SIGNS[finding.state]
    text = Text.assemble((f"{sign} ", style), (f"{finding.check}: ", "bold"), finding.said)
    if finding.mend:
        text.append(f"\n    {finding.mend}", style=style)
    return text


def table(found: Sequence[Finding]) -> Table:
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "check", "found", "what to do"):
        rows.add_column(column, overflow="fold")
    for finding in found:
        rows.add_row(Text(_SIGNS[finding.state][0]), Text(finding.check), Text(finding.said), Text(finding.mend))
    return rows


def verdict(found: Sequence[Finding]) -> Text:
    count = {kind: sum(finding.state is kind for finding in found) for kind in State}
    if count[State.WRONG]:
        return Text(f"\n{count[State.WRONG]} of {len(found)} checks found something wrong.", style="bold red")
    notes = f", {count[State.NOTE]} with a note" if count[State.NOTE] else ""
    return Text(f"\nNothing is wrong: {len(found)} checks{notes}.", style="green")
