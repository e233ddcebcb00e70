"""What a run scored on some cases: values per case (segmentation), or probabilities (classification)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from medssl.data.targets import Kind
from medssl.errors import DataError
from medssl.evaluation.overlap import HIGHER_IS_BETTER as OVERLAP_UP
from medssl.training.scores import HIGHER_IS_BETTER as SCORES_UP
from medssl.training.scores import Scores

Floats = NDArray[np.float64]


class Outcome(Protocol):
    """What can be measured of a run; resamples of cases come as weights."""

    @property
    def cases(self) -> tuple[str, ...]: ...

    @property
    def metrics(self) -> tuple[str, ...]: ...

    @property
    def strata(self) -> tuple[int, ...] | None:
        """Class of each case, within which cases are drawn; None draws from all."""
        ...

    def weighted(self, weights: Floats | None) -> dict[str, Floats]:
        """Return each metric for each set of weights. `weights` has shape (R, N), values have shape (R,)."""
        ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class CaseValues:
    """A value of each metric for each case; a metric's value is the mean over the cases where it is defined.

    Args:
        values: By metric and case, NaN where undefined. All metrics have the same cases.
    """

    values: Mapping[str, Mapping[str, float]]

    @property
    def cases(self) -> tuple[str, ...]:
        """Names, sorted."""
        return tuple(sorted(next(iter(self.values.values()), {})))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return tuple(self.values)

    @property
    def strata(self) -> None:
        """Cases are drawn from all."""

    def column(self, metric: str) -> Floats:
        """Return a metric's values in the order of `cases`. Shape: (N,)."""
        return np.array([self.values[metric][case] for case in self.cases], np.float64)

    def weighted(self, weights: Floats | None) -> dict[str, Floats]:
        """Return weighted means over the defined cases, NaN where there is none."""
        return {metric: weighted_mean(self.column(metric), weights) for metric in self.metrics}

    def to_json(self) -> dict[str, Any]:
        """Return plain types, None for NaN."""
        values = {
            metric: {case: None if math.isnan(value) else value for case, value in column.items()}
            for metric, column in self.values.items()
        }
        return {"kind": "case values", "values": values}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return what `to_json` wrote."""
        return cls(
            {
                metric: {case: math.nan if value is None else float(value) for case, value in column.items()}
                for metric, column in content["values"].items()
            }
        )

    @classmethod
    def mean_of(cls, outcomes: Sequence[CaseValues]) -> CaseValues:
        """Return each case's mean over several runs, of those where the metric is defined in it."""
        first = outcomes[0]
        values = {}
        for metric in first.metrics:
            columns = np.stack([outcome.column(metric) for outcome in outcomes])
            known = ~np.isnan(columns)
            total = np.where(known, columns, 0.0).sum(axis=0)
            mean = np.divide(total, known.sum(axis=0), out=np.full(len(total), np.nan), where=known.any(axis=0))
            values[metric] = dict(zip(first.cases, mean.tolist(), strict=True))
        return cls(values)


@dataclass(frozen=True)
class Answers:
    """Probabilities of a classifier with the truth.

    Args:
        kind: `multiclass`, `multilabel` or `ordinal`.
        classes: Names.
        names: Name of each case, sorted.
        probabilities: Shape: (N, K).
        targets: Shape: (N,), or (N, K) of 0 and 1 for `multilabel`.
    """

    kind: Kind
    classes: tuple[str, ...]
    names: tuple[str, ...]
    probabilities: Floats
    targets: NDArray[np.int64]

    @property
    def cases(self) -> tuple[str, ...]:
        """Names of the cases."""
        return self.names

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics over all classes."""
        return tuple(name for name in self.weighted(None) if "/" not in name)

    @property
    def strata(self) -> tuple[int, ...] | None:
        """Class of each case; None for several labels."""
        return None if self.kind == "multilabel" else tuple(self.targets.tolist())

    def weighted(self, weights: Floats | None) -> dict[str, Floats]:
        """Return every metric of `medssl.training.scores` under each set of weights."""
        found = Scores(self.probabilities, self.targets, self.kind, self.classes).weighted(weights)
        return {name: values for name, values in found.items() if "/" not in name}

    def to_json(self) -> dict[str, Any]:
        """Return plain types."""
        return {
            "kind": self.kind,
            "classes": list(self.classes),
            "cases": list(self.names),
            "probabilities": [[float(f"{value:.9g}") for value in row] for row in self.probabilities.tolist()],
            "targets": self.targets.tolist(),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return what `to_json` wrote."""
        probabilities = np.array(content["probabilities"], np.float64).reshape(-1, len(content["classes"]))
        targets = np.array(content["targets"], np.int64)
        return cls(content["kind"], tuple(content["classes"]), tuple(content["cases"]), probabilities, targets)


def read_outcome(content: Mapping[str, Any]) -> Outcome:
    """Return the outcome that a score file holds."""
    return CaseValues.from_json(content) if content["kind"] == "case values" else Answers.from_json(content)


def require_cases(outcome: Outcome, cases: Sequence[str], what: str) -> None:
    """Refuse an outcome that was not measured on exactly these cases.

    Raises:
        DataError: Naming one case that is missing or one too many.
    """
    odd = sorted(set(outcome.cases) ^ set(cases))
    if odd:
        problem = "was not measured" if odd[0] in set(cases) else "was measured and is none of them"
        raise DataError(f"{what}: {odd[0]} {problem} ({len(odd)} cases differ). Every arm needs the same cases.")


def weighted_mean(column: Floats, weights: Floats | None) -> Floats:
    """Return means of what is not NaN under each set of weights; NaN where all weight is on undefined cases.

    Args:
        column: Shape: (N,).
        weights: Shape: (R, N), or None for one set of ones.
    """
    known = ~np.isnan(column)
    given = np.ones((1, len(column))) if weights is None else weights
    total = given[:, known].sum(axis=1)
    return np.divide(given[:, known] @ column[known], total, out=np.full(len(given), np.nan), where=total > 0)


def higher_is_better(metric: str) -> bool:
    """Return whether a metric of either task is better where it is higher."""
    return {**OVERLAP_UP, **SCORES_UP}[metric]
