"""How results reach the terminal: as text or tables for people, as JSON for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

#: Columns of a list that may be folded; the others hold names. A folded column is no use below so many characters.
LEAST_PROSE = 20
PROSE = {"summary", "source", "title", "transforms", "meaning", "remedy", "detail", "licence"}

_out = Console()
_errors = Console(stderr=True)


def say(text: str) -> None:
    """Print a text as it is."""
    _out.print(text, markup=False, highlight=False, soft_wrap=True)


def complain(text: str) -> None:
    """Print a text in red on standard error."""
    _errors.print(text, style="red", markup=False, highlight=False, soft_wrap=True)


def show(result: Any, as_json: bool) -> None:
    """Print a result, or its `to_json()`."""
    if as_json:
        _json(result.to_json())
    else:
        _out.print(result, highlight=False)


def finish(summary: Any, out: Path, as_json: bool) -> None:
    """Print a summary and where its result is, and end with its exit code."""
    show(summary, as_json)
    if not as_json:
        say(f"Result: {out}")
    raise typer.Exit(summary.exit_code)


def table(title: str, entries: Iterable[Any], as_json: bool) -> None:
    """Print a list of mappings, or of things with a `row()`."""
    rows = [entry if isinstance(entry, dict) else entry.row() for entry in entries]
    if as_json:
        _json(rows)
        return
    names = list(rows[0]) if rows else []
    widths = [max(len(name), *(len(_cell(row[name])) for row in rows)) for name in names]
    needed = sum(LEAST_PROSE if name in PROSE else width for name, width in zip(names, widths, strict=True))
    if needed + 3 * len(names) + 1 > _out.width:
        _blocks(rows)
        return
    listed = Table(title=title)
    for name in names:
        listed.add_column(name, no_wrap=name not in PROSE, overflow="fold")
    for row in rows:
        listed.add_row(*map(_cell, row.values()))
    _out.print(listed)


def _blocks(rows: list[dict[str, Any]]) -> None:
    """Print rows below each other, where side by side their columns would not fit the terminal."""
    for row in rows:
        first, *others = ((name, _cell(value)) for name, value in row.items())
        facts = ", ".join(f"{name} {value}" for name, value in others if name not in PROSE and value)
        _out.print(Text.assemble((first[1], "bold"), f"  {facts}"))
        for name, value in others:
            if name in PROSE and value:
                _out.print(Padding(Text(value), (0, 0, 0, 4)))


def _json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return f"{value / 1e6:.1f} M" if isinstance(value, int) and value > 1e5 else str(value)
