"""The benchmark of hippocampal form: a target that does not leak, one division for all, and a run from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "pipelines" / "benchmarks"))
from _hippocampus_target import make_store, ratios_of, target_of

from medssl.preprocessing.store import Store

BENCHMARK = Path(__file__).resolve().parents[2] / "pipelines" / "benchmarks" / "hippocampus_classification.py"
SHAPE = (20, 24, 20)


def write_data(folder: Path, count: int) -> Path:
    """A data set of noise with two blocks; the first one's length grows with the case."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    labels = {"background": 0, "anterior": 1, "posterior": 2}
    content = {"channel_names": {"0": "MR"}, "labels": labels, "numTraining": count, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content))
    rng = np.random.default_rng(0)
    for number in range(count):
        mask = np.zeros(SHAPE, np.uint8)
        mask[6:14, 4:10, 6:14] = 2
        mask[6:14, 10 : 13 + number % 8, 6:14] = 1
        image = (rng.normal(100, 10, SHAPE) + 50 * mask).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), folder / "imagesTr" / f"case_{number:02d}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), folder / "labelsTr" / f"case_{number:02d}.nii.gz")
    return folder


def test_the_ratio_is_the_anterior_volume_by_the_posterior_one(tmp_path: Path) -> None:
    ratios = ratios_of(write_data(tmp_path / "data", 3))
    assert list(ratios.values()) == pytest.approx([3 / 6, 4 / 6, 5 / 6])


def test_validation_cases_do_not_move_the_median_that_divides_the_training_cases() -> None:
    ratios = {f"case_{number:02d}": 1 + number / 100 for number in range(40)}
    target = target_of(ratios, 10)
    changed = target_of({case: 9.0 if case in target.validating else ratio for case, ratio in ratios.items()}, 10)
    assert changed.median == target.median == np.median([ratios[case] for case in target.of("train")])
    assert [changed.labels[case] for case in target.of("train")] == [target.labels[c] for c in target.of("train")]
    assert sum(target.labels[case] for case in target.of("train")) == 15
    assert all(changed.labels[case] == 1 for case in target.of("validation"))


def test_the_division_is_that_of_the_label_efficiency_benchmark(tmp_path: Path) -> None:
    import argparse

    from label_efficiency import make_split

    data = write_data(tmp_path / "data", 12)
    options = argparse.Namespace(data=data, validation=4, selection=2, labels=[2])
    assert target_of(ratios_of(data), 4).of("validation") == make_split(options)["validation"]


def test_store_and_table_have_the_division(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", 8)
    target = target_of(ratios_of(data), 3)
    target.write(tmp_path / "labels.csv")
    store = Store.open(make_store(data, tmp_path / "store", target))
    assert store.ids_of("validation") == target.of("validation")
    assert store.ids_of("train") == target.of("train")
    assert all(store.has_label(name) for name in store.ids)
    rows = [line.split(",") for line in (tmp_path / "labels.csv").read_text().splitlines()[1:]]
    assert {name: split for name, _, split in rows} == {name: target.split(name) for name in store.ids}


@pytest.mark.slow
def test_it_runs_from_end_to_end_and_does_nothing_twice(tmp_path: Path) -> None:
    write_data(tmp_path / "data" / "hippocampus", 24)
    command = [sys.executable, str(BENCHMARK), "--quick", "--workdir", str(tmp_path / "w")]
    environment = {**os.environ, "MEDSSL_DATA": str(tmp_path / "data")}
    first, second = (
        subprocess.run(command, capture_output=True, text=True, check=False, env=environment) for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    assert "segmentation_probe" in first.stderr
    assert second.returncode == 0, second.stderr
    assert second.stderr.strip() == ""
    assert second.stdout == first.stdout
