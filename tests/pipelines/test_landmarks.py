"""The benchmark of landmarks: landmarks, peers and what is cut off."""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "pipelines" / "benchmarks"))
import landmarks
from _anatomy import Cases, interval

POINT = np.array([[12.0, 15.0, 14.0]])


def write(path: Path, centre: tuple[float, ...], shape: tuple[int, ...] = (30, 34, 28), offset: float = 0.0) -> Path:
    """A blob around a place in mm, in a volume whose first voxel lies at `offset`."""
    affine = np.diag([1.0, 1, 1, 1])
    affine[:3, 3] = offset
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1) + offset
    distance = np.square((grid - centre) / (5, 4, 3)).sum(axis=-1)
    nibabel.save(nibabel.Nifti1Image((100 * np.exp(-distance)).astype(np.float32), affine), path)
    return path


@pytest.mark.parametrize("refine", [False, True])
def test_registration_takes_a_point_along_with_its_anatomy(refine: bool, tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK")
    source = write(tmp_path / "a.nii.gz", (12, 15, 14))
    target = write(tmp_path / "b.nii.gz", (19 - 5, 18 - 5, 11 - 5), offset=-5)
    found = landmarks.registered(source, target, POINT, refine=refine)
    assert np.allclose(found, [[14, 13, 6]], atol=0.7)


def test_the_same_place_is_the_same_part_of_the_extent(tmp_path: Path) -> None:
    source = write(tmp_path / "a.nii.gz", (12, 15, 14), (20, 20, 20))
    target = write(tmp_path / "b.nii.gz", (12, 15, 14), (40, 40, 40), offset=3)
    found = landmarks.same_place(source, target, np.array([[9.5, 0.0, 19.0]]))
    assert np.allclose(found, [[19.5 + 3, 0.5 + 3, 38.5 + 3]])


def test_the_ends_are_the_most_anterior_and_the_most_posterior_part() -> None:
    line = np.stack([np.zeros(21), np.arange(21.0), np.ones(21)], axis=1)
    assert np.allclose(landmarks.ends(line), [[0, 19, 1], [0, 1, 1]])
    assert np.allclose(landmarks.centre(line), [[0, 10, 1]])


def test_what_is_cut_off_leaves_the_label_and_its_world(tmp_path: Path) -> None:
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / name).mkdir()
    write(tmp_path / "imagesTr" / "one_0000.nii.gz", (12, 15, 14))
    label = np.zeros((30, 34, 28), np.uint8)
    label[10:15, 12:20, 9:20] = 1
    nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), tmp_path / "labelsTr" / "one.nii.gz")
    cases = Cases(tmp_path, (), ("one",))
    cut = nibabel.load(landmarks.trimmed(cases, "one", tmp_path / "cut"))
    start = cut.affine[:3, 3]
    assert cut.shape != label.shape and (start < (10, 12, 9)).all()
    assert (start + cut.shape > (15, 20, 20)).all()
    place = tuple((np.array([12, 15, 14]) - start).astype(int))
    assert cut.get_fdata()[place] == pytest.approx(100)


def test_an_interval_holds_the_statistic_and_grows_with_the_spread() -> None:
    value, low, high = interval([1.0, 2, 3, 4, 5], np.median)
    assert value == 3 and low <= 3 <= high and low < high
    assert interval([2.0] * 5, np.median) == (2, 2, 2)
