"""What the gates of a model say of cases, and what they do to a prediction."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medssl.archive.codes import CODES
from medssl.errors import CheckpointError, UsageError
from medssl.inference.gates.calibration import calibrate
from medssl.inference.predict import predict
from tests.inference.test_predict import write_series
from tests.inference.tiny_models import make_model, read_mask, write_volume

SHAPE = (20, 18, 16)
TRAINING = [f"patient_{number}" for number in range(5)]
VALIDATION = [f"patient_{number}" for number in range(5, 9)]


def make_dataset(folder: Path, channel: str = "MR") -> Path:
    """Write an nnU-Net raw data set of nine small cases whose labels are two levels of brightness."""
    (folder / "labelsTr").mkdir(parents=True)
    for number, name in enumerate([*TRAINING, *VALIDATION]):
        image = nibabel.load(write_volume(folder / "imagesTr" / f"{name}_0000.nii.gz", SHAPE, (1, 1, 1), seed=number))
        voxels = np.asanyarray(image.dataobj)
        labels = np.where(voxels > 150, 2, np.where(voxels > 100, 1, 0)).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(labels, image.affine), folder / "labelsTr" / f"{name}.nii.gz")
    description = {
        "channel_names": {"0": channel},
        "labels": {"background": 0, "one": 1, "two": 2},
        "numTraining": 9,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "raw")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    run = make_model(tmp_path_factory.mktemp("model") / "model", spacing=(1.0, 1.0, 1.0), mirroring=(0, 1))
    (run / "recipe.yaml").write_text(f"dataset: {dataset}\n")
    (run / "data.json").write_text(json.dumps({"train_cases": TRAINING, "validation_cases": VALIDATION}))
    calibrate(run, flag_rate=0.2, step_size=1.0, device="cpu", quiet=True)
    return run


def run(model: Path, source: Path, out: Path, **options: Any) -> Any:
    return predict(model, source, out, device="cpu", quiet=True, step_size=1.0, **options)


def verdicts(out: Path) -> dict[str, tuple[str, set[str]]]:
    content = json.loads((out / "gates.json").read_text())
    return {row["case"]: (row["verdict"], {why["code"] for why in row["reasons"]}) for row in content["verdicts"]}


def changed(source: Path, target: Path, **change: Any) -> Path:
    """Write an image again with other voxels or another affine."""
    image = nibabel.load(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    voxels = change.get("voxels", np.asanyarray(image.dataobj))
    nibabel.save(nibabel.Nifti1Image(voxels, change.get("affine", image.affine)), target)
    return target


def test_calibration_spans_the_training_cases_and_tells_nothing_of_any(model: Path, tmp_path: Path) -> None:
    text = (model / "gates.json").read_text()
    content = json.loads(text)
    assert "patient" not in text and str(tmp_path.parent) not in text
    assert content["envelope"]["spacing_mm"] == [[1, 1], [1, 1], [1, 1]]
    assert content["envelope"]["extent_mm"] == [[16, 16], [18, 18], [20, 20]]
    assert content["envelope"]["modality"] == "MR" and content["envelope"]["cases"] == 5
    assert {name: row["cases"] for name, row in content["thresholds"].items()} == dict.fromkeys(
        ("embedding_distance", "disagreement", "entropy"), 4
    )
    assert sum(content["calibration"]["validation_verdicts"].values()) == 4
    assert content["temperature"] > 1 and content["calibration"]["temperature"]["fitted"]  # random weights are too sure


def test_volumes_of_training_labels_are_the_range(model: Path, dataset: Path) -> None:
    volumes = [np.sum(read_mask(dataset / "labelsTr" / f"{name}.nii.gz") == 2) / 1000 for name in TRAINING]
    found = json.loads((model / "gates.json").read_text())["envelope"]["volumes_ml"]["two"]
    assert found == pytest.approx([min(volumes), max(volumes)])


def test_too_few_validation_cases_are_refused_with_the_number_that_is_needed(model: Path, tmp_path: Path) -> None:
    before = (model / "gates.json").read_bytes()
    with pytest.raises(UsageError, match=r"4 validation cases cannot.* 5%.*: 19 are needed.*--flag-rate 0.2"):
        calibrate(model, device="cpu", quiet=True)
    assert (model / "gates.json").read_bytes() == before


def test_cases_that_were_trained_on_calibrate_nothing(model: Path) -> None:
    with pytest.raises(UsageError, match="patient_1 would be training and validation cases"):
        calibrate(model, validation_cases=["patient_1", *VALIDATION], flag_rate=0.2, device="cpu", quiet=True)


def test_an_ensemble_asks_for_cases_that_no_fold_has_seen(dataset: Path, tmp_path: Path) -> None:
    folds = make_model(tmp_path / "folds", folds=2, spacing=(1.0, 1.0, 1.0))
    with pytest.raises(UsageError, match=r"2 folds.*--validation-cases"):
        calibrate(folds, dataset=dataset, flag_rate=0.2, device="cpu", quiet=True)
    found = calibrate(
        folds, dataset=dataset, validation_cases=VALIDATION, flag_rate=0.2, step_size=1.0, device="cpu", quiet=True
    )
    assert "disagreement" in found.gates.thresholds  # the two folds disagree, without any mirroring


def test_without_mirroring_and_folds_there_is_no_disagreement_and_it_is_said(dataset: Path, tmp_path: Path) -> None:
    alone = make_model(tmp_path / "alone", spacing=(1.0, 1.0, 1.0))
    found = calibrate(
        alone, dataset=dataset, validation_cases=VALIDATION, flag_rate=0.2, step_size=1.0, device="cpu", quiet=True
    )
    assert "disagreement" not in found.gates.thresholds
    assert found.gates.facts["not_calibrated"][0].startswith("disagreement: one fold")


def test_regions_that_overlap_are_calibrated_too(dataset: Path, tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": 2}
    regions = make_model(tmp_path / "regions", spacing=(1.0, 1.0, 1.0), labels=labels, regions=[1, 2], mirroring=(0, 1))
    found = calibrate(
        regions, dataset=dataset, validation_cases=VALIDATION, flag_rate=0.2, step_size=1.0, device="cpu", quiet=True
    ).gates
    assert set(found.thresholds) == {"embedding_distance", "disagreement", "entropy"}
    whole, core = found.envelope.volumes_ml["whole"], found.envelope.volumes_ml["core"]
    assert whole[0] > core[0] and whole[1] > core[1] and found.facts["temperature"]["fitted"]


def test_each_case_gets_a_verdict_and_masks_are_what_they_are_without_gates(
    model: Path, dataset: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    source = dataset / "imagesTr" / "patient_0_0000.nii.gz"
    changed(source, images / "same.nii.gz")
    changed(source, images / "metres.nii.gz", affine=nibabel.load(source).affine * [[0.1], [0.1], [0.1], [1]])
    changed(source, images / "flat.nii.gz", voxels=np.full(SHAPE, 7, np.int16))
    (images / "broken.nii.gz").write_bytes(b"")
    summary = run(model, images, tmp_path / "on")
    run(model, images, tmp_path / "off", gates="off")
    assert not (tmp_path / "off" / "gates.json").exists()
    assert summary.exit_code == 3 and len(summary.predictions) == 3  # only the broken file is refused
    for name in ("same", "metres", "flat"):
        assert np.array_equal(
            read_mask(tmp_path / "on" / f"{name}.nii.gz"), read_mask(tmp_path / "off" / f"{name}.nii.gz")
        )
    found = verdicts(tmp_path / "on")
    assert found["metres"][0] == "refused" and {"spacing_unlike", "extent_unlike"} <= found["metres"][1]
    assert found["flat"][0] == "refused" and "intensity_constant" in found["flat"][1]
    assert found["broken"] == ("refused", {"not_read"}) or found["broken.nii.gz"] == ("refused", {"not_read"})
    assert not found["same"][1] & {"spacing_unlike", "extent_unlike", "intensity_unlike", "modality_unlike"}
    assert all(code in CODES and CODES[code].group == "gate" for _, codes in found.values() for code in codes)
    assert json.loads(json.dumps(summary.to_json()["gates"])) == json.loads(
        (tmp_path / "on" / "gates.json").read_text()
    )
    assert json.loads((tmp_path / "on" / "predictions.json").read_text())["gates"]["counts"]["refused"] == 3


def test_reasons_say_value_range_and_words(model: Path, dataset: Path, tmp_path: Path) -> None:
    source = dataset / "imagesTr" / "patient_0_0000.nii.gz"
    wide = changed(source, tmp_path / "wide.nii.gz", affine=nibabel.load(source).affine @ np.diag([2.0, 1, 1, 1]))
    run(model, wide, tmp_path / "out")
    row = json.loads((tmp_path / "out" / "gates.json").read_text())["verdicts"][0]
    why = next(why for why in row["reasons"] if why["code"] == "spacing_unlike")
    assert why["level"] == "review" and why["value"] == 2 and why["allowed"] == [0.8, 1.25]
    assert why["words"] == "x: 2 mm of voxel size; accepted: 0.8 to 1.25"


def test_enforced_gates_write_no_mask_and_end_with_3_or_4(model: Path, dataset: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    source = dataset / "imagesTr" / "patient_0_0000.nii.gz"
    changed(source, images / "metres.nii.gz", affine=nibabel.load(source).affine * [[0.1], [0.1], [0.1], [1]])
    strict = run(model, images, tmp_path / "all", gates="enforce")
    assert strict.exit_code == 4 and not list((tmp_path / "all").glob("*.nii.gz"))
    assert [row.code for row in strict.refused] == ["outside_training"]
    assert "accepted: 0.8 to 1.25" in strict.refused[0].detail
    changed(source, images / "same.nii.gz")
    mixed = run(model, images, tmp_path / "some", gates="enforce")
    assert mixed.exit_code == 3 and [path.name for path in (tmp_path / "some").glob("*.nii.gz")] == ["same.nii.gz"]
    assert verdicts(tmp_path / "some")["metres"][0] == "refused"


def test_pictures_and_other_modalities_are_refused(model: Path, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "picture").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (20, 18), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture" / "xray.png")
    assert run(model, tmp_path / "picture", tmp_path / "out", gates="enforce").exit_code == 4
    ((_, codes),) = verdicts(tmp_path / "out").values()
    assert {"modality_unlike", "single_slice"} <= codes
    write_series(tmp_path / "ct", slices=6)
    assert run(model, tmp_path / "ct", tmp_path / "ct_out", gates="enforce").exit_code == 4
    ((_, codes),) = verdicts(tmp_path / "ct_out").values()
    assert "modality_unlike" in codes and "single_slice" not in codes


def test_a_case_of_other_channels_is_refused(model: Path, dataset: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    for channel in (0, 1):
        changed(dataset / "imagesTr" / "patient_0_0000.nii.gz", images / f"a_{channel:04d}.nii.gz")
    run(model, images, tmp_path / "out", gates="enforce")
    assert list(verdicts(tmp_path / "out").values()) == [("refused", {"channel_count"})]


def test_a_label_that_every_training_case_has_must_be_found(model: Path, dataset: Path, tmp_path: Path) -> None:
    from medssl.inference.gates.gates import read_gates
    from medssl.inference.gates.measured import Measured

    gates = read_gates(model)
    assert gates is not None
    low, high = gates.envelope.volumes_ml["one"]
    parts = gates.envelope.parts["one"]

    def codes(volume: float, count: int) -> set[str]:
        found = Measured(volumes_ml={"one": volume}, parts={"one": count})
        return {why.code for why in gates.envelope.of_mask(found)}

    assert codes(high, parts) == set() and codes(low, 1) == set()
    assert codes(0.0, 0) == {"organ_not_found"}
    assert codes(high * 2, parts) == codes(low / 2, parts) == {"volume_unlike"}
    assert codes(high, parts + 1) == {"parts_unlike"}


def test_options_unlike_the_calibration_leave_out_its_scores_and_say_so(
    model: Path, dataset: Path, tmp_path: Path
) -> None:
    run(model, dataset / "imagesTr" / "patient_0_0000.nii.gz", tmp_path / "out", mirroring=False)
    row = json.loads((tmp_path / "out" / "gates.json").read_text())["verdicts"][0]
    assert "entropy: calibrated with another --step-size or mirroring" in row["not_checked"]
    assert not {why["code"] for why in row["reasons"]} & {"members_disagree", "organ_uncertain"}


def test_gates_of_other_weights_or_none_or_damaged_are_named(model: Path, dataset: Path, tmp_path: Path) -> None:
    source = dataset / "imagesTr" / "patient_0_0000.nii.gz"
    other = make_model(tmp_path / "other", seed=5, spacing=(1.0, 1.0, 1.0), mirroring=(0, 1))
    with pytest.raises(UsageError, match=r"no gates\.json"):
        run(other, source, tmp_path / "out", gates="enforce")
    assert run(other, source, tmp_path / "none").to_json()["gates"] is None
    shutil.copy(model / "gates.json", other / "gates.json")
    with pytest.raises(UsageError, match=r"other weights.*medssl calibrate"):
        run(other, source, tmp_path / "out")
    (other / "gates.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"gates\.json of the model cannot be used"):
        run(other, source, tmp_path / "out")
    assert run(other, source, tmp_path / "off", gates="off").exit_code == 0


def test_the_name_map_is_written_where_asked_and_never_among_the_outputs(model: Path, tmp_path: Path) -> None:
    write_series(tmp_path / "in" / "Mueller", slices=6)
    with pytest.raises(UsageError, match=r"lies in --out.*may name patients"):
        run(model, tmp_path / "in", tmp_path / "out", name_map=tmp_path / "out" / "map.csv")
    summary = run(model, tmp_path / "in", tmp_path / "out", name_map=tmp_path / "map.csv")
    rows = list(csv.DictReader((tmp_path / "map.csv").open()))
    assert {row["mask"] for row in rows} == {summary.predictions[0].mask} and len(rows) == 6
    assert {row["case"] for row in rows} == {summary.predictions[0].case}
    assert {row["input"] for row in rows} == {
        str(path.relative_to(tmp_path / "in")) for path in (tmp_path / "in" / "Mueller").iterdir()
    }
    assert not any(b"Mueller" in path.read_bytes() for path in (tmp_path / "out").iterdir())
