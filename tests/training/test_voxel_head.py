"""A linear head on the stages of an encoder, in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from medssl.training.voxel_head import SHRINKAGE, features_at, fit_voxel_head, mean_dice


def drawn(n: int = 300, width: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(n) % 3
    centres = torch.randn(3, width, generator=generator) * 2
    return centres[classes] + torch.randn(n, width, generator=generator), classes


def test_the_discriminant_is_that_of_scikit_learn() -> None:
    features, classes = drawn()
    # Of unequal priors scikit-learn weighs the covariances by them too; here each voxel counts alike.
    priors = torch.ones(3) / 3
    head = fit_voxel_head(features, classes, priors, [3, 1])
    ours = (features @ torch.cat(head.weights) + head.bias).softmax(dim=1)
    other = LinearDiscriminantAnalysis(solver="lsqr", priors=priors.numpy()).fit(features.numpy(), classes.numpy())
    # The shrinkage, and one over N - K in place of N, are all that differs.
    assert np.abs(ours.numpy() - other.predict_proba(features.numpy())).max() < 5 * SHRINKAGE


def test_a_class_that_is_rare_among_all_voxels_is_answered_less() -> None:
    features, classes = drawn()
    counts = []
    for prior in (0.4, 0.001):
        priors = torch.tensor([1 - 2 * prior, prior, prior]) if prior < 0.4 else torch.tensor([0.2, 0.4, 0.4])
        head = fit_voxel_head(features, classes, priors, [4])
        counts.append(int(((features @ head.weights[0] + head.bias).argmax(dim=1) > 0).sum()))
    assert counts[1] < counts[0]


def test_features_that_never_vary_get_no_weight_and_break_nothing() -> None:
    features, classes = drawn()
    features[:, 1] = 7.0
    head = fit_voxel_head(features, classes, torch.ones(3) / 3, [4])
    assert torch.isfinite(head.bias).all() and head.weights[0][1].abs().max() == 0


@pytest.mark.parametrize("size", [(6, 8), (4, 6, 8)])
def test_features_at_voxels_and_logits_are_those_of_upsampled_stages(size: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    stages = [
        torch.randn(1, 3, *size, generator=generator),
        torch.randn(1, 2, *(edge // 2 for edge in size), generator=generator),
    ]
    mode = "trilinear" if len(size) == 3 else "bilinear"
    whole = torch.cat([stages[0], F.interpolate(stages[1], size=size, mode=mode, align_corners=False)], dim=1)[0]
    points = torch.stack(torch.meshgrid(*(torch.arange(edge) for edge in size), indexing="ij"), -1).reshape(
        -1, len(size)
    )
    found = features_at(stages, points, size)
    assert torch.allclose(found, whole.flatten(1).T, atol=1e-5)
    head = fit_voxel_head(found, torch.arange(len(points)) % 2, torch.ones(2) / 2, [3, 2])
    logits = head(stages, size)
    assert logits.shape == (1, 2, *size)
    expected = found @ torch.cat(head.weights) + head.bias
    assert torch.allclose(logits[0].flatten(1).T, expected, atol=1e-4)


def test_dice_is_that_of_a_hand_value_and_undefined_without_foreground() -> None:
    answer, truth = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2])
    assert mean_dice([answer], [truth], 4) == approx((2 / 3 + 2 / 3) / 2)
    assert mean_dice([answer[:2], answer[2:]], [truth[:2], truth[2:]], 4) == approx(2 / 3)
    assert math.isnan(mean_dice([torch.zeros(3).long()], [torch.zeros(3).long()], 2))


def test_what_does_not_fit_is_named() -> None:
    features, classes = drawn()
    with pytest.raises(ValueError, match="do not fit"):
        fit_voxel_head(features, classes, torch.ones(3), [3])
    with pytest.raises(ValueError, match="no voxel"):
        fit_voxel_head(features, classes, torch.ones(4), [4])
