"""How well a score ranks cases of one kind above the others: areas under two curves, and false alarms at a recall.

Every function takes weights, many sets of them at once: counts of a bootstrap resample are weights, so that the value
and its interval come from one definition, and scores are sorted only once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Ranking:
    """Scores in order, cases of equal score kept together.

    Args:
        scores: One per case; larger speaks for positive. Shape: (N,), finite.
        positive: Whether the case is positive. Shape: (N,), bool.

    Raises:
        ValueError: If the shapes differ, there is no case, or a score is not finite.
    """

    def __init__(self, scores: Floats, positive: Bools) -> None:
        scores, positive = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
        if scores.shape != positive.shape or scores.ndim != 1 or scores.size == 0:
            raise ValueError(f"A ranking needs N scores and N truths, got shapes {scores.shape} and {positive.shape}")
        if not np.isfinite(scores).all():
            raise ValueError(f"Score {int(np.flatnonzero(~np.isfinite(scores))[0])} is not finite")
        self._order = np.argsort(-scores, kind="stable")
        self._positive = positive[self._order]
        ordered = scores[self._order]
        self._starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        self.thresholds: Floats = ordered[self._starts]

    def auroc(self, weights: Floats | None = None) -> Floats:
        """Return the chance that a positive case has a larger score than a negative one; ties count half.

        Args:
            weights: Sets of weights. Shape: (R, N); None is one set of ones.

        Returns:
            Shape: (R,); NaN where there are no positive or no negative cases.
        """
        hits, alarms = self._counts(weights)
        before = np.cumsum(alarms, axis=1) - alarms
        all_hits, all_alarms = hits.sum(axis=1), alarms.sum(axis=1)
        # A positive case wins against the negatives that come after its group, and half of those within it.
        wins = (hits * (all_alarms[:, None] - before - 0.5 * alarms)).sum(axis=1)
        return ratio(wins, all_hits * all_alarms)

    def average_precision(self, weights: Floats | None = None) -> Floats:
        """Return the area under precision over recall, as a sum of steps (not by trapezoids, which are too good).

        Returns:
            Shape: (R,); NaN where there are no positive cases.
        """
        hits, alarms = self._counts(weights)
        found, alarmed = np.cumsum(hits, axis=1), np.cumsum(alarms, axis=1)
        total = found + alarmed
        precision = np.divide(found, total, out=np.zeros_like(found), where=total > 0)
        return ratio((precision * hits).sum(axis=1), hits.sum(axis=1))

    def false_positive_rate(self, recall: float = 0.95, weights: Floats | None = None) -> Floats:
        """Return the share of negatives that are flagged at the strictest threshold reaching a recall of positives.

        Returns:
            Shape: (R,); NaN where there are no positive or no negative cases.
        """
        hits, alarms = self._counts(weights)
        found, alarmed = np.cumsum(hits, axis=1), np.cumsum(alarms, axis=1)
        all_hits, all_alarms = found[:, -1], alarmed[:, -1]
        # A hair below the recall, since sums of weights round.
        first = np.argmax(found >= recall * all_hits[:, None] * (1 - 1e-12), axis=1)
        rate = alarmed[np.arange(len(first)), first]
        return np.where(all_hits > 0, ratio(rate, all_alarms), np.nan)

    def curve(self) -> tuple[Floats, Floats]:
        """Return the false and the true positive rate at each threshold, from (0, 0) to (1, 1). Shape: (T + 1,) each.

        NaN where there are no negative or no positive cases.
        """
        hits, alarms = self._counts(None)
        rates = [np.concatenate([[0.0], np.cumsum(part[0])]) for part in (alarms, hits)]
        return tuple(ratio(rate, np.full_like(rate, rate[-1])) for rate in rates)  # type: ignore[return-value]

    def _counts(self, weights: Floats | None) -> tuple[Floats, Floats]:
        """Return the weight of positives and of negatives at each threshold. Shape: (R, T) each."""
        ordered = np.ones((1, self._order.size)) if weights is None else weights[:, self._order]
        hits = np.add.reduceat(np.where(self._positive, ordered, 0.0), self._starts, axis=1)
        alarms = np.add.reduceat(np.where(self._positive, 0.0, ordered), self._starts, axis=1)
        return hits, alarms


def ratio(part: Floats, whole: Floats) -> Floats:
    """Return part / whole, broadcast, float64; NaN where the whole is nothing."""
    part, whole = np.broadcast_arrays(np.asarray(part, np.float64), np.asarray(whole, np.float64))
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
