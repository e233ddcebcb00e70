"""SimCLR, whose loss is chosen by its name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from medssl.config import check_settings
from medssl.errors import UsageError
from medssl.losses.contrast import OBJECTIVES
from medssl.pretraining.contrast import retrieval
from medssl.pretraining.simclr import ObjectiveSettings, SimCLR, SimCLRSettings
from tests.pretraining.joint_cases import STEP, freeze_features, health_of, method_of, of_volumes, views_of

DEFAULTS = {
    "nt-xent": {"temperature": 0.1},
    "dcl": {"temperature": 0.1},
    "dclw": {"temperature": 0.1, "sigma": 0.5},
    "debiased": {"temperature": 0.5, "tau_plus": 0.1},
    "additive-margin": {"temperature": 0.03, "margin": 0.1},
    "supcon": {"temperature": 0.1},
}


def settings(**values: Any) -> SimCLRSettings:
    return check_settings(SimCLRSettings, values, "recipe")


def test_every_objective_can_be_named_with_all_the_numbers_it_has() -> None:
    assert set(DEFAULTS) == set(OBJECTIVES)
    for name, function in OBJECTIVES.items():
        keywords = {key for key, value in inspect.signature(function).parameters.items() if value.kind == 3}
        assert set(ObjectiveSettings(name=name).numbers()) == keywords - {"groups"}  # type: ignore[arg-type]


@pytest.mark.parametrize("name", DEFAULTS)
def test_an_objective_is_taken_by_its_name_alone_with_its_own_defaults(name: str) -> None:
    chosen = settings(objective=name).objective
    assert chosen.numbers() == DEFAULTS[name]
    assert settings(objective={"name": name}).objective == chosen
    assert settings(objective={"name": name, "temperature": 0.7}).objective.temperature == 0.7
    assert settings().objective.name == "nt-xent"


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_written_recipe_is_read_back_as_it_was(name: str) -> None:
    chosen = settings(objective=name)
    assert settings(**chosen.model_dump(mode="json")) == chosen


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"name": "nt-xent", "margin": 0.2}, "nt-xent has no margin; it has temperature"),
        ({"sigma": 0.2}, "nt-xent has no sigma"),
        ("ntxent", "Input should be 'nt-xent', 'dcl'"),
        ({"name": "dcl", "temperature": 0}, "greater than 0"),
        ({"name": "dcl", "temprature": 1}, "objective.temperature"),
    ],
)
def test_numbers_that_an_objective_does_not_have_are_refused(objective: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings(objective=objective)


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_loss_is_the_objective_of_the_projections(name: str) -> None:
    method = method_of(SimCLR, objective=name)
    first, second = torch.randn(2, 5, 8)
    volumes = of_volumes(0, 1, 1, 2, 3)
    expected = OBJECTIVES[name](first, second, groups=volumes.sample_id, **DEFAULTS[name])
    assert torch.equal(method.objective([first, second], [volumes, volumes], STEP)["contrast"], expected)
    method = method_of(SimCLR, objective=name, same_volume="negative")
    expected = OBJECTIVES[name](first, second, groups=None, **DEFAULTS[name])
    assert torch.equal(method.objective([first, second], [volumes, volumes], STEP)["contrast"], expected)


def test_crops_of_one_volume_are_told_apart_only_where_that_is_asked_for() -> None:
    views = views_of(method_of(SimCLR), volumes=[3, 3, 3, 3])
    assert method_of(SimCLR).losses(views, STEP)["contrast"].item() == 0
    assert method_of(SimCLR, same_volume="negative").losses(views, STEP)["contrast"].item() > 0.1


def test_views_that_do_not_know_their_volume_are_named() -> None:
    method = method_of(SimCLR)
    views = views_of(method)
    views[0].sample_id = None
    with pytest.raises(ValueError, match="sample_id"):
        method.losses(views, STEP)


def test_retrieval_is_one_where_pairs_are_found_and_chance_where_all_are_alike() -> None:
    rows = torch.randn(8, 5)
    assert retrieval(rows, rows * 3).item() == 1
    assert retrieval(rows, rows.roll(1, 0)).item() == 0
    method = method_of(SimCLR)
    views = views_of(method)
    views[1] = views[0]
    assert health_of(method, views)["retrieval"] == 1
    freeze_features(method)
    assert health_of(method, views)["retrieval"] == pytest.approx(1 / 4)
