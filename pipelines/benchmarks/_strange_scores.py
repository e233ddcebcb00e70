"""How `out_of_distribution.py` turns features into scores, and scores into rows with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.evaluation.bootstrap import RESAMPLES, resampled_counts
from medssl.evaluation.classification_result import Interval
from medssl.evaluation.ood import Detector, separation
from medssl.training.ranking import Ranking

Floats = NDArray[np.float64]
Scores = dict[str, Floats]
#: Scores of known ones and of strangers.
Pair = tuple[Floats, Floats]
Row = dict[str, Any]
SEED = 0
ENCODERS = ("pretrained", "random")
LOOKS = (*ENCODERS, "normalised", "raw")
MEASURES = {"auroc": "AUROC", "fpr95": "FPR95"}


def described(voxels: NDArray[Any]) -> Floats:
    """Return what a histogram knows, and the mean step between neighbours. Shape: (10,)."""
    values = voxels.astype(np.float64)
    steps = [np.abs(np.diff(values, axis=axis)).mean() for axis in range(values.ndim) if values.shape[axis] > 1]
    levels = np.percentile(values, (1, 5, 25, 50, 75, 95, 99))
    return np.array([values.mean(), values.std(), np.mean(steps), *levels])


def judge_of(fitted: Floats, targets: NDArray[np.int64] | None) -> Callable[[Floats], dict[str, list[float]]]:
    """Return a function to all scores: with labels those of an encoder, else those that a description has too."""
    plain, labelled = Detector(fitted), None if targets is None else Detector(fitted, targets)

    def judge(found: Floats) -> dict[str, list[float]]:
        scores = plain(found)
        if labelled is None:
            del scores["norm"]  # the length of a description means nothing
        else:
            of_classes = labelled(found)
            scores |= {"class means": of_classes["mahalanobis"]}
            scores |= {name: of_classes[name] for name in ("energy", "softmax")}
        return {name: values.tolist() for name, values in scores.items()}

    return judge


def arrays(scores: Mapping[str, Mapping[str, list[float]]]) -> dict[str, Scores]:
    """Return what was kept as text as arrays."""
    return {name: {score: np.asarray(values) for score, values in each.items()} for name, each in scores.items()}


def row_of(
    known: str, names: Sequence[str], score: str, scores: Mapping[str, Mapping[str, Scores]], called: str | None = None
) -> Row:
    """Return AUROC and FPR95 of one score by what looked, over one or several sets of strangers."""
    row: Row = {"known": known, "strangers": called or names[0], "score": score}
    pairs: dict[str, list[Pair]] = {
        look: [(of_sets["known"][score], of_sets[name][score]) for name in names]
        for look, of_sets in scores.items()
        if score in of_sets["known"]
    }
    for look, each in pairs.items():
        found = separation(*each[0], seed=SEED)
        if len(each) == 1:
            row[look] = {measure: found[measure] for measure in ("auroc", "fpr95")}
        else:
            row[look] = {"auroc": over_sets(partial(auroc, each), each), "fpr95": over_sets(partial(fpr95, each), each)}
    first, second = (pairs[look] for look in ENCODERS)
    return {**row, "pretrained - random": over_sets(lambda w: auroc(first, w) - auroc(second, w), first)}


def auroc(pairs: Sequence[Pair], weights: Floats | None) -> Floats:
    """Return the mean AUROC over sets of strangers."""
    return np.mean([Ranking(np.concatenate(pair), strange(pair)).auroc(weights) for pair in pairs], axis=0)


def fpr95(pairs: Sequence[Pair], weights: Floats | None) -> Floats:
    """Return the mean share of strangers that pass where 95 % of the known pass."""
    found = [Ranking(-np.concatenate(pair), ~strange(pair)).false_positive_rate(0.95, weights) for pair in pairs]
    return np.mean(found, axis=0)


def strange(pair: Pair) -> NDArray[np.bool_]:
    """Tell which of the scores of known ones and strangers are of strangers."""
    inside, outside = map(len, pair)
    return np.arange(inside + outside) >= inside


def over_sets(measure: Callable[[Floats | None], Floats], pairs: Sequence[Pair]) -> Interval:
    """Return a measure over sets of strangers that are the same cases: all sets see the same cases in each resample."""
    of_first = strange(pairs[0])
    draws = resampled_counts(len(of_first), strata=of_first.tolist(), seed=SEED, resamples=RESAMPLES // 5)
    low, high = np.percentile(np.concatenate([measure(weights) for weights in draws]), (2.5, 97.5))
    return Interval(float(measure(None)[0]), float(low), float(high))


def shown(row: Row) -> dict[str, str]:
    """Return a row as text: AUROC and FPR95 of whatever looked."""
    text = {name: row[name] for name in ("known", "strangers", "score")}
    for look in LOOKS:
        found = row.get(look)
        text |= {f"{look} {head}": str(found[key]) if found else "-" for key, head in MEASURES.items()}
    return {**text, "pretrained - random": str(row["pretrained - random"])}
