"""Each recipe in pipelines/ says how to run it, parses, and fits its network."""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path

import pytest

from medssl.config import check_settings, read_yaml
from medssl.pretraining.recipe import recipe_model

FOLDER = Path(__file__).resolve().parents[2] / "pipelines"
PROTOCOLS = sorted(FOLDER.glob("protocol_*.yaml"))
SEMISUPERVISED = sorted(FOLDER.glob("semixup_*.yaml"))
RECIPES = sorted({*FOLDER.glob("*.yaml")} - {*PROTOCOLS, *SEMISUPERVISED})


def commands(path):
    """The `medssl` commands of a recipe's header, continuation lines joined."""
    header = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        header.append(line.removeprefix("#").strip())
    text = "\n".join(header).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith("medssl ")]


def test_there_is_a_recipe_for_each_real_set():
    names = {path.stem for path in RECIPES}
    assert {"hippocampus_mae", "left_atrium_mae", "brain_mr_mae", "breast_ultrasound_mae", "ct_mae"} <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_its_patch_fits_its_network(path):
    values = read_yaml(path)
    recipe = check_settings(recipe_model(values["method"]), values, str(path))
    recipe.architecture.check_patch(recipe.patch_size)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_the_commands_that_run_it(path):
    verbs = commands(path)
    pretrain = next(words for words in verbs if words[1] == "pretrain")
    assert f"pipelines/{path.name}" in pretrain
    made = {words[words.index("--out") + 1] for words in verbs}
    assert pretrain[pretrain.index("--store") + 1] in made, "the store is made by a command above"


@pytest.mark.parametrize("path", [*RECIPES, *SEMISUPERVISED, *PROTOCOLS], ids=lambda path: path.stem)
def test_every_command_of_a_header_is_one_the_tool_knows(path):
    from typer.main import get_command

    from medssl.cli import app

    for words in commands(path):
        command, rest = get_command(app), words[1:]
        while hasattr(command, "commands"):
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_context(words[1], rest)


def test_the_semixup_recipe_is_of_settings_that_classification_and_the_method_know():
    from medssl.semisupervised.classification import OwnSettings
    from medssl.semisupervised.semixup import SemixupSettings
    from medssl.transfer.classification import finetune_classification
    from medssl.transfer.classification_settings import ClassificationSettings

    (path,) = SEMISUPERVISED
    values = read_yaml(path)
    assert values.pop("method") == "semixup"
    for model in (SemixupSettings, OwnSettings, ClassificationSettings):
        known = {name: values.pop(name) for name in list(values) if name in model.model_fields}
        assert known
        check_settings(model, known, str(path))
    assert set(values) <= set(inspect.signature(finetune_classification).parameters)
    (words,) = commands(path)
    assert words[1] == "semisupervise" and f"pipelines/{path.name}" in words


@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda path: path.stem)
def test_a_protocol_names_what_is_there_and_trains_as_its_task_can(path):
    from medssl.protocol.classification import ClassificationTraining
    from medssl.protocol.recipe import read_recipe
    from medssl.protocol.segmentation import SegmentationTraining

    data = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    if not data.is_dir():
        pytest.skip(f"the data sets are not at {data}")
    recipe = read_recipe(path)
    for name, dataset in recipe.datasets.items():
        model = SegmentationTraining if dataset.task == "segmentation" else ClassificationTraining
        check_settings(model, recipe.training_of(name), name)
    (words,) = commands(path)
    assert f"pipelines/{path.name}" in words


@pytest.mark.parametrize("path", [*RECIPES, *SEMISUPERVISED], ids=lambda path: path.stem)
def test_numbers_come_with_their_reason(path):
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    for name in ("patch_size", "batch_size", "steps", "network"):
        (line,) = [line for line in lines if line.startswith(f"{name}:")]
        assert "#" in line, f"{path.name}: {name} has no reason beside it"
