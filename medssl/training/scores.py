"""Metrics of a classifier from its probabilities: ranking, decisions and calibration, each with weights per case.

What cannot be said of the cases at hand is NaN and never 0: a class without cases has no sensitivity, cases of one
class have no AUROC. A mean over classes is taken over the classes for which the metric is defined.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medssl.data.targets import KINDS, Kind
from medssl.training.ranking import Floats, Ranking, ratio

BINS = 15
HIGHER_IS_BETTER = {
    "auroc": True,
    "aupr": True,
    "accuracy": True,
    "balanced_accuracy": True,
    "f1": True,
    "kappa": True,
    "kappa_quadratic": True,
    "mean_absolute_error": False,
    "ranked_probability_score": False,
    "ece": False,
    "brier": False,
    "nll": False,
    "sensitivity": True,
    "specificity": True,
}


def classification_metrics(
    probabilities: Floats, targets: NDArray[np.integer], kind: Kind, classes: Sequence[str] | None = None
) -> dict[str, float]:
    """Return every metric of a classifier.

    - `auroc`, `aupr` (average precision): each class against the rest, and their mean. For two classes the two AUROC
      are one; the AUPR of either class is its own, since it depends on how frequent the class is.
    - `accuracy`, `balanced_accuracy` (mean sensitivity over classes; of several labels the mean of sensitivity and
      specificity), `f1` (mean over classes), `kappa` (Cohen, 1960), `kappa_quadratic` (ordinal only): of the most
      probable class; of several labels, of the threshold 0.5.
    - `ece`: 15 bins of equal width (Guo et al., ICML 2017), on the confidence in the most probable class; of several
      labels on each label's probability, then the mean over labels.
    - `brier`: squared error summed over classes (Brier, 1950), halved for two classes so that it is the usual one; of
      several labels their mean. `nll`: mean negative logarithm of the true class's probability, in nats; of several
      labels the mean over labels.
    - `mean_absolute_error` in ranks and `ranked_probability_score` (Epstein, 1969; not divided by K - 1): ordinal only.
    - `sensitivity/<class>`, `specificity/<class>`, `auroc/<class>`, `aupr/<class>`.

    Args:
        probabilities: Rows that sum to 1; of several labels each between 0 and 1. Shape: (N, K).
        targets: Class of each case, shape (N,); of several labels 0 or 1, shape (N, K).
        kind: `multiclass`, `multilabel` or `ordinal`.
        classes: Names for the metrics of one class; by default their numbers.

    Raises:
        ValueError: If shapes do not fit, a probability is none, or a target is no class; the row is named.
    """
    scores = Scores(probabilities, targets, kind, classes)
    return {name: float(values[0]) for name, values in scores.weighted(None).items()}


class Scores:
    """The metrics of fixed cases under many sets of weights; see `classification_metrics`."""

    def __init__(
        self,
        probabilities: Floats,
        targets: NDArray[np.integer],
        kind: Kind,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.probabilities, self.targets = checked(probabilities, targets, kind)
        self.kind = kind
        width = self.probabilities.shape[1]
        self.classes = tuple(classes) if classes is not None else tuple(map(str, range(width)))
        if len(self.classes) != width:
            raise ValueError(f"{width} columns of probabilities for {len(self.classes)} classes")
        # One column per class: whether the case is of it.
        self.truth = self.targets.astype(bool) if kind == "multilabel" else self.targets[:, None] == np.arange(width)
        self._rankings = [
            Ranking(column, truth) for column, truth in zip(self.probabilities.T, self.truth.T, strict=True)
        ]

    def weighted(self, weights: Floats | None) -> dict[str, Floats]:
        """Return each metric for each set of weights. `weights` has shape (R, N); values have shape (R,)."""
        given = np.ones((1, len(self.targets))) if weights is None else weights
        auroc = np.stack([ranking.auroc(weights) for ranking in self._rankings])
        aupr = np.stack([ranking.average_precision(weights) for ranking in self._rankings])
        several = self.kind == "multilabel"
        decisions, sensitivity, specificity = self._of_labels(given) if several else self._of_classes(given)
        return {
            "auroc": mean_of_defined(auroc),
            "aupr": mean_of_defined(aupr),
            **decisions,
            **self._of_probabilities(given),
            **self._named("auroc", auroc),
            **self._named("aupr", aupr),
            **self._named("sensitivity", sensitivity),
            **self._named("specificity", specificity),
        }

    def _of_classes(self, weights: Floats) -> tuple[dict[str, Floats], Floats, Floats]:
        table = confusion(self.probabilities.argmax(axis=1), self.targets, len(self.classes), weights)
        total, right = weights.sum(axis=1), np.diagonal(table, axis1=1, axis2=2)
        of_class, said = table.sum(axis=2), table.sum(axis=1)
        sensitivity = ratio(right, of_class)
        specificity = ratio(total[:, None] - of_class - said + right, total[:, None] - of_class)
        found = {
            "accuracy": ratio(right.sum(axis=1), total),
            "balanced_accuracy": mean_of_defined(sensitivity.T),
            "f1": mean_of_defined(ratio(2 * right, of_class + said).T),
            "kappa": kappa(table),
        }
        if self.kind == "ordinal":
            ranks = np.arange(len(self.classes))
            apart = np.abs(ranks[:, None] - ranks)
            found["kappa_quadratic"] = kappa(table, apart**2)
            found["mean_absolute_error"] = ratio((table * apart).sum(axis=(1, 2)), total)
        return found, sensitivity.T, specificity.T

    def _of_labels(self, weights: Floats) -> tuple[dict[str, Floats], Floats, Floats]:
        columns = zip((self.probabilities >= 0.5).T, self.truth.T, strict=True)
        tables = [confusion(said.astype(np.int64), truth.astype(np.int64), 2, weights) for said, truth in columns]
        table = np.stack(tables)
        sensitivity = ratio(table[..., 1, 1], table[..., 1, :].sum(axis=-1))
        specificity = ratio(table[..., 0, 0], table[..., 0, :].sum(axis=-1))
        missed = table[..., 0, 1] + table[..., 1, 0]
        found = {
            "accuracy": mean_of_defined(ratio(table[..., 0, 0] + table[..., 1, 1], table.sum(axis=(-2, -1)))),
            "balanced_accuracy": mean_of_defined((sensitivity + specificity) / 2),
            "f1": mean_of_defined(ratio(2 * table[..., 1, 1], 2 * table[..., 1, 1] + missed)),
            "kappa": mean_of_defined(np.stack([kappa(each) for each in tables])),
        }
        return found, sensitivity, specificity

    def _of_probabilities(self, weights: Floats) -> dict[str, Floats]:
        total = weights.sum(axis=1)
        p, truth = self.probabilities, self.truth
        squares = (p - truth) ** 2
        smallest = np.finfo(np.float64).eps
        if self.kind == "multilabel":
            brier = squares.mean(axis=1)
            nll = -np.log(np.clip(np.where(truth, p, 1 - p), smallest, 1)).mean(axis=1)
        else:
            brier = squares.sum(axis=1) / (2 if p.shape[1] == 2 else 1)
            nll = -np.log(np.clip(p[np.arange(len(p)), self.targets], smallest, 1))
        errors = [
            ratio(np.abs(weights @ _gaps(confidence, right)).sum(axis=1), total)
            for confidence, right in confidences(p, self.targets, self.kind)
        ]
        found = {"ece": mean_of_defined(np.stack(errors))}
        if self.kind == "ordinal":
            steps = np.cumsum(p, axis=1) - np.cumsum(truth, axis=1)
            found["ranked_probability_score"] = ratio(weights @ (steps**2).sum(axis=1), total)
        return {**found, "brier": ratio(weights @ brier, total), "nll": ratio(weights @ nll, total)}

    def _named(self, metric: str, values: Floats) -> dict[str, Floats]:
        return {f"{metric}/{name}": column for name, column in zip(self.classes, values, strict=True)}


def checked(probabilities: Floats, targets: NDArray[np.integer], kind: str) -> tuple[Floats, NDArray[np.int64]]:
    """Return probabilities as float64 and targets as int64, or say which row cannot be used.

    Raises:
        ValueError: See `classification_metrics`.
    """
    p, t = np.asarray(probabilities, dtype=np.float64), np.asarray(targets)
    if kind not in KINDS:
        raise ValueError(f"There is no kind of target '{kind}': use {', '.join(KINDS)}")
    if p.ndim != 2 or p.shape[1] < (1 if kind == "multilabel" else 2) or len(p) == 0:
        raise ValueError(f"Probabilities need shape (N, K) with a column per class, got {p.shape}")
    expected = p.shape if kind == "multilabel" else p.shape[:1]
    if t.shape != expected:
        raise ValueError(f"Targets of kind {kind} need shape {expected}, got {t.shape}")
    if not np.isfinite(p).all() or (p < -1e-6).any() or (p > 1 + 1e-6).any():
        row = int(np.flatnonzero(~(np.isfinite(p) & (p >= -1e-6) & (p <= 1 + 1e-6)).all(axis=1))[0])
        raise ValueError(f"Row {row} holds no probabilities: {p[row].tolist()}")
    if kind != "multilabel" and (np.abs(p.sum(axis=1) - 1) > 1e-3).any():
        row = int(np.argmax(np.abs(p.sum(axis=1) - 1)))
        raise ValueError(f"The probabilities of row {row} sum to {p[row].sum():.4g} and not to 1")
    limit = 2 if kind == "multilabel" else p.shape[1]
    if not ((t >= 0) & (t < limit) & (t == np.floor(t))).all():
        wrong = ~((t >= 0) & (t < limit) & (t == np.floor(t)))
        row = int(np.flatnonzero(wrong.reshape(len(t), -1).any(axis=1))[0])
        raise ValueError(f"The target of row {row} is {t[row].tolist()}; it must be a number from 0 to {limit - 1}")
    return np.clip(p, 0, 1), t.astype(np.int64)


def confusion(said: NDArray[np.int64], truth: NDArray[np.int64], classes: int, weights: Floats | None = None) -> Floats:
    """Return how much weight of each true class (rows) was called what (columns). Shape: (R, K, K)."""
    given = np.ones((1, len(said))) if weights is None else weights
    cells = truth * classes + said
    order = np.argsort(cells, kind="stable")
    present, starts = np.unique(cells[order], return_index=True)
    table = np.zeros((len(given), classes * classes))
    table[:, present] = np.add.reduceat(given[:, order], starts, axis=1)
    return table.reshape(-1, classes, classes)


def kappa(table: Floats, disagreement: NDArray[np.integer] | None = None) -> Floats:
    """Return Cohen's kappa of confusion tables; NaN where truth and answers are all of one class.

    Args:
        table: Shape: (R, K, K).
        disagreement: Cost of each cell, 0 on the diagonal; None counts every error alike. Shape: (K, K).
    """
    cost = 1 - np.eye(table.shape[1]) if disagreement is None else disagreement
    by_chance = table.sum(axis=2)[:, :, None] * table.sum(axis=1)[:, None, :]
    expected = (cost * by_chance).sum(axis=(1, 2)) / np.maximum(table.sum(axis=(1, 2)), 1e-300)
    return 1 - ratio((cost * table).sum(axis=(1, 2)), expected)


def confidences(probabilities: Floats, targets: NDArray[np.int64], kind: str) -> list[tuple[Floats, NDArray[np.bool_]]]:
    """Return what calibration is measured on: pairs of a confidence and whether it came true, one pair per label."""
    if kind == "multilabel":
        return [(column, truth) for column, truth in zip(probabilities.T, targets.astype(bool).T, strict=True)]
    return [(probabilities.max(axis=1), probabilities.argmax(axis=1) == targets)]


def bin_of(confidence: Floats, bins: int = BINS) -> NDArray[np.int64]:
    """Return the bin of each confidence; bins are of equal width and hold their upper end, the first also 0."""
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def mean_of_defined(values: Floats) -> Floats:
    """Return the mean over the first axis of what is not NaN; NaN where nothing is."""
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0.0).sum(axis=0), known.sum(axis=0).astype(np.float64))


def _gaps(confidence: Floats, right: NDArray[np.bool_]) -> Floats:
    """Return each case's share of its bin's gap between what came true and what was said. Shape: (N, bins)."""
    gaps = np.zeros((len(confidence), BINS))
    gaps[np.arange(len(confidence)), bin_of(confidence)] = right - confidence
    return gaps
