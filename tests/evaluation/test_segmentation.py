"""Evaluation of folders of masks: every failure is counted, nothing is measured on the wrong grid."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medssl.errors import DataError, UsageError
from medssl.evaluation.segmentation import evaluate_segmentation

AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])


def write(path: Path, labels: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(labels, affine), path)
    return path


def block(low: int = 2, value: int = 1) -> np.ndarray:
    labels = np.zeros((12, 10, 8), np.uint8)
    labels[low : low + 4, 3:7, 2:6] = value
    return labels


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Four cases: perfect, shifted, missed, and one that holds label 1 only in the prediction."""
    predictions, references = tmp_path / "predictions", tmp_path / "labelsTr"
    write(references / "a.nii.gz", block())
    write(predictions / "a.nii.gz", block())
    write(references / "b.nii.gz", block())
    write(predictions / "b.nii.gz", block(4))
    write(references / "c.nii.gz", block())
    write(predictions / "c.nii.gz", block() * 0)
    write(references / "d.nii.gz", block(2, 2))
    write(predictions / "d.nii.gz", np.maximum(block(2, 2), block(7)))
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "organ": 1, "lesion": 2}}))
    return predictions, references


def test_means_leave_out_what_is_undefined_and_count_it(folders: tuple[Path, Path], tmp_path: Path) -> None:
    result = evaluate_segmentation(*folders, tmp_path / "out", quiet=True)
    assert result.counts("organ") == {"both": 2, "missed": 1, "spurious": 1, "absent": 0}
    assert result.counts("lesion") == {"both": 1, "missed": 0, "spurious": 0, "absent": 3}
    organ = result.per_label("organ", "dice")
    assert organ.cases == 4 and organ.mean == pytest.approx((1 + 0.5 + 0 + 0) / 4)
    assert result.per_label("organ", "hd95_mm").cases == 2
    assert result.per_label("lesion", "dice").mean == 1.0


