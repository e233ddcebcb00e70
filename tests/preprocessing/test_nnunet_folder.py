"""nnU-Net's preprocessed folders open as a store, and their pickles are never read."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import blosc2
import numpy as np
import pytest

from medssl.errors import DataError
from medssl.preprocessing.run import preprocess
from medssl.preprocessing.store import Store

CONFIGURATION = {
    "data_identifier": "nnUNetPlans_3d_fullres",
    "preprocessor_name": "DefaultPreprocessor",
    "spacing": [1.5, 1.0, 0.8],
    "patch_size": [32, 32, 32],
    "batch_size": 2,
    "normalization_schemes": ["ZScoreNormalization"],
    "use_mask_for_norm": [False],
    "resampling_fn_data": "resample_data_or_seg_to_shape",
    "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
    "resampling_fn_seg": "resample_data_or_seg_to_shape",
    "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
    "architecture": {"network_class_name": "", "arch_kwargs": {}, "_kw_requires_import": []},
}
PLANS = {
    "dataset_name": "Dataset904_Test",
    "plans_name": "nnUNetPlans",
    "image_reader_writer": "NibabelIOWithReorient",
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    "label_manager": "LabelManager",
    "foreground_intensity_properties_per_channel": {"0": {}},
    "configurations": {"2d": {"data_identifier": "nnUNetPlans_2d", "spacing": [1, 1]}, "3d_fullres": CONFIGURATION},
}


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def make_folder(root: Path, channel: str = "MR") -> Path:
    """Write what nnU-Net's preprocessor leaves behind, two cases, by hand."""
    folder = root / "Dataset904_Test" / "nnUNetPlans_3d_fullres"
    folder.mkdir(parents=True)
    (folder.parent / "nnUNetPlans.json").write_text(json.dumps(PLANS))
    (folder.parent / "dataset.json").write_text(json.dumps({"channel_names": {"0": channel}}))
    (folder.parent / "splits_final.json").write_text(json.dumps([{"train": ["case_0"], "val": ["case_1"]}]))
    for number in range(2):
        rng = np.random.default_rng(number)
        image = 0.3 * rng.standard_normal((1, 20, 30, 25)).astype(np.float32)
        image[:, 5:10] += 20
        label = np.zeros((1, 20, 30, 25), np.int16)
        label[:, 5:8] = 2
        label[:, 8:10] = -1
        for stem, array in ((f"case_{number}", image), (f"case_{number}_seg", label)):
            blosc2.asarray(array, urlpath=str(folder / f"{stem}.b2nd"), mode="w")
        (folder / f"case_{number}.pkl").write_bytes(pickle.dumps(Bomb(root / "exploded")))
    return folder


def test_facts_come_from_plans_data_set_and_splits(tmp_path: Path) -> None:
    store = Store.open(make_folder(tmp_path, "CT"))
    assert store.ids == ["case_0", "case_1"]
    entry = store.entry("case_1")
    assert (entry.shape, entry.spacing_mm) == ((1, 20, 30, 25), (1.5, 1.0, 0.8))
    assert (entry.modality, entry.split, entry.patient_key, entry.has_label) == ("CT", "validation", "case_1", True)
    assert entry.background == 0
    assert store.ids_of("train") == ["case_0"]
    assert [row["shape"] for row in store.info["volumes"]] == [[1, 20, 30, 25]] * 2


