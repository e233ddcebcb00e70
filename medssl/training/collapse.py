"""From figures of features to a verdict in words: what is wrong with them, and what most likely made it so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from medssl.training.quality import (
    MOST_PAIRED_ROWS,
    alpha_req,
    centred_rank,
    dimension_deviation,
    norms,
    rankme,
    spectrum,
    uniformity,
    unit,
)

State = Literal["healthy", "suspicious", "collapsed", "broken"]

#: Below this spread, relative to their size, features are one feature with noise of float16 or float32.
LEAST_DEVIATION = 1e-4
#: Share of the possible rank below which features have collapsed into few directions, and of the untrained network's.
LEAST_RANK, LEAST_OF_UNTRAINED = 0.05, 1 / 3
#: Factor by which lengths may differ from the untrained network's; without one, from a root mean square of 1.
NORM_FACTOR, NORM_FACTOR_ALONE = 30.0, 1000.0
#: Length of the longest feature in medians.
LARGEST_NORM = 10.0
MOST_DUPLICATES, MOST_IDLE = 0.05, 0.25


@dataclass(frozen=True)
class Verdict:
    """What is thought of some features.

    Args:
        state: `healthy`; `suspicious`, look at it; `collapsed`, of no use; `broken`, not even numbers.
        sentences: What was found, the worst first, each with its likely cause.
    """

    state: State
    sentences: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain types."""
        return {"state": self.state, "sentences": list(self.sentences)}

    def __str__(self) -> str:
        return f"{self.state}: {' '.join(self.sentences)}"


def figures(features: Tensor) -> dict[str, float]:
    """Return the figures that `verdict` reads.

    Args:
        features: One row per sample. Shape: (N, D).

    Returns:
        `samples`, `dimensions`, `not_finite` (share of rows), and over the finite rows `duplicates` (share of rows that
        nearly equal another), `rankme`, `centred_rank`, `first_direction` (share of the variance), `alpha`,
        `alpha_fit` (R squared), `uniformity`, `cosine` (mean over pairs), `norm`, `norm_spread`, `norm_largest` (in
        medians), `deviation` and `idle_dimensions`. NaN where a figure is not defined.
    """
    finite = torch.isfinite(features).all(dim=1)
    rows = features[finite].float()
    found = {
        "samples": float(len(features)),
        "dimensions": float(features.shape[1]),
        "not_finite": 1 - float(finite.float().mean()) if len(features) else math.nan,
    }
    names = ("duplicates", "rankme", "centred_rank", "first_direction", "alpha", "alpha_fit", "uniformity", "cosine",
             "norm", "norm_spread", "norm_largest", "deviation", "idle_dimensions")  # fmt: skip
    if len(rows) < 2:
        return found | dict.fromkeys(names, math.nan)
    length, deviation, values = norms(rows), dimension_deviation(rows), spectrum(rows)
    alpha, fit = alpha_req(rows)
    mean = unit(rows).mean(dim=0)
    count = len(rows)
    return found | {
        "duplicates": _duplicates(rows),
        "rankme": float(rankme(rows)),
        "centred_rank": float(centred_rank(rows)),
        "first_direction": float(values[0] / values.sum()),
        "alpha": float(alpha),
        "alpha_fit": float(fit),
        "uniformity": float(uniformity(rows)),
        "cosine": float((count * mean.square().sum() - 1) / (count - 1)),
        "norm": float(length.mean()),
        "norm_spread": float(length.std(correction=0) / length.mean().clamp(min=1e-30)),
        "norm_largest": float(length.max() / length.median().clamp(min=1e-30)),
        "deviation": float(deviation.mean()),
        "idle_dimensions": float((deviation <= 0.01 * deviation.mean()).float().mean()),
    }


def verdict(
    found: Mapping[str, float], *, untrained: Mapping[str, float] | None = None, copies: float | None = None
) -> Verdict:
    """Judge features by their figures.

    Args:
        found: What `figures` returned.
        untrained: The same of the untrained network on the same samples, where that is known: pooled features of a
            normalised network are short of spread before they are trained, and the comparison tells that from a
            collapse.
        copies: Share of the samples whose images, not only features, equal another's, where that is known.
    """
    if not found["samples"]:
        return Verdict("broken", ("There are no samples.",))
    if found["not_finite"] > 0 or found["samples"] < 2:
        return Verdict("broken", (_broken(found),))
    worst = _collapse(found, untrained, copies)
    length = _length(found, untrained)
    odd = ([length] if length is not None else []) + _oddities(found, copies)
    notes = _notes(found)
    if worst is not None:
        return Verdict("collapsed", (worst, *odd, *notes))
    if odd:
        return Verdict("suspicious", (*odd, *notes))
    possible = min(found["samples"] - 1, found["dimensions"])
    sound = f"Samples differ along {found['centred_rank']:.0f} of {possible:.0f} possible directions."
    return Verdict("healthy", (sound, *notes))


def _broken(found: Mapping[str, float]) -> str:
    if found["samples"] < 2:
        return "One sample cannot tell whether samples differ: use two or more."
    if found["not_finite"] == 1:
        return (
            "No feature is a finite number. Likely cause: the weights overflowed or became NaN; take an earlier "
            "checkpoint, lower the learning rate."
        )
    return (
        f"{found['not_finite']:.1%} of the features are NaN or infinite. Likely cause: volumes with NaN or wild "
        "intensities; if they look well, weights that overflow on bright ones."
    )


