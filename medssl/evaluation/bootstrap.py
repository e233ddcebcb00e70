"""Percentile bootstrap intervals over cases (Efron, 1979), seeded, so that a table can be made again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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
