"""Parts hold whole patients and their share of each class; labelled draws are nested."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medssl.errors import DataError, UsageError
from medssl.protocol.division import Case, counts_of, divide, draw
from medssl.protocol.recipe import DatasetSettings


def settings(**changes: Any) -> DatasetSettings:
    return DatasetSettings(**{"task": "segmentation", "path": Path(), "validation": 10, "selection": 5, **changes})


def test_a_patient_is_in_one_part_only() -> None:
    cases = [Case(f"scan{n:03d}", f"patient{n // 4}") for n in range(100)]
    for seed in range(5):
        division = divide(cases, settings(split_seed=seed), "here")
        parts = [{division.patients[name] for name in part} for part in
                 (division.pool, division.selection, division.validation)]  # fmt: skip
        assert sum(map(len, parts)) == 25 == len(set.union(*parts))
        assert len(division.validation) == 12 and len(division.selection) == 8, "whole patients, at least the number"


def test_the_division_is_that_of_the_label_efficiency_benchmark() -> None:
    names = sorted(f"hippocampus_{n:03d}" for n in range(60))
    order = [names[index] for index in np.random.default_rng(20_240).permutation(60)]
    division = divide([Case(name, name) for name in names], settings(split_seed=20_240), "here")
    assert division.validation == tuple(sorted(order[:10])) and division.selection == tuple(sorted(order[10:15]))
    chosen = np.random.default_rng([20_240, 1]).permutation(45)[:4]
    assert draw(division.pool, 4, 20_240, 1) == sorted(division.pool[index] for index in chosen)


def test_every_part_has_its_share_of_each_class() -> None:
    cases = [Case(f"scan{n:03d}", f"scan{n:03d}", stratum=int(n % 10 == 0)) for n in range(200)]
    division = divide(cases, settings(validation=50, selection=20), "here")
    by_name = {case.name: case.stratum for case in cases}
    assert Counter(by_name[name] for name in division.validation)[1] == 5
    assert Counter(by_name[name] for name in division.selection)[1] == 2


def test_what_the_data_set_sets_apart_is_the_validation_part() -> None:
    cases = [Case(f"scan{n:03d}", f"scan{n:03d}", given=n < 7) for n in range(50)]
    division = divide(cases, settings(validation="given"), "here")
    assert division.validation == tuple(f"scan{n:03d}" for n in range(7))
    with pytest.raises(DataError, match="sets no case apart"):
        divide(cases[7:], settings(validation="given"), "here")


def test_named_parts_are_taken_as_they_are() -> None:
    cases = [Case(f"scan{n:03d}", f"scan{n:03d}") for n in range(50)]
    named = settings(validation=("scan001",), selection=("scan002",), pool=("scan003", "scan004"))
    division = divide(cases, named, "here")
    assert (division.validation, division.selection, division.pool) == (
        ("scan001",),
        ("scan002",),
        ("scan003", "scan004"),
    )


def test_labelled_draws_are_nested_and_depend_on_both_seeds() -> None:
    pool = [f"scan{n:03d}" for n in range(40)]
    for seed in range(4):
        draws = [set(draw(pool, number, 0, seed)) for number in (1, 4, 16, 40)]
        assert all(few < many for few, many in itertools.pairwise(draws))
    assert draw(pool, 8, 0, 1) != draw(pool, 8, 0, 2) and draw(pool, 8, 0, 1) != draw(pool, 8, 1, 1)


def test_shares_of_the_pool_become_numbers() -> None:
    assert counts_of(("1%", "10%", "all", 7), 200, "here") == [2, 20, 200, 7]
    assert counts_of(("0.1%",), 200, "here") == [1]
    with pytest.raises(UsageError, match="201 labelled cases of a pool of 200"):
        counts_of((201,), 200, "here")
