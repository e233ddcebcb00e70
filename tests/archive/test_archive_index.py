"""The index: every file accounted for, the same bytes each time, only what is new is read, nothing of the patient."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from medssl.archive.codes import CODES
from medssl.archive.index import Run, index
from medssl.archive.load import open_index
from medssl.archive.manifest import TABLES
from medssl.archive.private import locked
from medssl.archive.stages import Stages
from medssl.archive.summary import IndexSummary
from medssl.archive.tasks import FileTask, read_file
from medssl.errors import EXIT_ALL_REFUSED, EXIT_OK, EXIT_SOME_REFUSED, InputRefused, MedsslError, UsageError
from tests.archive.archive_files import patch, voxels, write_nifti, write_series


def run(source: Path | list[Path], out: Path, **more) -> IndexSummary:
    sources = source if isinstance(source, list) else [source]
    return index(sources, out, workers=more.pop("workers", 1), quiet=True, **more)


def manifest_bytes(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in (*(f"{table}.parquet" for table in TABLES), "index.json")}


def places(out: Path) -> dict[str, list[str]]:
    """Return for each path where it ended: `volume`, or the code or kind."""
    found: dict[str, list[str]] = {}
    opened = open_index(out)
    for paths in opened.rows()["relative_paths"]:
        for path in paths:
            found.setdefault(path, []).append("volume")
    for row in opened.refused().iter_rows(named=True):
        found.setdefault(row["relative_path"], []).append(row["code"])
    for row in opened.related().iter_rows(named=True):
        found.setdefault(row["relative_path"], []).append(row["kind"])
    return found


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Two CT series of two patients, two NIfTI, a picture."""
    root = tmp_path / "archive"
    write_series(root / "ct1", series="1.2.3.4", study="1.2.3")
    write_series(root / "ct2", series="1.2.8.4", study="1.2.8", patient="P2", name="Roe^Jo", birth="19800202", seed=1)
    write_nifti(root / "case_001_0000.nii.gz", seed=2)
    write_nifti(root / "sub-07" / "sub-07_T1w.nii", seed=3)
    Image.fromarray(voxels((9, 11), dtype=np.uint8)).save(root / "picture.png")
    return root


