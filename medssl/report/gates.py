"""Gates on a page: what a RUN's gates allow, and the verdicts on the cases of a prediction."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medssl import __version__
from medssl.errors import DataError, MedsslError
from medssl.files import write_text
from medssl.inference.gates.calibration import summary_lines
from medssl.inference.gates.envelope import AXES
from medssl.inference.gates.gates import Gates, read_gates
from medssl.inference.gates.verdict import ACCEPTED, REFUSED, REVIEW
from medssl.inference.predict import NOTICE, TABLE
from medssl.report.facts import RunFacts

TEMPLATE = "prediction.html.j2"
_TITLES = {"embedding_distance": "embedding distance", "disagreement": "disagreement (1 - Dice)", "entropy": "entropy"}
#: The gravest first: what a person has to look at stands on top.
_ORDER = (REFUSED, REVIEW, ACCEPTED)


@dataclass(frozen=True)
class GateTables:
    """The gates of a RUN.

    Args:
        scores: Score, largest accepted value, refused above, validation cases, how many of them it flags.
        ranges: What is compared, and the range of the training cases.
        lines: What else is to be told.
    """

    scores: tuple[tuple[str, str, str, str, str], ...]
    ranges: tuple[tuple[str, str], ...]
    lines: tuple[str, ...]


def describe_gates(facts: RunFacts) -> GateTables | None:
    """Return the gates of a RUN, or None where it has none; a damaged file is named in `facts`."""
    try:
        gates = read_gates(facts.folder)
    except MedsslError as error:
        facts.missing.append(f"Gates: {error}")
        return None
    if gates is None:
        return None
    scores = tuple(
        (
            _TITLES[name],
            f"{found.review:.3g}",
            "–" if found.refuse is None else f"{found.refuse:.3g}",
            str(found.cases),
            str(found.flagged),
        )
        for name, found in gates.thresholds.items()
    )
    return GateTables(scores, tuple(_ranges(gates)), tuple(summary_lines(gates)))


def _ranges(gates: Gates) -> list[tuple[str, str]]:
    envelope = gates.envelope

    def span(low: float, high: float, unit: str) -> str:
        return f"{low:.3g} to {high:.3g}{unit}"

    rows = [("modality", envelope.modality or "not known: not checked")]
    for name, values in (("voxel size", envelope.spacing_mm), ("extent", envelope.extent_mm)):
        rows += [(f"{name}, {axis}", span(*value, " mm")) for axis, value in zip(AXES, values, strict=True)]
    what = "intensity" if envelope.raw else "normalised intensity"
    for number, channel in enumerate(envelope.intensity):
        for kind, value in zip(("0.5 %", "50 %", "99.5 %"), channel, strict=True):
            rows.append((f"{what}, channel {number}, {kind}", span(*value, "")))
    for name, value in envelope.volumes_ml.items():
        rows.append((f"volume of {name}", span(*value, f" ml, in at most {envelope.parts[name]} part(s)")))
    return rows


def prediction_report(folder: Path, template: Any) -> str:
    """Return the page of a folder of `medssl predict`.

    Args:
        folder: The folder.
        template: What to render it with.

    Raises:
        DataError: If its table is damaged.
    """
    try:
        content = json.loads((folder / TABLE).read_text())
        rows = _rows(content)
        labels = list(content["model"]["labels"])
        gates = content.get("gates")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / TABLE} is damaged ({type(error).__name__}): predict again.") from error
    page: str = template.render(
        name=folder.resolve().name,
        rows=rows,
        labels=labels,
        judged=gates is not None,
        mode=(gates or {}).get("mode"),
        counts=(gates or {}).get("counts", {}),
        refused=content["refused"],
        notice=NOTICE,
        version=__version__,
    )
    return page


def write_prediction_report(folder: Path, name: str, template: Any) -> Path:
    """Write the page into the folder and return its path."""
    write_text(folder / name, prediction_report(folder, template))
    return folder / name


def _rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row per case, the gravest verdict first."""
    volumes = {row["case"]: row["volumes_ml"] for row in content["predictions"]}
    verdicts: Sequence[Mapping[str, Any]] = (content.get("gates") or {}).get("verdicts", [])
    judged = {row["case"] for row in verdicts}
    rows = [
        {
            "case": row["case"],
            "verdict": row["verdict"],
            "words": [reason["words"] for reason in row["reasons"]],
            "not_checked": row["not_checked"],
            "volumes": {name: f"{value:.2f}" for name, value in volumes.get(row["case"], {}).items()},
        }
        for row in verdicts
    ]
    rows += [
        {
            "case": case,
            "verdict": "",
            "words": [],
            "not_checked": [],
            "volumes": {name: f"{value:.2f}" for name, value in found.items()},
        }
        for case, found in volumes.items()
        if case not in judged
    ]
    order = {name: place for place, name in enumerate(_ORDER)}
    return sorted(rows, key=lambda row: (order.get(row["verdict"], len(order)), row["case"]))
