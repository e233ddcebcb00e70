"""A recipe that cannot be run says what is wrong with it, where, and what helps, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medssl.errors import MedsslError, UsageError
from medssl.protocol.recipe import read_recipe

from .fakes import FakeTrainer, recipe_values, run, write_recipe

DATASET: dict[str, Any] = recipe_values()["datasets"]["forty"]


def with_dataset(**changes: Any) -> dict[str, Any]:
    """A recipe whose data set differs."""
    return recipe_values(datasets={"forty": {**DATASET, **changes}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (recipe_values(armes={}), "setting named 'armes'. Did you mean arms"),
        (with_dataset(valdation=3), "forty.valdation"),
        (recipe_values(training={"stepps": 3}), "setting named 'stepps'. Did you mean steps"),
        (with_dataset(training={"steps": 0.5}), "datasets.forty.training: steps"),
        (with_dataset(path="nowhere"), "datasets.forty.path is .*nowhere, which does not exist"),
        (recipe_values(arms={"a": {"checkpoint": "gone.pth"}}), "arms.a.checkpoint is .*gone.pth"),
        (recipe_values(arms={"a": {"pretrain": "gone.yaml"}}), "arms.a.pretrain.recipe is .*gone.yaml"),
        (recipe_values(arms={"a": {}}), "one of checkpoint, pretrain and same, this one has 0"),
        (recipe_values(arms={"a": {"checkpoint": "none", "same": "b"}}), "this one has 2"),
        (recipe_values(arms={"a": {"checkpoint": "none"}}), "no arm has a checkpoint"),
        (
            recipe_values(arms={"a": {"checkpoint": "none", "semisupervised": "mean-techer"}}),
            "Did you mean mean-teacher",
        ),
        (recipe_values(arms={"scratch": {"pretrain": "mae.yaml"}}), "name of a control"),
        (recipe_values(arms={"a/b": {"pretrain": "mae.yaml"}}), "'a/b' names folders"),
        (recipe_values(arms={"a": {"pretrain": "mae.yaml"}, "b": {"same": "aa"}}), "Did you mean a"),
        (recipe_values(plans_from="pretraned"), "Did you mean pretrained"),
        (recipe_values(controls=["strong"]), "controls must hold scratch"),
        (recipe_values(labels=[2, 30]), "datasets.forty: 30 labelled cases of a pool of 2"),
        (recipe_values(labels=[0]), "0 labelled cases"),
        (recipe_values(labels=["few"]), "shares such as 10%, or all, got 'few'"),
        (recipe_values(labels=[2, 2]), "labels: Value error, a value stands twice"),
        (recipe_values(labels=["all", "100%"]), "stands there already"),
        (recipe_values(seeds=[]), "seeds"),
        (recipe_values(rates=[0.0]), "above 0"),
        (with_dataset(selection=0), "3 rates need selection cases"),
        (with_dataset(validation=30, selection=20), "40 cases are too few for validation 30 and selection 20"),
        (with_dataset(validation=["case00"], selection=["case00"]), "case00 is in validation and in selection"),
        (with_dataset(validation=["case01"], selection=["case02"]), "are of one patient"),
        (with_dataset(validation=["case77"]), "case named 'case77'"),
        (with_dataset(validation=["case00"], pool=["case03"]), "name the selection cases too"),
        (with_dataset(metric="dise"), "Did you mean dice"),
        (with_dataset(patient="case.."), "needs a group"),
        (with_dataset(task="detection"), "datasets.forty.task"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    trainer = FakeTrainer()
    with pytest.raises(MedsslError, match=message):
        run(tmp_path, trainer, values=values)
    assert trainer.jobs == [] and not (tmp_path / "out").exists()


def test_paths_start_at_the_recipes_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe(tmp_path / "recipes", recipe_values())
    monkeypatch.chdir("/")
    recipe = read_recipe(path, ["rate_seeds=2"])
    pretrain = recipe.arms["pretrained"].pretrain
    assert pretrain is not None and pretrain.recipe == tmp_path.resolve() / "recipes" / "mae.yaml"
    assert recipe.rate_seeds == 2


def test_a_protocol_counts_its_runs(tmp_path: Path) -> None:
    recipe = read_recipe(write_recipe(tmp_path, recipe_values()))
    trainer = FakeTrainer()
    run(tmp_path, trainer)
    assert recipe.jobs() == len(trainer.jobs) == 2 * 4 * (3 + 2)


def test_without_a_recipe_there_must_be_something_to_go_on_with(tmp_path: Path) -> None:
    from medssl.protocol.run import protocol

    with pytest.raises(UsageError, match="--recipe"):
        protocol(None, tmp_path / "out", resume=True)


def test_a_folder_of_another_command_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not written by this command"):
        run(tmp_path, FakeTrainer(), overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").is_file()
