"""Intervals and paired tests over cases: seeds are averaged first, patients are drawn and flipped as a whole.

Intervals are percentile bootstraps over patients (cases where each is a patient of its own); for classification cases
are drawn within each class. The test of a difference depends on the metric. A mean over cases (Dice) takes the
sign-flip permutation test: if two arms are exchangeable, a patient's difference is as likely as its negative; all
2^n flips are looked at where they are few, else as many random ones as resamples. A metric of all cases together
(AUROC) has no difference in a case; its p is twice the smaller share of paired resamples on either side of 0 (Davison
and Hinkley, 1997). Both count the observed one, so that p is never 0. Holm (1979) corrects for all differences of a
table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medssl.evaluation.bootstrap import LEVEL, RESAMPLES, resampled_counts
from medssl.evaluation.classification_result import Interval
from medssl.protocol.outcomes import CaseValues, Floats, Outcome, higher_is_better, weighted_mean

# Up to so many patients every combination of signs is looked at.
MOST_EXACT = 13
_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Paired:
    """One arm against another in one metric.

    Args:
        interval: Mean difference with its interval; `p` is not corrected.
        test: `sign-flip` or `bootstrap`.
        better: Cases in which the first is better; None where a case has no value of its own.
        cases: Cases that were compared.
        unpaired: Cases left out since the metric is undefined in one of the two.
    """

    interval: Interval
    test: str
    better: int | None
    cases: int
    unpaired: int

    def to_json(self) -> dict[str, Any]:
        """Return plain types."""
        content = {"difference": self.interval.to_json(), **vars(self)}
        del content["interval"]
        return content


def over_seeds(outcomes: Sequence[Outcome], groups: Sequence[str], *, seed: int = 0) -> dict[str, Interval]:
    """Return every metric of some runs that differ in their seed alone, with its interval over cases.

    Args:
        outcomes: One for each seed, on the same cases.
        groups: Patient of each case.
        seed: Of the resampling.
    """
    points, samples = _sampled(outcomes, groups, seed)
    return {metric: _interval(points[metric], samples[metric]) for metric in points}


def paired(
    ours: Sequence[Outcome], theirs: Sequence[Outcome], metric: str, groups: Sequence[str], *, seed: int = 0
) -> Paired:
    """Return ours minus theirs in one metric.

    Args:
        ours: One for each seed.
        theirs: The same seeds and cases.
        metric: Name.
        groups: Patient of each case.
        seed: Of resampling and flips.
    """
    if all(isinstance(outcome, CaseValues) for outcome in (*ours, *theirs)):
        return _of_cases(_mean(ours).column(metric) - _mean(theirs).column(metric), metric, groups, seed)
    (mine, my_samples), (other, other_samples) = (_sampled(each, groups, seed) for each in (ours, theirs))
    gaps = my_samples[metric] - other_samples[metric]
    gaps = gaps[~np.isnan(gaps)]
    interval = _interval(mine[metric] - other[metric], gaps)
    p = None
    if not math.isnan(interval.low):
        sides = min(int((gaps <= 0).sum()), int((gaps >= 0).sum())) + 1
        p = min(1.0, 2 * sides / (gaps.size + 1))
    return Paired(Interval(interval.value, interval.low, interval.high, p), "bootstrap", None, len(ours[0].cases), 0)


def sign_flip(values: Floats, groups: Sequence[str], *, seed: int = 0) -> float | None:
    """Return the two-sided p of the sign-flip test that the mean is 0.

    Args:
        values: Differences, none NaN. Shape: (N,).
        groups: What flips together, one per value.
        seed: Of random flips.

    Returns:
        None with fewer than two groups.
    """
    names = sorted(set(groups))
    if len(names) < 2:
        return None
    place = {name: number for number, name in enumerate(names)}
    sums = np.bincount([place[group] for group in groups], weights=values, minlength=len(names))
    reached = abs(sums.sum()) - _TOLERANCE * np.abs(sums).sum()
    if len(names) <= MOST_EXACT:
        signs = 1.0 - 2.0 * (np.arange(2 ** len(names))[:, None] >> np.arange(len(names)) & 1)
        return float((np.abs(signs @ sums) >= reached).mean())
    rng = np.random.default_rng(seed)
    hits = 0
    step = max(1, 2_000_000 // len(names))
    for start in range(0, RESAMPLES, step):
        signs = 1.0 - 2.0 * rng.integers(0, 2, (min(step, RESAMPLES - start), len(names)))
        hits += int((np.abs(signs @ sums) >= reached).sum())
    return (hits + 1) / (RESAMPLES + 1)


def _of_cases(column: Floats, metric: str, groups: Sequence[str], seed: int) -> Paired:
    known = ~np.isnan(column)
    values, kept = column[known], [group for group, here in zip(groups, known, strict=True) if here]
    if not kept:
        return Paired(Interval(math.nan, math.nan, math.nan), "sign-flip", 0, 0, len(column))
    weights = resampled_counts(len(kept), groups=kept, seed=seed)
    samples = np.concatenate([weighted_mean(values, portion) for portion in weights])
    interval = _interval(float(values.mean()), samples if len(set(kept)) > 1 else samples[:0])
    gains = values if higher_is_better(metric) else -values
    return Paired(
        Interval(interval.value, interval.low, interval.high, sign_flip(values, kept, seed=seed)),
        "sign-flip",
        int((gains > 0).sum()),
        len(kept),
        int((~known).sum()),
    )


def _mean(outcomes: Sequence[Outcome]) -> CaseValues:
    return CaseValues.mean_of([outcome for outcome in outcomes if isinstance(outcome, CaseValues)])


def _sampled(
    outcomes: Sequence[Outcome], groups: Sequence[str], seed: int
) -> tuple[dict[str, float], dict[str, Floats]]:
    """Return each metric, mean over runs, and the same in each resample of cases."""
    if all(isinstance(outcome, CaseValues) for outcome in outcomes):
        outcomes = [_mean(outcomes)]
    first = outcomes[0]
    alone = len(set(groups)) < 2
    found = [outcome.weighted(None) for outcome in outcomes]
    points = {metric: float(np.mean([values[metric][0] for values in found])) for metric in found[0]}
    parts: dict[str, list[Floats]] = {metric: [] for metric in points}
    strata = first.strata
    for weights in resampled_counts(len(first.cases), strata=strata, groups=groups, seed=seed):
        drawn = [outcome.weighted(weights) for outcome in outcomes]
        for metric, column in parts.items():
            column.append(np.mean([values[metric] for values in drawn], axis=0))
    # One patient cannot be drawn otherwise: there is no interval, and none of width 0.
    samples = {metric: np.concatenate(column) for metric, column in parts.items()}
    return points, {metric: values[:0] if alone else values for metric, values in samples.items()}


def _interval(value: float, samples: Floats) -> Interval:
    known = samples[~np.isnan(samples)]
    # Of few resamples in which the metric is defined, the interval would be about those alone.
    if math.isnan(value) or known.size < RESAMPLES / 2:
        return Interval(value, math.nan, math.nan)
    low, high = np.percentile(known, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(value, float(low), float(high))
