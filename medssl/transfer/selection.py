"""Which cases a run learns from and which it is looked at with; always the same for the same seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medssl.errors import DataError, UsageError
from medssl.transfer.raw import RawDataset, require_labels

# nnU-Net's own seed and number of folds, so that a run without options has nnU-Net's fold 0.
_SPLIT_SEED, _FOLDS = 12345, 5


@dataclass(frozen=True)
class Selection:
    """Cases by use.

    Args:
        train: Cases to learn from, sorted.
        validation: Cases to look at, sorted; none of them is in `train`.
    """

    train: list[str]
    validation: list[str]


def select_cases(
    dataset: RawDataset,
    *,
    train_cases: Sequence[str] | None = None,
    validation_cases: Sequence[str] | None = None,
    labelled: int | None = None,
    seed: int = 0,
) -> Selection:
    """Choose cases.

    Without names, fold 0 of the data set's `splits_final.json` is taken, else nnU-Net's own fold 0 of five. `labelled`
    then draws that many training cases; for one seed, fewer cases are always a part of more.

    Args:
        dataset: The data set.
        train_cases: Names, or None.
        validation_cases: Names (an empty list for none at all), or None.
        labelled: How many of the training cases to use, or None for all.
        seed: Of the draw of `labelled`.

    Raises:
        UsageError: If a name does not exist, a case is in both parts, or there are fewer cases than `labelled`.
        DataError: If a used case has no mask, or there is nothing to split.
    """
    train, validation = _split(dataset, train_cases, validation_cases)
    both = sorted(set(train) & set(validation))
    if both:
        raise UsageError(f"{', '.join(both[:5])} would be in training and in validation: choose one of them.")
    if not train:
        raise UsageError(
            "No case is left to train on: name fewer validation cases, or name training cases with --train-cases."
        )
    if labelled is not None:
        if not 1 <= labelled <= len(train):
            raise UsageError(f"labelled={labelled}: there are {len(train)} training cases. Choose 1 to {len(train)}.")
        order = np.random.default_rng(seed).permutation(len(train))
        train = sorted(train[index] for index in order[:labelled])
    chosen = train_cases is not None and validation_cases is not None
    require_labels(dataset, [*train, *validation], chosen=chosen)
    return Selection(train, validation)


def _split(
    dataset: RawDataset, train_cases: Sequence[str] | None, validation_cases: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    if train_cases is not None and validation_cases is not None:
        return dataset.select(train_cases, "train_cases"), dataset.select(validation_cases, "validation_cases")
    if validation_cases is not None:
        validation = dataset.select(validation_cases, "validation_cases")
        return [name for name in dataset.cases if name not in set(validation)], validation
    if train_cases is not None:
        train = dataset.select(train_cases, "train_cases")
        _, validation = _default_split(dataset)
        validation = [name for name in validation if name not in set(train)]
        rest = [name for name, case in dataset.cases.items() if name not in set(train) and case.label.is_file()]
        return train, validation or rest
    return _default_split(dataset)


def _default_split(dataset: RawDataset) -> tuple[list[str], list[str]]:
    written = dataset.folder / "splits_final.json"
    if written.is_file():
        try:
            fold = json.loads(written.read_text())[0]
            return dataset.select(fold["train"], str(written)), dataset.select(fold["val"], str(written))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(f"{written} is no list of folds with train and val: {error}. Mend or remove it.") from error
    names = sorted(dataset.cases)
    if len(names) < 2:
        raise DataError(
            f"The data set has {len(names)} case: one to train on and one to look at are needed. Add a case, or "
            "name the "
            "training case and no validation cases."
        )
    if len(names) < _FOLDS:
        return names[:-1], names[-1:]
    from sklearn.model_selection import KFold

    train, validation = next(KFold(_FOLDS, shuffle=True, random_state=_SPLIT_SEED).split(names))
    return [names[index] for index in train], [names[index] for index in validation]
