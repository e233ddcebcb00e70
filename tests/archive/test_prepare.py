"""`medssl dataset prepare` on made trees of the public sets' layouts, on damaged ones, and on the real sets at hand."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medssl.archive import prepare as module
from medssl.archive.datasets import Manifest, manifest
from medssl.archive.load import open_index
from medssl.archive.prepare import Prepared, prepare_dataset
from medssl.cli import main
from medssl.errors import DataError, UsageError
from medssl.transfer.raw import read_dataset
from tests.archive import dataset_trees as trees
from tests.archive.archive_files import write_series

#: Problems of a tree that is a small part of its set.
PART = {"count"}


def run(name: str, source: Path, out: Path, **more: Any) -> Prepared:
    return prepare_dataset(name, source, out, workers=1, quiet=True, **{"partial": True, **more})


def kinds(result: Prepared) -> set[str]:
    return {problem.kind for problem in result.problems}


def fingerprint(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as handle:
        return list(csv.DictReader(handle))


def without_counts(entry: Manifest) -> Manifest:
    layouts = [
        layout.model_copy(update={"parts": tuple(part.model_copy(update={"count": None}) for part in layout.parts)})
        for layout in entry.layouts
    ]
    return entry.model_copy(update={"layouts": tuple(layouts)})


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made tree counts as a whole release."""
    monkeypatch.setattr(module, "manifest", lambda name: without_counts(manifest(name)))


@pytest.mark.parametrize("name", trees.TREES)
def test_a_tree_of_the_releases_layout_is_written(name: str, tmp_path: Path) -> None:
    trees.TREES[name](tmp_path / "source")
    before = fingerprint(tmp_path / "source")
    result = run(name, tmp_path / "source", tmp_path / "out")
    assert kinds(result) <= PART, result
    assert result.written and result.layout == manifest(name).layouts[0].title
    assert fingerprint(tmp_path / "source") == before
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["name"] == name
    if manifest(name).layouts[0].writes == "nnunet":
        dataset = read_dataset(tmp_path / "out")
        assert dataset.content["labels"] == manifest(name).labels
        assert dataset.content["numTraining"] == len(list((tmp_path / "out" / "labelsTr").iterdir()))


