"""Verdicts: each kind of collapse is told from the others, and a sound encoder from all of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from medssl.training.collapse import figures, verdict


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def duplicated() -> Tensor:
    z = noise(100, 16)
    z[:20] = z[20:40] * (1 + 1e-7)
    return z


def outlier() -> Tensor:
    z = noise(100, 16)
    z[0] *= 50
    return z


def one_bad_row() -> Tensor:
    z = noise(100, 16)
    z[3, 2] = math.nan
    return z


@pytest.mark.parametrize(
    ("features", "state", "words"),
    [
        (noise(100, 16), "healthy", "differ along 16 of 16 possible"),
        (0.5 + 1e-6 * noise(100, 16), "collapsed", "Complete collapse: all samples get one feature"),
        (torch.zeros(100, 16), "collapsed", "every feature is zero"),
        (noise(100, 1) @ noise(1, 64, seed=1) + 1e-3 * noise(100, 64), "collapsed", "Dimensional collapse"),
        (duplicated(), "suspicious", "40% of the samples have the feature of another. Likely cause: duplicates"),
        (1e5 * noise(100, 16), "suspicious", "Norm explosion"),
        (1e-5 * noise(100, 16), "suspicious", "Norm shrinkage"),
        (outlier(), "suspicious", "longest feature"),
        (torch.cat([noise(100, 10), torch.ones(100, 6)], dim=1), "suspicious", "38% of the dimensions are the same"),
        (one_bad_row(), "broken", "1.0% of the features are NaN"),
        (torch.full((9, 4), math.inf), "broken", "No feature is a finite number"),
        (noise(1, 4), "broken", "One sample"),
        (noise(0, 4), "broken", "no samples"),
    ],
)
def test_each_fault_is_named(features: Tensor, state: str, words: str) -> None:
    found = verdict(figures(features))
    assert found.state == state, str(found)
    assert words in found.sentences[0]


def test_a_common_part_is_a_note_and_no_collapse() -> None:
    found = verdict(figures(noise(100, 16) + 100))
    assert found.state == "healthy"
    assert "large common part" in " ".join(found.sentences)


def test_fewer_samples_than_dimensions_is_a_note() -> None:
    found = verdict(figures(noise(20, 64)))
    assert found.state == "healthy" and "bounded by the samples" in found.sentences[-1]


def test_the_untrained_network_tells_flat_inputs_from_a_collapse() -> None:
    flat = figures(0.5 + 1e-7 * noise(100, 16))
    assert "trivial solution" in verdict(flat, untrained=figures(noise(100, 16))).sentences[0]
    assert "inputs that hardly differ" in verdict(flat, untrained=flat).sentences[0]


def test_a_rank_that_the_data_themselves_bound_is_no_collapse() -> None:
    low = figures(noise(100, 1) @ noise(1, 64, seed=1) + 0.01 * noise(100, 64))
    assert verdict(low).state == "collapsed"
    assert verdict(low, untrained=low).state != "collapsed"
    fallen = figures(noise(100, 8) @ noise(8, 64, seed=1))
    assert verdict(fallen).state != "collapsed"
    assert "Dimensional collapse" in verdict(fallen, untrained=figures(noise(100, 64))).sentences[0]


def test_lengths_are_judged_against_the_untrained_network() -> None:
    small = figures(0.001 * noise(100, 16))
    assert verdict(small, untrained=small).state == "healthy"
    assert "100 times as long" in verdict(figures(0.1 * noise(100, 16)), untrained=small).sentences[0]


def test_equal_images_are_told_from_an_encoder_that_sees_no_difference() -> None:
    found = figures(duplicated())
    assert "duplicates in the data" in verdict(found, copies=0.4).sentences[0]
    assert "ignores what tells them apart" in verdict(found, copies=0.0).sentences[0]
    assert "every image equals another" in verdict(figures(0.5 + 1e-7 * noise(9, 4)), copies=1.0).sentences[0]


def test_two_samples_are_enough_not_to_fail() -> None:
    assert verdict(figures(noise(2, 8))).state in ("healthy", "suspicious")
