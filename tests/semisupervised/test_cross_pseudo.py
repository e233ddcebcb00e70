"""CPS: two networks, each of which learns the likeliest class of the other."""

from __future__ import annotations

import math

import pytest
import torch

from medssl.semisupervised.batch import SemiView
from medssl.semisupervised.cross_pseudo import CrossPseudo, CrossPseudoSettings
from medssl.semisupervised.method import SemiSupervisedSettings
from medssl.semisupervised.ramp import RampSettings
from medssl.semisupervised.supervised import Supervised
from tests.semisupervised.helpers import (
    LATE,
    answer,
    build,
    gradients_of,
    paired,
    same_gradients,
    unsupervised_terms,
    views_of,
    weights_out_of_reach,
)

TASKS = ["segmentation", "classification"]
CROSS = ["first_from_second", "second_from_first"]


def settings(threshold: float = 0.0, weight: float = 1.0) -> CrossPseudoSettings:
    return CrossPseudoSettings(threshold=threshold, unlabelled=RampSettings(weight=weight, fraction=0))


@pytest.mark.parametrize("task", TASKS)
def test_each_network_pays_for_the_class_that_the_other_one_prefers(task: str) -> None:
    method = build(CrossPseudo, settings(), task)
    answer(method.networks[0], math.log(0.9), math.log(0.1))
    answer(method.networks[1], math.log(0.4), math.log(0.6))
    terms = unsupervised_terms(method, views_of(method, paired(task)))
    assert terms["first_from_second"].item() == pytest.approx(-math.log(0.1), rel=1e-5)
    assert terms["second_from_first"].item() == pytest.approx(-math.log(0.4), rel=1e-5)
    method.settings = settings(threshold=0.7)
    terms = unsupervised_terms(method, views_of(method, paired(task)))
    assert terms["first_from_second"].item() == 0 and terms["second_from_first"].item() > 0


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("number", [0, 1])
def test_a_label_does_not_learn(task: str, number: int) -> None:
    method = build(CrossPseudo, settings(), task)
    (view,) = views_of(method, paired(task))[1:]
    assert isinstance(view, SemiView)
    method.unsupervised([view], LATE)[CROSS[number]].backward()
    assert any(weight.grad is not None for weight in method.networks[number].parameters())
    assert all(weight.grad is None for weight in method.networks[1 - number].parameters())


@pytest.mark.parametrize("task", TASKS)
def test_the_networks_start_differently_and_gradients_reach_both(task: str) -> None:
    method = build(CrossPseudo, settings(), task)
    first, second = (next(network.parameters()) for network in method.networks)
    assert not torch.equal(first, second)
    assert weights_out_of_reach(method, paired(task)) == []


@pytest.mark.parametrize("task", TASKS)
def test_at_weight_zero_each_network_has_the_gradients_of_one_that_is_trained_alone(task: str) -> None:
    method, batch = build(CrossPseudo, settings(weight=0.0), task), paired(task)
    mine = gradients_of(method, method.losses(views_of(method, batch), LATE))
    for number, network in enumerate(method.networks):
        control = Supervised([network], method.task, method.policy, SemiSupervisedSettings())
        alone = gradients_of(control, control.losses(views_of(control, batch), LATE))
        own = {name.replace(f"{number}.", "0.", 1): value for name, value in mine.items() if name[0] == str(number)}
        assert len(own) == len(alone) and same_gradients(alone, own)


def test_padding_has_no_influence() -> None:
    method = build(CrossPseudo, settings())
    _, view = views_of(method, paired(margin=6))
    assert isinstance(view, SemiView) and 0 < view.inside.sum() < view.inside.numel()
    first, second = (network(view.image).detach() for network in method.networks)
    error = torch.nn.functional.cross_entropy(first, second.argmax(dim=1), reduction="none")
    term = method.unsupervised([view], LATE)["first_from_second"]
    assert term.item() == pytest.approx(error[view.inside[:, 0]].mean().item(), rel=1e-4)


def test_the_first_network_predicts() -> None:
    method = build(CrossPseudo, settings())
    assert method.predictor is method.networks[0] and method.network is method.networks[0]
