"""Thresholds of scores that are stranger the larger they are, set on validation cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medssl.errors import UsageError


@dataclass(frozen=True)
class Threshold:
    """Above which a score asks for a look, and above which the case is strange.

    Args:
        review: The conformal quantile.
        refuse: Tukey's outer fence or the largest validation score, whichever is larger; None never refuses.
        cases: Validation cases it rests on.
        flagged: How many of them lie above `review`.
    """

    review: float
    refuse: float | None
    cases: int
    flagged: int

    def to_json(self) -> dict[str, Any]:
        """Return plain types."""
        return dict(vars(self))


def least_cases(flag_rate: float) -> int:
    """Return how many validation cases a threshold needs that flags this share of cases like them."""
    return math.ceil(1 / flag_rate) - 1


def check_cases(count: int, flag_rate: float) -> None:
    """Refuse to set thresholds on too few cases.

    Raises:
        UsageError: That names the number that is needed, and the rate that is possible.
    """
    if not 0 < flag_rate < 1:
        raise UsageError(f"--flag-rate {flag_rate}: must lie between 0 and 1. The default is 0.05.")
    needed = least_cases(flag_rate)
    if count < needed:
        possible = math.ceil(100 / (count + 1)) / 100
        way_out = f", or ask for --flag-rate {possible}" if count > 1 and possible < 0.5 else ""
        raise UsageError(
            f"{count} validation cases cannot tell a threshold that flags {flag_rate:.0%} of such cases: {needed} are "
            f"needed. Name more with --validation-cases (none that the model was trained on){way_out}."
        )


def calibrate(scores: Sequence[float], flag_rate: float, *, refuses: bool) -> Threshold:
    """Return the threshold of a score.

    `review` is the split conformal quantile (Papadopoulos et al., ECML 2002): the ceil((n + 1)(1 - rate))-th smallest
    of n scores. Of new cases like these, at most the share `flag_rate` lies above it, on average over draws of the
    validation cases. `refuse` is the upper outer fence of Tukey (1977), the third quartile and three interquartile
    ranges, but never below the largest validation score.

    Args:
        scores: Of validation cases.
        flag_rate: Share to flag.
        refuses: Whether the score alone can refuse a case.

    Raises:
        UsageError: If there are too few cases.
    """
    check_cases(len(scores), flag_rate)
    ordered = np.sort(np.asarray(scores, np.float64))
    place = math.ceil(round((len(ordered) + 1) * (1 - flag_rate), 9))
    review = float(ordered[min(place, len(ordered)) - 1])
    first, third = np.percentile(ordered, (25, 75))
    fence = max(float(third + 3 * (third - first)), float(ordered[-1]))
    return Threshold(review, fence if refuses else None, len(ordered), int((ordered > review).sum()))
