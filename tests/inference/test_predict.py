"""What predict takes, writes and refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
import torch
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medssl.errors import CheckpointError, DataError, UsageError
from medssl.inference.predict import predict
from tests.inference.tiny_models import make_model, read_mask, write_volume


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model")


def run(model: Path, source: Path, out: Path, **options: Any) -> Any:
    return predict(model, source, out, device="cpu", quiet=True, **options)


def test_plain_and_numbered_names_and_single_files_give_one_mask_each(model: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    write_volume(images / "a.nii.gz")
    write_volume(images / "b_0000.nii.gz", seed=1)
    (images / "notes.txt").write_text("not an image")
    both = run(model, images, tmp_path / "both")
    assert [row.case for row in both.predictions] == ["a", "b"] and both.exit_code == 0
    alone = run(model, images / "b_0000.nii.gz", tmp_path / "alone")
    assert [row.mask for row in alone.predictions] == ["b.nii.gz"]
    assert np.array_equal(read_mask(tmp_path / "alone" / "b.nii.gz"), read_mask(tmp_path / "both" / "b.nii.gz"))


def test_nrrd_and_metaimage_give_the_mask_of_the_same_nifti(model: Path, tmp_path: Path) -> None:
    write_volume(tmp_path / "images" / "a.nii.gz", orientation="LPS")
    image = SimpleITK.ReadImage(str(tmp_path / "images" / "a.nii.gz"))
    for ending in ("nrrd", "mha"):
        SimpleITK.WriteImage(image, str(tmp_path / "images" / f"b{ending}.{ending}"))
    summary = run(model, tmp_path / "images", tmp_path / "out")
    assert len(summary.predictions) == 3
    first = nibabel.load(tmp_path / "out" / "a.nii.gz")
    for name in ("bnrrd", "bmha"):
        other = nibabel.load(tmp_path / "out" / f"{name}.nii.gz")
        np.testing.assert_allclose(other.affine, first.affine, atol=1e-4)
        assert np.array_equal(np.asanyarray(other.dataobj), np.asanyarray(first.dataobj))


def test_table_holds_volumes_notice_and_model_and_no_path(model: Path, tmp_path: Path) -> None:
    write_volume(tmp_path / "images" / "a.nii.gz", spacing=(1.0, 2.0, 3.0))
    summary = run(model, tmp_path / "images", tmp_path / "out")
    text = (tmp_path / "out" / "predictions.json").read_text()
    content = json.loads(text)
    assert content == json.loads(json.dumps(summary.to_json()))
    assert "Not a medical device" in content["notice"] and str(tmp_path) not in text
    assert len(content["model"]["sha256"]["fold_0"]) == 64
    mask = read_mask(tmp_path / "out" / "a.nii.gz")
    row = next(iter(csv.DictReader((tmp_path / "out" / "volumes.csv").open())))
    for name, value in (("one", 1), ("two", 2)):
        assert content["predictions"][0]["volumes_ml"][name] == pytest.approx(np.sum(mask == value) * 6 / 1000)
        assert float(row[f"{name}_ml"]) == pytest.approx(np.sum(mask == value) * 6 / 1000)


def test_volume_of_a_region_counts_all_its_labels(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", labels={"background": 0, "whole": [1, 2], "core": 2}, regions=[1, 2])
    write_volume(tmp_path / "images" / "a.nii.gz", spacing=(1.0, 1.0, 1.0))
    volumes = run(model, tmp_path / "images", tmp_path / "out").predictions[0].volumes_ml
    mask = read_mask(tmp_path / "out" / "a.nii.gz")
    assert volumes["whole"] == pytest.approx(np.sum(mask > 0) / 1000)
    assert volumes["core"] == pytest.approx(np.sum(mask == 2) / 1000)


def test_a_bad_input_costs_one_row_and_nothing_else(model: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    write_volume(images / "good.nii.gz")
    whole = (images / "good.nii.gz").read_bytes()
    (images / "empty.nii.gz").write_bytes(b"")
    (images / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    (images / "text.nii.gz").write_text("no image at all, only some words that go on for a while")
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4, 3), np.int16), np.eye(4)), images / "frames.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.full((9, 9, 9), np.nan, np.float32), np.eye(4)), images / "nan.nii.gz")
    image = nibabel.Nifti1Image(np.ones((9, 9, 9), np.int16), np.eye(4))
    image.header["pixdim"][1:4] = 0
    image.header["sform_code"] = image.header["qform_code"] = 0
    raw = bytearray(image.to_bytes())
    raw[80:92] = np.zeros(3, "<f4").tobytes()
    raw[252:256] = b"\0" * 4
    (images / "zero.nii").write_bytes(bytes(raw))
    summary = run(model, images, tmp_path / "out")
    codes = {row.source: row.code for row in summary.refused}
    assert summary.exit_code == 3 and [row.case for row in summary.predictions] == ["good"]
    assert codes == {
        "empty.nii.gz": "empty_file",
        "truncated.nii.gz": "truncated",
        "text.nii.gz": "not_an_image",
        "frames.nii.gz": "dimensions_unsupported",
        "nan.nii.gz": "not_finite",
        "zero.nii": "spacing_invalid",
    }
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "good.nii.gz",
        "predictions.json",
        "volumes.csv",
        "volumes.json",
    ]
    (images / "good.nii.gz").unlink()
    assert run(model, images, tmp_path / "all_bad").exit_code == 4


def test_a_few_voxels_that_are_not_finite_are_replaced_and_flagged(model: Path, tmp_path: Path) -> None:
    write_volume(tmp_path / "images" / "a.nii.gz")
    image = nibabel.load(tmp_path / "images" / "a.nii.gz")
    voxels = image.get_fdata().astype(np.float32)
    voxels[5, 5, 5], voxels[6, 6, 6] = np.nan, np.inf
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine), tmp_path / "images" / "b.nii.gz")
    voxels[5, 5, 5], voxels[6, 6, 6] = np.nanmin(voxels), np.max(voxels[np.isfinite(voxels)])
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine), tmp_path / "images" / "c.nii.gz")
    summary = run(model, tmp_path / "images", tmp_path / "out")
    assert [row.flags for row in summary.predictions] == [(), ("non_finite_replaced",), ()]
    assert np.array_equal(read_mask(tmp_path / "out" / "b.nii.gz"), read_mask(tmp_path / "out" / "c.nii.gz"))


def test_scaled_integers_are_scaled_and_an_empty_image_is_no_crash(model: Path, tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros((20, 20, 20), np.int16), np.eye(4)), tmp_path / "zero.nii")
    assert run(model, tmp_path / "zero.nii", tmp_path / "zero").exit_code == 0
    rng = np.random.default_rng(0)
    voxels = rng.normal(size=(24, 24, 24)).astype(np.float32)
    image = nibabel.Nifti1Image(voxels, np.eye(4))
    image.set_data_dtype(np.int16)
    nibabel.save(image, tmp_path / "scaled.nii.gz")
    stored = nibabel.load(tmp_path / "scaled.nii.gz")
    nibabel.save(nibabel.Nifti1Image(stored.get_fdata().astype(np.float32), np.eye(4)), tmp_path / "plain.nii.gz")
    for name in ("scaled", "plain"):
        run(model, tmp_path / f"{name}.nii.gz", tmp_path / name)
    assert np.array_equal(
        read_mask(tmp_path / "scaled" / "scaled.nii.gz"), read_mask(tmp_path / "plain" / "plain.nii.gz")
    )


def test_an_image_of_one_slice_keeps_its_stored_shape(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", patch=(16, 16), spacing=(1.0, 1.0))
    voxels = np.random.default_rng(0).normal(100, 20, (30, 24)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / "a.nii.gz")
    run(model, tmp_path / "a.nii.gz", tmp_path / "out")
    assert nibabel.load(tmp_path / "out" / "a.nii.gz").shape == (30, 24)


def test_channels_must_be_complete_and_on_one_grid(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", channels=2)
    images = tmp_path / "images"
    for name, size in (("a_0000", 30), ("a_0001", 30), ("b_0000", 30), ("c_0000", 30), ("c_0001", 28)):
        write_volume(images / f"{name}.nii.gz", shape=(size, 26, 22))
    summary = run(model, images, tmp_path / "out")
    assert [row.case for row in summary.predictions] == ["a"]
    assert {row.code for row in summary.refused} == {"channels_incomplete", "channels_differ"}
    single = run(model, images / "a_0000.nii.gz", tmp_path / "single")  # its other channel lies beside it
    assert [row.source for row in single.predictions] == [("a_0000.nii.gz", "a_0001.nii.gz")]


def test_mirroring_is_switched_off_and_never_added(tmp_path: Path) -> None:
    write_volume(tmp_path / "a.nii.gz")
    plain = make_model(tmp_path / "plain")
    mirrored = make_model(tmp_path / "mirrored", mirroring=(0, 1, 2))
    off = run(mirrored, tmp_path / "a.nii.gz", tmp_path / "off", mirroring=False)
    on = run(mirrored, tmp_path / "a.nii.gz", tmp_path / "on")
    run(plain, tmp_path / "a.nii.gz", tmp_path / "without")
    assert np.array_equal(read_mask(tmp_path / "off" / "a.nii.gz"), read_mask(tmp_path / "without" / "a.nii.gz"))
    assert not np.array_equal(read_mask(tmp_path / "on" / "a.nii.gz"), read_mask(tmp_path / "without" / "a.nii.gz"))
    assert off.facts["options"]["mirroring_axes"] == [] and on.facts["options"]["mirroring_axes"] == [0, 1, 2]
    with pytest.raises(UsageError, match="trained without mirroring"):
        run(plain, tmp_path / "a.nii.gz", tmp_path / "no", mirroring=True)
    assert not (tmp_path / "no").exists()


def test_an_earlier_prediction_is_only_replaced_when_told(model: Path, tmp_path: Path) -> None:
    source = write_volume(tmp_path / "images" / "a.nii.gz")
    out = tmp_path / "out"
    run(model, source, out)
    with pytest.raises(UsageError, match=r"is not empty.*--overwrite"):
        run(model, source, out)
    run(model, source, out, overwrite=True)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="was not written by this command"):
        run(model, source, foreign, overwrite=True)
    with pytest.raises(UsageError, match="holds the input"):
        run(model, source, tmp_path / "images")


def test_options_that_cannot_work_are_named(model: Path, tmp_path: Path) -> None:
    source = write_volume(tmp_path / "a.nii.gz")
    for options, message in (
        ({"step_size": 0.0}, "--step-size"),
        ({"memory_mb": 0}, "--memory-mb"),
    ):
        with pytest.raises(UsageError, match=message):
            run(model, source, tmp_path / "out", **options)
    with pytest.raises(UsageError, match="no such device"):
        predict(model, source, tmp_path / "out", device="warp", quiet=True)
    with pytest.raises(UsageError, match="does not exist"):
        run(model, tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(DataError, match="nothing to predict"):
        run(model, tmp_path / "hollow", tmp_path / "out")


def test_a_folder_that_is_no_model_is_named(model: Path, tmp_path: Path) -> None:
    source = write_volume(tmp_path / "a.nii.gz")
    with pytest.raises(CheckpointError, match=r"no readable dataset\.json"):
        run(tmp_path, source, tmp_path / "out")
    broken = make_model(tmp_path / "broken")
    (broken / "fold_0" / "checkpoint_final.pth").unlink()
    with pytest.raises(CheckpointError, match="training has not ended"):
        run(broken, source, tmp_path / "out")
    other = make_model(tmp_path / "other", labels={"background": 0, "only": 1})
    (other / "fold_0" / "checkpoint_final.pth").write_bytes((model / "fold_0" / "checkpoint_final.pth").read_bytes())
    with pytest.raises(CheckpointError, match="weights do not fit"):
        run(other, source, tmp_path / "out")


def test_a_checkpoint_that_would_run_code_is_refused(model: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    evil = make_model(tmp_path / "evil")
    torch.save({"network_weights": {}, "evil": Evil()}, evil / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(CheckpointError, match="pickle"):
        run(evil, write_volume(tmp_path / "a.nii.gz"), tmp_path / "out")
    assert not (tmp_path / "executed").exists()


def write_series(folder: Path, slices: int = 20, seed: int = 0, patient: str = "Mueller^Hans", number: int = 1) -> None:
    """Write an axial CT series with LPS axes, slices shuffled by name."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    study, series, frame = (generate_uid(entropy_srcs=[patient, str(number), kind]) for kind in "abc")
    order = rng.permutation(slices)
    for position in range(slices):
        data = pydicom.Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
        data.SOPInstanceUID = generate_uid(entropy_srcs=[str(series), str(position)])
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = study, series, frame
        data.PatientName, data.PatientID, data.PatientBirthDate = patient, "4711-" + patient, "19500101"
        data.Modality, data.SeriesNumber, data.InstanceNumber = "CT", number, position + 1
        data.SeriesDescription = f"{patient} thorax"
        data.Rows, data.Columns, data.PixelSpacing, data.SliceThickness = 24, 28, [1.5, 1.25], 2.0
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.ImagePositionPatient = [-10.0, -20.0, 5.0 + 2.0 * position]
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.RescaleSlope, data.RescaleIntercept, data.RescaleType = 1, -20 * position, "HU"
        data.PixelData = rng.normal(100 + 20 * position, 60, (24, 28)).astype(np.int16).tobytes()
        data.save_as(folder / f"{patient}_{order[position]:03d}", enforce_file_format=True)


