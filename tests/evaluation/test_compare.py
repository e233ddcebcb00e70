"""Paired comparison of runs."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from medssl.errors import DataError, UsageError
from medssl.evaluation.bootstrap import estimate
from medssl.evaluation.compare import compare, holm, signed_rank
from tests.evaluation.test_segmentation import block, write


def slow_signed_rank(values: list[float]) -> float:
    """Exact two-sided p by flipping every sign: how often the smaller rank sum is as small as the one seen."""
    ranks = {value: rank for rank, value in enumerate(sorted(values, key=abs), 1)}
    total = sum(ranks.values())
    seen = sum(ranks[value] for value in values if value > 0)
    extreme = min(seen, total - seen)
    sums = [
        sum(rank for rank, keep in zip(ranks.values(), signs, strict=False) if keep)
        for signs in itertools.product((0, 1), repeat=len(values))
    ]
    return min(1.0, sum(min(each, total - each) <= extreme for each in sums) / len(sums))


def make_run(folder: Path, shifts: dict[str, int]) -> Path:
    """A run whose validation masks are shifted by so many voxels, with its references beside it."""
    for case, shift in shifts.items():
        write(folder / "validation" / f"{case}.nii.gz", block(2 + shift))
        write(folder.parent / "labelsTr" / f"{case}.nii.gz", block(2))
    cases = {case: {"label": f"labelsTr/{case}.nii.gz", "images": []} for case in shifts}
    listed = {"folder": str(folder.parent), "cases": cases}
    (folder / "validation" / "references.json").write_text(json.dumps(listed))
    (folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "organ": 1}}))
    return folder


def test_signed_rank_equals_its_definition() -> None:
    values = [0.31, -0.02, 0.11, 0.27, 0.05, -0.08, 0.19]
    assert signed_rank(values) == pytest.approx(slow_signed_rank(values))
    assert signed_rank([0.0, 0.0, 0.0]) == 1.0 and signed_rank([0.3]) is None


def test_holm_multiplies_step_by_step_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0]) and holm([]) == []


def test_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        found = estimate(list(rng.normal(0.3, 1.0, 40)), seed=trial, resamples=500)
        hits += found.low <= 0.3 <= found.high  # type: ignore[operator]
    assert 0.89 <= hits / 200 <= 0.99


def test_differences_are_paired_by_case_and_signed(tmp_path: Path) -> None:
    names = [f"case{number}" for number in range(8)]
    baseline = make_run(tmp_path / "scratch", dict.fromkeys(names, 2))
    better = make_run(tmp_path / "pretrained", dict.fromkeys(names, 1))
    found = compare([baseline, better])
    dice = next(row for row in found.differences if row.metric == "dice")
    assert (dice.run, dice.baseline, dice.better, dice.worse) == ("pretrained", "scratch", 8, 0)
    assert dice.estimate.mean == pytest.approx(0.75 - 0.5) and dice.estimate.low == pytest.approx(0.25)
    distance = next(row for row in found.differences if row.metric == "hd95_mm")
    assert distance.estimate.mean == pytest.approx(-1.0) and distance.better == 8
    assert dice.p == pytest.approx(2 / 2**8) and dice.p_holm == pytest.approx(2 * 2 / 2**8)
    json.dumps(found.to_json(), allow_nan=False)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(found)
    assert "pretrained" in console.export_text()


def test_runs_on_different_cases_are_refused_unless_told(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", {"a": 1, "b": 1, "c": 0})
    second = make_run(tmp_path / "second", {"a": 1, "b": 2, "d": 0})
    with pytest.raises(DataError, match=r"different cases \(2 are in only one.*example c.*--common-cases"):
        compare([first, second])
    found = compare([first, second], common_cases=True)
    assert found.cases == ("a", "b") and found.left_out == ("c", "d")


def test_a_missed_case_counts_in_dice_and_is_named_unpaired_in_distance(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", {"a": 1, "b": 1})
    second = make_run(tmp_path / "second", {"a": 1, "b": 1})
    write(second / "validation" / "b.nii.gz", block() * 0)
    found = {row.metric: row for row in compare([first, second]).differences}
    assert found["dice"].estimate.mean == pytest.approx(-0.75 / 2) and found["dice"].unpaired == 0
    assert found["hd95_mm"].unpaired == 1


def test_a_validation_case_that_was_never_predicted_counts_as_missed(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", {"a": 1, "b": 1})
    second = make_run(tmp_path / "second", {"a": 1, "b": 1})
    (second / "validation" / "b.nii.gz").unlink()
    dice = compare([first, second]).differences[0]
    assert dice.estimate.cases == 2 and dice.estimate.mean == pytest.approx(-0.75 / 2)


def test_every_pair_can_be_compared(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, {"a": shift, "b": 1}) for name, shift in (("x", 0), ("y", 1), ("z", 2))]
    pairs = {(row.baseline, row.run) for row in compare(runs, all_pairs=True).differences}
    assert pairs == {("x", "y"), ("x", "z"), ("y", "z")}
    assert {(row.baseline, row.run) for row in compare(runs).differences} == {("x", "y"), ("x", "z")}


def test_an_evaluation_folder_is_a_run(tmp_path: Path) -> None:
    from medssl.evaluation.segmentation import evaluate_segmentation

    run = make_run(tmp_path / "run", {"a": 1, "b": 2})
    evaluate_segmentation(run / "validation", tmp_path / "labelsTr", tmp_path / "scores", quiet=True)
    found = compare([run, tmp_path / "scores"])
    assert all(row.estimate.mean == 0 and row.p == 1.0 for row in found.differences)


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"a": 1})
    with pytest.raises(UsageError, match="at least two"):
        compare([run])
    with pytest.raises(UsageError, match="same run twice"):
        compare([run, run])
    with pytest.raises(UsageError, match=r"no metric named 'dize'.*dice"):
        compare([run, tmp_path], metrics=["dize"])
    (run / "validation" / "references.json").unlink()
    with pytest.raises(UsageError, match="medssl evaluate segmentation --predictions"):
        compare([make_run(tmp_path / "other", {"a": 1}), run])


def test_scores_older_than_a_mask_are_not_trusted(tmp_path: Path) -> None:
    import os

    from medssl.evaluation.segmentation import evaluate_segmentation

    first, second = (make_run(tmp_path / name, {"a": 1, "b": 1}) for name in ("first", "second"))
    evaluate_segmentation(second, tmp_path / "labelsTr", second / "validation", quiet=True)
    mask = write(second / "validation" / "a.nii.gz", block(2))
    stamp = (second / "validation" / "metrics.json").stat().st_mtime + 5
    os.utime(mask, (stamp, stamp))
    assert compare([first, second]).differences[0].estimate.mean == pytest.approx(0.125)


@pytest.mark.parametrize("place", ["run", "validation"])
def test_a_classification_run_is_named_and_sent_to_the_protocol(tmp_path: Path, place: str) -> None:
    clf = tmp_path / "clf"
    (clf / "validation").mkdir(parents=True)
    (clf / "run.json").write_text(json.dumps({"kind": "classification"}))
    (clf / "validation" / "metrics.json").write_text(json.dumps({"kind": "classification evaluation", "cases": 3}))
    given = clf if place == "run" else clf / "validation"
    with pytest.raises(UsageError, match=f"^{given.name} is a classification RUN; .*`medssl protocol`"):
        compare([make_run(tmp_path / "other", {"a": 1}), given])


def test_a_pretraining_run_is_named_and_has_to_be_fine_tuned_first(tmp_path: Path) -> None:
    run = tmp_path / "pretrained"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"kind": "pretraining"}))
    with pytest.raises(UsageError, match=r"^pretrained is a pretraining RUN: fine-tune it first"):
        compare([run, make_run(tmp_path / "other", {"a": 1})])
