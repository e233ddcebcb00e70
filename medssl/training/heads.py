"""Heads on frozen features: linear, nearest neighbours, and nearest prototypes of few labelled cases.

Features are standardised by the training cases first, without their labels: pooled features of normalised networks
share a large common part, beside which cosines could not tell cases apart.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medssl.data.targets import Kind
from medssl.errors import DataError
from medssl.training.ranking import Floats
from medssl.training.scores import classification_metrics

logger = logging.getLogger(__name__)

Integers = NDArray[np.int64]

#: Inverse strengths of the penalty that are tried.
STRENGTHS = tuple(10.0**power for power in range(-5, 3))
#: Numbers of neighbours that are tried.
NEIGHBOURS = (1, 3, 5, 10, 20, 50, 100, 200)
#: Of the softmax over cosines in votes and prototypes.
TEMPERATURE = 0.1
FOLDS = 5


class Head(Protocol):
    """Maps features to probabilities."""

    def __call__(self, features: Floats) -> Floats: ...


@dataclass(frozen=True)
class Cases:
    """Features with their targets.

    Args:
        features: Shape: (N, W).
        targets: Shape: (N,), or (N, K) for `multilabel`.
        patients: One per case, for folds; empty where every case is a patient of its own.
    """

    features: Floats
    targets: Integers
    patients: tuple[str, ...] = ()

    def of(self, rows: Integers) -> Cases:
        """Return some of the rows."""
        patients = tuple(self.patients[row] for row in rows) if self.patients else ()
        return Cases(self.features[rows], self.targets[rows], patients)


@dataclass(frozen=True)
class Chosen:
    """A head and the setting that was chosen for it.

    Args:
        head: Trained on all training cases.
        setting: Its value.
        scores: What each setting that was tried scored.
    """

    head: Head
    setting: float
    scores: dict[float, float]


class Standardiser:
    """Subtracts the mean and divides by the deviation of some features; a constant one becomes 0.

    Args:
        features: Shape: (N, W), finite.

    Raises:
        DataError: If one is not finite.
    """

    def __init__(self, features: Floats) -> None:
        features = np.asarray(features, np.float64)
        bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if bad.size:
            raise DataError(
                f"The features of {bad.size} of {len(features)} cases are not numbers (first: row {bad[0]})."
            )
        self.mean, deviation = features.mean(axis=0), features.std(axis=0)
        # Below a millionth of its size a feature varies by rounding only.
        varies = deviation > 1e-6 * np.maximum(np.abs(self.mean), 1e-6)
        self.scale = np.where(varies, deviation, np.inf)

    def __call__(self, features: Floats) -> Floats:
        """Return the features standardised. Shape: (N, W), float64."""
        return (np.asarray(features, np.float64) - self.mean) / self.scale


def linear_probe(train: Cases, kind: Kind, classes: int, select: Cases | None = None, seed: int = 0) -> Chosen:
    """Fit a logistic regression; the strength of its penalty is the one with the least loss on other cases.

    Args:
        train: What it learns from.
        kind: Several labels get one regression each; ordinal classes are treated as plain ones.
        classes: K.
        select: Cases that choose; None makes five folds of the training patients.
        seed: Of the folds.

    Returns:
        Probabilities of shape (N, K); a class without training cases gets 0. The setting is C of scikit-learn.

    Raises:
        DataError: If the training cases are of one class, or a feature is not a number.
    """

    def fit(cases: Cases, setting: float) -> Head:
        return Logistic(cases, kind, classes, setting)

    return _choose(fit, STRENGTHS, "nll", train, kind, select, seed)


def knn_probe(train: Cases, kind: Kind, classes: int, select: Cases | None = None, seed: int = 0) -> Chosen:
    """Let the nearest training cases vote, by the cosine of standardised features.

    Votes weigh `exp(cosine / 0.1)` (as Wu et al., CVPR 2018); k is the one with the largest AUROC on other cases.

    Args:
        train: What votes.
        kind: Kind of target.
        classes: K.
        select: Cases that choose; None makes five folds of the training patients.
        seed: Of the folds.

    Raises:
        DataError: If the training cases are of one class, or a feature is not a number.
    """

    def fit(cases: Cases, setting: float) -> Head:
        return Neighbours(cases, kind, classes, int(setting))

    # In a fold there are fewer cases to vote than in all.
    most = len(train.features) * (FOLDS - 1) // FOLDS if select is None else len(train.features)
    tried = [float(count) for count in NEIGHBOURS if count <= max(most, 1)]
    return _choose(fit, tried, "auroc", train, kind, select, seed)


def prototypes(train: Cases, kind: Kind, classes: int, shots: int, draw: int, seed: int = 0) -> Head | None:
    """Return the head that takes the nearest mean of a few cases of each class, drawn anew for each `draw`.

    Snell et al., NeurIPS 2017, with cosines of features standardised by all training cases.

    Args:
        train: What is drawn from.
        kind: `multiclass` or `ordinal`.
        classes: K.
        shots: Cases of each class.
        draw: Number of the draw.
        seed: With `draw` and the class it decides which cases are drawn; more shots contain fewer.

    Returns:
        None if a class has fewer cases than `shots`.
    """
    if kind == "multilabel":
        raise ValueError("Prototypes need one class per case; several labels have none of their own")
    standardise = Standardiser(train.features)
    rows = unit(standardise(train.features))
    centres = []
    for number in range(classes):
        members = np.flatnonzero(train.targets == number)
        if members.size < shots:
            return None
        order = np.random.default_rng([seed, draw, number]).permutation(members.size)
        centres.append(rows[members[order[:shots]]].mean(axis=0))
    means = unit(np.stack(centres))

    def head(features: Floats) -> Floats:
        return softmax(unit(standardise(features)) @ means.T / TEMPERATURE)

    return head


def unit(features: Floats) -> Floats:
    """Return rows of length 1; one of zeros stays."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-30)


