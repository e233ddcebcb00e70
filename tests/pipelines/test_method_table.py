"""README's tables of methods are made of the registries and of what was measured."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from medssl import registry, registry_semisupervised

BENCHMARKS = Path(__file__).parents[2] / "pipelines" / "benchmarks"


@pytest.fixture(scope="module")
def program() -> ModuleType:
    """Return the program."""
    sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module("method_table")


def cells(lines: list[str]) -> dict[str, list[str]]:
    """Return the cells of each row by its first one."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_every_registered_method_has_a_row(program: ModuleType) -> None:
    assert set(registry.METHODS) <= set(cells(program.lines()))
    found = cells(program.semisupervised_lines())
    assert {name: found[name][0].split(", ") for name in registry_semisupervised.SEMISUPERVISED} == {
        name: list(entry.tasks) for name, entry in registry_semisupervised.SEMISUPERVISED.items()
    }


def test_what_was_measured_stands_in_the_row_of_its_method(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "RESULTS", tmp_path)
    assert "time" not in cells(program.semisupervised_lines())["method"][-2]
    costs = [
        {"method": "cps", "task": task, "time / supervised": value, "memory / supervised": value + 1}
        for task, value in (("segmentation", 4.04), ("classification", 3.5))
    ]
    (tmp_path / "semisupervised_costs.json").write_text(json.dumps({"rows": costs}))
    facts = {"dataset": "atrium", "metric": "dice", "tested": "True", "low": 0.4, "high": 0.6}
    scores = [
        {**facts, "arm": arm, "labels": labels, "value": value}
        for arm, labels, value in (("cps", "16", 0.9), ("cps", "4", 0.5), ("scratch", "4", 0.45), ("strong", "4", 0.46))
    ]
    other = {**facts, "arm": "cps", "labels": "4", "value": 0.1, "metric": "hd95_mm", "tested": "False"}
    (tmp_path / "protocol_semisupervised_atrium.json").write_text(json.dumps({"rows": [*scores, other]}))
    found = cells(program.semisupervised_lines())
    assert found["method"] == [
        "for", "time x supervised", "memory x supervised", "atrium, 4 labels, dice", "source"
    ]  # fmt: skip
    assert found["cps"][1:4] == ["4.0 / 3.5", "5.0 / 4.5", "50.0 [40.0, 60.0]"]
    assert found["supervised"][3].startswith("45.0") and found["supervised`, strong augmentation"][3].startswith("46.0")
    assert found["bcp"][1:4] == ["", "", ""]


def test_a_table_takes_the_place_of_what_was_between_its_marks(program: ModuleType) -> None:
    text = "before\n<!-- a -->\nold\n<!-- b -->\nafter\n"
    assert program.put(text, "<!-- a -->", "<!-- b -->", ["new"]) == text.replace("old", "new")
    with pytest.raises(SystemExit, match="each of the two marks once"):
        program.put("before\n<!-- a -->\n", "<!-- a -->", "<!-- b -->", ["new"])