def _collapse(found: Mapping[str, float], untrained: Mapping[str, float] | None, copies: float | None) -> str | None:
    """Return a sentence about complete or dimensional collapse, or None."""
    if found["norm"] == 0:
        return (
            "Complete collapse: every feature is zero. Likely cause: weights or normalisation that died (weight decay "
            "without a loss that needs the features, or a layer whose units are all off)."
        )
    if not found["deviation"] >= LEAST_DEVIATION:
        if copies is not None and copies > 1 - 1e-9:
            return "All samples get one feature. Likely cause: duplicates in the data: every image equals another."
        if untrained is not None and not untrained["deviation"] >= LEAST_DEVIATION:
            return (
                "All samples get one feature, as from the untrained network. Likely cause: inputs that hardly differ "
                "(constant volumes, or a normalisation that flattens them), not the training."
            )
        return (
            f"Complete collapse: all samples get one feature (they differ by {found['deviation']:.1g} of its length). "
            "Likely cause: the trivial solution of a method that draws views together: too high a learning rate, too "
            "low a momentum of the teacher, no stop-gradient or predictor, or too small a batch."
        )
    possible = min(found["samples"] - 1, found["dimensions"])
    rank = found["centred_rank"]
    before = untrained["centred_rank"] if untrained is not None else math.nan
    low = rank < max(LEAST_RANK * possible, 1.5) and possible >= 4
    if untrained is not None and not math.isnan(before):
        # What the data themselves allow is seen on the untrained network.
        low = rank < LEAST_OF_UNTRAINED * before or (low and rank < before)
    if not low:
        return None
    than = "" if math.isnan(before) else f" (untrained: {before:.1f})"
    return (
        f"Dimensional collapse: samples differ along {rank:.1f} of {possible:.0f} possible directions{than}; the first "
        f"carries {found['first_direction']:.0%} of the variance. Likely cause: views that are too much or too little "
        "alike, too strong a weight decay, or a shortcut such as overall brightness or size that answers the task."
    )


def _length(found: Mapping[str, float], untrained: Mapping[str, float] | None) -> str | None:
    size = found["norm"]
    usual = untrained["norm"] if untrained is not None else math.sqrt(found["dimensions"])
    factor = NORM_FACTOR if untrained is not None else NORM_FACTOR_ALONE
    than = "those of the untrained network" if untrained is not None else "numbers of size 1 would be"
    if size > factor * usual:
        return (
            f"Norm explosion: features are {size / usual:.3g} times as long as {than}. Likely cause: a loss that only "
            "sees their direction and no weight decay, or a diverging learning rate; it also slows such losses down."
        )
    if 0 < size * factor < usual:
        return (
            f"Norm shrinkage: features are {usual / size:.3g} times shorter than {than}. Likely cause: weight decay "
            "that outweighs the loss."
        )
    return None


def _oddities(found: Mapping[str, float], copies: float | None) -> list[str]:
    odd = []
    differ = found["deviation"] >= LEAST_DEVIATION
    if found["duplicates"] > MOST_DUPLICATES and differ:
        if copies is not None and copies < 0.5 * found["duplicates"]:
            cause = "an encoder that ignores what tells them apart, since their images differ."
        else:
            cause = "duplicates in the data; remove them, above all across splits."
        odd.append(f"{found['duplicates']:.0%} of the samples have the feature of another. Likely cause: {cause}")
    if found["norm_largest"] > LARGEST_NORM:
        odd.append(
            f"The longest feature is {found['norm_largest']:.3g} times the median. Likely cause: single volumes with "
            "wild intensities or artefacts."
        )
    if found["idle_dimensions"] > MOST_IDLE and differ:
        odd.append(
            f"{found['idle_dimensions']:.0%} of the dimensions are the same for all samples. Likely cause: dead units, "
            "or a wider feature than the method uses."
        )
    return odd


def _notes(found: Mapping[str, float]) -> list[str]:
    """Return what a reader should know before comparing the figures."""
    notes = []
    if found["cosine"] > 0.95 and found["deviation"] >= LEAST_DEVIATION:
        notes.append(
            f"All features share a large common part (mean cosine {found['cosine']:.3f}): centre or standardise them "
            "before comparing directions; RankMe and uniformity mostly see that part."
        )
    if found["samples"] <= found["dimensions"]:
        notes.append(
            f"{found['samples']:.0f} samples for {found['dimensions']:.0f} dimensions: ranks are bounded by the "
            "samples; compare only runs with as many."
        )
    return notes


def _duplicates(rows: Tensor) -> float:
    """Return the share of rows that have another within a thousandth of the usual distance between two.

    Equal images get features that differ in their last digits, since sums round by where they stand in a batch.
    """
    if len(rows) > MOST_PAIRED_ROWS:
        rows = rows[torch.linspace(0, len(rows) - 1, MOST_PAIRED_ROWS).long()]
    distances = torch.pdist(rows - rows.mean(dim=0))
    close = distances <= 1e-3 * distances.square().mean().sqrt()
    first, second = torch.triu_indices(len(rows), len(rows), offset=1)[:, close.cpu()]
    return len(torch.cat([first, second]).unique()) / len(rows)