def softmax(values: Floats) -> Floats:
    """Return rows of positive numbers that sum to 1."""
    raised = np.exp(values - values.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


class Logistic:
    """Logistic regression on standardised features; see `linear_probe`."""

    def __init__(self, cases: Cases, kind: Kind, classes: int, strength: float) -> None:
        self.standardise = Standardiser(cases.features)
        self.several, self.classes = kind == "multilabel", classes
        x = self.standardise(cases.features)
        columns = cases.targets.T if self.several else [cases.targets]
        self.models = [self._fit(x, column, strength) for column in columns]

    def __call__(self, features: Floats) -> Floats:
        x = self.standardise(features)
        if self.several:
            return np.stack([self._positive(model, x) for model in self.models], axis=1)
        found = np.zeros((len(x), self.classes))
        found[:, self.models[0].classes_] = self.models[0].predict_proba(x)
        return found

    def logits(self, features: Floats) -> Floats:
        """Return what the probabilities are the softmax of, summing to 0. Shape: (N, classes that were trained on)."""
        values = self.models[0].decision_function(self.standardise(features))
        return np.stack([-values / 2, values / 2], axis=1) if values.ndim == 1 else values

    def _fit(self, x: Floats, targets: Integers, strength: float) -> Any:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        if len(np.unique(targets)) < 2:
            # One label of several may be absent or everywhere: its frequency is all there is to say.
            return float(targets.mean()) if self.several else self._refuse(targets)
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always", ConvergenceWarning)
            model = LogisticRegression(C=strength, max_iter=1000, tol=1e-5).fit(x, targets)
        if any(issubclass(warning.category, ConvergenceWarning) for warning in raised):
            logger.info("Logistic regression with C = %g did not settle in 1000 steps.", strength)
        return model

    def _refuse(self, targets: Integers) -> float:
        raise DataError(
            f"All {len(targets)} training cases of the probe are of class {targets[0]}: it needs two classes."
        )

    @staticmethod
    def _positive(model: Any, x: Floats) -> Floats:
        return np.full(len(x), model) if isinstance(model, float) else model.predict_proba(x)[:, 1]


class Neighbours:
    """The vote of the `count` nearest cases; see `knn_probe`."""

    def __init__(self, cases: Cases, kind: Kind, classes: int, count: int) -> None:
        self.standardise = Standardiser(cases.features)
        self.rows = unit(self.standardise(cases.features))
        self.truth = cases.targets if kind == "multilabel" else np.eye(classes)[cases.targets]
        if kind != "multilabel" and len(np.unique(cases.targets)) < 2:
            raise DataError(f"All {len(cases.targets)} training cases of the probe are of one class: it needs two.")
        self.count = min(count, len(self.rows))

    def __call__(self, features: Floats) -> Floats:
        found = []
        rows = unit(self.standardise(features))
        # In portions, so that 10,000 cases against 100,000 do not need 8 GB.
        for part in np.array_split(rows, max(1, len(rows) * len(self.rows) // 20_000_000)):
            cosine = part @ self.rows.T
            nearest = np.argpartition(-cosine, self.count - 1, axis=1)[:, : self.count]
            votes = softmax(np.take_along_axis(cosine, nearest, axis=1) / TEMPERATURE)
            found.append((votes[:, :, None] * self.truth[nearest]).sum(axis=1))
        return np.concatenate(found)


def _choose(
    fit: Callable[[Cases, float], Head],
    settings: Sequence[float],
    by: str,
    train: Cases,
    kind: Kind,
    select: Cases | None,
    seed: int,
) -> Chosen:
    pairs = [(train, select)] if select is not None else _folds(train, kind, seed)
    scores: dict[float, float] = {}
    if not pairs:
        # With one case of each class, none is left to choose by.
        middle = settings[len(settings) // 2]
        logger.info("Too few training cases to choose the probe's setting: %g is taken.", middle)
        return Chosen(fit(train, middle), middle, {})
    for setting in settings:
        # Out-of-fold answers are scored together: a fold may lack a class.
        answers = [fit(learn, setting)(judge.features) for learn, judge in pairs]
        truth = np.concatenate([judge.targets for _, judge in pairs])
        value = classification_metrics(_valid(np.concatenate(answers), kind), truth, kind)[by]
        scores[setting] = -value if by == "nll" else value
    defined = {setting: value for setting, value in scores.items() if not np.isnan(value)}
    best = max(defined, key=lambda setting: defined[setting]) if defined else settings[len(settings) // 2]
    shown = {setting: -value if by == "nll" else value for setting, value in scores.items()}
    return Chosen(fit(train, best), best, shown)


def _folds(train: Cases, kind: Kind, seed: int) -> list[tuple[Cases, Cases]]:
    """Return five parts of the training patients, each once to judge, as alike in classes as whole patients allow.

    Parts that leave less than two classes to learn from are left out.
    """
    patients = train.patients or tuple(map(str, range(len(train.targets))))
    units = sorted(set(patients))
    count = min(FOLDS, len(units))
    first = {patient: patients.index(patient) for patient in units}
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(units))
    keyed = sorted(order, key=lambda number: str(train.targets[first[units[number]]]))
    fold_of = {units[number]: place % count for place, number in enumerate(keyed)}
    folds = np.array([fold_of[patient] for patient in patients])
    pairs = [
        (train.of(np.flatnonzero(folds != fold)), train.of(np.flatnonzero(folds == fold))) for fold in range(count)
    ]
    if kind != "multilabel":
        pairs = [pair for pair in pairs if len(np.unique(pair[0].targets)) > 1]
    return [pair for pair in pairs if len(pair[0].targets)]


def _valid(probabilities: Floats, kind: Kind) -> Floats:
    """Return rows that sum to 1 where they must; sums of many votes round."""
    clipped = np.clip(probabilities, 0, 1)
    return clipped if kind == "multilabel" else clipped / clipped.sum(axis=1, keepdims=True)
