"""What a classifier learns from: cases with their target, patient and split, checked before anything is trained."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from medssl.data.generators import generator
from medssl.errors import DataError, UsageError, unknown_name

#: One of K classes; any of K; one of K in an order.
Kind = Literal["multiclass", "multilabel", "ordinal"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SPLITS = ("train", "validation", "test")
#: Share of patients that validate where the data set names no split.
VALIDATION_SHARE = 0.2
#: Spellings of the splits.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
#: How many of many are named in a message.
NAMED = 5


@dataclass(frozen=True)
class Case:
    """One image with its target.

    Args:
        name: Name in outputs; free of identity.
        target: Class number, or for `multilabel` a 0 or 1 for each label.
        patient_key: Pseudonym of the patient; of the case itself where no patient is known.
        split: `train`, `validation` or `test`.
        row: Where the case stands in its source: line of the CSV, position in the listing or in the array.
        where: The same in words, for messages.
        path: The image file, or None.
        volume_id: The volume in an INDEX or STORE, or None.
        array: Name and position of the image in a .npz, or None.
        shuffle_key: Decides on which side of a split the patient falls; does not leave the process.
    """

    name: str
    target: int | tuple[int, ...]
    patient_key: str
    split: str
    row: int = 0
    where: str = field(default="", repr=False)
    path: Path | None = field(default=None, repr=False)
    volume_id: str | None = None
    array: tuple[str, int] | None = None
    shuffle_key: str = field(default="", repr=False, compare=False)


@dataclass(frozen=True)
class Targets:
    """All cases of a data set.

    Args:
        kind: `multiclass`, `multilabel` or `ordinal`.
        classes: Names, in the order of the class numbers.
        cases: Sorted by row.
        source: What was read: `csv`, `folder`, `npz`.
        split_source: Who split: `given`, `patients` (by their hash), or `folds`.
    """

    kind: str
    classes: tuple[str, ...]
    cases: tuple[Case, ...]
    source: str = "csv"
    split_source: str = "given"

    def of(self, split: str) -> list[Case]:
        """Return the cases of one split."""
        return [case for case in self.cases if case.split == split]

    def array(self, cases: Sequence[Case]) -> NDArray[np.int64]:
        """Return the targets of some cases. Shape: (N,), or (N, K) for `multilabel`."""
        shape = (len(cases), len(self.classes)) if self.kind == "multilabel" else (len(cases),)
        return np.array([case.target for case in cases], np.int64).reshape(shape)

    def counts(self, cases: Sequence[Case]) -> dict[str, int]:
        """Return how many cases carry each class."""
        numbers = Counter(number for case in cases for number in carried(case))
        return {name: numbers[number] for number, name in enumerate(self.classes)}

    def digest(self) -> str:
        """Return a hash of names, targets, patients and splits."""
        text = "\n".join(f"{case.name}|{case.target}|{case.patient_key}|{case.split}" for case in self.cases)
        return hashlib.sha256(f"{self.kind}|{self.classes}\n{text}".encode()).hexdigest()

    def with_cases(self, cases: Iterable[Case], **changes: Any) -> Targets:
        """Return the same with other cases."""
        return dataclasses.replace(self, cases=tuple(cases), **changes)


def carried(case: Case) -> tuple[int, ...]:
    """Return the class numbers that a case carries: one, or for several labels any number."""
    if isinstance(case.target, tuple):
        return tuple(number for number, value in enumerate(case.target) if value)
    return (case.target,)


def check(targets: Targets) -> Targets:
    """Refuse what no training can make good; the row is named.

    Raises:
        DataError: A patient in two splits, an image twice, a class with one case, a class that is only in validation,
            or a split without cases.
    """
    _refuse_repeats(targets)
    _refuse_shared_patients(targets)
    if len(targets.classes) < (1 if targets.kind == "multilabel" else 2):
        raise DataError(f"The data set has one class ({targets.classes[0]}); a classifier needs two or more.")
    for split in ("train", "validation"):
        if not targets.of(split):
            given = ", ".join(f"{name}: {len(targets.of(name))}" for name in SPLITS)
            raise DataError(
                f"No case is in the split {split} ({given}). Name it in the column split, or use --folds 5 to have "
                "the patients dealt out."
            )
    _refuse_lonely_classes(targets)
    return targets


def split_by_patient(targets: Targets, share: float = VALIDATION_SHARE) -> Targets:
    """Deal patients to training and validation by a hash of each, so that new patients never move old ones."""
    cases = [
        dataclasses.replace(case, split="validation" if _fraction(case.shuffle_key, "split") < share else "train")
        for case in targets.cases
    ]
    return targets.with_cases(cases, split_source="patients")


def split_into_folds(targets: Targets, folds: int, fold: int) -> Targets:
    """Make one of k folds the validation part; cases of the split `test` stay out of it.

    Patients are dealt out class by class in the order of their hash, so that each fold has its part of each class. A
    patient whose cases differ counts for the rarest of their classes.

    Raises:
        UsageError: If there are fewer than two folds, or no such fold.
        DataError: If there are fewer patients than folds.
    """
    if folds < 2 or not 0 <= fold < folds:
        raise UsageError(f"--folds {folds} --fold {fold}: give at least 2 folds and a fold from 0 to {folds - 1}.")
    used = [case for case in targets.cases if case.split != "test"]
    frequency = Counter(number for case in used for number in carried(case))
    patients: dict[str, list[Case]] = defaultdict(list)
    for case in used:
        patients[case.shuffle_key].append(case)
    if len(patients) < folds:
        raise DataError(f"--folds {folds}: there are {len(patients)} patients. Give at most as many folds as patients.")
    strata: dict[int, list[str]] = defaultdict(list)
    for key, cases in patients.items():
        numbers = {number for case in cases for number in carried(case)}
        strata[min(numbers, key=lambda number: (frequency[number], number), default=-1)].append(key)
    dealt: dict[str, int] = {}
    # One deck, the rarest class first: where it ends in the middle of a round, the next class goes on from there.
    for stratum in sorted(strata, key=lambda number: (frequency[number], number)):
        for key in sorted(strata[stratum], key=lambda key: (_fraction(key, "fold"), key)):
            dealt[key] = len(dealt) % folds
    cases_ = [
        case
        if case.split == "test"
        else dataclasses.replace(case, split="validation" if dealt[case.shuffle_key] == fold else "train")
        for case in targets.cases
    ]
    return targets.with_cases(cases_, split_source="folds")


def draw_labelled(targets: Targets, count: int, seed: int) -> Targets:
    """Keep `count` of the training cases, spread over the classes as in all of them, at least one of each.

    For one seed, fewer cases are always a part of more.

    Raises:
        UsageError: If there are fewer cases than that, or fewer asked for than classes.
    """
    train = targets.of("train")
    if not len(targets.classes) <= count <= len(train):
        raise UsageError(
            f"--labelled {count}: there are {len(train)} training cases of {len(targets.classes)} classes. Choose "
            f"{len(targets.classes)} to {len(train)}."
        )
    piles: dict[int, list[Case]] = defaultdict(list)
    frequency = Counter(number for case in train for number in carried(case))
    for case in train:
        piles[min(carried(case), key=lambda number: (frequency[number], number), default=-1)].append(case)
    orders = {
        stratum: [pile[i] for i in generator(seed, stratum + 1, "labelled").permutation(len(pile))]
        for stratum, pile in sorted(piles.items())
    }
    taken: dict[int, int] = dict.fromkeys(orders, 0)
    kept: set[str] = set()
    for _ in range(count):
        # The class that is furthest behind its share; those with none yet come first, the rarest of all before.
        behind = [number for number in orders if taken[number] < len(orders[number])]
        chosen = min(behind, key=lambda number: (taken[number] > 0, (taken[number] + 1) / len(orders[number]), number))
        kept.add(orders[chosen][taken[chosen]].name)
        taken[chosen] += 1
    return targets.with_cases(case for case in targets.cases if case.split != "train" or case.name in kept)


def class_numbers(names: Sequence[str], kind: str, classes: Sequence[str] | None) -> tuple[str, ...]:
    """Return the classes in order: as given, else whole numbers by value and everything else by the alphabet.

    Raises:
        UsageError: If ordered classes are no numbers and no order is given, or a given list repeats a name.
        DataError: If a name is none of those that are given.
    """
    found = sorted(set(names))
    if classes is not None:
        if len(set(classes)) != len(classes):
            raise UsageError(f"--classes {','.join(classes)} repeats a name.")
        for name in found:
            if name not in classes:
                raise DataError(f"The label '{name}' is none of --classes {','.join(classes)}. Add it or mend the row.")
        return tuple(classes)
    if all(name.lstrip("-").isdigit() for name in found):
        return tuple(sorted(found, key=int))
    if kind == "ordinal":
        raise UsageError(
            f"Ordered classes need their order: --classes {','.join(found)}, from the least to the most, or whole "
            "numbers as labels."
        )
    return tuple(found)


def check_kind(kind: str) -> str:
    """Return a kind of target, or `auto`.

    Raises:
        UsageError: If there is none of that name.
    """
    if kind not in (*KINDS, "auto"):
        raise unknown_name("kind of target", kind, (*KINDS, "auto"))
    return kind


def few(names: Sequence[str]) -> str:
    """Return the first of some names for a message."""
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def _refuse_repeats(targets: Targets) -> None:
    seen: dict[object, Case] = {}
    for case in targets.cases:
        # One file may be spelt in several ways.
        key = case.volume_id or case.array or (case.path and case.path.resolve())
        if key in seen:
            raise DataError(f"{case.where}: the same image as in {seen[key].where}. Keep one of the two rows.")
        seen[key] = case


def _refuse_shared_patients(targets: Targets) -> None:
    first: dict[str, Case] = {}
    for case in targets.cases:
        other = first.setdefault(case.patient_key, case)
        if other.split != case.split:
            raise DataError(
                f"{case.where}: its patient is in the split {case.split} here and in {other.split} in {other.where}. "
                "All images of a patient belong to one split: mend the column split, or leave it out and let the "
                "patients be split."
            )


def _refuse_lonely_classes(targets: Targets) -> None:
    by_class: Mapping[int, list[Case]] = defaultdict(list)
    for case in targets.cases:
        for number in carried(case):
            by_class[number].append(case)
    for number, name in enumerate(targets.classes):
        cases = by_class[number]
        if len(cases) < 2:
            place = f"{cases[0].where} is its only case" if cases else "no case carries it"
            raise DataError(
                f"Class '{name}': {place}; one to learn from and one to validate on are needed. Add cases, or take the "
                "class out of the data set."
            )
        if not any(case.split == "train" for case in cases):
            shown = few([case.where for case in cases])
            split = " and ".join(sorted({case.split for case in cases}))
            raise DataError(
                f"Class '{name}' is only in {split} ({shown}): nothing can be learned of it. Move a patient to "
                "train, or use --folds to have the patients dealt out class by class."
            )
    if targets.kind == "multilabel":
        train = targets.of("train")
        for number, name in enumerate(targets.classes):
            if all(number in carried(case) for case in train):
                raise DataError(f"Label '{name}' is carried by all {len(train)} training cases: add some without it.")


def _fraction(key: str, purpose: str) -> float:
    """Return a number in [0, 1) that depends on a patient alone."""
    digest = hashlib.sha256(f"{purpose}|{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