def test_a_dicom_series_gives_the_mask_of_its_nifti_on_its_own_grid(model: Path, tmp_path: Path) -> None:
    from medssl.archive.load import read_any

    write_series(tmp_path / "series")
    summary = run(model, tmp_path / "series", tmp_path / "out")
    assert summary.exit_code == 0 and len(summary.predictions) == 1
    volume = read_any(tmp_path / "series")[0]
    nibabel.save(nibabel.Nifti1Image(volume.array[0].transpose(2, 1, 0), volume.affine), tmp_path / "same.nii.gz")
    run(model, tmp_path / "same.nii.gz", tmp_path / "same")
    mask = nibabel.load(tmp_path / "out" / summary.predictions[0].mask)
    assert mask.shape == (28, 24, 20)
    np.testing.assert_allclose(
        mask.affine, np.diag([-1.25, -1.5, 2.0, 1.0]) + [[0, 0, 0, 10], [0, 0, 0, 20], [0, 0, 0, 5], [0] * 4]
    )
    assert np.array_equal(np.asanyarray(mask.dataobj), read_mask(tmp_path / "same" / "same.nii.gz"))
    assert len(np.unique(np.asanyarray(mask.dataobj))) > 1


def test_every_series_of_a_folder_is_predicted_under_a_name_without_identity(model: Path, tmp_path: Path) -> None:
    write_series(tmp_path / "in" / "Mueller" / "one", number=1)
    write_series(tmp_path / "in" / "Mueller" / "two", number=2, seed=1)
    write_series(tmp_path / "in" / "Schmidt", patient="Schmidt^Eva", seed=2)
    (tmp_path / "in" / "Mueller" / "report_Mueller.txt").write_text("a letter about Hans Mueller")
    summary = run(model, tmp_path / "in", tmp_path / "out")
    assert len(summary.predictions) == 3 and len({row.case for row in summary.predictions}) == 3
    assert summary.exit_code == 3 and [row.code for row in summary.refused] == ["not_an_image"]
    names = " ".join(path.name for path in (tmp_path / "out").iterdir())
    written = (
        names + (tmp_path / "out" / "predictions.json").read_text() + (tmp_path / "out" / "volumes.csv").read_text()
    )
    for path in (tmp_path / "out").glob("*.nii.gz"):
        header = nibabel.load(path).header
        written += "".join(str(header[field]) for field in ("descrip", "aux_file", "db_name", "intent_name"))
    for identity in ("Mueller", "Hans", "Schmidt", "4711", "1950", "thorax"):
        assert identity not in written
    again = run(model, tmp_path / "in", tmp_path / "again")
    assert [row.case for row in again.predictions] == [row.case for row in summary.predictions]


@pytest.mark.slow
def test_real_series_give_masks_on_the_grid_of_their_expected_volumes(tmp_path: Path, data_folder: Path) -> None:
    model = make_model(tmp_path / "model", patch=(16, 128, 128), spacing=(4.0, 2.0, 2.0))
    summary = run(model, data_folder / "dicom" / "brain_mr_study", tmp_path / "out", step_size=1.0)
    assert len(summary.predictions) == 4 and all(row.shape[2] in range(20, 26) for row in summary.predictions)
    ct = run(model, data_folder / "dicom" / "ct_jpeg2000", tmp_path / "ct", step_size=1.0)
    mask = next(row for row in ct.predictions if row.shape == (512, 512, 20))
    expected = nibabel.load(next((data_folder / "dicom").rglob("ct_jpeg2000_segmentation.nii.gz")))
    made = nibabel.load(tmp_path / "ct" / mask.mask)
    corners = np.array([[0, 0, 0, 1], [511, 511, 19, 1]], float).T

    def box(affine: np.ndarray) -> np.ndarray:
        return np.sort((affine @ corners)[:3], axis=1)

    np.testing.assert_allclose(box(made.affine), box(expected.affine), atol=0.01)
