"""Which cases are for what: pool, selection and validation by patient, once; labelled cases nested in the pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medssl.errors import DataError, UsageError, unknown_name
from medssl.protocol.recipe import DatasetSettings, Labels

PARTS = ("pool", "selection", "validation")


@dataclass(frozen=True)
class Case:
    """One labelled case as the division sees it.

    Args:
        name: Its name.
        patient: Pseudonym of its patient; a patient is in one part only.
        stratum: Class, for parts that each have their share of every class.
        given: Whether the data set itself sets it apart for the final look.
    """

    name: str
    patient: str
    stratum: int = 0
    given: bool = False


@dataclass(frozen=True)
class Division:
    """Cases by use, each part sorted by name.

    Args:
        pool: To learn from, with labels or without.
        selection: To choose the learning rate by.
        validation: To report.
        patients: Patient of each case.
    """

    pool: tuple[str, ...]
    selection: tuple[str, ...]
    validation: tuple[str, ...]
    patients: Mapping[str, str]

    def groups(self, cases: Sequence[str]) -> tuple[str, ...]:
        """Return the patient of each case."""
        return tuple(self.patients[case] for case in cases)

    def to_json(self) -> dict[str, Any]:
        """Return the names by part."""
        return {part: list(getattr(self, part)) for part in PARTS}


def divide(cases: Sequence[Case], settings: DatasetSettings, where: str) -> Division:
    """Divide cases by patient; the same for the same cases, sizes and seed.

    A part of a given size gets whole patients, in an order drawn by the seed, until it has at least so many cases.

    Args:
        cases: All labelled cases.
        settings: Of the data set.
        where: The place to name in messages.

    Raises:
        UsageError: If a named case does not exist.
        DataError: If there are too few cases, or a case or patient would be in two parts.
    """
    by_name = {case.name: case for case in cases}
    taken: dict[str, str] = {}
    parts: dict[str, list[str]] = {}

    def take(part: str, names: Sequence[str]) -> None:
        for name in names:
            if name not in by_name:
                raise UsageError(f"{where}.{part}: {unknown_name('case', name, by_name)}")
            if name in taken:
                raise DataError(f"{where}: case {name} is in {taken[name]} and in {part}. Name it once.")
            taken[name] = part
        parts[part] = sorted(names)

    if settings.validation == "given":
        take("validation", [case.name for case in cases if case.given])
        if not parts["validation"]:
            raise DataError(f"{where}: validation is given, but the data set sets no case apart. Give a number.")
    for part in PARTS[::-1]:
        named = getattr(settings, part)
        if isinstance(named, tuple):
            take(part, named)
    if settings.pool is None:
        # A patient of whom some cases are set apart by name is not dealt out: the check below names them.
        rest = [case for case in cases if case.name not in taken]
    else:
        rest = []
    queue = _dealt(rest, settings.split_seed)
    for part in ("validation", "selection"):
        wanted = getattr(settings, part)
        if not isinstance(wanted, int):
            continue
        if settings.pool is not None:
            raise UsageError(f"{where}: with a pool by name, name the {part} cases too.")
        names: list[str] = []
        while len(names) < wanted:
            if not queue:
                raise DataError(
                    f"{where}: {len(cases)} cases are too few for validation {settings.validation} and selection "
                    f"{settings.selection}. Give smaller numbers."
                )
            names += [case.name for case in queue.pop(0)]
        take(part, names)
    if settings.pool is None:
        take("pool", [case.name for patient in queue for case in patient])
    for part in ("pool", "validation"):
        if not parts[part]:
            raise DataError(f"{where}: no case is left for the {part}. Give smaller numbers.")
    _refuse_shared_patients({name: by_name[name] for name in taken}, taken, where)
    patients = {case.name: case.patient for case in cases}
    return Division(**{part: tuple(parts[part]) for part in PARTS}, patients=patients)


def draw(pool: Sequence[str], number: int, split_seed: int, seed: int) -> list[str]:
    """Draw labelled cases; for one seed, fewer are a part of more."""
    order = np.random.default_rng([split_seed, seed]).permutation(len(pool))
    return sorted(pool[index] for index in order[:number])


def counts_of(labels: Sequence[Labels], pool: int, where: str) -> list[int]:
    """Return numbers of labelled cases for what a recipe says: a number, `10%` of the pool, or `all`.

    Raises:
        UsageError: If a text is none of these, a number is not in 1 to `pool`, or two are the same.
    """
    counts = []
    for value in labels:
        text = str(value).strip()
        if isinstance(value, int):
            count = value
        elif text == "all":
            count = pool
        elif text.endswith("%") and text[:-1].replace(".", "", 1).isdigit():
            count = max(1, round(pool * float(text[:-1]) / 100))
        else:
            raise UsageError(f"{where}: labels takes numbers, shares such as 10%, or all, got '{value}'.")
        if not 1 <= count <= pool:
            raise UsageError(f"{where}: {value} labelled cases of a pool of {pool}. Choose 1 to {pool}.")
        if count in counts:
            raise UsageError(f"{where}: {value} is {count} labelled cases of {pool}, which stands there already.")
        counts.append(count)
    return counts


def _dealt(cases: Sequence[Case], seed: int) -> list[list[Case]]:
    """Return the cases of each patient; the classes are spread evenly over the order of the patients."""
    patients: dict[str, list[Case]] = {}
    for case in sorted(cases, key=lambda case: case.name):
        patients.setdefault(case.patient, []).append(case)
    groups = list(patients.values())
    order = np.random.default_rng(seed).permutation(len(groups)).tolist()
    ranks: dict[int, int] = {}
    places = []
    sizes = {stratum: sum(group[0].stratum == stratum for group in groups) for stratum in {c.stratum for c in cases}}
    for position, number in enumerate(order):
        stratum = groups[number][0].stratum
        rank = ranks[stratum] = ranks.get(stratum, -1) + 1
        places.append(((rank + 0.5) / sizes[stratum], position, number))
    return [groups[number] for _, _, number in sorted(places)]


def _refuse_shared_patients(cases: Mapping[str, Case], taken: Mapping[str, str], where: str) -> None:
    first: dict[str, str] = {}
    for name, case in cases.items():
        other = first.setdefault(case.patient, name)
        if taken[other] != taken[name]:
            raise DataError(
                f"{where}: {other} ({taken[other]}) and {name} ({taken[name]}) are of one patient. All cases of a "
                "patient belong to one part."
            )
