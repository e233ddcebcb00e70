"""Recipes and overrides."""

from __future__ import annotations

from pathlib import Path

import pytest

from medssl.config import Settings, apply_overrides, check_settings, read_yaml, to_yaml
from medssl.errors import UsageError


class Mask(Settings):
    block: int = 8
    ratio: float = 0.6


class Recipe(Settings):
    steps: int = 10
    mask: Mask = Mask()


def test_an_override_reaches_into_nested_settings_and_leaves_the_recipe_alone() -> None:
    values = {"mask": {"block": 8}}
    assert apply_overrides(values, ["mask.ratio=0.75", "steps=20"]) == {
        "mask": {"block": 8, "ratio": 0.75},
        "steps": 20,
    }
    assert values == {"mask": {"block": 8}}


@pytest.mark.parametrize("override", ["steps", "=3", "steps.more=1", "steps=[1"])
def test_unusable_overrides_are_refused(override: str) -> None:
    with pytest.raises(UsageError, match="--set"):
        apply_overrides({"steps": 1}, [override])


def test_an_unknown_setting_lists_near_names() -> None:
    with pytest.raises(UsageError, match=r"Did you mean mask\.ratio\b"):
        check_settings(Recipe, {"mask": {"ration": 0.5}}, "recipe.yaml")


def test_a_value_that_does_not_fit_is_named_with_its_place() -> None:
    with pytest.raises(UsageError, match=r"recipe\.yaml: steps: .*'many'"):
        check_settings(Recipe, {"steps": "many"}, "recipe.yaml")


def test_a_recipe_survives_its_file(tmp_path: Path) -> None:
    recipe = Recipe(steps=3, mask=Mask(block=4))
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    assert check_settings(Recipe, read_yaml(tmp_path / "recipe.yaml"), "here") == recipe


@pytest.mark.parametrize("content", ["- a", "a: [", "\x80"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UsageError, match=r"recipe\.yaml"):
        read_yaml(path)
