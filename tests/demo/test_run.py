"""The demo goes from DICOM to a report, keeps to its folder, and tells the truth about what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import polars as pl
import pytest

from medssl.demo.archive import ARCHIVE, HOSPITAL, NEW_PATIENTS
from medssl.demo.dataset import TASK, Case, choose_training, write_label
from medssl.demo.phantom import CtLook, body, ct, grid
from medssl.demo.run import demo
from medssl.errors import UsageError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A quick demo run as a user runs it, and what it wrote to its streams."""
    home, out = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("demo") / "out"
    environment = {**os.environ, "HOME": str(home), "XDG_CONFIG_HOME": str(home), "XDG_CACHE_HOME": str(home)}
    command = [sys.executable, "-m", "medssl", "demo", "--out", str(out), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done, home


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_the_demo_leaves_every_stage_where_it_says(finished):
    out, _, _ = finished
    runs = ("pretrained/report.html", "finetuned/report.html", "scratch/report.html")
    others = ("index/refused.parquet", "store/store.json", "finetuned/fold_0/checkpoint_final.pth", "comparison.json")
    for name in (*runs, *others, "commands.sh"):
        assert (out / name).is_file(), name


@pytest.mark.slow
def test_each_defect_is_refused_or_set_aside_under_its_code(finished):
    out, _, _ = finished
    refused = set(pl.read_parquet(out / "index/refused.parquet")["code"])
    related = set(pl.read_parquet(out / "index/related.parquet")["kind"])
    assert {"gantry_tilt", "missing_slices", "truncated", "too_few_slices", "empty_file"} <= refused
    assert {"secondary_capture", "structured_report", "encapsulated_document", "localiser"} <= related
    volumes = json.loads((out / "index/index.json").read_text())["volumes"]
    known = json.loads((out / "hospital/truth.json").read_text())
    # The hospital's own, and what is good of three studies: with a duplicate, a localiser, a screenshot.
    assert volumes == sum(truth["tree"] == ARCHIVE for truth in known) + 3


@pytest.mark.slow
def test_labels_fit_the_converted_images(finished):
    out, _, _ = finished
    for path in (out / "dataset/labelsTr").iterdir():
        label = nib.load(path)
        image = nib.load(out / "dataset/imagesTr" / path.name.replace(".nii.gz", "_0000.nii.gz"))
        assert np.allclose(label.affine, image.affine) and label.shape == image.shape
        liver = np.asarray(image.dataobj)[np.asarray(label.dataobj) == TASK["liver"]]
        assert np.median(liver) == pytest.approx(102, abs=15), "a label drawn beside its organ would show lung and fat"


@pytest.mark.slow
def test_validation_patients_were_never_in_the_store(finished):
    out, _, _ = finished
    store = {path.stem for path in (out / "store").glob("*.b2nd")}
    converted = pl.read_parquet(out / "nifti/volumes.parquet")
    known = json.loads((out / "hospital/truth.json").read_text())
    new = {file for truth in known if truth["tree"] == NEW_PATIENTS for file in truth["files"]}
    ids = {row["volume_id"] for row in converted.iter_rows(named=True) if row["relative_paths"][0] in new}
    assert ids and not ids & store


@pytest.mark.slow
def test_the_demo_narrates_and_ends_with_numbers_and_places(finished):
    out, done, _ = finished
    for step in range(1, 11):
        assert f"[{step}/10]" in done.stderr
    assert "paired difference" in done.stderr and "finetuned/report.html" in done.stderr
    told = json.loads((out / "comparison.json").read_text())["means"]["finetuned"]["dice"]["all labels"]["mean"]
    assert f"{told:.3f}" in done.stderr
    assert str(out) not in (out / "commands.sh").read_text()
    for line in (out / "commands.sh").read_text().splitlines():
        assert line.startswith(("medssl ", "#", "cd "))


@pytest.mark.slow
def test_the_demo_writes_nothing_outside_its_folder(finished):
    _, _, home = finished
    left = [path for path in home.rglob("*") if path.is_file() and "matplotlib" not in str(path)]
    assert not left


def test_a_folder_of_someone_else_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError):
            demo(tmp_path, quick=True, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_labelled_patients_come_from_both_sites():
    cases = [Case(f"a{n}", Path(), n, 0.0, ARCHIVE, f"site_{'ab'[n // 4]}/x/{n}") for n in range(8)]
    cases.append(Case("new", Path(), 9, 0.0, NEW_PATIENTS, "site_a/x"))
    assert [case.patient for case in choose_training(cases, 3)] == [0, 4, 1]


def test_a_label_is_drawn_through_the_images_own_affine(tmp_path):
    person = body(0, 0, healthy=True)
    for name, directions in (("head first", np.diag([1.0, 1.0, 1.0])), ("turned", np.diag([-1.0, 1.0, -1.0]))):
        where = grid((20, 40, 40), (10.0, 9.0, 9.0), directions, np.array([0.0, 0.0, -35.0]))
        volume = ct(person, where, CtLook(noise_hu=0), 1)
        nib.save(nib.Nifti1Image(volume.transpose(2, 1, 0), where.affine), tmp_path / f"{name}.nii.gz")
        write_label(tmp_path / "label.nii.gz", Case(name, tmp_path / f"{name}.nii.gz", 0, 0.0), 0)
        label = nib.load(tmp_path / "label.nii.gz")
        liver = volume.transpose(2, 1, 0)[np.asarray(label.dataobj) == TASK["liver"]]
        assert np.median(liver) == pytest.approx(102, abs=12)
        assert np.allclose(label.affine, where.affine)


def test_the_hospital_is_as_large_as_a_demo_should_be():
    patients = HOSPITAL.ct_patients + HOSPITAL.mr_patients - HOSPITAL.mr_patients // 2 + HOSPITAL.new_patients
    assert 30 <= patients <= 40
