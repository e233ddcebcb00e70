"""Runs side by side: paired differences over the same cases, with intervals and corrected tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medssl.errors import DataError, UsageError, unknown_name
from medssl.evaluation.bootstrap import LEVEL, RESAMPLES, Estimate, estimate
from medssl.evaluation.overlap import HIGHER_IS_BETTER, METRICS
from medssl.evaluation.results import Values, run_scores
from medssl.evaluation.segmentation import case_means, show

ALL_LABELS = "all labels"


@dataclass(frozen=True)
class Difference:
    """One run against another in one metric and label.

    Args:
        run: Its name.
        baseline: Name of the run it is compared with.
        metric: A metric.
        label: A label, or `all labels` for the mean over labels in each case.
        estimate: Mean of `run - baseline` over the paired cases, with its interval.
        better: Cases in which `run` is better.
        worse: Cases in which it is worse.
        unpaired: Cases left out since the metric is undefined in one of the two.
        p: Two-sided Wilcoxon signed-rank test, None where it cannot be made.
        p_holm: `p` corrected for all comparisons of the table (Holm, 1979).
    """

    run: str
    baseline: str
    metric: str
    label: str
    estimate: Estimate
    better: int
    worse: int
    unpaired: int
    p: float | None
    p_holm: float | None

    def to_json(self) -> dict[str, Any]:
        """Return plain types."""
        return {**vars(self), "estimate": self.estimate.to_json()}


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Args:
        runs: Names of the runs in the order given.
        cases: The cases that all runs have.
        left_out: Cases that not all runs have.
        means: Estimate per run, metric and label.
        differences: Each run against the baseline, or every pair.
        seed: Of the bootstrap.
    """

    runs: tuple[str, ...]
    cases: tuple[str, ...]
    left_out: tuple[str, ...]
    means: dict[str, dict[str, dict[str, Estimate]]]
    differences: tuple[Difference, ...]
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Return plain types."""
        return {
            "schema_version": 1,
            "kind": "comparison",
            "method": {
                "interval": f"percentile bootstrap over cases, {LEVEL:.0%}, {RESAMPLES} resamples, seed {self.seed}",
                "test": "two-sided Wilcoxon signed-rank over cases, Holm-corrected over all differences listed",
                "difference": "run minus baseline",
            },
            "runs": list(self.runs),
            "cases": list(self.cases),
            "left_out": list(self.left_out),
            "means": {
                run: {
                    metric: {label: value.to_json() for label, value in labels.items()}
                    for metric, labels in metrics.items()
                }
                for run, metrics in self.means.items()
            },
            "differences": [difference.to_json() for difference in self.differences],
        }

    def __rich__(self) -> Any:
        """Return tables for the terminal."""
        from rich.console import Group
        from rich.table import Table

        first = next(iter(self.means.values()))
        means = Table(title=f"Means over {len(self.cases)} cases ({LEVEL:.0%} interval)")
        for name in ("metric", "label", *self.runs):
            means.add_column(name, justify="left" if name in ("metric", "label") else "right")
        for metric, labels in first.items():
            for label in labels:
                means.add_row(metric, label, *(show(self.means[run][metric][label], metric) for run in self.runs))
        table = Table(title="Paired differences (run minus baseline)")
        for name in ("run", "baseline", "metric", "label", "difference", "better", "worse", "p (Holm)"):
            table.add_column(name, justify="left" if name in ("run", "baseline", "metric", "label") else "right")
        for row in self.differences:
            table.add_row(
                row.run,
                row.baseline,
                row.metric,
                row.label,
                show(row.estimate, row.metric),
                str(row.better),
                str(row.worse),
                "-" if row.p_holm is None else f"{row.p_holm:.3g}",
            )
        notes = [f"Left out, since not all runs have them: {', '.join(self.left_out)}"] if self.left_out else []
        if len(self.cases) < 6:
            notes.append(f"{len(self.cases)} cases: no difference can be significant in a signed-rank test of so few.")
        return Group(means, table, *notes)


def compare(
    runs: Sequence[Path],
    *,
    references: Path | None = None,
    metrics: Sequence[str] = ("dice", "hd95_mm"),
    all_pairs: bool = False,
    common_cases: bool = False,
    seed: int = 0,
) -> Comparison:
    """Compare runs case by case; the first one is the baseline.

    Args:
        runs: Two or more segmentation RUNs or folders of `evaluate segmentation --out`.
        references: Reference masks, for runs that do not say where theirs are.
        metrics: Of `dice`, `jaccard`, `hd95_mm`, `assd_mm`.
        all_pairs: Compare every pair instead of each with the first.
        common_cases: Where the runs have different cases, compare those they share.
        seed: Of the bootstrap.

    Raises:
        UsageError: If there are fewer than two runs or a metric is unknown.
        DataError: If the runs have different cases or labels.
    """
    if len(runs) < 2:
        raise UsageError("compare needs at least two runs: medssl compare BASELINE RUN...")
    for metric in metrics:
        if metric not in METRICS:
            raise unknown_name("metric", metric, METRICS)
    names = _names(runs)
    values = {name: run_scores(run, references) for name, run in zip(names, runs, strict=True)}
    labels = _common_labels(values)
    cases, left_out = _common_cases(values, common_cases)
    series = {
        name: {metric: _series(scores[metric], labels, cases) for metric in metrics} for name, scores in values.items()
    }
    means = {
        name: {
            metric: {label: estimate(list(column.values()), seed=seed) for label, column in columns.items()}
            for metric, columns in by_metric.items()
        }
        for name, by_metric in series.items()
    }
    pairs = (
        [(a, b) for index, a in enumerate(names) for b in names[index + 1 :]]
        if all_pairs
        else [(names[0], name) for name in names[1:]]
    )
    found = [
        _difference(run, baseline, metric, label, series[run][metric][label], series[baseline][metric][label], seed)
        for baseline, run in pairs
        for metric in metrics
        for label in series[run][metric]
    ]
    return Comparison(tuple(names), cases, left_out, means, tuple(_with_holm(found)), seed)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down correction: the i-th smallest of n is multiplied by n - i, kept monotone, at most 1.

    Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def signed_rank(differences: Sequence[float]) -> float | None:
    """Return the two-sided p of Wilcoxon's signed-rank test; zeros count by Pratt's rule.

    Returns:
        None with fewer than two differences; 1 if all are zero.
    """
    from scipy.stats import wilcoxon

    values = np.asarray(differences, dtype=np.float64)
    if values.size < 2:
        return None
    if not values.any():
        return 1.0
    return float(wilcoxon(values, zero_method="pratt").pvalue)


def _difference(
    run: str, baseline: str, metric: str, label: str, ours: dict[str, float], theirs: dict[str, float], seed: int
) -> Difference:
    paired = [ours[case] - theirs[case] for case in ours if not math.isnan(ours[case] - theirs[case])]
    gains = [value if HIGHER_IS_BETTER[metric] else -value for value in paired]
    return Difference(
        run=run,
        baseline=baseline,
        metric=metric,
        label=label,
        estimate=estimate(paired, seed=seed),
        better=sum(gain > 0 for gain in gains),
        worse=sum(gain < 0 for gain in gains),
        unpaired=len(ours) - len(paired),
        p=signed_rank(paired),
        p_holm=None,
    )


def _with_holm(found: Sequence[Difference]) -> list[Difference]:
    tested = [difference for difference in found if difference.p is not None]
    corrected = dict(zip(map(id, tested), holm([row.p for row in tested if row.p is not None]), strict=True))
    return [Difference(**{**vars(row), "p_holm": corrected.get(id(row))}) for row in found]


def _series(
    scores: dict[str, dict[str, float]], labels: Sequence[str], cases: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return a column per label and, with several labels, one of their mean in each case."""
    columns = {label: {case: scores[label].get(case, math.nan) for case in cases} for label in labels}
    if len(labels) == 1:
        return columns
    mean = case_means((case, value) for column in columns.values() for case, value in column.items())
    return {ALL_LABELS: mean, **columns}


