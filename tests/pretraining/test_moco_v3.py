"""MoCo v3."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.data.batch import View
from medssl.pretraining.moco_v3 import MoCoV3
from tests.pretraining.joint_cases import STEP, health_of, method_of, of_volumes, train, views_of


@pytest.mark.parametrize("same_volume", ["left-out", "negative"])
def test_the_loss_is_the_symmetric_contrast_of_predictions_and_keys(same_volume: str) -> None:
    method = method_of(MoCoV3, same_volume=same_volume)
    volumes = [0, 1, 1, 2]
    views = [of_volumes(*volumes), of_volumes(*volumes)]
    generator = torch.Generator().manual_seed(0)
    guesses, keys = (F.normalize(torch.randn(2, 4, 8, generator=generator), dim=2) for _ in range(2))

    def rows(of: Tensor, view: View) -> Tensor:
        return of[0] if view is views[0] else of[1]

    method.predict = lambda view: rows(guesses, view)  # type: ignore[method-assign]
    method.key = lambda view: rows(keys, view)  # type: ignore[method-assign]
    expected = 0.0
    for query, key in ((guesses[0], keys[1]), (guesses[1], keys[0])):
        for i in range(4):
            counted = [j for j in range(4) if j == i or same_volume == "negative" or volumes[j] != volumes[i]]
            logits = {j: float(query[i] @ key[j]) / 0.2 for j in counted}
            expected += 2 * 0.2 * (math.log(sum(math.exp(value) for value in logits.values())) - logits[i]) / 4
    assert method.losses(views, STEP)["contrast"].item() == pytest.approx(expected, rel=1e-5)


def test_the_students_guess_goes_through_the_predictor_and_the_key_does_not() -> None:
    method = method_of(MoCoV3)
    views = views_of(method)
    guess, key = method.predict(views[0]), method.key(views[0])
    assert guess.requires_grad and not key.requires_grad
    torch.testing.assert_close(key, method.projector(method.features(views[0])))
    torch.testing.assert_close(guess, method.predictor(key))


def test_health_shows_a_missing_predictor_and_a_teacher_that_does_not_lag() -> None:
    method = method_of(MoCoV3)
    views = views_of(method)
    train(method, views, 3)
    healthy = health_of(method, views)
    assert abs(healthy["predictor_gain"]) > 1e-5 and healthy["teacher_lag"] > 0
    method.predictor = nn.Identity()
    assert health_of(method, views)["predictor_gain"] == 0
    method = method_of(MoCoV3, teacher={"momentum": 0.0, "final": 0.0})
    train(method, views, 2)
    assert health_of(method, views)["teacher_lag"] == 0
