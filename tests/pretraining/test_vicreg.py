"""VICReg."""

from __future__ import annotations

import pytest
import torch

from medssl.losses.decorrelation import vicreg_terms
from medssl.pretraining.vicreg import VICReg
from tests.pretraining.joint_cases import STEP, freeze_features, health_of, keep_features, method_of, train, views_of


def test_the_terms_have_the_papers_weights() -> None:
    method = method_of(VICReg)
    views = views_of(method)
    plain = vicreg_terms(method.project(views[0]), method.project(views[1]))
    terms = method.losses(views, STEP)
    assert set(terms) == set(plain)
    for name, weight in {"invariance": 25, "variance": 25, "covariance": 1}.items():
        assert terms[name].item() == pytest.approx(weight * plain[name].item(), rel=1e-5)


def test_a_weight_of_zero_takes_a_term_out() -> None:
    method = method_of(VICReg, covariance_weight=0, invariance_weight=3)
    views = views_of(method)
    plain = vicreg_terms(method.project(views[0]), method.project(views[1]))
    terms = method.losses(views, STEP)
    assert terms["covariance"].item() == 0
    assert terms["invariance"].item() == pytest.approx(3 * plain["invariance"].item(), rel=1e-5)


def test_projections_are_not_brought_to_one_length() -> None:
    method = method_of(VICReg)
    views = views_of(method)
    before = method.project(views[0])
    with torch.no_grad():
        method.projector[-1].weight.mul_(3)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(method.project(views[0]), 3 * before)
    assert method.projector[-1].bias is None


def test_without_the_variance_term_features_collapse_and_health_says_so() -> None:
    views = views_of(method_of(VICReg))
    spread = {}
    for weight in (25.0, 0.0):
        method = method_of(VICReg, variance_weight=weight)
        keep_features(method, views)
        before = health_of(method, views)["variance_std"]
        train(method, views, 80, rate=0.05, of=80)
        spread[weight] = health_of(method, views)["variance_std"] / before
    assert spread[25.0] > 0.9 and spread[0.0] < 0.5
    freeze_features(method)
    assert health_of(method, views)["variance_std"] == pytest.approx(0, abs=1e-5)