def _common_labels(values: dict[str, Values]) -> list[str]:
    found = {name: list(scores["dice"]) for name, scores in values.items()}
    first_name, first = next(iter(found.items()))
    for name, labels in found.items():
        if set(labels) != set(first):
            raise DataError(
                f"{name} has the labels {', '.join(labels)}, {first_name} has {', '.join(first)}: they were measured "
                "on different data. Measure both with the same references."
            )
    return first


def _common_cases(values: dict[str, Values], common: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    each = {name: {case for column in scores["dice"].values() for case in column} for name, scores in values.items()}
    shared, every = set.intersection(*each.values()), set.union(*each.values())
    if shared != every and not common:
        first_name, first = next(iter(each.items()))
        for name, cases in each.items():
            if cases != first:
                odd = sorted(cases ^ first)
                raise DataError(
                    f"{first_name} and {name} were measured on different cases ({len(odd)} are in only one of them, "
                    f"for example {odd[0]}). Give all runs the same validation cases, or use --common-cases."
                )
    if not shared:
        raise DataError("The runs share no case: there is nothing to compare.")
    return tuple(sorted(shared)), tuple(sorted(every - shared))


def _names(runs: Sequence[Path]) -> list[str]:
    """Return the shortest trailing parts of the paths that tell the runs apart."""
    parts = [run.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise UsageError("compare got the same run twice.")
