"""How results reach the terminal: as text or tables for people, as JSON for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

#: Columns of a list that may be folded; the others hold names.
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
    listed = Table(title=title)
    for name in rows[0] if rows else ():
        listed.add_column(name, no_wrap=name not in PROSE, overflow="fold")
    for row in rows:
        listed.add_row(*map(_cell, row.values()))
    _out.print(listed)


def _json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return f"{value / 1e6:.1f} M" if isinstance(value, int) and value > 1e5 else str(value)
