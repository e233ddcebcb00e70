"""`preprocess`: the same store however it is run, one row for what fails, nothing lost on the way."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from medssl.errors import EXIT_ALL_REFUSED, EXIT_OK, EXIT_SOME_REFUSED, DataError, MedsslError, UsageError
from medssl.preprocessing import worker
from medssl.preprocessing.case import Plan
from medssl.preprocessing.run import preprocess
from medssl.preprocessing.source import open_source
from medssl.preprocessing.store import Store
from tests.preprocessing.raw import SHAPE, make_raw, write_nifti


def run(raw: Path, out: Path, **options):
    return preprocess(raw, out, quiet=True, **{"workers": 1, **options})


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_raw_data_set_becomes_a_store_with_labels(tmp_path: Path) -> None:
    summary = run(make_raw(tmp_path / "raw"), tmp_path / "store", spacing=(1.0, 1.0, 1.0))
    assert (summary.volumes, summary.failed, summary.exit_code) == (4, 0, EXIT_OK)
    assert "4 volumes" in str(summary) and summary.to_json()["spacing_mm"] == [1.0, 1.0, 1.0]
    store = Store.open(tmp_path / "store")
    assert store.ids == [f"case_{number}" for number in range(4)]
    entry = store.entry("case_1")
    assert entry.spacing_mm == (1.0, 1.0, 1.0) and entry.modality == "MR" and entry.has_label
    label = store.read_label("case_1", (0, 0, 0), entry.shape[1:])
    image = store.read("case_1", (0, 0, 0), entry.shape[1:])
    assert label is not None and set(np.unique(label)) == {0, 1, 2}
    assert image[0][label == 2].mean() > image[0][label == 1].mean() > image[0][label == 0].mean()
    assert not list((tmp_path / "store").glob(".*"))


def test_the_store_does_not_depend_on_workers_or_executor(tmp_path: Path) -> None:
    raw = make_raw(tmp_path / "raw", channel="CT")
    run(raw, tmp_path / "one")
    run(raw, tmp_path / "two", workers=2)
    with ThreadPoolExecutor(2) as executor:
        run(raw, tmp_path / "three", executor=executor)
    assert tree(tmp_path / "one") == tree(tmp_path / "two") == tree(tmp_path / "three")


@pytest.mark.slow
def test_the_store_is_the_same_on_a_dask_cluster(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    raw = make_raw(tmp_path / "raw", channel="CT")
    shutil.copy(raw / "dataset.json", raw / "imagesTr" / "case_9_0000.nii.gz")
    run(raw, tmp_path / "pool")
    assert run(raw, tmp_path / "local", scheduler="local", workers=2).exit_code == EXIT_SOME_REFUSED
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        run(raw, tmp_path / "remote", scheduler=cluster.scheduler_address)
    assert tree(tmp_path / "pool") == tree(tmp_path / "local") == tree(tmp_path / "remote")


def test_a_scheduler_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("medssl.preprocessing.cluster.SECONDS_TO_CONNECT", 0.5)
    with pytest.raises(UsageError, match="no Dask scheduler answers"):
        run(make_raw(tmp_path / "raw", n=1), tmp_path / "store", scheduler="tcp://127.0.0.1:9")


def test_bad_volumes_cost_a_row_each_and_the_others_are_written(tmp_path: Path) -> None:
    raw = make_raw(tmp_path / "raw", n=2)
    images, labels = raw / "imagesTr", raw / "labelsTr"
    good = (images / "case_0_0000.nii.gz").read_bytes()
    for name in ("truncated", "shape", "values", "zero", "grid"):
        (images / f"{name}_0000.nii.gz").write_bytes(good)
    (images / "truncated_0000.nii.gz").write_bytes(good[: len(good) // 2])
    (images / "nothing_0000.nii.gz").write_bytes(b"")
    write_nifti(labels / "shape.nii.gz", np.zeros((5, 5, 5), np.uint8))
    write_nifti(labels / "values.nii.gz", np.full(SHAPE, 255, np.uint8))
    write_nifti(labels / "grid.nii.gz", np.zeros(SHAPE, np.uint8), np.diag([1.0, 1.2, 3.0, 1.0]))
    write_nifti(images / "zero_0000.nii.gz", np.zeros(SHAPE, np.float32))
    write_nifti(images / "flat_0000.nii.gz", np.full(SHAPE, 5, np.float32))
    write_nifti(images / "nan_0000.nii.gz", np.full(SHAPE, np.nan, np.float32))
    header = bytearray(gzip.decompress(good))
    header[80:84] = bytes(4)  # pixdim[1]
    (images / "size_0000.nii.gz").write_bytes(gzip.compress(header))
    summary = run(raw, tmp_path / "store", spacing=(2.0, 2.0, 2.0))
    assert (summary.volumes, summary.failed, summary.exit_code) == (2, 9, EXIT_SOME_REFUSED)
    rows = json.loads((tmp_path / "store" / "failed.json").read_text())["volumes"]
    codes = {row["volume_id"]: row["code"] for row in rows}
    assert codes.pop("nothing") in ("truncated", "empty_file")
    assert codes == {
        "flat": "no_contrast",
        "grid": "label_grid_differs",
        "nan": "not_finite",
        "shape": "label_shape_differs",
        "size": "spacing_invalid",
        "truncated": "truncated",
        "values": "label_values_unknown",
        "zero": "no_content",
    }
    assert next(row for row in rows if row["volume_id"] == "values")["detail"].endswith("dataset.json knows {0, 1, 2}")
    assert Store.open(tmp_path / "store").ids == ["case_0", "case_1"]


def test_when_every_volume_fails_there_is_no_store_and_the_exit_code_says_so(tmp_path: Path) -> None:
    raw = make_raw(tmp_path / "raw", n=1)
    (raw / "imagesTr" / "case_0_0000.nii.gz").write_bytes(b"not an image")
    summary = run(raw, tmp_path / "store", spacing="native")
    assert (summary.volumes, summary.exit_code) == (0, EXIT_ALL_REFUSED)
    with pytest.raises(UsageError, match="not finished"):
        Store.open(tmp_path / "store")


def test_resume_keeps_what_is_complete_and_repeats_what_is_not(tmp_path: Path) -> None:
    raw, out = make_raw(tmp_path / "raw", channel="CT"), tmp_path / "store"
    run(raw, out)
    before = tree(out)
    kept = (out / "case_0.b2nd").stat().st_mtime_ns
    (out / "case_1.json").unlink()
    (out / "case_2.b2nd").write_bytes(b"short")
    content = bytearray((out / "case_3.b2nd").read_bytes())
    content[len(content) // 2] ^= 255
    (out / "case_3.b2nd").write_bytes(bytes(content))
    (out / "store.json").rename(out / "unfinished.json")
    (out / f".{'a' * 32}-case_1.b2nd").write_bytes(b"left by a killed process")
    summary = run(raw, out, resume=True)
    assert summary.kept == 1 and summary.volumes == 4
    assert (out / "case_0.b2nd").stat().st_mtime_ns == kept
    assert tree(out) == before


def test_resume_with_other_options_or_other_images_is_an_error(tmp_path: Path) -> None:
    raw, out = make_raw(tmp_path / "raw", n=2), tmp_path / "store"
    run(raw, out)
    with pytest.raises(UsageError, match="not empty"):
        run(raw, out)
    with pytest.raises(UsageError, match=r"other settings \(normalisation\)"):
        run(raw, out, resume=True, normalisation="zscore")
    (raw / "imagesTr" / "case_1_0000.nii.gz").unlink()
    with pytest.raises(UsageError, match=r"other settings \(provenance\)"):
        run(raw, out, resume=True)
    assert run(raw, out, overwrite=True).volumes == 1
    assert Store.open(out).ids == ["case_0"]


def test_overwrite_never_removes_a_folder_that_is_no_store(tmp_path: Path) -> None:
    raw = make_raw(tmp_path / "raw", n=1)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    with pytest.raises(UsageError, match="not written by this command"):
        run(raw, tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").exists()


def test_median_spacing_and_native_spacing(tmp_path: Path) -> None:
    raw = make_raw(tmp_path / "raw", n=3, labels=False)
    for number, edge in enumerate((0.5, 2.0, 3.0)):
        image = np.random.default_rng(number).uniform(1, 2, SHAPE).astype(np.float32)
        write_nifti(raw / "imagesTr" / f"case_{number}_0000.nii.gz", image, np.diag([edge, 1.0, 2 * edge, 1.0]))
    assert run(raw, tmp_path / "median").spacing_mm == [4.0, 1.0, 2.0]
    run(raw, tmp_path / "native", spacing="native")
    store = Store.open(tmp_path / "native")
    assert store.entry("case_0").spacing_mm == (1.0, 1.0, 0.5)
    assert store.entry("case_0").shape[1:] == SHAPE[::-1]


def test_ct_is_normalised_by_the_fingerprint_of_all_volumes(tmp_path: Path) -> None:
    raw = make_raw(tmp_path / "raw", channel="CT")
    run(raw, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    figures = store.info["fingerprint"]["intensities"]["CT"]
    assert 35 < figures["mean"] < 80 and figures["min"] > -900
    for name in store.ids:
        used = store.entry(name).properties["normalisation"][0]
        assert (used["shift"], used["low"], used["high"]) == (
            figures["mean"],
            figures["percentile_00_5"],
            figures["percentile_99_5"],
        )


def test_several_channels_are_stacked_and_normalised_each_by_its_own_modality(tmp_path: Path) -> None:
    raw = make_raw(tmp_path / "raw", n=2, channel="CT")
    for number in range(2):
        second = np.random.default_rng(number).uniform(1, 9, SHAPE).astype(np.float32)
        write_nifti(raw / "imagesTr" / f"case_{number}_0001.nii.gz", second)
    description = json.loads((raw / "dataset.json").read_text())
    description["channel_names"]["1"] = "T1"
    (raw / "dataset.json").write_text(json.dumps(description))
    run(raw, tmp_path / "store", spacing="native")
    entry = Store.open(tmp_path / "store").entry("case_0")
    assert entry.shape[0] == 2
    assert [one["scheme"] for one in entry.properties["normalisation"]] == ["fingerprint", "zscore-foreground"]


def test_select_keeps_what_meets_the_condition(tmp_path: Path) -> None:
    raw = make_raw(tmp_path / "raw")
    assert run(raw, tmp_path / "store", select="volume_id IN ('case_1', 'case_3')").volumes == 2
    with pytest.raises(UsageError, match="matches no volume"):
        run(raw, tmp_path / "none", select="modality = 'PT'")
    with pytest.raises(UsageError, match="Columns: volume_id"):
        run(raw, tmp_path / "none", select="nonsense = 1")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spacing": "coarse"}, "median, native"),
        ({"spacing": (1.0, 0.0, 1.0)}, "positive"),
        ({"spacing": (1.0, 1.0)}, "positive"),
        ({"normalisation": "zscor"}, "zscore"),
        ({"codec": "int4"}, "codec named .int4"),
        ({"workers": -1}, "workers"),
        ({"resume": True, "overwrite": True}, "exclude"),
    ],
)
def test_options_that_cannot_work_are_named(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(make_raw(tmp_path / "raw", n=1), tmp_path / "store", **options)


def test_inputs_that_are_nothing_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a folder"):
        run(tmp_path / "missing", tmp_path / "store")
    (tmp_path / "raw" / "imagesTr").mkdir(parents=True)
    with pytest.raises(DataError, match="no file that ends in"):
        run(tmp_path / "raw", tmp_path / "store")
    with pytest.raises(UsageError, match="is the input"):
        run(make_raw(tmp_path / "one", n=1), tmp_path / "one")
    (tmp_path / "one" / "dataset.json").write_text("{")
    with pytest.raises(DataError, match=r"dataset\.json is no JSON"):
        run(tmp_path / "one", tmp_path / "store")


def test_names_of_cases_cannot_leave_the_store(tmp_path: Path) -> None:
    raw = make_raw(tmp_path / "raw", n=1, labels=False)
    good = raw / "imagesTr" / "case_0_0000.nii.gz"
    for name in ("a b", "a_b", "ä", "store", "x_seg"):
        shutil.copy(good, raw / "imagesTr" / f"{name}_0000.nii.gz")
    run(raw, tmp_path / "store", spacing="native")
    ids = Store.open(tmp_path / "store").ids
    assert len(ids) == 6 and {"a_b", "case_0"} < set(ids)


def test_a_full_disk_ends_the_run_with_a_message_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = open_source(make_raw(tmp_path / "raw", n=1), None, tmp_path / "unused", workers=1, quiet=True).jobs
    out = tmp_path / "store"
    out.mkdir()

    def full(path: Path, content: bytes) -> int:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    message = worker.process(worker.Task(jobs[0], Plan(None, "zscore"), str(out)))
    assert "No space left" in message and "--resume" in message
    assert not list(out.iterdir())


def test_a_failure_of_the_machine_stops_the_run(tmp_path: Path) -> None:
    raw, out = make_raw(tmp_path / "raw", n=1), tmp_path / "store"
    with ThreadPoolExecutor(1) as executor:
        executor.shutdown()
        with pytest.raises(MedsslError, match="--resume"):
            run(raw, out, executor=executor)


@pytest.mark.slow
def test_a_folder_of_images_is_indexed_on_the_fly_under_pseudonyms(tmp_path: Path) -> None:
    make_raw(tmp_path / "raw", n=2, labels=False)
    images = tmp_path / "patients"
    (tmp_path / "raw" / "imagesTr").rename(images)
    (images / "case_0_0000.nii.gz").rename(images / "meier_hans.nii.gz")
    summary = run(images, tmp_path / "store", spacing="native")
    store = Store.open(tmp_path / "store")
    assert summary.volumes == len(store) == 2
    everything = b"".join(path.read_bytes() for path in (tmp_path / "store").iterdir())
    assert b"meier" not in everything and str(tmp_path).encode() not in everything
    assert run(images, tmp_path / "store", spacing="native", resume=True).kept == 2


def test_hippocampus_keeps_its_voxels_and_its_labels(tmp_path: Path, data_folder: Path) -> None:
    import nibabel

    source = data_folder / "hippocampus"
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (source / "labelsTr").iterdir())[:3]
    raw = tmp_path / "raw"
    for case in cases:
        for folder, name in (("imagesTr", f"{case}_0000.nii.gz"), ("labelsTr", f"{case}.nii.gz")):
            (raw / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(source / folder / name, raw / folder / name)
    shutil.copy(source / "dataset.json", raw)
    run(raw, tmp_path / "store", spacing="native", normalisation="none", crop=False)
    store = Store.open(tmp_path / "store")
    for case in cases:
        shape = store.entry(case).shape[1:]
        image = nibabel.as_closest_canonical(nibabel.load(raw / "imagesTr" / f"{case}_0000.nii.gz"))
        label = nibabel.as_closest_canonical(nibabel.load(raw / "labelsTr" / f"{case}.nii.gz"))
        np.testing.assert_array_equal(store.read(case, (0, 0, 0), shape)[0], image.get_fdata().T.astype(np.float32))
        np.testing.assert_array_equal(store.read_label(case, (0, 0, 0), shape), label.get_fdata().T)
