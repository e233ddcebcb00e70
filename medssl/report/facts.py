"""What a RUN says about itself, read file by file; what is missing is said instead of guessed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from medssl.errors import UsageError
from medssl.training.metrics import read_metrics

_PATH = re.compile(r"(?<![\w.:/<])(?:~|\.{1,2}|[A-Za-z]:)?(?:[\\/][^\s\\/:'\",;<>|]+){2,}[\\/]?")


@dataclass
class RunFacts:
    """A RUN's own files.

    Args:
        folder: The RUN.
        kind: `pretraining`, `segmentation` or `classification`.
        run: `run.json`.
        recipe: `recipe.yaml` with paths cut to their last part.
        data: `data.json`.
        environment: `environment.json`.
        transfer: `transfer.json`.
        metrics: Rows of `metrics.jsonl`.
        missing: What is not there, and why it may be so.
    """

    folder: Path
    kind: str
    run: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    recipe_values: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    transfer: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name


def read_facts(folder: Path) -> RunFacts:
    """Read a RUN.

    Raises:
        UsageError: If the folder is no RUN.
    """
    run = _json(folder / "run.json")
    kind = str((run or {}).get("kind") or _guess_kind(folder))
    facts = RunFacts(folder, kind, _dictionary(public(run)))
    if run is None:
        facts.missing.append("run.json: the kind of run was told from its other files.")
    for name, why in (
        ("data", "what the run learned from is not known"),
        ("environment", "versions and hardware are not known"),
        *((("transfer", "what became of each pretrained weight is not known"),) if kind != "pretraining" else ()),
    ):
        content = _json(folder / f"{name}.json")
        if content is None:
            facts.missing.append(f"{name}.json is missing or damaged: {why}.")
        setattr(facts, name, _dictionary(public(content)))
    _read_recipe(folder, facts)
    facts.metrics = read_metrics(folder)
    if not facts.metrics:
        facts.missing.append("metrics.jsonl is missing or empty: there are no curves.")
    return facts


def public(value: Any) -> Any:
    """Return plain data with every path cut to its last part, so that a page tells nothing about the machine."""
    if isinstance(value, dict):
        return {str(name): public(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    if isinstance(value, str):
        return public_text(value)
    return value


def public_text(text: str) -> str:
    """Return text in which each path is `…/` and its last part."""
    return _PATH.sub(lambda found: "…/" + re.split(r"[\\/]", found.group(0).rstrip("\\/"))[-1], text)


def _read_recipe(folder: Path, facts: RunFacts) -> None:
    path = folder / "recipe.yaml"
    try:
        text = path.read_text()
        content = yaml.safe_load(text)
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        facts.missing.append("recipe.yaml is missing or damaged: the settings are not known.")
        return
    facts.recipe = public_text(text).strip()
    facts.recipe_values = _dictionary(public(content))


def _guess_kind(folder: Path) -> str:
    if (folder / "plans.json").is_file():
        return "segmentation"
    if (folder / "validation" / "probabilities.csv").is_file():
        return "classification"
    if any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints", "recipe.yaml")):
        return "pretraining"
    raise UsageError(f"{folder} is no RUN: it has neither run.json, metrics.jsonl nor plans.json.")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _dictionary(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
