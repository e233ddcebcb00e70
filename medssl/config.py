"""Recipes: YAML, overridden by `--set a.b=c`, checked by a pydantic model that lists near names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from medssl.errors import UsageError, unknown_name

SettingsT = TypeVar("SettingsT", bound="Settings")


class Settings(BaseModel):
    """Base of all settings: immutable, and an unknown name is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        UsageError: If the file is missing, is not YAML, or holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(
            f"Recipe {path} cannot be read: {error.strerror}. Check the path given to --recipe."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"Recipe {path} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"Recipe {path} must hold `name: value` lines, not a {type(content).__name__}.")
    return content


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return `values` with each `a.b=c` of `--set` applied; the right side is read as YAML.

    Raises:
        UsageError: If an override has no `=` or passes through something that is not a mapping.
    """
    result = _deep_copy(values)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path.strip():
            raise UsageError(f"--set takes name=value, got '{override}'.")
        *parents, leaf = path.strip().split(".")
        target = result
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise UsageError(f"--set {override}: '{parent}' is a value, it has nothing below it.")
        try:
            target[leaf] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {override}: the value is not YAML: {error}") from error
    return result


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with `changes` on top, mapping by mapping; neither is modified."""
    result = dict(values)
    for name, change in changes.items():
        before = result.get(name)
        if isinstance(before, Mapping) and isinstance(change, Mapping):
            result[name] = merged(before, change)
        else:
            result[name] = change
    return result


def check_settings(model: type[SettingsT], values: Mapping[str, Any], where: str) -> SettingsT:
    """Build `model` from `values`, turning pydantic's errors into one line each.

    Args:
        model: The settings class.
        values: What the user gave.
        where: The place to name in the message, for example the recipe's path.

    Raises:
        UsageError: If a name is unknown (near names are listed) or a value does not fit.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            location = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                raise UsageError(
                    f"{where}: {unknown_name('setting', location, _names(model, problem['loc'][:-1]))}"
                ) from error
            lines.append(f"{location}: {problem['msg']}, got {problem.get('input')!r}")
        raise UsageError(f"{where}: " + "; ".join(lines)) from error


def to_yaml(settings: BaseModel | Mapping[str, Any]) -> str:
    """Return settings as YAML in their own order."""
    values = settings.model_dump(mode="json") if isinstance(settings, BaseModel) else dict(settings)
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None)


def _names(model: type[BaseModel], path: Sequence[Any]) -> list[str]:
    prefix = ""
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            break
        model, prefix = field.annotation, f"{prefix}{part}."
    return [prefix + name for name in model.model_fields]


def _deep_copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _deep_copy(value) if isinstance(value, Mapping) else value for name, value in values.items()}


def part_of(settings: Settings, model: type[SettingsT]) -> SettingsT:
    """Return the settings of one model from those that stand on one level with them, for example a method's own."""
    return model(**{name: getattr(settings, name) for name in model.model_fields})
