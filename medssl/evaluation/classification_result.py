"""What a measured classifier looks like: as JSON for scripts, as tables for people."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from medssl.evaluation.bootstrap import LEVEL, RESAMPLES
from medssl.training.scores import BINS

SCHEMA_VERSION = 1
OVERALL = (
    "auroc",
    "aupr",
    "accuracy",
    "balanced_accuracy",
    "f1",
    "kappa",
    "kappa_quadratic",
    "mean_absolute_error",
    "ranked_probability_score",
    "ece",
    "brier",
    "nll",
)


def resamples_for(cases: int) -> int:
    """Return how many resamples an interval is made of: fewer of many cases, whose intervals vary less."""
    return RESAMPLES if cases <= 2000 else RESAMPLES // 5


@dataclass(frozen=True)
class Interval:
    """A metric over cases, with its percentile bootstrap interval.

    Args:
        value: NaN where it is not defined.
        low: NaN where there is no interval.
        high: NaN where there is no interval.
        p: Two-sided bootstrap test against 0, of differences only.
    """

    value: float
    low: float
    high: float
    p: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """Return plain types, None for NaN."""
        content = {
            name: None if math.isnan(getattr(self, name)) else getattr(self, name) for name in ("value", "low", "high")
        }
        return content if self.p is None else {**content, "p": self.p}

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "-"
        ends = "" if math.isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.value:.3f}{ends}"


@dataclass(frozen=True)
class ClassificationResult:
    """What was measured of a classifier.

    Args:
        kind: `multiclass`, `multilabel` or `ordinal`.
        classes: Their names.
        cases: Names of the cases.
        counts: Cases of each class.
        patients: Number of patients, or None where the tables do not tell.
        metrics: Each metric with its interval.
        confusion: True class (rows) and answer (columns); of several labels one 2 x 2 table per label.
        reliability: Per bin that is not empty `low`, `high`, `cases`, `confidence` and `frequency`; of several labels
            over all labels together.
        curves: Per class the false and the true positive rates of its ROC curve.
        seed: Of the bootstrap.
    """

    kind: str
    classes: tuple[str, ...]
    cases: tuple[str, ...]
    counts: dict[str, int]
    patients: int | None
    metrics: dict[str, Interval]
    confusion: list[Any]
    reliability: list[dict[str, float]]
    curves: dict[str, tuple[list[float], list[float]]]
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Return the content of `metrics.json`."""
        clustered = self.patients is not None and self.patients < len(self.cases)
        units = "patients, all cases of a patient together" if clustered else "cases, within each class"
        units = "cases" if self.kind == "multilabel" and not clustered else units
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "classification evaluation",
            "target_kind": self.kind,
            "cases": len(self.cases),
            "patients": self.patients,
            "classes": self.counts,
            "conventions": {
                "interval": f"percentile bootstrap over {units}, {LEVEL:.0%}, "
                f"{resamples_for(len(self.cases))} resamples, seed {self.seed}",
                "undefined": "null; means over classes are over the classes for which the metric is defined",
                "auroc, aupr": "each class against the rest, then the mean; aupr is average precision",
                "decisions": "threshold 0.5 per label" if self.kind == "multilabel" else "the most probable class",
                "ece": f"{BINS} bins of equal width",
                "brier": "mean over labels" if self.kind == "multilabel" else "sum over classes, halved for two",
            },
            "metrics": {name: value.to_json() for name, value in self.metrics.items()},
            "confusion": self.confusion,
            "reliability": self.reliability,
            "roc": {
                name: {"false_positive_rate": rates[0], "true_positive_rate": rates[1]}
                for name, rates in self.curves.items()
            },
        }

    def __rich__(self) -> Any:
        """Return tables for the terminal."""
        from rich.console import Group
        from rich.table import Table

        overall = Table(title=f"{len(self.cases)} cases ({LEVEL:.0%} interval)")
        overall.add_column("metric")
        overall.add_column("value", justify="right")
        for name in OVERALL:
            if name in self.metrics:
                overall.add_row(name.replace("_", " "), str(self.metrics[name]))
        each = Table(title="Classes")
        for name in ("class", "cases", "auroc", "aupr", "sensitivity", "specificity"):
            each.add_column(name, justify="left" if name == "class" else "right")
        for name in self.classes:
            values = (
                str(self.metrics[f"{metric}/{name}"]) for metric in ("auroc", "aupr", "sensitivity", "specificity")
            )
            each.add_row(name, str(self.counts[name]), *values)
        return Group(overall, each)