def spoil(root: Path) -> dict[str, str]:
    """Add bad input; return the code each must end with."""
    bad = root / "bad"
    bad.mkdir()
    (bad / "empty.dcm").touch()
    (bad / "text.dcm").write_text("Dear colleague")
    (bad / "archive.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    full = write_nifti(bad / "cut.nii", (20, 20, 20), seed=9)
    full.write_bytes(full.read_bytes()[:3000])
    patch(write_nifti(bad / "huge.nii"), 40, np.array([3, 32767, 32767, 32767], "<i2").tobytes())
    patch(write_nifti(bad / "flat.nii"), 80, bytes(4))
    patch(write_nifti(bad / "magic.nii"), 344, b"zzz\0")
    patch(write_nifti(bad / "nan.nii", dtype=np.float32), 352, np.full(200, np.nan, "<f4").tobytes())
    (cut, *others) = write_series(root / "cut", series="1.5.5", study="1.5", slices=4, seed=5)
    cut.write_bytes(cut.read_bytes()[:-100])
    for other in others:
        other.unlink()
    (bad / "loop").symlink_to(root)
    (bad / "gone").symlink_to(root / "nothing")
    os.mkfifo(bad / "pipe")
    return {
        "bad/empty.dcm": "empty_file",
        "bad/text.dcm": "not_an_image",
        "bad/archive.zip": "archive_not_opened",
        "bad/cut.nii": "truncated",
        "bad/huge.nii": "too_large",
        "bad/flat.nii": "spacing_invalid",
        "bad/magic.nii": "header_invalid",
        "bad/nan.nii": "not_finite",
        "cut/I0000": "truncated",
        "bad/loop": "symlink_loop",
        "bad/gone": "broken_link",
        "bad/pipe": "special_file",
    }


def test_a_clean_archive_is_accepted_whole(archive, tmp_path):
    summary = run(archive, tmp_path / "index")
    assert (summary.files, summary.volumes, summary.files_in_volumes) == (11, 5, 11)
    assert summary.exit_code == EXIT_OK and not summary.refused
    rows = open_index(tmp_path / "index").rows()
    assert rows["volume_id"].is_unique().all() and rows["volume_id"].is_sorted()
    ct = rows.filter(pl.col("modality") == "CT")
    assert ct["shape"].to_list() == [[1, 4, 16, 16]] * 2
    assert ct["spacing_mm"].to_list() == [[2.0, 0.7, 0.7]] * 2
    assert ct["body_part"].to_list() == ["CHEST"] * 2
    assert set(rows["modality"]) == {"CT", "OT", "MR", "IMAGE"}  # T1w of a BIDS name is MR
    assert set(rows["split"]) <= {"train", "validation"}
    assert (rows["p00_5"] <= rows["p50"]).all() and (rows["p50"] <= rows["p99_5"]).all()


def test_each_bad_input_costs_its_own_row_and_nothing_else(archive, tmp_path):
    expected = spoil(archive)
    summary = run(archive, tmp_path / "index")
    found = places(tmp_path / "index")
    assert {path: found[path] for path in expected} == {path: [code] for path, code in expected.items()}
    assert summary.volumes == 5
    assert summary.exit_code == EXIT_SOME_REFUSED
    assert summary.files == len(found) == summary.files_in_volumes + sum(summary.refused.values())
    assert all(len(ends) == 1 for ends in found.values())
    assert {code for ends in found.values() for code in ends} <= {*CODES, "volume"}
    assert all(code in str(summary) for code in summary.refused)


def test_nothing_but_refused_input_is_exit_code_4(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").write_text("no image")
    summary = run(tmp_path / "source", tmp_path / "index")
    assert summary.exit_code == EXIT_ALL_REFUSED
    assert open_index(tmp_path / "index").refused()["code"].to_list() == ["not_an_image"]


@pytest.mark.slow
def test_the_same_archive_gives_the_same_bytes(archive, tmp_path):
    spoil(archive)
    run(archive, tmp_path / "one")
    first = manifest_bytes(tmp_path / "one")
    run(archive, tmp_path / "one", resume=True)
    assert manifest_bytes(tmp_path / "one") == first
    run(archive, tmp_path / "one", overwrite=True, workers=2)
    assert manifest_bytes(tmp_path / "one") == first
    run(archive, tmp_path / "two", workers=2)
    assert manifest_bytes(tmp_path / "two") == first


def test_a_moved_archive_keeps_its_ids(archive, tmp_path):
    run(archive, tmp_path / "one")
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(archive, tmp_path / "elsewhere" / "archive")
    run(Path(moved), tmp_path / "two")
    assert open_index(tmp_path / "one").rows().equals(open_index(tmp_path / "two").rows())


def test_only_what_is_new_or_changed_is_read_again(archive, tmp_path):
    out = tmp_path / "index"
    first = run(archive, out)
    assert (first.headers_read, first.volumes_decoded) == (11, 5)
    again = run(archive, out, resume=True)
    assert (again.headers_read, again.volumes_decoded) == (0, 0)
    before = {row["volume_id"]: row for row in open_index(out).rows().iter_rows(named=True)}
    write_nifti(archive / "new.nii", seed=8)
    grown = run(archive, out, resume=True)
    assert (grown.headers_read, grown.volumes_decoded, grown.volumes) == (1, 1, 6)
    after = {row["volume_id"]: row for row in open_index(out).rows().iter_rows(named=True)}
    assert {key: after[key] for key in before} == before
    os.utime(archive / "new.nii")
    touched = run(archive, out, resume=True)
    assert (touched.headers_read, touched.volumes_decoded, touched.volumes) == (1, 1, 6)
    (archive / "new.nii").unlink()
    gone = run(archive, out, resume=True)
    assert (gone.headers_read, gone.volumes_decoded, gone.volumes, gone.files) == (0, 0, 5, 11)
    assert "new.nii" not in places(out)


def test_a_series_that_grows_is_planned_again_with_its_old_id(archive, tmp_path):
    out = tmp_path / "index"
    run(archive, out)
    before = open_index(out).rows("modality = 'CT'")
    write_series(archive / "ct1", series="1.2.3.4", study="1.2.3", slices=6)
    summary = run(archive, out, resume=True)
    after = open_index(out).rows("modality = 'CT'")
    assert sorted(shape[1] for shape in after["shape"]) == [4, 6]
    assert after["volume_id"].to_list() == before["volume_id"].to_list()
    assert summary.volumes == 5


def test_another_geometry_policy_is_applied_on_resume(tmp_path):
    for path in write_series(tmp_path / "a" / "gap", slices=6)[3:4]:
        path.unlink()
    strict = run(tmp_path / "a", tmp_path / "index")
    assert strict.volumes == 0 and "missing_slices" in strict.refused
    repaired = run(tmp_path / "a", tmp_path / "index", resume=True, geometry="repair")
    assert repaired.volumes == 1 and repaired.headers_read == 0
    assert run(tmp_path / "a", tmp_path / "index", resume=True).volumes == 0


def test_a_file_that_changes_while_it_is_read_has_a_code(tmp_path, monkeypatch):
    path = write_nifti(tmp_path / "a" / "one.nii")
    write_nifti(tmp_path / "a" / "two.nii", seed=1)
    with pytest.raises(InputRefused, match="changed_while_read"):
        read_file(FileTask(0, str(path.parent), path.name, path.stat().st_size, path.stat().st_mtime_ns - 1))
    original = Stages.decode

    def decode(self: Stages) -> None:
        with path.open("ab") as handle:
            handle.write(b"more")
        original(self)

    monkeypatch.setattr(Stages, "decode", decode)
    run(tmp_path / "a", tmp_path / "index")
    assert places(tmp_path / "index") == {"one.nii": ["changed_while_read"], "two.nii": ["volume"]}
    monkeypatch.setattr(Stages, "decode", original)
    run(tmp_path / "a", tmp_path / "index", resume=True)
    assert places(tmp_path / "index") == {"one.nii": ["volume"], "two.nii": ["volume"]}


def test_a_file_that_vanishes_is_refused_and_forgotten_next_time(archive, tmp_path, monkeypatch):
    original = Stages.read_headers

    def read_headers(self: Stages) -> None:
        (archive / "picture.png").unlink()
        original(self)

    monkeypatch.setattr(Stages, "read_headers", read_headers)
    assert run(archive, tmp_path / "index").refused == {"vanished": 1}
    monkeypatch.setattr(Stages, "read_headers", original)
    assert run(archive, tmp_path / "index", resume=True).refused == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_read_once_it_may_be(archive, tmp_path):
    (archive / "picture.png").chmod(0)
    assert run(archive, tmp_path / "index").refused == {"unreadable": 1}
    (archive / "picture.png").chmod(0o600)
    assert run(archive, tmp_path / "index", resume=True).refused == {}


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_the_same(archive, tmp_path):
    for number in range(30):
        write_nifti(archive / "more" / f"{number}.nii.gz", (30, 30, 30), seed=number)
    run(archive, tmp_path / "whole")
    out = tmp_path / "killed"
    command = "import sys; from pathlib import Path; from medssl.archive.index import index\n"
    command += "index([Path(sys.argv[1])], Path(sys.argv[2]), workers=1, quiet=True, resume=True)"
    for delay in (0.3, 0.6, 0.9, 1.2):
        process = subprocess.Popen([sys.executable, "-c", command, str(archive), str(out)])
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(archive, out, resume=True)
    assert manifest_bytes(out) == manifest_bytes(tmp_path / "whole")


def test_no_name_id_or_date_leaves_the_private_folder(tmp_path):
    canaries = ["CANARYNAME", "CANARYID", "19231231", "CANARYUID", "CANARYTEXT", "1.2.826.0.1.77"]
    source = tmp_path / "source"
    identity = {
        "patient": "CANARYID",
        "name": "CANARYNAME^X",
        "birth": "19231231",
        "StudyDate": "19231231",
        "StudyDescription": "CANARYTEXT",
        "SeriesDescription": "CANARYTEXT",
        "AccessionNumber": "CANARYID",
        "ReferringPhysicianName": "CANARYNAME",
        "ImageComments": "CANARYTEXT",
    }
    write_series(source / "s", series="1.2.826.0.1.77.4", study="1.2.826.0.1.77", **identity)
    (cut, *_) = write_series(source / "t", series="1.2.826.0.1.77.5", study="1.2.826.0.1.77", slices=3, **identity)
    cut.write_bytes(cut.read_bytes()[:-50])
    header_only = write_series(source / "u", series="1.2.826.0.1.77.6", study="1.2.826.0.1.77", slices=3, **identity)
    for path in header_only:
        path.write_bytes(path.read_bytes().replace(b"CANARYTEXT", b"CANARY\xff\xfe\x00\x01")[:700])
    import nibabel as nib

    image = nib.load(write_nifti(source / "n.nii.gz"))
    image.header["descrip"], image.header["db_name"] = b"CANARYTEXT", b"CANARYNAME"
    nib.save(image, source / "n.nii.gz")
    out = tmp_path / "index"
    run(source, out)
    told = []
    for path in out.rglob("*"):
        if path.is_file() and "private" not in path.parts:
            told.append(path.read_bytes().decode("latin-1"))
            if path.suffix == ".parquet":
                told.append(str(pl.read_parquet(path).to_dicts()))
    text = "\n".join(told)
    assert str(tmp_path) not in text
    assert [canary for canary in canaries if canary in text] == []
    assert oct((out / "private").stat().st_mode & 0o777) == "0o700"


def test_a_patient_has_one_key_and_one_side_of_the_split_in_every_index(archive, tmp_path):
    run(archive, tmp_path / "one")
    write_series(tmp_path / "later" / "x", series="1.9.9.1", study="1.9.9", seed=4)
    run(tmp_path / "later", tmp_path / "two")
    one = open_index(tmp_path / "one").rows("modality = 'CT'")
    two = open_index(tmp_path / "two").rows()
    shared = one.join(two, on="patient_key")
    assert shared.height == 1
    assert shared["split"].to_list() == shared["split_right"].to_list()


def test_an_index_is_not_continued_with_another_key(archive, tmp_path, monkeypatch):
    run(archive, tmp_path / "index", key_file=tmp_path / "one.key")
    assert oct((tmp_path / "one.key").stat().st_mode & 0o777) == "0o600"
    assert not (tmp_path / "index" / "private" / "key").exists()
    with pytest.raises(UsageError, match="another key"):
        run(archive, tmp_path / "index", resume=True, key_file=tmp_path / "two.key")
    monkeypatch.setenv("MEDSSL_KEY_FILE", str(tmp_path / "one.key"))
    run(archive, tmp_path / "index", resume=True)
    run(archive, tmp_path / "other", key_file=tmp_path / "two.key")
    assert not set(open_index(tmp_path / "index").rows()["patient_key"]) & set(
        open_index(tmp_path / "other").rows()["patient_key"]
    )


def test_two_patients_with_one_id_are_flagged_and_stay_on_one_side(tmp_path):
    write_series(tmp_path / "a" / "x", series="1.1.1", study="1.1", name="Doe^Jane", birth="19700101")
    write_series(tmp_path / "a" / "y", series="1.2.1", study="1.2", name="Roe^Max", birth="19510505", seed=1)
    write_series(tmp_path / "a" / "z", series="1.3.1", study="1.3", name="Poe^Eve", patient="P9", seed=2)
    run(tmp_path / "a", tmp_path / "index")
    rows = open_index(tmp_path / "index").rows()
    flagged = rows.filter(pl.col("flags").list.contains("patient_conflict"))
    assert flagged.height == 2 and flagged["patient_key"].n_unique() == 1


def test_one_series_with_two_patients_is_refused(tmp_path):
    write_series(tmp_path / "a" / "x", slices=4)
    for path in write_series(tmp_path / "a" / "y", slices=8, patient="P2", name="Roe^Max", birth="19510505")[:4]:
        path.unlink()
    summary = run(tmp_path / "a", tmp_path / "index")
    assert summary.refused == {"series_of_two_patients": 8}


def test_a_series_in_two_sources_is_one_volume_unless_it_differs(tmp_path):
    write_series(tmp_path / "one" / "s")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    same = run([tmp_path / "one", tmp_path / "two"], tmp_path / "index")
    assert (same.volumes, same.refused) == (1, {"duplicate_volume": 4})
    write_series(tmp_path / "three" / "s", seed=7)
    differ = run([tmp_path / "one", tmp_path / "three"], tmp_path / "other")
    assert differ.volumes == 2 and differ.flags["series_in_two_sources"] == 2


def test_equal_voxels_are_flagged(tmp_path):
    write_nifti(tmp_path / "a" / "x.nii")
    shutil.copy(tmp_path / "a" / "x.nii", tmp_path / "a" / "y.nii")
    write_nifti(tmp_path / "a" / "z.nii", seed=1)
    assert run(tmp_path / "a", tmp_path / "index").flags["duplicate_voxels"] == 2


def test_companions_sidecars_and_masks_are_related(tmp_path):
    import SimpleITK as sitk

    source = tmp_path / "a"
    write_nifti(source / "scan.nii.gz")
    (source / "scan.json").write_text('{"Modality": "MR", "BodyPartExamined": "BRAIN", "PatientName": "Doe"}')
    (source / "scan.bval").write_text("0 1000")
    (source / "other.json").write_text("{}")
    sitk.WriteImage(sitk.GetImageFromArray(voxels((4, 5, 6))), str(source / "b.mhd"))
    write_nifti(source / "labelsTr" / "scan.nii.gz")
    summary = run(source, tmp_path / "index")
    assert summary.related == {"companion_file": 1, "label_map": 1, "sidecar": 2}
    assert places(tmp_path / "index")["other.json"] == ["not_an_image"]
    row = open_index(tmp_path / "index").rows("body_part = 'BRAIN'")
    assert row["modality"].to_list() == ["MR"]
    (source / "scan.json").write_text('{"Modality": "CT"}')
    run(source, tmp_path / "index", resume=True)
    assert open_index(tmp_path / "index").rows("modality = 'CT'").height == 1


def test_channels_of_an_nnunet_data_set_get_their_modality_and_share_a_patient(tmp_path):
    source = tmp_path / "Dataset001_X"
    write_nifti(source / "imagesTr" / "c1_0000.nii.gz")
    write_nifti(source / "imagesTr" / "c1_0001.nii.gz", seed=1)
    (source / "dataset.json").write_text('{"channel_names": {"0": "CT", "1": "T1"}}')
    run(source, tmp_path / "index")
    rows = open_index(tmp_path / "index").rows()
    assert set(rows["modality"]) == {"CT", "MR"} and rows["patient_key"].n_unique() == 1


def test_any_executor_gives_the_same_index(archive, tmp_path):
    run(archive, tmp_path / "one")
    with ThreadPoolExecutor(2) as executor:
        run(archive, tmp_path / "two", executor=executor)
    assert manifest_bytes(tmp_path / "one") == manifest_bytes(tmp_path / "two")


def test_unusable_options_are_named(archive, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    (tmp_path / "void").mkdir()
    with pytest.raises(UsageError, match="--resume to continue it, --overwrite"):
        run(archive, tmp_path / "full")
    for more in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(UsageError):
            run(archive, tmp_path / "full", **more)
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"
    with pytest.raises(UsageError, match="strict"):
        run(archive, tmp_path / "index", geometry="strikt")
    with pytest.raises(UsageError, match="no file"):
        run(tmp_path / "void", tmp_path / "index")
    with pytest.raises(UsageError, match="does not exist"):
        run(tmp_path / "nothing", tmp_path / "index2")
    with pytest.raises(UsageError, match="lies in the source"):
        run(archive, archive / "index")


def test_a_run_that_was_killed_at_once_can_be_continued(archive, tmp_path):
    private = tmp_path / "index" / "private"
    private.mkdir(parents=True)
    (private / ".temporary-README").touch()
    assert run(archive, tmp_path / "index", resume=True).volumes == 5


def test_a_second_writer_is_kept_off(archive, tmp_path):
    run(archive, tmp_path / "index")
    with locked(tmp_path / "index"), pytest.raises(UsageError, match="Another process"):
        run(archive, tmp_path / "index", resume=True)


def test_an_unfinished_or_changed_index_is_not_opened(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(archive, tmp_path / "index")
    monkeypatch.undo()
    with pytest.raises(UsageError, match="--resume"):
        open_index(tmp_path / "index")
    with pytest.raises(UsageError, match="no index"):
        open_index(archive)
    run(archive, tmp_path / "index", resume=True)
    patch(tmp_path / "index" / "volumes.parquet", 100, b"x")
    with pytest.raises(MedsslError, match=r"volumes\.parquet"):
        open_index(tmp_path / "index")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_ends_with_a_remedy_and_nothing_half_written(tmp_path):
    source, disk = tmp_path / "source", tmp_path / "disk"
    for number in range(150):
        write_series(source / f"s{number:03d}", series=f"1.7.{number}.1", study=f"1.7.{number}", slices=3, seed=number)
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(MedsslError, match=r"No space left.*--resume"):
            run(source, disk / "index", workers=2)
        left = {path.name for path in (disk / "index").iterdir()}
        assert left <= {"private"}
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        assert run(source, disk / "index", resume=True).volumes == 150
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_real_archive_loses_nothing(data_folder, tmp_path):
    source = data_folder / "dicom"
    if not source.is_dir():
        pytest.skip("no dicom folder in the real data")
    summary = run(source, tmp_path / "index", workers=2)
    found = places(tmp_path / "index")
    names = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert set(found) == names
    assert all(len(ends) == 1 for ends in found.values())
    assert summary.files == len(names)
    assert summary.files == summary.files_in_volumes + sum(summary.related.values()) + sum(summary.refused.values())
    assert {code for ends in found.values() for code in ends} <= {*CODES, "volume"}
    (ct,) = [row for row in open_index(tmp_path / "index").rows("modality = 'CT'").to_dicts() if row["shape"][1] == 20]
    assert len(ct["relative_paths"]) == 20
