"""Tables of probabilities measured against true labels, with intervals."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pytest import approx

from medssl.data.probabilities import Probabilities, read_probabilities, write_probabilities
from medssl.errors import DataError, UsageError
from medssl.evaluation.bootstrap import resampled_counts
from medssl.evaluation.classification import evaluate_classification, measure_classification, metric_differences
from medssl.training.scores import classification_metrics

CLASSES = ("normal", "pneumonia")


def table(n: int = 40, seed: int = 0, skill: float = 1.0) -> Probabilities:
    rng = np.random.default_rng(seed)
    truth = np.arange(n) % 4 == 0
    p = 1 / (1 + np.exp(-(skill * (2.0 * truth - 1) + rng.normal(size=n))))
    targets = tuple(CLASSES[int(each)] for each in truth)
    return Probabilities(tuple(f"case_{i:03d}" for i in range(n)), CLASSES, np.stack([1 - p, p], axis=1), (), targets)


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    made = replace(table(), patient_keys=tuple(f"key{i}" for i in range(40)))
    write_probabilities(tmp_path / "p.csv", made)
    back = read_probabilities(tmp_path / "p.csv")
    np.testing.assert_allclose(back.values, made.values, atol=1e-8)
    assert (back.cases, back.classes, back.patient_keys, back.targets) == (
        made.cases, made.classes, made.patient_keys, made.targets,
    )  # fmt: skip


def test_values_are_those_of_the_metrics_and_lie_within_their_intervals(tmp_path: Path) -> None:
    made = table()
    write_probabilities(tmp_path / "p.csv", made)
    result = evaluate_classification(tmp_path / "p.csv", out=tmp_path / "out")
    truth = np.array([CLASSES.index(name) for name in made.targets])
    for name, value in classification_metrics(made.values, truth, "multiclass", CLASSES).items():
        assert result.metrics[name].value == approx(value)
        assert result.metrics[name].low <= value <= result.metrics[name].high
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["metrics"]["auroc"]["value"] == approx(result.metrics["auroc"].value)
    assert written["classes"] == {"normal": 30, "pneumonia": 10}
    assert sum(map(sum, written["confusion"])) == 40
    assert written["roc"]["pneumonia"]["true_positive_rate"][-1] == 1.0
    assert sum(each["cases"] for each in written["reliability"]) == 40


@pytest.mark.slow
def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    accuracies = [measure_classification(table(60, seed, 0.5), "multiclass").metrics["accuracy"] for seed in range(40)]
    truth = np.mean([measure_classification(table(4000, 99, 0.5), "multiclass").metrics["accuracy"].value])
    assert sum(each.low <= truth <= each.high for each in accuracies) >= 34


def test_the_same_seed_gives_the_same_interval() -> None:
    first, second = (measure_classification(table(), "multiclass", seed=seed).metrics["auroc"] for seed in (1, 1))
    assert first == second
    assert first.low != measure_classification(table(), "multiclass", seed=2).metrics["auroc"].low


def test_images_of_one_patient_are_drawn_together() -> None:
    counts = np.concatenate(list(resampled_counts(6, groups=["a", "a", "a", "b", "b", "c"], resamples=50)))
    assert (counts[:, 0] == counts[:, 1]).all() and (counts[:, 3] == counts[:, 4]).all()
    copies = table(20)
    doubled = Probabilities(
        tuple(f"{case}_{side}" for case in copies.cases for side in "lr"),
        CLASSES,
        np.repeat(copies.values, 2, axis=0),
        tuple(case for case in copies.cases for _ in range(2)),
        tuple(target for target in copies.targets for _ in range(2)),
    )
    blind = measure_classification(replace(doubled, patient_keys=()), "multiclass").metrics["accuracy"]
    aware = measure_classification(doubled, "multiclass").metrics["accuracy"]
    assert aware.high - aware.low > 1.25 * (blind.high - blind.low)


def test_every_resample_has_as_many_cases_of_each_class() -> None:
    counts = np.concatenate(list(resampled_counts(9, strata=[0] * 6 + [1] * 3, resamples=200)))
    assert counts.shape == (200, 9)
    assert (counts[:, :6].sum(axis=1) == 6).all() and (counts[:, 6:].sum(axis=1) == 3).all()


def test_one_case_of_each_class_has_no_interval() -> None:
    made = Probabilities(("a", "b"), CLASSES, np.array([[0.9, 0.1], [0.2, 0.8]]), (), CLASSES)
    found = measure_classification(made, "multiclass").metrics["accuracy"]
    assert found.value == 1.0 and math.isnan(found.low)


def test_cases_of_one_class_give_null_and_never_zero(tmp_path: Path) -> None:
    made = replace(table(8), targets=("normal",) * 8)
    write_probabilities(tmp_path / "p.csv", made)
    content = evaluate_classification(tmp_path / "p.csv", out=tmp_path).to_json()
    assert content["metrics"]["auroc"] == {"value": None, "low": None, "high": None}
    assert content["metrics"]["accuracy"]["value"] is not None


def test_several_labels_are_told_by_bars(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("case,p_a,p_b\none,0.9,0.8\ntwo,0.2,0.7\nthree,0.1,0.1\n")
    (tmp_path / "t.csv").write_text("case,label\none,a|b\ntwo,b\nthree,\n")
    result = evaluate_classification(tmp_path / "p.csv", tmp_path / "t.csv")
    assert result.kind == "multilabel" and result.counts == {"a": 1, "b": 2}
    assert result.metrics["auroc"].value == 1.0


def test_references_are_found_by_file_name_and_split(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("case,p_normal,p_pneumonia\nx1,0.9,0.1\nx2,0.2,0.8\n")
    (tmp_path / "t.csv").write_text(
        "path,label,patient,split\na/x1.nii.gz,normal,k1,test\nb/x2.png,1,k2,test\nx3.png,0,k3,train\n"
    )
    result = evaluate_classification(tmp_path / "p.csv", tmp_path / "t.csv", split="test")
    assert result.counts == {"normal": 1, "pneumonia": 1} or result.metrics["accuracy"].value == 1.0
    assert result.patients == 2
    with pytest.raises(DataError, match="no row of the split 'val'; it has test, train"):
        evaluate_classification(tmp_path / "p.csv", tmp_path / "t.csv", split="val")
    with pytest.raises(DataError, match=r"'x3'.*every case counts"):
        evaluate_classification(tmp_path / "p.csv", tmp_path / "t.csv")
    assert len(evaluate_classification(tmp_path / "p.csv", tmp_path / "t.csv", common_cases=True).cases) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("case,p_a,p_b\none,0.5,x\n", "line 2: p_b is 'x'"),
        ("case,p_a,p_b\none,0.5,0.5\none,0.1,0.9\n", "'one' stands in lines 2 and 3"),
        ("case,p_a,p_b\none,nan,0.5\n", "line 2: a probability is not finite"),
        ("case,p_a,p_b\none,0.5\n", "line 2 has 2 cells"),
        ("name,p_a\none,0.5\n", "need 'case'"),
        ("case,p_a\n", "holds no rows"),
    ],
)
def test_a_table_that_cannot_be_read_names_the_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        evaluate_classification(tmp_path / "p.csv", tmp_path / "p.csv")


def test_a_label_that_is_no_class_names_the_case(tmp_path: Path) -> None:
    write_probabilities(tmp_path / "p.csv", replace(table(4), targets=("normal", "normal", "covid", "normal")))
    with pytest.raises(DataError, match=r"case_002: its label is 'covid'; the predictions know normal, pneumonia"):
        evaluate_classification(tmp_path / "p.csv")


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        evaluate_classification(tmp_path / "none.csv")
    write_probabilities(tmp_path / "p.csv", replace(table(4), targets=()))
    with pytest.raises(UsageError, match="--references"):
        evaluate_classification(tmp_path / "p.csv")
    with pytest.raises(UsageError, match="no kind of target 'nominal'"):
        evaluate_classification(tmp_path / "p.csv", kind="nominal")


def test_differences_are_paired_and_a_better_run_is_told_from_itself() -> None:
    weak, strong = table(200, 0, 0.3), table(200, 0, 1.5)
    found = metric_differences(strong, weak, "multiclass")
    assert found["auroc"].low > 0 and found["auroc"].p < 0.01
    assert found["brier"].high < 0
    itself = metric_differences(weak, weak, "multiclass")["auroc"]
    assert (itself.value, itself.low, itself.high, itself.p) == (0, 0, 0, 1.0)


def test_the_order_of_the_rows_does_not_pair_the_wrong_cases() -> None:
    weak, strong = table(60, 0, 0.3), table(60, 0, 1.5)
    order = np.random.default_rng(0).permutation(60)
    turned = Probabilities(
        tuple(strong.cases[i] for i in order),
        CLASSES,
        strong.values[order],
        (),
        tuple(strong.targets[i] for i in order),
    )
    assert metric_differences(turned, weak, "multiclass") == metric_differences(strong, weak, "multiclass")
    with pytest.raises(DataError, match="different cases"):
        metric_differences(table(59), weak, "multiclass")