def test_files_hold_the_same_numbers_and_null_where_nothing_was_measured(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    result = evaluate_segmentation(*folders, tmp_path / "out", quiet=True)
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    rows = list(csv.DictReader((tmp_path / "out" / "cases.csv").open()))
    assert content == json.loads(json.dumps(result.to_json()))
    assert len(content["cases"]) == len(rows) == 8
    missed = next(row for row in content["cases"] if row["outcome"] == "missed")
    assert missed["dice"] == 0 and missed["hd95_mm"] is None and missed["assd_mm"] is None
    assert next(row for row in rows if row["outcome"] == "missed")["hd95_mm"] == ""


def test_a_case_without_prediction_counts_as_missed(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    (predictions / "a.nii.gz").unlink()
    result = evaluate_segmentation(predictions, references, quiet=True)
    assert result.missing == ("a",)
    assert result.per_label("organ", "dice").mean == pytest.approx(0.5 / 4)
    assert [row.scores.outcome for row in result.rows if row.case == "a"] == ["missed", "absent"]


def test_a_prediction_without_reference_is_named_and_not_measured(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    write(predictions / "z.nii.gz", block())
    result = evaluate_segmentation(predictions, references, quiet=True)
    assert result.extra == ("z",) and "z" not in result.cases


def test_distances_use_the_voxel_size_of_the_reference(folders: tuple[Path, Path]) -> None:
    result = evaluate_segmentation(*folders, quiet=True)
    shifted = next(row for row in result.rows if row.case == "b" and row.label == "organ")
    assert shifted.scores.hd95_mm == pytest.approx(2.0)  # two voxels of 1 mm along x
    assert shifted.scores.reference_ml == pytest.approx(4 * 4 * 4 * 6 / 1000)


def test_masks_stored_in_other_axes_are_refused_with_both_grids_named(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    moved = AFFINE.copy()
    moved[0, 3] = 5.0
    write(predictions / "b.nii.gz", block(), moved)
    with pytest.raises(DataError, match=r"b: prediction and reference lie 5 mm apart.*resample"):
        evaluate_segmentation(predictions, references, quiet=True)
    write(predictions / "b.nii.gz", np.zeros((12, 10, 9), np.uint8))
    with pytest.raises(DataError, match=r"b: the prediction has \(12, 10, 9\) voxels.*\(12, 10, 8\)"):
        evaluate_segmentation(predictions, references, quiet=True)


def test_rounding_of_an_affine_is_no_mismatch(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    write(predictions / "a.nii.gz", block(), AFFINE + np.eye(4) * [1e-6, 1e-6, 1e-6, 0])
    assert evaluate_segmentation(predictions, references, quiet=True).per_label("lesion", "dice").cases == 1


def test_values_that_no_label_has_are_named(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    write(references / "a.nii.gz", block(2, 255))
    with pytest.raises(DataError, match=r"a: the reference has values \[0, 255\]; known are \[0, 1, 2\]"):
        evaluate_segmentation(predictions, references, quiet=True)


def test_probabilities_are_no_mask(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    write(predictions / "a.nii.gz", block().astype(np.float32) * 0.7)
    with pytest.raises(DataError, match=r"whole numbers.*0\.7.*threshold"):
        evaluate_segmentation(predictions, references, quiet=True)


def test_a_damaged_mask_is_named(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    whole = (predictions / "a.nii.gz").read_bytes()
    (predictions / "a.nii.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.nii\.gz cannot be read as a mask"):
        evaluate_segmentation(predictions, references, quiet=True)


def test_regions_join_the_values_of_their_labels(folders: tuple[Path, Path]) -> None:
    result = evaluate_segmentation(*folders, labels={"whole": [1, 2], "lesion": 2}, quiet=True)
    assert result.counts("whole") == {"both": 3, "missed": 1, "spurious": 0, "absent": 0}


def test_voxels_of_the_ignore_label_count_for_nobody(tmp_path: Path) -> None:
    truth = block()
    truth[7:11] = 3
    write(tmp_path / "labelsTr" / "a.nii.gz", truth)
    write(tmp_path / "predictions" / "a.nii.gz", np.maximum(block(), block(7)))
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "organ": 1, "ignore": 3}}))
    result = evaluate_segmentation(tmp_path / "predictions", tmp_path / "labelsTr", quiet=True)
    assert result.per_label("organ", "dice").mean == 1.0


def test_without_dataset_json_the_labels_are_those_of_the_references(folders: tuple[Path, Path]) -> None:
    (folders[0].parent / "dataset.json").unlink()
    assert list(evaluate_segmentation(*folders, quiet=True).labels) == ["label 1", "label 2"]


def test_two_single_files_of_different_names_are_one_case(tmp_path: Path) -> None:
    truth, made = write(tmp_path / "truth.nii.gz", block()), write(tmp_path / "made.nii.gz", block(4))
    result = evaluate_segmentation(made, truth, quiet=True)
    assert result.per_label("label 1", "dice").mean == pytest.approx(0.5)


def test_intervals_are_the_same_on_every_run_and_hold_the_mean(folders: tuple[Path, Path]) -> None:
    first, second = (evaluate_segmentation(*folders, quiet=True).per_label("organ", "dice") for _ in range(2))
    assert first == second and first.low is not None and first.high is not None
    assert first.low <= first.mean <= first.high  # type: ignore[operator]
    assert first.low == 0.0 and first.high == pytest.approx(0.75, abs=0.13)


def test_overall_is_the_mean_over_cases_of_the_labels_they_hold(folders: tuple[Path, Path]) -> None:
    per_case = evaluate_segmentation(*folders, quiet=True).per_case("dice")
    assert per_case == pytest.approx({"a": 1.0, "b": 0.5, "c": 0.0, "d": 0.5})
    assert not any(math.isnan(value) for value in per_case.values())


def test_folders_that_share_no_case_are_an_error(folders: tuple[Path, Path], tmp_path: Path) -> None:
    write(tmp_path / "other" / "q.nii.gz", block())
    with pytest.raises(DataError, match=r"No prediction in .* has the name of a reference"):
        evaluate_segmentation(tmp_path / "other", folders[1], quiet=True)
    with pytest.raises(UsageError, match="does not exist"):
        evaluate_segmentation(tmp_path / "nothing", folders[1], quiet=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no mask"):
        evaluate_segmentation(folders[0], tmp_path / "empty", quiet=True)


def test_a_run_is_measured_on_its_validation_cases_against_its_raw_data_set(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    predictions, references = folders
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text('{"kind": "segmentation"}')
    predictions.rename(run / "validation")
    (run / "validation" / "references.json").write_text(json.dumps({"folder": "gone", "cases": {"a": {}, "b": {}}}))
    (run / "validation" / "b.nii.gz").unlink()
    for where in (run, run / "validation"):
        result = evaluate_segmentation(where, references.parent, quiet=True)
        assert result.cases == ("a", "b") and result.missing == ("b",)


def test_masks_in_other_formats_and_named_as_labels_are_read(tmp_path: Path) -> None:
    import SimpleITK

    write(tmp_path / "truth" / "a.nii.gz", block())
    image = SimpleITK.ReadImage(str(tmp_path / "truth" / "a.nii.gz"))
    (tmp_path / "labels").mkdir()
    SimpleITK.WriteImage(image, str(tmp_path / "labels" / "a.nrrd"))
    assert (
        evaluate_segmentation(tmp_path / "labels", tmp_path / "truth", quiet=True).per_label("label 1", "dice").mean
        == 1
    )


def test_pictures_are_measured_in_pixels(tmp_path: Path) -> None:
    from PIL import Image

    for folder, low in (("truth", 2), ("made", 4)):
        (tmp_path / folder).mkdir()
        Image.fromarray(block(low)[:, :, 3]).save(tmp_path / folder / "a.png")
    result = evaluate_segmentation(tmp_path / "made", tmp_path / "truth", quiet=True)
    assert result.per_label("label 1", "dice").mean == pytest.approx(0.5)
    assert result.per_label("label 1", "hd95_mm").mean == pytest.approx(2.0)
