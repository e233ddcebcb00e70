"""Plans describe the checkpoint's network and the data set's geometry, in nnU-Net's own words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from medssl.errors import DataError, UsageError
from medssl.networks.architecture import Architecture, architecture
from medssl.transfer.fingerprint import fingerprint
from medssl.transfer.plans import fit_patch, make_plans
from medssl.transfer.raw import read_dataset

from .conftest import MakeDataset, write_case


def test_plans_hold_the_network_and_the_median_spacing(make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset = read_dataset(make_dataset(channel_names=("CT", "T2")))
    facts = fingerprint(dataset, list(dataset.cases), tmp_path / "cache", quiet=True)
    plans = make_plans(dataset, facts, architecture("resenc-xs", 3), patch_size=None, wanted_patch=(64, 16, 32))
    configuration = plans["configurations"]["3d_fullres"]
    assert Architecture.from_json(configuration["architecture"]) == architecture("resenc-xs", 3)
    assert configuration["spacing"] == pytest.approx([1.2, 1.0, 1.0])
    assert configuration["patch_size"] == [24, 16, 24]
    assert configuration["normalization_schemes"] == ["CTNormalization", "ZScoreNormalization"]
    assert plans["transpose_forward"] == [0, 1, 2]
    assert plans["image_reader_writer"] == "NibabelIOWithReorient"
    assert json.loads(json.dumps(plans)) == plans


def test_the_fingerprint_equals_nnunets(
    make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    folder = make_dataset("Dataset001_balls", cases=3)
    monkeypatch.setenv("nnUNet_raw", str(folder.parent))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    theirs = DatasetFingerprintExtractor("Dataset001_balls", 1).run()
    dataset = read_dataset(folder)
    ours = fingerprint(dataset, list(dataset.cases), tmp_path / "cache", quiet=True)
    assert ours["spacings"] == [pytest.approx(spacing) for spacing in theirs["spacings"]]
    assert ours["shapes_after_crop"] == [list(shape) for shape in theirs["shapes_after_crop"]]
    assert ours["median_relative_size_after_cropping"] == theirs["median_relative_size_after_cropping"]
    first, second = (values["foreground_intensity_properties_per_channel"] for values in (ours, theirs))
    for name, value in second[0].items():
        assert first["0"][name] == pytest.approx(value, rel=0.02), name


def test_cases_are_looked_at_once_and_again_when_they_change(make_dataset: MakeDataset, tmp_path: Path) -> None:
    folder, cache = make_dataset(cases=2), tmp_path / "cache"
    dataset = read_dataset(folder)
    before = fingerprint(dataset, ["case0", "case1"], cache, quiet=True)
    written = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert fingerprint(dataset, ["case0", "case1"], cache, quiet=True) == before
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == written
    write_case(folder, "case1", seed=99, affine=np.diag([2.0, 2.0, 2.0, 1.0]))
    after = fingerprint(dataset, ["case0", "case1"], cache, quiet=True)
    assert after["spacings"][1] == [2.0, 2.0, 2.0] and after["spacings"][0] == before["spacings"][0]


def test_cases_without_a_labelled_voxel_cannot_be_planned_for(make_dataset: MakeDataset, tmp_path: Path) -> None:
    import nibabel

    folder = make_dataset(cases=2)
    for case in ("case0", "case1"):
        path = folder / "labelsTr" / f"{case}.nii.gz"
        image = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), path)
    dataset = read_dataset(folder)
    with pytest.raises(DataError, match="None of the 2 training cases has a labelled voxel"):
        fingerprint(dataset, ["case0", "case1"], tmp_path / "cache", quiet=True)


def test_patches_fit_the_network_and_the_image() -> None:
    xs = architecture("resenc-xs", 3)
    assert fit_patch(xs, (36.0, 50.0, 35.0), (160, 160, 160)) == [40, 56, 40]
    assert fit_patch(xs, (100.0, 100.0, 100.0), (40, 56, 40)) == [40, 56, 40]
    assert fit_patch(xs, (300.0, 20.0, 300.0), None) == [128, 24, 128]
    assert fit_patch(xs, (3.0, 3.0, 3.0), None) == [8, 8, 16]


def test_a_patch_or_spacing_that_does_not_fit_is_refused(make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset = read_dataset(make_dataset(cases=2))
    facts = fingerprint(dataset, list(dataset.cases), tmp_path / "cache", quiet=True)
    with pytest.raises(UsageError, match=r"multiples of \[8, 8, 8\]"):
        make_plans(dataset, facts, architecture("resenc-xs", 3), patch_size=(20, 24, 24))
    with pytest.raises(UsageError, match="three positive millimetres"):
        make_plans(dataset, facts, architecture("resenc-xs", 3), patch_size=None, spacing=(1.0, 0.0, 1.0))


def test_data_are_shared_between_plans_that_preprocess_alike(make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset = read_dataset(make_dataset(cases=3))
    names = list(dataset.cases)
    one = fingerprint(dataset, names[:2], tmp_path / "cache", quiet=True)
    two = fingerprint(dataset, names[1:], tmp_path / "cache", quiet=True)
    identifiers = [
        make_plans(dataset, facts, architecture(network, 3), patch_size=None, spacing=spacing)["configurations"][
            "3d_fullres"
        ]["data_identifier"]
        for facts, network, spacing in (
            (one, "resenc-xs", None),
            (two, "resenc-s", None),
            (one, "resenc-xs", (2.0, 2.0, 2.0)),
        )
    ]
    assert identifiers[0] == identifiers[1] != identifiers[2]
