"""README's table of methods, made of the registry and of what was measured.

    python pipelines/benchmarks/method_table.py [--write]

Prints the table, or puts it between the two marks in README.md. Figures that have not been measured stay empty.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from medssl import registry

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- methods: made by pipelines/benchmarks/method_table.py -->", "<!-- end of methods -->"
HEADS = ("method", "family", "in", "transfers", "batch from", "time x mae", "memory x mae", "Dice", "source")


def main() -> None:
    """Print the table or write it into README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    options = parser.parse_args()
    text = "\n".join(lines())
    if not options.write:
        print(text)
        return
    readme = REPOSITORY / "README.md"
    content = readme.read_text()
    if content.count(BEGIN) != 1 or content.count(END) != 1:
        raise SystemExit("README.md must hold each of the two marks once.")
    before, _, rest = content.partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def lines() -> list[str]:
    """Return the lines of the table."""
    costs = {(row["method"], row["dimensions"]): row for row in _read("methods").get("rows", [])}
    scores = _read("protocol_methods_hippocampus").get("rows", [])
    dice = {row["arm"]: row for row in scores if row["metric"] == "dice"}
    rows = [HEADS, ("---",) * len(HEADS)]
    for name, entry in registry.METHODS.items():
        measured = [costs.get((name, f"{dimensions}D"), {}) for dimensions in entry.dimensions]
        rows.append(
            (
                f"`{name}`",
                entry.family,
                ", ".join(f"{dimensions}D" for dimensions in entry.dimensions),
                entry.transfers,
                str(entry.sensible_batch),
                _each(measured, "time / mae"),
                _each(measured, "memory / mae"),
                _score(dice.get(name)),
                entry.source,
            )
        )
    rows.append(("none", "the twin from scratch", "", "", "", "", "", _score(dice.get("scratch")), ""))
    return [f"| {' | '.join(row)} |" for row in rows]


def _read(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def _each(measured: list[dict[str, Any]], key: str) -> str:
    return " / ".join(f"{row[key]:.1f}" for row in measured if key in row)


def _score(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{100 * row['value']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


if __name__ == "__main__":
    main()
