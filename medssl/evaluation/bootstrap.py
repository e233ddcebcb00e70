"""Percentile bootstrap intervals over cases (Efron, 1979), seeded, so that a table can be made again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over cases with its interval; None where nothing was measured.

    Args:
        mean: Mean of the defined values.
        low: Lower end of the interval.
        high: Upper end of the interval.
        median: Median of the defined values.
        deviation: Standard deviation over cases (divisor n - 1).
        cases: How many values were defined.
    """

    mean: float | None
    low: float | None
    high: float | None
    median: float | None
    deviation: float | None
    cases: int

    def to_json(self) -> dict[str, Any]:
        """Return plain types."""
        return dict(vars(self))


def estimate(values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> Estimate:
    """Return the mean over cases and its percentile interval.

    With one case there is no interval: its ends are None.

    Args:
        values: One number per case; NaN is left out.
        seed: Of the resampling.
        resamples: Number of resamples.
        level: Coverage of the interval.
    """
    defined = np.asarray([value for value in values if not np.isnan(value)], dtype=np.float64)
    if defined.size == 0:
        return Estimate(None, None, None, None, None, 0)
    mean, median = float(defined.mean()), float(np.median(defined))
    if defined.size == 1:
        return Estimate(mean, None, None, median, None, 1)
    means = resampled_means(defined, seed, resamples)
    low, high = np.percentile(means, [50 * (1 - level), 50 * (1 + level)])
    return Estimate(mean, float(low), float(high), median, float(defined.std(ddof=1)), int(defined.size))


def resampled_means(values: np.ndarray[Any, Any], seed: int, resamples: int) -> np.ndarray[Any, Any]:
    """Return the means of `resamples` samples with replacement. Shape: (resamples,)."""
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    # In portions: 10,000 x 1,000 indices at once would be 80 MB.
    step = max(1, 1_000_000 // values.size)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        means[start : start + count] = values[rng.integers(0, values.size, (count, values.size))].mean(axis=1)
    return means


def resampled_counts(
    cases: int,
    *,
    strata: Sequence[object] | None = None,
    groups: Sequence[object] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Iterator[NDArray[np.float64]]:
    """Yield how often each case is in each resample, in portions that together are `resamples` rows.

    Args:
        cases: How many there are.
        strata: Draw within each stratum, so that every resample has as many cases of each as there are. One per case.
        groups: Draw whole groups with replacement, for cases that depend on each other, such as several images of a
            patient. One per case; the strata are then not used, since a group may lie in several.
        seed: Of the resampling.
        resamples: Number of resamples.

    Yields:
        Counts. Shape: (rows, cases), float64.
    """
    rng = np.random.default_rng(seed)
    grouped = groups is not None and len(set(groups)) < cases
    of_unit = _numbered(groups) if grouped and groups is not None else np.arange(cases)
    units = int(of_unit.max()) + 1 if cases else 0
    of_stratum = np.zeros(units, np.int64) if grouped or strata is None else _numbered(strata)
    members = [np.flatnonzero(of_stratum == stratum) for stratum in np.unique(of_stratum)]
    step = max(1, 500_000 // max(cases, 1))
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        counts = np.zeros((rows, units))
        for member in members:
            drawn = member[rng.integers(0, member.size, (rows, member.size))]
            flat = (drawn + units * np.arange(rows)[:, None]).ravel()
            counts += np.bincount(flat, minlength=rows * units).reshape(rows, units)
        yield counts[:, of_unit]


def _numbered(values: Sequence[object]) -> NDArray[np.int64]:
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)
