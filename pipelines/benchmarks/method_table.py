"""README's tables of methods, made of the registries and of what was measured.

    python pipelines/benchmarks/method_table.py [--write]

Prints the table of pretraining methods and that of semi-supervised ones, or puts each between its two marks in
README.md. Figures that have not been measured stay empty; a protocol that has not been run has no column.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medssl import registry, registry_semisupervised

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- methods: made by pipelines/benchmarks/method_table.py -->", "<!-- end of methods -->"
SEMI_BEGIN = "<!-- semi-supervised methods: made by pipelines/benchmarks/method_table.py -->"
SEMI_END = "<!-- end of semi-supervised methods -->"
HEADS = ("method", "family", "in", "transfers", "batch from", "time x mae", "memory x mae", "Dice", "source")


def main() -> None:
    """Print the tables or write them into README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="put them into README.md")
    options = parser.parse_args()
    tables = ((BEGIN, END, lines()), (SEMI_BEGIN, SEMI_END, semisupervised_lines()))
    if not options.write:
        print("\n\n".join("\n".join(table) for _, _, table in tables))
        return
    readme = REPOSITORY / "README.md"
    content = readme.read_text()
    for begin, end, table in tables:
        content = put(content, begin, end, table)
    readme.write_text(content)


def put(content: str, begin: str, end: str, table: list[str]) -> str:
    """Return the text with a table between two marks, in place of what was there."""
    if content.count(begin) != 1 or content.count(end) != 1:
        raise SystemExit(f"README.md must hold each of the two marks once: {begin} and {end}")
    before, _, rest = content.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n" + "\n".join(table) + f"\n{end}{after}"


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


def semisupervised_lines() -> list[str]:
    """Return the lines of the table of semi-supervised methods.

    Of each protocol `results/protocol_semisupervised_*.json` there is a column: the metric that it tests, at its
    smallest number of labels. Its supervised controls have rows of their own.
    """
    costs = {(row["method"], row["task"]): row for row in _read("semisupervised_costs").get("rows", [])}
    measured = dict(_protocols())
    heads = ("method", "for", "time x supervised", "memory x supervised", *measured, "source")
    rows = [heads, ("---",) * len(heads)]

    def row(name: str, arm: str, *texts: str, source: str) -> None:
        rows.append((name, *texts, *(_score(scores.get(arm)) for scores in measured.values()), source))

    for name, entry in registry_semisupervised.SEMISUPERVISED.items():
        own = [costs.get((name, task), {}) for task in entry.tasks]
        row(
            f"`{name}`", "scratch" if name == "supervised" else name, ", ".join(entry.tasks),
            _each(own, "time / supervised"), _each(own, "memory / supervised"), source=entry.source,
        )  # fmt: skip
    row("`supervised`, strong augmentation", "strong", "", "", "", source="the second control")
    return [f"| {' | '.join(cells)} |" for cells in rows]


def _protocols() -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Yield the head of each protocol's column and the scores by arm."""
    for path in sorted(RESULTS.glob("protocol_semisupervised_*.json")):
        tested = [row for row in _read(path.stem).get("rows", []) if row["tested"] == "True"]
        if not tested:
            continue
        fewest = min(tested, key=lambda row: int(row["labels"]) if row["labels"].isdecimal() else sys.maxsize)
        chosen = {row["arm"]: row for row in tested if row["labels"] == fewest["labels"]}
        yield f"{fewest['dataset']}, {fewest['labels']} labels, {fewest['metric']}", chosen


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
