"""The demo's archive is real DICOM: other readers see the phantom where it is, and each defect is really there."""

from __future__ import annotations

import json

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from medssl.demo.archive import ARCHIVE, NEW_PATIENTS, Size, plan_series, write_archive
from medssl.demo.defects import TILT_DEGREES, write_defects
from medssl.demo.phantom import ORGANS, body, labels

TINY = Size(ct_patients=4, mr_patients=2, new_patients=1, defects=False)


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    out = tmp_path_factory.mktemp("hospital")
    return out, write_archive(out, seed=1, size=TINY, workers=0, quiet=True)


@pytest.fixture(scope="module")
def defects(tmp_path_factory):
    return write_defects(tmp_path_factory.mktemp("defects"), 0)


def in_order(paths):
    """Slices sorted by their position along the normal."""
    datasets = [pydicom.dcmread(path, force=True) for path in paths]
    rows, columns = np.split(np.array(datasets[0].ImageOrientationPatient, float), 2)
    normal = np.cross(rows, columns)
    return sorted(datasets, key=lambda dataset: float(np.array(dataset.ImagePositionPatient, float) @ normal))


def steps(paths):
    positions = np.array([dataset.ImagePositionPatient for dataset in in_order(paths)], float)
    return np.diff(positions, axis=0)


def slices_of(folder):
    return [path for path in sorted(folder.iterdir()) if path.name.startswith("IM")]


def test_every_planned_series_is_written_and_truth_names_its_files(hospital):
    out, truths = hospital
    assert len(truths) == len(plan_series(1, TINY)) == 4 + 4 + 1
    told = json.loads((out / "truth.json").read_text())
    files = {f"{entry['tree']}/{name}" for entry in told for name in entry["files"]}
    there = {
        str(path.relative_to(out))
        for tree in (ARCHIVE, NEW_PATIENTS)
        for path in (out / tree).rglob("*")
        if path.is_file()
    }
    assert files == there
    assert not any("." in name.rsplit("/", 1)[-1] for name in files), "no file has an extension"


def test_an_independent_reader_finds_the_liver_where_the_phantom_has_it(hospital):
    out, truths = hospital
    for truth in truths:
        if truth.modality != "CT":
            continue
        datasets = in_order([out / truth.tree / name for name in truth.files])
        reader = sitk.ImageSeriesReader()
        # SimpleITK only takes paths; the order is ours, by position.
        by_uid = {pydicom.dcmread(out / truth.tree / n).SOPInstanceUID: str(out / truth.tree / n) for n in truth.files}
        reader.SetFileNames([by_uid[dataset.SOPInstanceUID] for dataset in datasets])
        image = reader.Execute()
        value = sitk.GetArrayFromImage(image)
        person = body(1, truth.patient)
        points = labelled_points(person, truth.breath_mm)
        found = [value[image.TransformPhysicalPointToIndex(point)[::-1]] for point in points]
        assert np.median(found) == pytest.approx(102, abs=25)


def labelled_points(person, breath_mm):
    """Points inside the liver, away from its surface, in DICOM's coordinates."""
    from scipy import ndimage

    from medssl.demo.phantom import grid

    where = grid((20, 60, 60), (6.0, 6.0, 6.0), np.diag([-1.0, -1.0, 1.0]), np.array([0.0, 0.0, -50.0]))
    inside = ndimage.binary_erosion(labels(person, where, breath_mm=breath_mm) == ORGANS["liver"], iterations=2)
    world = np.stack([axis.reshape(where.shape)[inside] for axis in where.points()], axis=1)[::20]
    return [(-float(x), -float(y), float(z)) for x, y, z in world]


