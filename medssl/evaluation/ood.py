"""How well an encoder tells what it was made for from what it was not: scores of strangeness, and how they rank.

A larger score is stranger. Scores are fitted on training volumes of the known kind, and judged on other volumes of that
kind against volumes of another.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.errors import DataError
from medssl.evaluation.bootstrap import LEVEL, RESAMPLES, resampled_counts
from medssl.evaluation.classification_result import Interval
from medssl.training.heads import Cases, Logistic, linear_probe
from medssl.training.ranking import Floats, Ranking

logger = logging.getLogger(__name__)

SCORES = ("mahalanobis", "knn", "norm", "energy", "softmax")
MEASURES = ("auroc", "aupr_out", "aupr_in", "fpr95")
#: Neighbours of the distance: the root of the number of training volumes, at most this.
MOST_NEIGHBOURS = 50


class Detector:
    """Scores of strangeness, fitted on features of the known kind.

    - `mahalanobis` (Lee et al., NeurIPS 2018): squared distance to the nearest class mean, or to the one mean without
      labels, by one covariance of all classes, shrunk as Ledoit and Wolf (2004) so that it can be inverted with fewer
      volumes than dimensions.
    - `knn` (Sun et al., ICML 2022): distance to the k-th nearest training volume, k the root of their number, after
      standardising. Unlike theirs not on the sphere: standardised features have their origin in the middle of the known
      ones, so that their length is how far away they are, and a sphere forgets it.
    - `norm`: the negative length of the feature; unexpected samples get short ones (Draganov et al., 2025).
    - `energy` (Liu et al., NeurIPS 2020): negative log-sum-exp of a linear classifier's outputs; with labels.
    - `softmax` (Hendrycks and Gimpel, ICLR 2017): negative largest probability of that classifier; with labels.

    Args:
        features: Of training volumes. Shape: (N, W), N >= 2, finite.
        targets: Their classes, or None. Shape: (N,).
        patients: Their patients, for the folds that choose the classifier's penalty.
        seed: Of those folds.

    Raises:
        DataError: If there are fewer than two volumes, or a feature is not a number.
    """

    def __init__(
        self,
        features: Floats,
        targets: NDArray[np.int64] | None = None,
        patients: tuple[str, ...] = (),
        seed: int = 0,
    ) -> None:
        from sklearn.covariance import LedoitWolf

        x = np.asarray(features, np.float64)
        if x.ndim != 2 or len(x) < 2:
            raise DataError(
                f"Scores of strangeness need features of two or more training volumes, got shape {x.shape}."
            )
        bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
        if bad.size:
            raise DataError(f"The features of {bad.size} of {len(x)} training volumes are not numbers (row {bad[0]}).")
        self._mean, deviation = x.mean(axis=0), x.std(axis=0)
        # A feature that hardly varies among the known ones may tell strangers: it is not divided by next to nothing.
        floor = 0.01 * float(np.median(deviation[deviation > 0])) if (deviation > 0).any() else 1.0
        self._scale = np.maximum(deviation, floor)
        z = self._standardised(x)
        groups = np.zeros(len(z), np.int64) if targets is None else np.asarray(targets)
        self._centres = np.stack([z[groups == number].mean(axis=0) for number in np.unique(groups)])
        place = np.searchsorted(np.unique(groups), groups)
        covariance = LedoitWolf(assume_centered=True).fit(z - self._centres[place]).covariance_
        # One case of each class leaves no covariance: then all directions count alike.
        if not np.trace(covariance) > 0:
            covariance = np.eye(len(covariance))
        self._root = np.linalg.cholesky(
            covariance + 1e-9 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        )
        self._known = z
        self.neighbours = int(np.clip(round(np.sqrt(len(z))), 1, MOST_NEIGHBOURS))
        self._classifier: Logistic | None = None
        if targets is not None and len(np.unique(targets)) > 1:
            dense = np.searchsorted(np.unique(targets), targets)
            chosen = linear_probe(Cases(x, dense, patients), "multiclass", int(dense.max()) + 1, seed=seed)
            assert isinstance(chosen.head, Logistic)
            self._classifier = chosen.head

    def __call__(self, features: Floats) -> dict[str, Floats]:
        """Return each score that can be computed. Shape: (N,) each.

        Raises:
            DataError: If a feature is not a number.
        """
        from scipy.spatial.distance import cdist

        x = np.asarray(features, np.float64)
        if not np.isfinite(x).all():
            raise DataError("Features that are not numbers have no score of strangeness: look at the volumes.")
        z = self._standardised(x)
        apart = [((np.linalg.solve(self._root, (z - centre).T)) ** 2).sum(axis=0) for centre in self._centres]
        nearest = np.partition(cdist(z, self._known), self.neighbours - 1, axis=1)
        found = {
            "mahalanobis": np.min(apart, axis=0),
            "knn": nearest[:, self.neighbours - 1],
            "norm": -np.linalg.norm(x, axis=1),
        }
        if self._classifier is not None:
            logits = self._classifier.logits(x)
            highest = logits.max(axis=1)
            energy = -(highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1)))
            found |= {"energy": energy, "softmax": -np.exp(highest + energy)}
        return found

    def _standardised(self, features: Floats) -> Floats:
        return (features - self._mean) / self._scale


def separation(
    inside: Floats,
    outside: Floats,
    *,
    inside_patients: tuple[str, ...] = (),
    outside_patients: tuple[str, ...] = (),
    seed: int = 0,
) -> dict[str, Interval]:
    """Return how well one score tells strangers from known volumes.

    `auroc`; `aupr_out` with strangers as positive and `aupr_in` with the known as positive, both of which depend on how
    many there are of each; `fpr95`, the share of strangers that pass at the threshold that lets 95 % of the known pass.

    Intervals are over volumes, strangers and known ones drawn apart, and over patients where they have several.

    Args:
        inside: Scores of known volumes that nothing was fitted on. Shape: (N,).
        outside: Scores of strangers. Shape: (M,).
        inside_patients: Pseudonyms, or empty.
        outside_patients: Pseudonyms, or empty.
        seed: Of the resampling.

    Raises:
        DataError: If either is empty.
    """
    if not len(inside) or not len(outside):
        raise DataError(f"{len(inside)} known and {len(outside)} strange volumes: both are needed to tell them apart.")
    scores = np.concatenate([inside, outside])
    strange = np.arange(len(scores)) >= len(inside)
    groups = [f"in {key}" for key in inside_patients] + [f"out {key}" for key in outside_patients]
    counts = resampled_counts(
        len(scores),
        strata=strange.tolist(),
        groups=groups if len(groups) == len(scores) else None,
        seed=seed,
        resamples=RESAMPLES // 5,
    )
    by_strange, by_known = Ranking(scores, strange), Ranking(-scores, ~strange)

    def measure(weights: Floats | None) -> dict[str, Floats]:
        return {
            "auroc": by_strange.auroc(weights),
            "aupr_out": by_strange.average_precision(weights),
            "aupr_in": by_known.average_precision(weights),
            "fpr95": by_known.false_positive_rate(0.95, weights),
        }

    values = measure(None)
    parts = [measure(weights) for weights in counts]
    found = {}
    for name, value in values.items():
        samples = np.concatenate([part[name] for part in parts])
        samples = samples[~np.isnan(samples)]
        single = min(len(inside), len(outside)) < 2 or not samples.size
        ends = (np.nan, np.nan) if single else np.percentile(samples, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
        found[name] = Interval(float(value[0]), float(ends[0]), float(ends[1]))
    return found


@dataclass(frozen=True)
class OodResult:
    """How well each score tells each set of strangers.

    Args:
        sets: By set of strangers and score, the measures.
        near: Names of the sets that are the known volumes with an artefact.
        counts: Volumes by set; `known (fitted)` and `known (judged)` among them.
        scores: Of each volume, by set and score.
        facts: Which encoder and stages.
    """

    sets: dict[str, dict[str, dict[str, Interval]]]
    near: tuple[str, ...]
    counts: dict[str, int]
    scores: Mapping[str, dict[str, dict[str, float]]]
    facts: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the content of `ood.json`."""
        return {
            "schema_version": 1,
            "kind": "out-of-distribution evaluation",
            "conventions": {
                "auroc, aupr_out": "strangers are positive",
                "aupr_in, fpr95": "known ones are positive; fpr95 is the share of strangers that pass where 95 % of "
                "the known pass",
                "interval": f"percentile bootstrap over volumes or patients, {LEVEL:.0%}, {RESAMPLES // 5} resamples",
            },
            "volumes": self.counts,
            "near": list(self.near),
            "sets": {
                name: {
                    score: {measure: value.to_json() for measure, value in values.items()}
                    for score, values in by_score.items()
                }
                for name, by_score in self.sets.items()
            },
            **self.facts,
        }

    def __rich__(self) -> Any:
        """Return a table for the terminal."""
        from rich.table import Table

        table = Table(title=f"Strangers told from {self.counts['known (judged)']} known volumes")
        for name in ("strangers", "volumes", "score", "AUROC", "AUPR", "FPR95"):
            table.add_column(name, justify="left" if name in ("strangers", "score") else "right")
        for name, by_score in self.sets.items():
            for score, values in by_score.items():
                plain = (f"{values[measure].value:.3f}" for measure in ("aupr_out", "fpr95"))
                table.add_row(name, str(self.counts[name]), score, str(values["auroc"]), *plain)
        return table