def test_parts_go_to_the_folders_of_nnunet(tmp_path: Path) -> None:
    trees.amos(tmp_path / "source")
    run("amos", tmp_path / "source", tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.nii.gz")}
    assert found == {
        "imagesTr/amos_0001_0000.nii.gz",
        "labelsTr/amos_0001.nii.gz",
        "imagesTr/amos_0008_0000.nii.gz",
        "labelsTr/amos_0008.nii.gz",
        "imagesTs/amos_0002_0000.nii.gz",
    }
    splits = {row["case"]: row["split"] for row in table(tmp_path / "out" / "cases.csv")}
    assert splits == {"amos_0001": "train", "amos_0008": "validation", "amos_0002": "test"}


def test_unlabelled_cases_stay_apart(tmp_path: Path) -> None:
    trees.flare(tmp_path / "source")
    run("flare22", tmp_path / "source", tmp_path / "out")
    assert (tmp_path / "out" / "imagesUnlabelled" / "Case_00001_0000.nii.gz").is_file()
    assert sorted(read_dataset(tmp_path / "out").cases) == ["FLARE22_Tr_0001"]


def test_patients_and_the_literatures_split_are_in_the_table(tmp_path: Path) -> None:
    trees.acdc(tmp_path / "source")
    run("acdc", tmp_path / "source", tmp_path / "out")
    rows = {row["case"]: row for row in table(tmp_path / "out" / "cases.csv")}
    assert rows["patient001_frame12"]["patient"] == "patient001"
    assert rows["patient001_frame12"]["literature_split"] == "test"
    assert rows["patient005_frame01"]["literature_split"] == "train"
    assert rows["patient101_frame01"]["split"] == "test"


def test_what_needs_no_change_is_copied_byte_by_byte(tmp_path: Path) -> None:
    trees.TREES["msd_task04_hippocampus"](tmp_path / "source")
    run("msd_task04_hippocampus", tmp_path / "source", tmp_path / "out")
    source = tmp_path / "source" / "Task04_Hippocampus"
    for old, new in (
        ("imagesTr/hippocampus_001.nii.gz", "imagesTr/hippocampus_001_0000.nii.gz"),
        ("labelsTr/hippocampus_001.nii.gz", "labelsTr/hippocampus_001.nii.gz"),
    ):
        assert (source / old).read_bytes() == (tmp_path / "out" / new).read_bytes()
        assert not (source / old).samefile(tmp_path / "out" / new)


def test_the_twins_that_a_mac_packs_are_not_looked_at(tmp_path: Path) -> None:
    trees.TREES["msd_task04_hippocampus"](tmp_path / "source")
    assert (tmp_path / "source" / "Task04_Hippocampus" / "imagesTr" / "._hippocampus_001.nii.gz").is_file()
    assert run("msd_task04_hippocampus", tmp_path / "source", tmp_path / "out").others == 0


def test_hardlink_shares_the_file(tmp_path: Path) -> None:
    trees.TREES["msd_task04_hippocampus"](tmp_path / "source")
    run("msd_task04_hippocampus", tmp_path / "source", tmp_path / "out", files="hardlink")
    source = tmp_path / "source" / "Task04_Hippocampus" / "labelsTr" / "hippocampus_001.nii.gz"
    assert source.samefile(tmp_path / "out" / "labelsTr" / "hippocampus_001.nii.gz")


def test_four_channels_in_one_file_become_four_files(tmp_path: Path) -> None:
    trees.TREES["msd_task01_braintumour"](tmp_path / "source")
    run("msd_task01_braintumour", tmp_path / "source", tmp_path / "out")
    stored = voxels(tmp_path / "source" / "Task01_BrainTumour" / "imagesTr" / "BRATS_001.nii.gz")
    for channel in range(4):
        written = tmp_path / "out" / "imagesTr" / f"BRATS_001_{channel:04d}.nii.gz"
        np.testing.assert_array_equal(voxels(written), stored[..., channel])
        np.testing.assert_allclose(nib.load(written).affine, trees.affine())


def test_values_of_masks_are_written_without_gaps(tmp_path: Path) -> None:
    trees.brats2021(tmp_path / "source")
    run("brats2021", tmp_path / "source", tmp_path / "out")
    stored = voxels(tmp_path / "source" / "BraTS2021_00000" / "BraTS2021_00000_seg.nii.gz")
    written = voxels(tmp_path / "out" / "labelsTr" / "BraTS2021_00000.nii.gz")
    np.testing.assert_array_equal(written, np.where(stored == 4, 3, stored))


def test_nrrd_becomes_nifti_with_the_names_of_the_literature(tmp_path: Path) -> None:
    trees.left_atrium(tmp_path / "source")
    run("left_atrium_2018", tmp_path / "source", tmp_path / "out")
    image = voxels(tmp_path / "out" / "imagesTr" / "la_06SR5R_0000.nii.gz")
    np.testing.assert_array_equal(voxels(tmp_path / "out" / "labelsTr" / "la_06SR5R.nii.gz"), image > 128)
    rows = {row["case"]: row["literature_split"] for row in table(tmp_path / "out" / "cases.csv")}
    assert rows == {"la_06SR5R": "train", "la_UPT6DX": "test", "la_4HOHMV": ""}


def test_one_file_for_each_structure_becomes_one_label_map(tmp_path: Path) -> None:
    labels = manifest("totalsegmentator").labels
    case = tmp_path / "source" / "s0000"
    trees.image(case / "ct.nii.gz")
    for label in labels:
        if label != "background":
            trees.mask(case / "segmentations" / f"{label}.nii.gz", (1,) if label in ("liver", "aorta") else (0,))
    run("totalsegmentator", tmp_path / "source", tmp_path / "out")
    written = voxels(tmp_path / "out" / "labelsTr" / "s0000.nii.gz")
    assert set(np.unique(written)) == {labels["aorta"]}
    (case / "segmentations" / "liver.nii.gz").unlink()
    result = run("totalsegmentator", tmp_path / "source", tmp_path / "again")
    assert result.exit_code == 4 and "1 labels have no mask: liver" in str(result)


def test_outlines_are_filled_also_where_the_edge_cuts_them(tmp_path: Path) -> None:
    trees.hc18(tmp_path / "source")
    cut = trees.ring((54, 80), (40, 70))
    trees.picture(tmp_path / "source" / "training_set" / "010_2HC_Annotation.png", cut)
    run("hc18", tmp_path / "source", tmp_path / "out")
    for name, middle in (("010", (27, 40)), ("010_2", (40, 70))):
        written = np.asarray(Image.open(tmp_path / "out" / "labelsTr" / f"{name}.png"))
        expected = trees.disc((54, 80), middle)
        assert set(np.unique(written)) == {0, 1}
        assert (written != expected).sum() <= 0.02 * expected.sum()
    patients = {row["case"]: row["patient"] for row in table(tmp_path / "out" / "cases.csv")}
    assert patients == {"010": "010", "010_2": "010", "test_010": "test_010"}


def test_an_outline_that_is_no_ellipse_is_named(tmp_path: Path) -> None:
    trees.hc18(tmp_path / "source")
    square = np.zeros((54, 80), np.uint8)
    square[[10, 40], 5:75] = square[10:41, [5, 74]] = 255
    trees.picture(tmp_path / "source" / "training_set" / "010_HC_Annotation.png", square)
    result = run("hc18", tmp_path / "source", tmp_path / "out")
    assert "an outline that is no ellipse" in str(result) and result.written == 2


def test_several_masks_of_a_picture_are_united_and_classes_are_listed(tmp_path: Path) -> None:
    trees.busi(tmp_path / "source")
    run("busi", tmp_path / "source", tmp_path / "out")
    written = np.asarray(Image.open(tmp_path / "out" / "labelsTr" / "benign_1.png"))
    assert written.sum() == 8 and written[2, 2] == written[8, 8] == 1
    rows = table(tmp_path / "out" / "labels.csv")
    assert {row["label"] for row in rows} == {"benign", "malignant", "normal"}
    assert all((tmp_path / "out" / row["path"]).is_file() for row in rows)


def test_dicom_and_a_mask_turned_against_it_lie_on_one_grid(tmp_path: Path) -> None:
    series = tmp_path / "source" / "Pancreas-CT" / "PANCREAS_0001" / "study" / "series"
    write_series(series, slices=5)
    from medssl.archive.load import read_any

    (volume,) = read_any(series)
    rng = np.random.default_rng(0)
    expected = rng.integers(0, 2, volume.shape[1:]).astype(np.uint8)
    stored = nib.Nifti1Image(expected.transpose(2, 1, 0), volume.affine)
    turned = stored.as_reoriented(np.array([[0, 1], [1, -1], [2, 1]]))
    path = tmp_path / "source" / "TCIA_pancreas_labels" / "label0001.nii.gz"
    path.parent.mkdir()
    nib.save(turned, path)
    result = run("nih_pancreas", tmp_path / "source", tmp_path / "out")
    assert kinds(result) <= PART, result
    image = tmp_path / "out" / "imagesTr" / "PANCREAS_0001_0000.nii.gz"
    mask = tmp_path / "out" / "labelsTr" / "PANCREAS_0001.nii.gz"
    np.testing.assert_allclose(nib.load(mask).affine, nib.load(image).affine, atol=1e-5)
    np.testing.assert_array_equal(voxels(mask), expected.transpose(2, 1, 0))
    np.testing.assert_array_equal(voxels(image), volume.array[0].transpose(2, 1, 0))


def test_images_alone_become_an_index_without_their_masks(tmp_path: Path) -> None:
    trees.openmind(tmp_path / "source")
    result = run("openmind", tmp_path / "source", tmp_path / "out")
    rows = open_index(tmp_path / "out").rows()
    assert result.exit_code == 0 and result.written == len(rows) == 2
    assert rows["patient_key"].n_unique() == 2, "sub-01 of two studies are two people"
    assert set(open_index(tmp_path / "out").related()["kind"]) == {"label_map"}


def test_a_cohort_in_dicom_becomes_an_index(tmp_path: Path) -> None:
    write_series(tmp_path / "source" / "0.C.2" / "9000099" / "20050101" / "00138103", prefix="")
    result = run("oai", tmp_path / "source", tmp_path / "out", partial=False)
    assert result.exit_code == 0 and result.written == 1


def test_nothing_is_written_while_something_is_wrong(tmp_path: Path, whole: None) -> None:
    trees.acdc(tmp_path / "source")
    folder = tmp_path / "source" / "ACDC" / "database" / "training" / "patient001"
    (folder / "patient001_frame01_gt.nii.gz").unlink()
    result = run("acdc", tmp_path / "source", tmp_path / "out", partial=False)
    assert result.exit_code == 1 and not (tmp_path / "out").exists()
    assert [(problem.kind, problem.case) for problem in result.problems] == [("no_mask", "patient001_frame01")]
    assert "training/patient001/patient001_frame01.nii.gz" in str(result) and "Download the mask" in str(result)


def test_partial_leaves_out_the_cases_that_are_wrong(tmp_path: Path, whole: None) -> None:
    trees.acdc(tmp_path / "source")
    folder = tmp_path / "source" / "ACDC" / "database" / "training" / "patient001"
    trees.mask(folder / "patient001_frame01_gt.nii.gz", (0, 1, 2, 9))
    result = run("acdc", tmp_path / "source", tmp_path / "out")
    assert result.exit_code == 3 and result.written == 5
    assert not (tmp_path / "out" / "imagesTr" / "patient001_frame01_0000.nii.gz").exists()
    assert "values [9]; [0, 1, 2, 3] are expected" in str(result)


def test_a_whole_set_is_written_without_a_word(tmp_path: Path, whole: None) -> None:
    trees.acdc(tmp_path / "source")
    result = run("acdc", tmp_path / "source", tmp_path / "out", partial=False)
    assert result.exit_code == 0 and not result.problems and result.written == 6


def damage_truncate(folder: Path) -> None:
    path = folder / "imagesTr" / "hippocampus_001.nii.gz"
    path.write_bytes(path.read_bytes()[:200])


def damage_grid(folder: Path) -> None:
    where = trees.affine()
    where[0, 3] += 5
    trees.mask(folder / "labelsTr" / "hippocampus_001.nii.gz", (0, 1, 2), where)


def damage_fractions(folder: Path) -> None:
    path = folder / "labelsTr" / "hippocampus_001.nii.gz"
    nib.save(nib.Nifti1Image(np.full(trees.SHAPE, 0.5, np.float32), trees.affine()), path)


def damage_channels(folder: Path) -> None:
    trees.image(folder / "imagesTr" / "hippocampus_001.nii.gz", channels=3)


def damage_image(folder: Path) -> None:
    (folder / "imagesTr" / "hippocampus_001.nii.gz").unlink()


def damage_twice(folder: Path) -> None:
    trees.image(folder / "copy" / "imagesTr" / "hippocampus_001.nii.gz")


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (damage_truncate, "truncated"),
        (damage_grid, "grid"),
        (damage_fractions, "label_value"),
        (damage_channels, "channels"),
        (damage_image, "no_image"),
        (damage_twice, "case_twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damage_is_named_with_path_and_remedy(tmp_path: Path, whole: None, damage: Any, kind: str) -> None:
    trees.TREES["msd_task04_hippocampus"](tmp_path / "source")
    damage(tmp_path / "source" / "Task04_Hippocampus")
    result = run("msd_task04_hippocampus", tmp_path / "source", tmp_path / "out", partial=False)
    assert kinds(result) == {kind}, result
    (problem,) = result.problems
    assert "hippocampus_001" in problem.path and not Path(problem.path).is_absolute()
    assert problem.detail and problem.remedy
    assert not (tmp_path / "out").exists()


def test_missing_channels_are_named(tmp_path: Path) -> None:
    trees.brats2021(tmp_path / "source")
    (tmp_path / "source" / "BraTS2021_00000" / "BraTS2021_00000_t2.nii.gz").unlink()
    result = run("brats2021", tmp_path / "source", tmp_path / "out")
    assert result.exit_code == 4 and "lacks {case}/{case}_t2.nii.gz" in str(result)


def test_an_archive_with_another_checksum_is_named(tmp_path: Path) -> None:
    trees.TREES["msd_task04_hippocampus"](tmp_path / "source")
    (tmp_path / "source" / "Task04_Hippocampus.tar").write_bytes(b"half a download")
    result = run("msd_task04_hippocampus", tmp_path / "source", tmp_path / "out")
    assert "checksum" in kinds(result)
    assert "9d24dba78a72977dbd1d2e110310f31b" in str(result)


def test_the_number_of_cases_is_compared_with_the_release(tmp_path: Path) -> None:
    trees.TREES["msd_task04_hippocampus"](tmp_path / "source")
    result = run("msd_task04_hippocampus", tmp_path / "source", tmp_path / "out", partial=False)
    assert "2 whole cases of the part 'train', the release has 260" in str(result)
    assert result.exit_code == 1


def test_a_folder_of_something_else_says_what_was_expected(tmp_path: Path) -> None:
    trees.image(tmp_path / "source" / "scan.nii.gz")
    with pytest.raises(DataError, match=r"holds no file of lits.*[\s\S]*volume-\{case\}\.nii"):
        run("lits", tmp_path / "source", tmp_path / "out")


def test_the_output_may_not_lie_in_the_source(tmp_path: Path) -> None:
    trees.lits(tmp_path / "source")
    with pytest.raises(UsageError, match="lie in each other"):
        run("lits", tmp_path / "source", tmp_path / "source" / "out")


def test_overwrite_replaces_only_what_this_command_wrote(tmp_path: Path) -> None:
    trees.lits(tmp_path / "source")
    run("lits", tmp_path / "source", tmp_path / "out")
    with pytest.raises(UsageError, match="--overwrite"):
        run("lits", tmp_path / "source", tmp_path / "out")
    run("lits", tmp_path / "source", tmp_path / "out", overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(UsageError, match="not written by this command"):
        run("lits", tmp_path / "source", tmp_path / "other", overwrite=True)


@pytest.fixture
def small_arrays(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """MedMNIST sets of a few images."""
    samples = {"train": 6, "val": 3, "test": 3}

    def smaller(name: str) -> Manifest:
        entry = manifest(name)
        assert entry.arrays is not None
        changes = {"arrays": entry.arrays.model_copy(update={"samples": samples}), "checksums": {}}
        return entry.model_copy(update=changes)

    monkeypatch.setattr(module, "manifest", smaller)
    return samples


@pytest.mark.parametrize(
    ("name", "shape", "classes", "columns"),
    [("pneumoniamnist", (28, 28), 2, 1), ("pathmnist", (28, 28, 3), 9, 1), ("chestmnist", (28, 28), 2, 14),
     ("organmnist3d", (28, 28, 28), 11, 1), ("retinamnist", (64, 64, 3), 5, 1)],
)  # fmt: skip
def test_a_whole_npz_passes(
    name: str, shape: tuple[int, ...], classes: int, columns: int, tmp_path: Path, small_arrays: dict[str, int]
) -> None:
    path = trees.arrays(tmp_path / "source" / f"{name}.npz", small_arrays, shape, classes, columns)
    result = run(name, path, tmp_path / "out", partial=False)
    assert result.exit_code == 0, result
    assert (tmp_path / "out" / f"{name}.npz").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("change", "kind", "usable"),
    [
        ({"train_images": np.array([{}], object)}, "npz_pickled", False),
        ({"train_images": np.zeros((6, 28, 28), np.float32)}, "npz_type", False),
        ({"train_images": np.zeros((6, 28, 27), np.uint8)}, "npz_shape", False),
        ({"train_images": np.zeros((6, 30, 30), np.uint8)}, "npz_shape", True),
        ({"train_labels": np.full((6, 1), 2, np.uint8)}, "label_value", False),
        ({"train_labels": np.zeros((5, 1), np.uint8)}, "npz_labels", False),
        ({"train_labels": None}, "npz_missing", False),
        ({"test_images": None, "test_labels": None}, "npz_missing", True),
        ({"val_images": np.zeros((2, 28, 28), np.uint8), "val_labels": np.zeros((2, 1), np.uint8)}, "count", True),
    ],
)
def test_what_is_wrong_in_an_npz_is_named(
    change: dict[str, Any], kind: str, usable: bool, tmp_path: Path, small_arrays: dict[str, int]
) -> None:
    path = trees.arrays(tmp_path / "source" / "pneumoniamnist.npz", small_arrays, (28, 28), 2)
    with np.load(path) as stored:
        content = {key: value for key, value in {**stored, **change}.items() if value is not None}
    np.savez(path, **content)
    result = run("pneumoniamnist", path, tmp_path / "out")
    assert kinds(result) == {kind}, result
    assert result.exit_code == (3 if usable else 4)
    assert (tmp_path / "out").exists() == usable


def test_half_an_npz_is_named(tmp_path: Path, small_arrays: dict[str, int]) -> None:
    path = trees.arrays(tmp_path / "source" / "pneumoniamnist.npz", small_arrays, (28, 28), 2)
    path.write_bytes(path.read_bytes()[:300])
    assert kinds(run("pneumoniamnist", path, tmp_path / "out")) == {"npz_damaged"}


def test_a_medmnist_file_with_another_checksum_is_named(tmp_path: Path) -> None:
    path = trees.arrays(tmp_path / "source" / "pneumoniamnist.npz", {"train": 6, "val": 3, "test": 3}, (28, 28), 2)
    assert "checksum" in kinds(run("pneumoniamnist", path, tmp_path / "out"))


def test_the_command_line_prepares_and_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trees.lits(tmp_path / "source")
    arguments = ["dataset", "prepare", "lits", "--source", str(tmp_path / "source"), "--out", str(tmp_path / "out")]
    codes = []
    for more in (["--json", "-q"], ["--partial", "-q", "--workers", "1"]):
        monkeypatch.setattr(sys, "argv", ["medssl", *arguments, *more])
        with pytest.raises(SystemExit) as end:
            main()
        codes.append(end.value.code)
        if "--json" in more:
            assert json.loads(capsys.readouterr().out)["problems"][0]["kind"] == "count"
    assert codes == [1, 3]
    monkeypatch.setattr(sys, "argv", ["medssl", "list", "datasets", "--json"])
    with pytest.raises(SystemExit):
        main()
    listed = capsys.readouterr().out
    assert '"lits"' in listed and '"pneumoniamnist"' in listed


@pytest.mark.parametrize(
    ("folder", "name", "number", "expected"),
    [
        ("hippocampus", "msd_task04_hippocampus", 195, {"count"}),
        ("left_atrium", "left_atrium_2018", 80, {"count"}),
        ("breast_ultrasound", "busi", 290, {"count"}),
        ("pneumoniamnist", "pneumoniamnist", 1, {"count", "npz_missing"}),
    ],
)
@pytest.mark.slow
def test_the_real_sets_at_hand_are_parts_of_their_releases(
    folder: str, name: str, number: int, expected: set[str], tmp_path: Path, data_folder: Path
) -> None:
    if not (data_folder / folder).is_dir():
        pytest.skip(f"{folder} is not among the real data")
    result = run(name, data_folder / folder, tmp_path / "out", files="copy")
    assert (result.written, kinds(result), result.exit_code) == (number, expected, 3), result
    if manifest(name).task == "segmentation":
        assert len(read_dataset(tmp_path / "out").cases) == number