def test_geometry_of_each_series_is_a_regular_grid(hospital):
    out, truths = hospital
    orientations = set()
    for truth in truths:
        paths = [out / truth.tree / name for name in truth.files]
        datasets = in_order(paths)
        assert np.allclose(steps(paths), steps(paths)[0], atol=1e-3)
        assert np.linalg.norm(steps(paths)[0]) == pytest.approx(datasets[0].SliceThickness, abs=1e-3)
        across, down = np.split(np.array(datasets[0].ImageOrientationPatient, float), 2)
        assert across @ down == pytest.approx(0, abs=1e-5)
        orientations.add(tuple(np.round(across, 1)) + tuple(np.round(down, 1)))
    assert len(orientations) > 2, "axial, coronal and oblique"


def test_numbers_and_names_do_not_tell_the_order_of_slices(hospital):
    out, truths = hospital
    by_name = steps([out / truths[0].tree / name for name in truths[0].files])
    names = sorted(truths[0].files)
    positions = [pydicom.dcmread(out / truths[0].tree / name).ImagePositionPatient[2] for name in names]
    assert len(by_name) and not (np.diff(positions) > 0).all() and not (np.diff(positions) < 0).all()


def test_several_series_share_a_folder_and_encodings_differ(hospital):
    out, truths = hospital
    folders: dict[str, set] = {}
    syntaxes = set()
    for truth in truths:
        dataset = pydicom.dcmread(out / truth.tree / truth.files[0], force=True)
        folders.setdefault(truth.files[0].rsplit("/", 1)[0], set()).add(dataset.SeriesInstanceUID)
        syntaxes.add(getattr(dataset.file_meta, "TransferSyntaxUID", "no meta group"))
    assert max(map(len, folders.values())) > 1
    assert len(syntaxes) == 4


def test_the_same_seed_writes_the_same_bytes(tmp_path, hospital):
    out, truths = hospital
    write_archive(tmp_path, seed=1, size=Size(1, 0, 0, defects=False), workers=0, quiet=True)
    for name in truths[0].files:
        assert (tmp_path / ARCHIVE / name).read_bytes() == (out / ARCHIVE / name).read_bytes()


def test_defects_are_what_their_names_say(defects):
    gap = np.abs(steps(slices_of(defects["missing_slice"]))[:, 2])
    assert sorted(gap)[-1] == pytest.approx(18) and sorted(gap)[-2] == pytest.approx(9)
    tilted = in_order(slices_of(defects["gantry_tilt"]))
    across, down = np.split(np.array(tilted[0].ImageOrientationPatient, float), 2)
    step = steps(slices_of(defects["gantry_tilt"]))[0]
    lean = np.rad2deg(np.arccos(abs(step @ np.cross(across, down)) / np.linalg.norm(step)))
    assert lean == pytest.approx(TILT_DEGREES, abs=0.01)
    assert np.abs(steps(slices_of(defects["duplicate_slice"]))).sum(axis=1).min() == pytest.approx(0)
    with pytest.raises((ValueError, AttributeError)):
        [pydicom.dcmread(path).pixel_array for path in slices_of(defects["truncated_file"])]
    views = [pydicom.dcmread(path).ImageOrientationPatient for path in slices_of(defects["localiser_in_series"])]
    assert len({tuple(view) for view in views}) == 2
    assert len({round(abs(step[2]), 1) for step in steps(slices_of(defects["uneven_spacing"]))}) == 2
    assert len(slices_of(defects["few_slices"])) == 2
    assert {pydicom.dcmread(path).Modality for path in defects["no_volumes"].iterdir()} == {"CT", "OT", "SR", "DOC"}
    for path in defects["foreign_files"].iterdir():
        with pytest.raises(pydicom.errors.InvalidDicomError):
            pydicom.dcmread(path)


def test_headers_pass_pydicoms_own_checks(hospital, defects):
    out, truths = hospital
    paths = [out / truth.tree / truth.files[0] for truth in truths]
    paths += [path for name in ("missing_slice", "no_volumes") for path in defects[name].iterdir()]
    with pydicom.config.strict_reading():
        for path in paths:
            str(pydicom.dcmread(path, force=True))
