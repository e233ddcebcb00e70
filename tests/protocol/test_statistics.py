"""Intervals and tests against definitions, known values and how often they err."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from pytest import approx

from medssl.evaluation.bootstrap import estimate
from medssl.protocol.outcomes import Answers, CaseValues, read_outcome
from medssl.protocol.statistics import over_seeds, paired, sign_flip
from medssl.protocol.tempering import outputs_of, tempered_anew
from medssl.training.temperature import fit_temperature, probabilities_of

from .fakes import answers


def values(numbers: list[float] | np.ndarray) -> CaseValues:
    return CaseValues({"dice": {f"case{n:03d}": float(value) for n, value in enumerate(numbers)}})


def own(count: int) -> list[str]:
    """Every case is a patient of its own."""
    return [f"case{n:03d}" for n in range(count)]


def slow_sign_flip(numbers: np.ndarray) -> float:
    sums = [abs(sum(s * v for s, v in zip(signs, numbers, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(numbers))]  # fmt: skip
    return float(np.mean([value >= abs(numbers.sum()) - 1e-12 for value in sums]))


def test_sign_flip_equals_its_definition() -> None:
    numbers = np.random.default_rng(0).normal(0.3, 1, 9)
    assert sign_flip(numbers, own(9)) == approx(slow_sign_flip(numbers))


def test_sign_flip_of_cases_that_all_gain_is_the_smallest_there_is() -> None:
    assert sign_flip(np.ones(6), own(6)) == approx(2 / 2**6)
    assert sign_flip(np.ones(40), own(40)) == approx(1 / 10_001)
    assert sign_flip(np.zeros(6), own(6)) == 1.0
    assert sign_flip(np.ones(3), ["one"] * 3) is None


def test_cases_of_a_patient_flip_together() -> None:
    numbers = np.random.default_rng(1).normal(0.5, 1, 8)
    doubled = sign_flip(np.repeat(numbers, 2), [name for name in own(8) for _ in range(2)])
    assert doubled == approx(sign_flip(numbers, own(8)))
    assert sign_flip(np.repeat(numbers, 2), own(16)) < doubled, "counted as patients of their own they seem surer"


def test_sign_flip_errs_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    ps = np.array([sign_flip(rng.normal(0, 1, 20), own(20)) for _ in range(300)])
    assert 0.02 <= (ps < 0.05).mean() <= 0.085


def test_intervals_of_cases_are_those_of_the_bootstrap_over_cases() -> None:
    numbers = np.random.default_rng(3).normal(0.8, 0.1, 30)
    found, known = over_seeds([values(numbers)], own(30))["dice"], estimate(numbers.tolist())
    assert found.value == approx(known.mean)
    assert known.low is not None and known.high is not None
    assert found.low == approx(known.low, abs=3e-3) and found.high == approx(known.high, abs=3e-3)


def test_seeds_are_averaged_in_each_case_before_anything_else() -> None:
    rng = np.random.default_rng(4)
    runs = rng.normal(0.8, 0.1, (3, 25))
    found = over_seeds([values(run) for run in runs], own(25))["dice"]
    alone = over_seeds([values(runs.mean(axis=0))], own(25))["dice"]
    assert (found.value, found.low, found.high) == approx((alone.value, alone.low, alone.high))


def test_undefined_cases_are_left_out_in_pairs_and_counted() -> None:
    ours, theirs = [0.9, math.nan, 0.8, 0.7], [0.8, 0.7, 0.6, math.nan]
    found = paired([values(ours)], [values(theirs)], "dice", own(4))
    assert (found.cases, found.unpaired, found.better) == (2, 2, 2)
    assert found.interval.value == approx(0.15)
    nothing = paired([values([math.nan])], [values([0.5])], "dice", own(1))
    assert nothing.interval.p is None and math.isnan(nothing.interval.value)


def test_one_patient_has_no_interval() -> None:
    found = over_seeds([values([0.8, 0.9])], ["one", "one"])["dice"]
    assert found.value == approx(0.85) and math.isnan(found.low)
    assert math.isnan(paired([values([0.8, 0.9])], [values([0.7, 0.7])], "dice", ["one", "one"]).interval.low)


def test_a_better_classifier_is_found_and_an_equal_one_is_not() -> None:
    groups = own(60)
    good, poor = [answers(1.5, seed) for seed in (0, 1)], [answers(0.2, seed) for seed in (2, 3)]
    found = paired(good, poor, "auroc", groups)
    assert found.test == "bootstrap" and found.interval.low > 0 and found.interval.p is not None
    assert found.interval.p < 0.01
    same = paired(good, good, "auroc", groups)
    assert same.interval.value == 0 and same.interval.p == 1.0


def test_a_classifiers_metric_is_the_mean_over_seeds() -> None:
    runs = [answers(0.7, seed) for seed in range(3)]
    found = over_seeds(runs, own(60))
    assert found["auroc"].value == approx(np.mean([run.weighted(None)["auroc"][0] for run in runs]))
    assert found["auroc"].low < found["auroc"].value < found["auroc"].high


@pytest.mark.parametrize("outcome", [values([0.5, math.nan]), answers(1.0, 0)], ids=["cases", "answers"])
def test_outcomes_come_back_from_json(outcome: CaseValues | Answers) -> None:
    back = read_outcome(outcome.to_json())
    assert back.cases == outcome.cases
    for metric, value in outcome.weighted(None).items():
        assert back.weighted(None)[metric] == approx(value, nan_ok=True)


@pytest.mark.parametrize("kind", ["multiclass", "multilabel", "ordinal"])
def test_outputs_are_found_again_from_probabilities(kind: str) -> None:
    outputs = np.random.default_rng(5).normal(0, 4, (20, 3))
    if kind == "ordinal":
        outputs = -np.sort(-outputs[:, :2], axis=1)
    p = probabilities_of(outputs, kind, 1.7)  # type: ignore[arg-type]
    again = probabilities_of(1.7 * outputs_of(p, kind), kind, 1.0)  # type: ignore[arg-type]
    assert again == approx(probabilities_of(outputs, kind, 1.0), abs=1e-9)  # type: ignore[arg-type]


def test_reported_cases_do_not_decide_the_temperature() -> None:
    rng = np.random.default_rng(6)
    targets = rng.integers(0, 3, 80)
    outputs = rng.normal(0, 3, (80, 3)) + 3.0 * np.eye(3)[targets]
    p = probabilities_of(outputs, "multiclass", fit_temperature(outputs, targets, "multiclass"))
    temperature = fit_temperature(outputs, targets, "multiclass")
    found = tempered_anew(p, targets, "multiclass", temperature, range(30))
    alone = probabilities_of(outputs, "multiclass", fit_temperature(outputs[:30], targets[:30], "multiclass"))
    assert found == approx(alone, abs=1e-6)
    assert tempered_anew(p, targets, "multiclass", temperature, []) == approx(
        probabilities_of(outputs, "multiclass"), abs=1e-6
    )
