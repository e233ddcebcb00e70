"""Canonical axes are nnU-Net's, exactly, whatever the axes of the file."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from medssl.archive.formats import nifti
from medssl.archive.volume import orientation_of, spacing_of
from medssl.preprocessing.orient import canonical, canonical_spacing
from tests.preprocessing.raw import write_nifti

TURNS = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))


def affine_of(axes: tuple[int, ...], signs: tuple[int, ...], tilt: float = 0.0) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = 0
    for world, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
        affine[world, axis] = sign * (0.7, 1.1, 2.3)[axis]
    c, s = np.cos(tilt), np.sin(tilt)
    affine[:3, :3] = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ affine[:3, :3]
    affine[:3, 3] = (-12.0, 5.5, 30.0)
    return affine


@pytest.mark.parametrize("tilt", [0.0, 0.3])
def test_equals_nnunets_reorienting_reader_in_all_48_orientations(tmp_path: Path, tilt: float) -> None:
    reader = pytest.importorskip("nnunetv2.imageio.nibabel_reader_writer").NibabelIOWithReorient()
    voxels = np.random.default_rng(0).integers(0, 1000, (5, 6, 7)).astype(np.int16)
    for axes, signs in TURNS:
        path = write_nifti(tmp_path / "a.nii.gz", voxels, affine_of(axes, signs, tilt))
        expected, properties = reader.read_images([str(path)])
        volume = nifti.load(path)
        array, affine = canonical(volume.array, volume.affine)
        np.testing.assert_array_equal(array, expected)
        np.testing.assert_allclose(affine, properties["nibabel_stuff"]["reoriented_affine"], atol=1e-4)
        np.testing.assert_allclose(spacing_of(affine), properties["spacing"], rtol=1e-5)


def test_every_voxel_keeps_its_place_in_the_patient() -> None:
    for axes, signs in TURNS:
        affine = affine_of(axes, signs, 0.2)
        array = np.arange(5 * 6 * 7).reshape(1, 7, 6, 5)
        turned, new_affine = canonical(array, affine)
        for value in (0, 17, 209):
            z, y, x = np.argwhere(array[0] == value)[0]
            new_z, new_y, new_x = np.argwhere(turned[0] == value)[0]
            np.testing.assert_allclose(affine @ (x, y, z, 1), new_affine @ (new_x, new_y, new_z, 1), atol=1e-9)
        assert orientation_of(new_affine) == "RAS"


def test_spacing_from_an_indexs_columns_is_that_of_the_turned_volume() -> None:
    array = np.zeros((1, 7, 6, 5))
    for axes, signs in TURNS:
        affine = affine_of(axes, signs)
        _, turned = canonical(array, affine)
        found = canonical_spacing(spacing_of(affine), orientation_of(affine), array.shape)
        assert found == pytest.approx(spacing_of(turned))


def test_pictures_stay_as_a_person_looks_at_them_and_slices_in_their_plane() -> None:
    picture = np.arange(12).reshape(1, 1, 3, 4)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0])
    np.testing.assert_array_equal(canonical(picture, lps, "DX")[0], picture)
    np.testing.assert_array_equal(canonical(picture, lps, "MR")[0], picture[:, :, ::-1, ::-1])
    coronal = affine_of((0, 2, 1), (1, 1, -1))
    np.testing.assert_array_equal(canonical(picture, coronal, "MR")[0], picture)
    assert canonical_spacing((3.0, 1.0, 2.0), "RSA", (1, 1, 3, 4)) == (3.0, 1.0, 2.0)
