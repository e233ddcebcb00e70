"""From runs to results: each arm's rate, its scores with intervals, and its differences from the controls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medssl.evaluation.bootstrap import LEVEL, RESAMPLES
from medssl.evaluation.classification_result import Interval
from medssl.evaluation.compare import holm
from medssl.protocol.outcomes import Outcome, higher_is_better
from medssl.protocol.statistics import Paired, over_seeds, paired

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Entry:
    """One run as the tables see it.

    Args:
        dataset: Name of the data set.
        arm: Name of the arm.
        labels: Number of labelled cases.
        seed: Of labelled cases and training.
        rate: Peak learning rate, or None for an arm that was trained elsewhere by rules of its own.
        selection: Outcome on the selection cases, if there are any.
        validation: Outcome on the validation cases; None for a run that failed.
        failed: Why, or empty.
        costs: Seconds and whatever else it took.
    """

    dataset: str
    arm: str
    labels: int
    seed: int
    rate: float | None
    selection: Outcome | None = None
    validation: Outcome | None = None
    failed: str = ""
    costs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One arm with one number of labels.

    Args:
        dataset: Name of the data set.
        arm: Name of the arm.
        labels: Number of labelled cases.
        metric: The metric that is tested.
        values: Every metric, mean over seeds, with its interval over cases.
        seeds: The tested metric of each seed.
        rate: The rate that was chosen, None for an arm from elsewhere or where no rate worked.
        looked: Mean of the tested metric on the selection cases for each rate of the grid.
        at_edge: Whether a better rate may lie outside the grid.
        failed: Why runs at the chosen rate failed, by seed.
    """

    dataset: str
    arm: str
    labels: int
    metric: str
    values: Mapping[str, Interval]
    seeds: Mapping[int, float]
    rate: float | None
    looked: Mapping[str, float] = field(default_factory=dict)
    at_edge: bool = False
    failed: Mapping[int, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain types."""
        return {
            **vars(self),
            "values": {name: value.to_json() for name, value in self.values.items()},
            "seeds": {str(seed): _plain(value) for seed, value in self.seeds.items()},
            "looked": {rate: _plain(value) for rate, value in self.looked.items()},
            "failed": {str(seed): why for seed, why in self.failed.items()},
        }


@dataclass(frozen=True)
class Difference:
    """One arm minus a control.

    Args:
        dataset: Name of the data set.
        arm: Name of the arm.
        control: What it is compared with.
        labels: Number of labelled cases.
        metric: Metric.
        paired: What was found.
        seeds: Seeds that both arms have.
        p_holm: p corrected for all differences of the protocol.
    """

    dataset: str
    arm: str
    control: str
    labels: int
    metric: str
    paired: Paired
    seeds: tuple[int, ...]
    p_holm: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain types."""
        return {**vars(self), **self.paired.to_json(), "paired": True, "seeds": list(self.seeds)}


@dataclass(frozen=True)
class Results:
    """The tables of a protocol.

    Args:
        rows: One for each data set, number of labels and arm.
        differences: One for each comparison of which both sides are there.
        missing: What is not in the tables and why.
    """

    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    missing: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the content of `results.json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "protocol",
            "method": METHOD,
            "arms": [row.to_json() for row in self.rows],
            "differences": [difference.to_json() for difference in self.differences],
            "missing": list(self.missing),
        }

    def __rich__(self) -> Any:
        """Return tables for the terminal."""
        from medssl.protocol.pages import rich_tables

        return rich_tables(self)


METHOD = {
    "model": "the last checkpoint of each run; nothing is chosen on the validation cases",
    "learning rate": "the same grid for every arm; the best mean on the selection cases, by number of labels",
    "value": "mean over seeds (in each case first, where a case has a value), then over cases",
    "interval": f"percentile bootstrap over patients, {LEVEL:.0%}, {RESAMPLES} resamples; of classes within each class",
    "scope": "intervals and tests are about other cases of the same kind, for the models at hand; how much the luck of "
    "training matters is seen from the seeds, which are listed one by one",
    "test": "sign-flip permutation over patients for means over cases; paired bootstrap for metrics of all cases "
    "together, such as AUROC; two-sided; Holm-corrected over all differences of the protocol",
}


def tabulate(
    entries: Sequence[Entry],
    comparisons: Sequence[tuple[str, str]],
    metrics: Mapping[str, str],
    groups: Mapping[str, Mapping[str, str]],
    rates: Sequence[float],
    looking: Sequence[int],
) -> Results:
    """Make the tables.

    Args:
        entries: All runs, in the order of the tables.
        comparisons: Pairs (arm, control).
        metrics: The tested metric of each data set.
        groups: Patient of each case, by data set.
        rates: The grid.
        looking: Seeds that choose the rate.
    """
    rows, differences, missing = [], [], []
    for dataset in dict.fromkeys(entry.dataset for entry in entries):
        metric, patients = metrics[dataset], groups[dataset]
        here = [entry for entry in entries if entry.dataset == dataset]
        for labels in dict.fromkeys(entry.labels for entry in here):
            chosen: dict[str, dict[int, Outcome]] = {}
            for arm in dict.fromkeys(entry.arm for entry in here if entry.labels == labels):
                runs = [entry for entry in here if (entry.labels, entry.arm) == (labels, arm)]
                row, outcomes = _row(runs, metric, patients, rates, looking)
                rows.append(row)
                chosen[arm] = outcomes
                missing += _complaints(row)
            for arm, control in comparisons:
                ours, theirs = chosen.get(arm, {}), chosen.get(control, {})
                seeds = tuple(seed for seed in ours if seed in theirs)
                if not seeds:
                    missing.append(f"{dataset}, {labels} labels: {arm} - {control}: no seed has both.")
                    continue
                cases = ours[seeds[0]].cases
                found = paired(
                    [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds], metric,
                    [patients[case] for case in cases],
                )  # fmt: skip
                differences.append(Difference(dataset, arm, control, labels, metric, found, seeds))
    return Results(tuple(rows), tuple(_with_holm(differences)), tuple(missing))


def choose_rate(
    entries: Sequence[Entry], metric: str, rates: Sequence[float], looking: Sequence[int]
) -> tuple[float | None, dict[str, float]]:
    """Return the rate with the best mean on the selection cases, and what each had there.

    A rate of which a run failed is not chosen; of equal ones the first is. A grid of one needs no look.

    Args:
        entries: Runs of one arm with one number of labels.
        metric: What counts.
        rates: The grid.
        looking: Seeds that count.
    """
    looked: dict[str, float] = {}
    for rate in rates:
        found = [entry for entry in entries if entry.rate == rate and entry.seed in looking]
        values = [
            float(entry.selection.weighted(None)[metric][0])
            for entry in found
            if entry.selection is not None and not entry.failed
        ]
        complete = len(values) == len(looking)
        looked[f"{rate:g}"] = float(np.mean(values)) if complete else math.nan
    if len(rates) == 1:
        return rates[0], looked
    sign = 1 if higher_is_better(metric) else -1
    known = [rate for rate in rates if not math.isnan(looked[f"{rate:g}"])]
    if not known:
        return None, looked
    return max(known, key=lambda rate: sign * looked[f"{rate:g}"]), looked


def _row(
    runs: Sequence[Entry],
    metric: str,
    patients: Mapping[str, str],
    rates: Sequence[float],
    looking: Sequence[int],
) -> tuple[Row, dict[int, Outcome]]:
    first = runs[0]
    rate: float | None = None
    looked: dict[str, float] = {}
    if any(entry.rate is not None for entry in runs):
        rate, looked = choose_rate(runs, metric, rates, looking)
        runs = [entry for entry in runs if entry.rate == rate]
    outcomes = {entry.seed: entry.validation for entry in runs if entry.validation is not None}
    failed = {entry.seed: entry.failed for entry in runs if entry.failed}
    values: dict[str, Interval] = {}
    if outcomes:
        cases = next(iter(outcomes.values())).cases
        values = over_seeds(list(outcomes.values()), [patients[case] for case in cases])
    return (
        Row(
            dataset=first.dataset,
            arm=first.arm,
            labels=first.labels,
            metric=metric,
            values=values,
            seeds={seed: float(outcome.weighted(None)[metric][0]) for seed, outcome in outcomes.items()},
            rate=rate,
            looked=looked,
            at_edge=len(rates) > 2 and rate in (min(rates), max(rates)),
            failed=failed,
        ),
        outcomes,
    )


def _complaints(row: Row) -> list[str]:
    where = f"{row.dataset}, {row.labels} labels: {row.arm}"
    if not row.seeds and not row.failed:
        return [f"{where}: no learning rate of the grid worked."]
    return [f"{where}, seed {seed}: {why}" for seed, why in row.failed.items()]


def _with_holm(found: Sequence[Difference]) -> list[Difference]:
    tested = [row for row in found if row.paired.interval.p is not None]
    corrected = holm([row.paired.interval.p for row in tested if row.paired.interval.p is not None])
    by_id = dict(zip(map(id, tested), corrected, strict=True))
    return [Difference(**{**vars(row), "p_holm": by_id.get(id(row))}) for row in found]


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value
