"""The numbers behind the gates, against slow definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from medssl.errors import DataError, UsageError
from medssl.inference.gates.certainty import Certainty, uncertainty
from medssl.inference.gates.measured import measure_mask
from medssl.inference.gates.members import Members
from medssl.inference.gates.reference import Reference, fit_reference
from medssl.inference.gates.thresholds import calibrate, least_cases
from medssl.inference.grid import Grid


def slow_overlap(labels: list[np.ndarray], weights: np.ndarray, classes: int) -> float:
    """Return the mean weighted Dice over pairs and classes by plain loops."""
    values = []
    for label in range(1, classes):
        for a, b in itertools.combinations(labels, 2):
            both = weights[(a == label) & (b == label)].sum()
            total = weights[a == label].sum() + weights[b == label].sum()
            if total > 0:
                values.append(2 * both / total)
    return float(np.mean(values))


def test_overlap_of_members_equals_its_definition_over_tiles() -> None:
    rng = np.random.default_rng(0)
    members, seen, weighing = Members(False), [], []
    for _ in range(2):
        logits = torch.from_numpy(rng.normal(size=(3, 3, 4, 5, 6)).astype(np.float32))
        weights = torch.from_numpy(rng.random((4, 5, 6)))
        for each in logits:
            members.add(each)
        members.finish_tile(weights)
        seen.append(logits.argmax(1).numpy())
        weighing.append(weights.numpy())
    stacked = [np.stack([tile[member] for tile in seen]) for member in range(3)]
    assert members.overlap() == pytest.approx(slow_overlap(stacked, np.stack(weighing), 3), rel=1e-5)


def test_equal_members_agree_wholly_and_padding_does_not_count() -> None:
    members = Members(False)
    logits = torch.randn(2, 3, 4, 5)
    other = logits.clone()
    other[:, 0] = other[:, 0].flip(0)  # differs in the padding only
    for each in (logits, other):
        members.add(each)
    weights = torch.ones(3, 4, 5)
    weights[0] = 0
    members.finish_tile(weights)
    assert members.overlap() == pytest.approx(1)


def test_one_member_or_an_empty_answer_has_no_overlap() -> None:
    alone, empty = Members(False), Members(False)
    alone.add(torch.randn(2, 2, 2, 2))
    alone.finish_tile(torch.ones(2, 2, 2))
    for _ in range(2):
        empty.add(torch.stack([torch.ones(2, 2, 2), torch.zeros(2, 2, 2)]))
    empty.finish_tile(torch.ones(2, 2, 2))
    assert alone.overlap() is None and empty.overlap() is None


def test_regions_overlap_by_their_own_threshold() -> None:
    members = Members(True)
    a, b = torch.full((2, 1, 1, 4), -1.0), torch.full((2, 1, 1, 4), -1.0)
    a[0, ..., :2], b[0, ..., 1:3] = 1.0, 1.0  # one of two shared; the second region is empty in both
    for each in (a, b):
        members.add(each)
    members.finish_tile(torch.ones(1, 1, 4))
    assert members.overlap() == pytest.approx(0.5)


def test_entropy_runs_from_0_to_1_and_a_temperature_above_1_raises_it() -> None:
    for regions in (False, True):
        sure, torn = np.array([[40.0], [-40.0], [-40.0]]), np.zeros((3, 1))
        assert uncertainty(sure, regions)[0] == pytest.approx(0, abs=1e-9)
        assert uncertainty(torn, regions)[0] == pytest.approx(1)
    rows = np.random.default_rng(0).normal(0, 3, (3, 4, 5, 6)).astype(np.float16)
    cold, warm = Certainty(False), Certainty(False, 2.0)
    passed = np.concatenate(list(cold.pass_on([rows[:, :1], rows[:, 1:]])), axis=1)
    list(warm.pass_on([rows]))
    assert np.array_equal(passed, rows)
    p = np.exp(rows.astype(float)) / np.exp(rows.astype(float)).sum(0)
    found = rows.argmax(0) > 0
    expected = (-(p * np.log(p)).sum(0) / math.log(3))[found].mean()
    assert cold.entropy() == pytest.approx(expected) and cold.confidence() == pytest.approx(p.max(0)[found].mean())
    assert warm.entropy() > cold.entropy()  # type: ignore[operator]
    assert Certainty(False).entropy() is None


def test_distance_is_mahalanobis_and_survives_the_file() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(4, 4))
    features = rng.normal(size=(4000, 4)) @ mixing + 5
    reference = fit_reference(features)
    strange = features.mean(0) + 3.0
    offset = strange - features.mean(0)
    true = math.sqrt(offset @ np.linalg.solve(np.cov(features.T), offset) / 4)
    assert reference.distance(strange) == pytest.approx(true, rel=0.02)
    assert Reference.from_json(reference.to_json()).distance(strange) == pytest.approx(
        reference.distance(strange), rel=1e-4
    )


def test_a_reference_of_fewer_cases_than_features_keeps_none_of_them() -> None:
    features = np.random.default_rng(0).normal(size=(5, 64))
    reference = Reference.from_json(fit_reference(features).to_json())
    assert np.isfinite(reference.distance(features[0])) and reference.distance(features[0] + 100) > 5
    with pytest.raises(DataError, match="3 training cases or more"):
        fit_reference(features[:2])


def test_threshold_is_the_conformal_quantile_and_the_fence_is_tukeys() -> None:
    scores = np.random.default_rng(0).permutation(np.arange(1, 40)).astype(float)
    found = calibrate(scores.tolist(), 0.05, refuses=True)
    assert found.review == 38 and found.flagged == 1 and found.cases == 39  # ceil(40 * 0.95) = 38
    assert found.refuse == pytest.approx(29.5 + 3 * 19)
    assert calibrate([*np.linspace(0, 1, 38), 1000.0], 0.05, refuses=True).refuse == 1000.0
    assert calibrate(scores.tolist(), 0.05, refuses=False).refuse is None


def test_share_of_new_cases_above_the_threshold_is_at_most_the_flag_rate() -> None:
    rng = np.random.default_rng(1)
    shares = [
        (rng.normal(size=200) > calibrate(rng.normal(size=19).tolist(), 0.05, refuses=False).review).mean()
        for _ in range(400)
    ]
    assert np.mean(shares) == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize(("rate", "needed"), [(0.05, 19), (0.1, 9), (0.2, 4)])
def test_a_threshold_needs_enough_cases(rate: float, needed: int) -> None:
    assert least_cases(rate) == needed
    calibrate(list(range(needed)), rate, refuses=False)
    with pytest.raises(UsageError, match=f"{needed} are needed"):
        calibrate(list(range(needed - 1)), rate, refuses=False)


def test_parts_are_counted_without_specks_and_volumes_in_millilitres() -> None:
    mask = np.zeros((20, 20, 20), np.uint8)
    mask[2:8, 2:8, 2:8] = 1
    mask[12:18, 12:18, 12:18] = 1
    mask[0, 0, 19] = 1
    mask[8, 8, 8] = 2
    grid = Grid((20, 20, 20), np.diag([2.0, 1.0, 1.0, 1.0]), (20, 20, 20))
    volumes, parts = measure_mask(mask, grid, {"organ": (1,), "both": (1, 2), "none": (3,)})
    assert parts == {"organ": 2, "both": 2, "none": 0}
    assert volumes == {"organ": pytest.approx(433 * 2 / 1000), "both": pytest.approx(434 * 2 / 1000), "none": 0.0}
