"""The report of a classification RUN: its scores, its three figures, and nothing of its patients."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from medssl.data.probabilities import Probabilities, write_probabilities
from medssl.evaluation.classification import evaluate_classification
from medssl.report.page import report
from tests.report.runs import SECRET, write_common
from tests.report.test_page import Outline

FIGURES = ("Confusion matrix", "Reliability", "ROC curves")
CLASSES = ("benign", "malignant", "cost $5 & $6")


def classification_run(run: Path, kind: str = "multiclass", measured: bool = True) -> Path:
    """A fine-tuned RUN of 24 validation cases, right in two of three."""
    rows = [{"step": step, "loss": 1 / step, "validation/auroc": 0.5 + step / 100} for step in (10, 20, 30)]
    write_common(run, "classification", "finetune", rows)
    facts = {"kind": "classification", "method": "finetune", "target_kind": kind, "arm": "pretrained", "steps": 30}
    (run / "run.json").write_text(json.dumps({**facts, "finished": True}))
    (run / "data.json").write_text(json.dumps({"classes": list(CLASSES), "counts": {"train": 60, "validation": 24}}))
    (run / "transfer.json").write_text(json.dumps({"checkpoint": None, "summary": "all weights start random"}))
    truth = np.arange(24) % 3
    values = np.full((24, 3), 0.15)
    values[np.arange(24), np.where(np.arange(24) < 16, truth, (truth + 1) % 3)] = 0.7
    names = tuple(f"Mueller_Hans_{number:02}" for number in range(24))
    table = Probabilities(names, CLASSES, values, names, tuple(CLASSES[number] for number in truth))
    write_probabilities(run / "validation" / "probabilities.csv", table)
    if measured:
        evaluate_classification(run, None, run / "validation", kind=kind)  # type: ignore[arg-type]
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classification_run(tmp_path_factory.mktemp("report") / "clf")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return report(run).read_text()


def test_the_page_is_about_classification_and_shows_what_was_measured(run: Path, page: str) -> None:
    auroc = json.loads((run / "validation" / "metrics.json").read_text())["metrics"]["auroc"]
    assert "<h1>Classification, fine-tuned</h1>" in page and "Segmentation" not in page
    shown = f"[{auroc['low']:.3f}, {auroc['high']:.3f}]"
    assert f"AUROC {auroc['value']:.3f} {shown} on 24 validation cases" in page
    assert f"{auroc['value']:.3f}<small>{shown}</small>" in page
    assert '<td class="name">malignant</td><td class="number">8</td>' in page


def test_confusion_reliability_and_roc_are_drawn_in_the_page(page: str) -> None:
    for title in FIGURES:
        drawn = page.partition(f"<h3>{title}</h3>")[2].partition("</figure>")[0]
        assert drawn.startswith("<svg") and "<path" in drawn
    assert "16 of 24 decisions are right" in page and "cost $5 &amp; $6" in page
    outline = Outline(page)
    assert len(outline.ids) == len(set(outline.ids))
    assert all(address.startswith(("#", "data:")) for address in outline.addresses)


def test_no_case_and_no_path_is_on_the_page(page: str, run: Path) -> None:
    assert "Mueller" not in page and str(run.parent) not in page and str(Path(SECRET).parent) not in page


def test_several_labels_have_a_row_each(tmp_path: Path) -> None:
    page = report(classification_run(tmp_path / "clf", "multilabel")).read_text()
    drawn = page.partition("<h3>Confusion matrix</h3>")[2].partition("</figure>")[0]
    assert "true positive" in drawn and "56 of 72 decisions are right" in page


@pytest.mark.parametrize("content", [None, "{", '{"metrics": {}}'])
def test_without_scores_the_page_says_how_to_make_them(tmp_path: Path, content: str | None) -> None:
    run = classification_run(tmp_path / "clf", measured=False)
    if content is not None:
        (run / "validation" / "metrics.json").write_text(content)
    page = report(run).read_text()
    assert "<h1>Classification, fine-tuned</h1>" in page and 'id="scores"' not in page
    assert f"validation/metrics.json is {'missing' if content is None else 'damaged'}: there are no scores" in page
    assert "medssl evaluate classification --predictions RUN --out RUN/validation --kind multiclass" in page


def test_a_classification_run_is_told_without_its_run_file(tmp_path: Path) -> None:
    run = classification_run(tmp_path / "clf")
    (run / "run.json").unlink()
    assert "<h1>Classification</h1>" in report(run).read_text()
