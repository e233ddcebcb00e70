"""No planted identity is found in any byte that a verb writes or says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.privacy import canaries


def spoken(text: str) -> list[str]:
    """Return the canaries in what a command said."""
    return [canary for canary in canaries.ALL if canary in text]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("privacy")
    canaries.plant(folder / "archive")
    return folder


def test_the_search_finds_what_is_planted(place: Path) -> None:
    found = canaries.leaks(place / "archive")
    assert {canary for canary in canaries.ALL if any(line.endswith(canary) for line in found)} == set(canaries.ALL)


def test_index_and_preprocess_tell_no_identity(place: Path) -> None:
    said = canaries.run("index", "archive", "--out", "index", "--workers", "1", cwd=place)
    said += canaries.run("index", "archive", "--out", "index", "--resume", "--json", "--workers", "1", cwd=place)
    said += canaries.run("preprocess", "index", "--out", "store", "--workers", "1", cwd=place)
    assert len(list((place / "store").glob("*.b2nd"))) == 5
    assert spoken(said) == []
    assert canaries.leaks(place / "index") == [] and canaries.leaks(place / "store") == []


def test_convert_tells_no_identity(place: Path) -> None:
    said = canaries.run("convert", "archive", "--out", "nifti", "--workers", "1", cwd=place)
    assert len(list((place / "nifti").glob("*.nii.gz"))) == 5
    assert spoken(said) == [] and canaries.leaks(place / "nifti") == []


def test_errors_tell_no_identity(place: Path) -> None:
    damaged = place / "archive" / "CANARYFILE_damaged"
    shown = place / "damaged"
    shown.symlink_to(damaged)
    said = canaries.run("index", "damaged", "--out", "none", "--workers", "1", cwd=place, codes=[4])
    said += canaries.run("convert", "damaged", "--out", "none2", "--workers", "1", cwd=place, codes=[4])
    assert "position_invalid" in said and "truncated" in said and "series_of_two_patients" in said
    assert spoken(said) == []
    assert canaries.leaks(place / "none") == [] and canaries.leaks(place / "none2") == []


@pytest.mark.slow
def test_no_verb_tells_an_identity_from_the_archive_to_the_report(place: Path) -> None:
    said = ""

    def medssl(*arguments: str | Path) -> None:
        nonlocal said
        said += canaries.run(*arguments, cwd=place)

    if not (place / "store").is_dir():
        medssl("index", "archive", "--out", "index", "--workers", "1")
        medssl("preprocess", "index", "--out", "store", "--workers", "1")
    small = ("--device", "cpu", "--workers", "0")
    medssl(
        "pretrain", "--method", "mae", "--store", "store", "--out", "pretrained", "--steps", "3", *small,
        "--set", "network=resenc-xs", "--set", "patch_size=[16,16,16]", "--set", "batch_size=2",
    )  # fmt: skip
    dataset = _raw_dataset(place / "dataset")
    medssl(
        "finetune", "segmentation", "--dataset", dataset, "--checkpoint", "pretrained", "--out", "segmentation",
        "--steps", "2", "--val-every", "2", "--patch-size", "16,16,16", "--batch-size", "2", *small,
    )  # fmt: skip
    table = _table(place)
    medssl(
        "finetune", "classification", "--dataset", table, "--checkpoint", "pretrained", "--out", "classification",
        "--modality", "CT", "--steps", "2", "--val-every", "2", "--batch-size", "2", *small,
    )  # fmt: skip
    medssl("predict", "--model", "segmentation", "--input", "archive", "--out", "prediction", "--device", "cpu")
    # A classifier names image files by their relative path, by which labels are found; DICOM series by their id.
    (place / "series").symlink_to(place / "archive" / "CANARYFILE_patient0")
    medssl("predict", "--model", "classification", "--input", "series", "--out", "classes", "--device", "cpu")
    medssl("evaluate", "segmentation", "--predictions", "segmentation/validation", "--references", dataset / "labelsTr",
           "--out", "evaluation")  # fmt: skip
    medssl("evaluate", "quality", "pretrained", "--store", "store", "--out", "quality", "--device", "cpu")
    medssl("embed", "pretrained", "--store", "store", "--out", "embedding", "--device", "cpu")
    for form in ("nnunet", "nnssl", "safetensors"):
        medssl("export", "pretrained", "--format", form, "--out", Path("exported") / f"{form}.pth")
    for name in ("pretrained", "segmentation", "classification"):
        medssl("report", name)
    shutil.copytree(place / "segmentation", place / "again")
    medssl("compare", "segmentation", "again", "--json")
    assert spoken(said) == []
    inputs = {"archive", "damaged", "series", "dataset", "configuration"}
    outputs = [path for path in sorted(place.iterdir()) if path.name not in inputs and path.is_dir()]
    assert [line for out in outputs for line in canaries.leaks(out)] == []


def _raw_dataset(folder: Path) -> Path:
    """Write an nnU-Net data set; the names of its cases are keys of every table, so they carry no canary."""
    for number in range(5):
        rng = np.random.default_rng(number)
        mask = np.zeros((24, 24, 24), np.uint8)
        mask[6:16, 6:16, 6:16] = 1
        canaries.nifti(
            folder / "imagesTr" / f"case{number}_0000.nii.gz",
            (rng.normal(100, 10, mask.shape) + 60 * mask).astype(np.float32),
        )
        canaries.nifti(folder / "labelsTr" / f"case{number}.nii.gz", mask)
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "ball": 1}, "numTraining": 5}
    (folder / "dataset.json").write_text(json.dumps({**content, "file_ending": ".nii.gz"}))
    return folder


def _table(place: Path) -> Path:
    """Write a table of labelled images whose paths and patients are canaries."""
    lines = ["path,label,patient,split"]
    for number in range(8):
        rng = np.random.default_rng(number)
        path = place / "dataset" / "images" / f"CANARYFILE_{number}.nii.gz"
        canaries.nifti(path, rng.normal(100 + 40 * (number % 2), 10, (20, 20, 20)).astype(np.float32))
        split = "train" if number < 5 else "validation"
        lines.append(f"images/{path.name},{'ill' if number % 2 else 'well'},CANARYID{number},{split}")
    table = place / "dataset" / "labels.csv"
    table.write_text("\n".join(lines) + "\n")
    return table


def test_masks_of_nifti_input_lose_the_header_fields(tmp_path: Path) -> None:
    from medssl.inference.predict import predict
    from tests.inference.tiny_models import make_model

    canaries.nifti(tmp_path / "in" / "case_0000.nii.gz", np.zeros((20, 20, 20), np.float32) + np.arange(20))
    predict(make_model(tmp_path / "model"), tmp_path / "in", tmp_path / "out", device="cpu", quiet=True)
    assert [nib.load(path).shape for path in (tmp_path / "out").glob("*.nii.gz")] == [(20, 20, 20)]
    assert canaries.leaks(tmp_path / "out") == []
