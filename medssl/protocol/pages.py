"""The results as files: JSON, Markdown, CSV, curves, and one self-contained page."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medssl import __version__
from medssl.evaluation.classification_result import Interval
from medssl.files import write_bytes, write_json, write_text
from medssl.inference.predict import NOTICE
from medssl.protocol.division import PARTS, Division
from medssl.protocol.results import METHOD, Difference, Results, Row
from medssl.report.facts import public_text
from medssl.report.figures import Figure
from medssl.report.intervals import Point, interval_figure, interval_png

NAMES = {"dice": "Dice", "jaccard": "Jaccard", "auroc": "AUROC", "aupr": "AUPR", "f1": "F1"}
_ROW_HEADER = ("data set", "labels", "arm", "score", "each seed", "rate")
_DIFFERENCE_HEADER = ("data set", "labels", "arms", "difference", "better in", "p", "p (Holm)")


def write_tables(out: Path, results: Results, divisions: Mapping[str, Division]) -> None:
    """Write `results.json`, `table.md`, `table.csv`, `differences.csv`, `curves_<data set>.png` and `report.html`.

    Args:
        out: Folder of the protocol; its `recipe.yaml` is shown on the page.
        results: What was found.
        divisions: Of each data set.
    """
    sizes = {name: {part: len(getattr(each, part)) for part in PARTS} for name, each in divisions.items()}
    write_json(out / "results.json", {**results.to_json(), "cases": sizes})
    write_text(out / "table.md", markdown(results))
    write_text(out / "table.csv", _csv(_score_records(results)))
    write_text(out / "differences.csv", _csv(_difference_records(results)))
    figures = []
    for name in divisions:
        rows = [row for row in results.rows if row.dataset == name]
        places, curves = _curves(rows)
        label = f"{_metric(rows[0].metric)} on validation cases"
        write_bytes(out / f"curves_{name}.png", interval_png(label, places, curves))
        figures.append(interval_figure(f"{name}: {_metric(rows[0].metric)}", label, places, curves))
    write_text(out / "report.html", _page(out, results, sizes, figures))


def markdown(results: Results) -> str:
    """Return scores, differences and what is missing as Markdown."""
    parts = [_markdown(_ROW_HEADER, score_cells(results)), _markdown(_DIFFERENCE_HEADER, difference_cells(results))]
    if results.missing:
        parts.append("Missing:\n\n" + "".join(f"- {line}\n" for line in results.missing))
    parts.append("".join(f"- {name}: {text}.\n" for name, text in METHOD.items()))
    return "\n".join(part for part in parts if part)


def score_cells(results: Results) -> list[list[str]]:
    """Return the table of scores as text."""
    return [
        [
            row.dataset,
            str(row.labels),
            row.arm,
            f"{_metric(row.metric)} {shown(row.values.get(row.metric))}",
            " ".join(f"{value:.3f}" for value in row.seeds.values()),
            "-" if row.rate is None else f"{row.rate:g}{' (edge of the grid)' if row.at_edge else ''}",
        ]
        for row in results.rows
    ]


def difference_cells(results: Results) -> list[list[str]]:
    """Return the table of differences as text."""
    return [
        [
            row.dataset,
            str(row.labels),
            f"{row.arm} - {row.control}",
            f"{_metric(row.metric)} {shown(row.paired.interval, sign=True)}",
            "-" if row.paired.better is None else f"{row.paired.better}/{row.paired.cases}",
            _p(row.paired.interval.p),
            _p(row.p_holm),
        ]
        for row in results.differences
    ]


def shown(value: Interval | None, *, sign: bool = False) -> str:
    """Return a value with its interval as text."""
    if value is None or value.value != value.value:
        return "-"
    form = "+.3f" if sign else ".3f"
    ends = "" if value.low != value.low else f" [{value.low:{form}}, {value.high:{form}}]"
    return f"{value.value:{form}}{ends}"


def rich_tables(results: Results) -> Any:
    """Return the tables for the terminal."""
    from rich.console import Group
    from rich.table import Table

    tables: list[Any] = []
    for title, header, cells in (
        ("Scores on validation cases (95 % interval)", _ROW_HEADER, score_cells(results)),
        ("Paired differences", _DIFFERENCE_HEADER, difference_cells(results)),
    ):
        table = Table(title=title)
        for name in header:
            table.add_column(name, justify="left" if name in ("data set", "arm", "arms") else "right")
        for row in cells:
            table.add_row(*row)
        tables.append(table)
    return Group(*tables, *(f"Missing: {line}" for line in results.missing))


def _curves(rows: Sequence[Row]) -> tuple[list[str], dict[str, dict[str, Point]]]:
    curves: dict[str, dict[str, Point]] = {}
    for row in rows:
        value = row.values.get(row.metric)
        points = curves.setdefault(row.arm, {})
        if value is not None:
            points[str(row.labels)] = Point(value.value, value.low, value.high, tuple(row.seeds.values()))
    return [str(labels) for labels in sorted({row.labels for row in rows})], curves


def _page(out: Path, results: Results, sizes: Mapping[str, Mapping[str, int]], figures: Sequence[Figure]) -> str:
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=ChoiceLoader([PackageLoader("medssl.protocol"), PackageLoader("medssl.report")]),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    arms = list(dict.fromkeys(row.arm for row in results.rows))
    return environment.get_template("protocol.html.j2").render(
        name=out.resolve().name,
        lead=_lead(results.differences),
        tiles=[
            ("arms", str(len(arms))),
            ("seeds", str(max((len(row.seeds) for row in results.rows), default=0))),
            ("comparisons", str(len(results.differences))),
            *((f"{name}: validation cases", f"{parts['validation']:,}") for name, parts in sizes.items()),
        ],
        tables=[
            ("scores", "Scores on validation cases", _ROW_HEADER, score_cells(results)),
            ("differences", "Paired differences", _DIFFERENCE_HEADER, difference_cells(results)),
        ],
        figures=figures,
        method=METHOD,
        sizes=sizes,
        missing=results.missing,
        recipe=public_text((out / "recipe.yaml").read_text()).strip(),
        notice=NOTICE,
        version=__version__,
    )


def _lead(differences: Sequence[Difference]) -> str:
    """Return in a sentence how many differences are more than chance; no arm is praised by it."""
    tested = [row for row in differences if row.p_holm is not None]
    small = [row for row in tested if row.p_holm is not None and row.p_holm < 0.05]
    return f"{len(small)} of {len(tested)} differences have a corrected p below 0.05."


def _score_records(results: Results) -> list[dict[str, Any]]:
    records = []
    for row in results.rows:
        for metric, value in row.values.items():
            seeds = list(row.seeds.values()) if metric == row.metric else []
            records.append(
                {
                    "dataset": row.dataset, "labels": row.labels, "arm": row.arm, "metric": metric,
                    "tested": metric == row.metric, **_ends(value), "seeds": " ".join(f"{seed:.6g}" for seed in seeds),
                    "rate": "" if row.rate is None else f"{row.rate:g}", "failed_seeds": " ".join(map(str, row.failed)),
                }
            )  # fmt: skip
    return records


def _difference_records(results: Results) -> list[dict[str, Any]]:
    return [
        {
            "dataset": row.dataset, "labels": row.labels, "arm": row.arm, "control": row.control, "metric": row.metric,
            **_ends(row.paired.interval), "test": row.paired.test, "p": _number(row.paired.interval.p),
            "p_holm": _number(row.p_holm), "better": "" if row.paired.better is None else row.paired.better,
            "cases": row.paired.cases, "unpaired": row.paired.unpaired, "seeds": " ".join(map(str, row.seeds)),
        }
        for row in results.differences
    ]  # fmt: skip


def _ends(value: Interval) -> dict[str, str]:
    return {name: _number(getattr(value, name)) for name in ("value", "low", "high")}


def _number(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.6g}"


def _csv(records: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    if records:
        writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    return text.getvalue()


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _metric(name: str) -> str:
    return NAMES.get(name, name.replace("_", " "))