def test_crops_and_labels_are_read_and_what_is_outside_counts_as_background(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    store = Store.open(folder)
    image = blosc2.open(str(folder / "case_0.b2nd"))[:]
    np.testing.assert_array_equal(store.read("case_0", (2, 3, 4), (12, 13, 14)), image[:, 2:12, 3:13, 4:14])
    label = store.read_label("case_0", (4, 0, 0), (11, 5, 5))
    assert label is not None and label[:, 0, 0].tolist() == [0, 2, 2, 2, 0, 0, 0]
    voxels = store.entry("case_0").foreground
    assert len(voxels) == 512 and ((voxels[:, 0] >= 5) & (voxels[:, 0] < 8)).all()


PROPERTIES = {"mean": 98.5, "std": 140.25, "percentile_00_5": -950.0, "percentile_99_5": 310.0, "median": 90.0}


@pytest.mark.parametrize(
    ("schemes", "properties", "rescale"),
    [
        (["CTNormalization"], {"0": PROPERTIES}, (98.5, 140.25)),
        (["CTNormalization"] * 2, {"0": PROPERTIES, "1": PROPERTIES}, (98.5, 140.25)),
        (["CTNormalization"] * 2, {"0": PROPERTIES, "1": {**PROPERTIES, "mean": 1.0}}, None),
        (["CTNormalization", "ZScoreNormalization"], {"0": PROPERTIES, "1": PROPERTIES}, None),
        (["ZScoreNormalization"], {"0": PROPERTIES}, None),
        (["CTNormalization"], {"0": {}}, None),
        (["CTNormalization"], {}, None),
    ],
)
def test_stored_values_go_back_to_hounsfield_units_where_every_channel_is_ct(
    tmp_path: Path, schemes: list[str], properties: dict, rescale: tuple[float, float] | None
) -> None:
    folder = make_folder(tmp_path, "CT")
    plans = {
        **PLANS,
        "foreground_intensity_properties_per_channel": properties,
        "configurations": {"3d_fullres": {**CONFIGURATION, "normalization_schemes": schemes}},
    }
    (folder.parent / "nnUNetPlans.json").write_text(json.dumps(plans))
    entry = Store.open(folder).entry("case_0")
    if rescale is None:
        assert np.isnan(entry.rescale).all()
        return
    assert entry.rescale == rescale
    first = entry.properties["normalisation"][0]
    assert first == {"scheme": "fingerprint", "shift": 98.5, "scale": 140.25, "low": -950.0, "high": 310.0}


def test_pickles_are_never_read(tmp_path: Path) -> None:
    store = Store.open(make_folder(tmp_path))
    store.entry("case_0")
    store.read_label("case_0", (0, 0, 0), (4, 4, 4))
    assert not (tmp_path / "exploded").exists()


def test_hash_notices_other_voxels(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    before = Store.open(folder).hash
    assert Store.open(folder).hash == before
    blosc2.asarray(np.ones((1, 20, 30, 25), np.float32), urlpath=str(folder / "case_0.b2nd"), mode="w")
    assert Store.open(folder).hash != before


def test_missing_plans_are_named_with_the_remedy(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    (folder.parent / "nnUNetPlans.json").unlink()
    with pytest.raises(DataError, match="no plans beside or above"):
        Store.open(folder)


@pytest.mark.slow
def test_what_nnunet_itself_preprocessed_opens_and_equals_ours(tmp_path: Path, data_folder: Path) -> None:
    pytest.importorskip("nnunetv2")
    source, raw = data_folder / "hippocampus", tmp_path / "raw" / "Dataset904_Test"
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (source / "labelsTr").iterdir())[:3]
    for case in cases:
        shutil.copy(source / "imagesTr" / f"{case}_0000.nii.gz", raw / "imagesTr")
        shutil.copy(source / "labelsTr" / f"{case}.nii.gz", raw / "labelsTr")
    prepared = tmp_path / "preprocessed" / "Dataset904_Test"
    prepared.mkdir(parents=True)
    description = {**json.loads((source / "dataset.json").read_text()), "numTraining": 3}
    for folder in (raw, prepared):
        (folder / "dataset.json").write_text(json.dumps(description))
    (prepared / "nnUNetPlans.json").write_text(json.dumps(PLANS))
    code = (
        "from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor\n"
        "if __name__ == '__main__':\n"
        "    DefaultPreprocessor(verbose=False).run(904, '3d_fullres', 'nnUNetPlans', 1)\n"
    )
    script = tmp_path / "preprocess.py"
    script.write_text(code)
    environment = {
        **os.environ,
        "nnUNet_raw": str(tmp_path / "raw"),
        "nnUNet_preprocessed": str(tmp_path / "preprocessed"),
        "nnUNet_results": str(tmp_path / "results"),
    }
    subprocess.run([sys.executable, str(script)], env=environment, check=True, capture_output=True)
    theirs = Store.open(prepared / "nnUNetPlans_3d_fullres")
    preprocess(raw, tmp_path / "ours", spacing=(1.5, 1.0, 0.8), normalisation="zscore", workers=1, quiet=True)
    ours = Store.open(tmp_path / "ours")
    assert theirs.ids == ours.ids == cases
    for case in cases:
        entry, other = ours.entry(case), theirs.entry(case)
        assert (entry.shape, entry.spacing_mm, other.has_label) == (other.shape, other.spacing_mm, True)
        box = (0, 0, 0), entry.shape[1:]
        np.testing.assert_allclose(ours.read(case, *box), theirs.read(case, *box), atol=1e-4)
        mine, reference = ours.read_label(case, *box), theirs.read_label(case, *box)
        assert mine is not None and reference is not None and (mine != reference).mean() < 1e-4
