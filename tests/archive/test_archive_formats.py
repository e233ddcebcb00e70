"""Image files that are not DICOM: right voxels on the right grid, or a code; no memory on a header's mere word."""

from __future__ import annotations

import gzip
import resource
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image, PngImagePlugin

from medssl.archive.codes import CODES
from medssl.archive.formats.common import Layout
from medssl.archive.formats.read import check_file, load_file
from medssl.archive.sniff import sniff
from medssl.archive.volume import Volume
from medssl.errors import InputRefused
from tests.archive.archive_files import patch, voxels, write_nifti


def load(path: Path, geometry: str = "strict") -> Volume:
    return load_file(path, sniff(path), path.parent, geometry)  # type: ignore[arg-type]


def check(path: Path) -> Layout:
    return check_file(path, sniff(path), path.parent)


def code_of(path: Path, geometry: str = "strict") -> str:
    with pytest.raises(InputRefused) as refusal:
        check(path)
        load(path, geometry)
    assert refusal.value.code in CODES
    return refusal.value.code


def as_nibabel(volume: Volume) -> np.ndarray:
    """Return (x, y, z[, t]) voxels."""
    array = volume.array.transpose(3, 2, 1, 0)
    return array[..., 0] if array.shape[-1] == 1 else array


# NIfTI


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.img"])
@pytest.mark.parametrize("shape", [(7, 6, 5), (7, 6, 5, 3), (7, 6)])
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<f4", ">f8", "u1", "<u4"])
@pytest.mark.parametrize("two", [False, True])
def test_nifti_equals_nibabel(tmp_path, name, shape, dtype, two):
    if two and name == "a.img":
        kind = nib.Nifti2Pair
    elif name == "a.img":
        kind = nib.Nifti1Pair
    else:
        kind = nib.Nifti2Image if two else nib.Nifti1Image
    affine = nib.affines.from_matvec(sitk_rotation() @ np.diag([-0.7, 0.8, 2.5]), (1, 2, 3))
    header = kind.header_class(endianness=dtype[0] if dtype[0] in "<>" else "<")
    image = kind(voxels(shape, dtype=np.dtype(dtype)), affine, header)
    image.header.set_data_dtype(np.dtype(dtype))
    nib.save(image, tmp_path / name)
    path = tmp_path / ("a.hdr" if name == "a.img" else name)
    volume = load(path)
    reference = nib.load(tmp_path / name)
    assert check(path).shape == volume.shape
    assert np.array_equal(as_nibabel(volume).squeeze(), np.asanyarray(reference.dataobj).squeeze())
    assert np.allclose(volume.affine, reference.affine, atol=1e-5)
    assert volume.array.dtype.isnative
    assert volume.channels == ("frames" if len(shape) == 4 else "scalar")


def sitk_rotation() -> np.ndarray:
    return np.array(sitk.VersorTransform((0.1, 0.2, 0.3, 0.9)).GetMatrix()).reshape(3, 3)


def test_slope_and_intercept_are_applied(tmp_path):
    path = write_nifti(tmp_path / "a.nii")
    patch(path, 112, struct.pack("<2f", 0.5, -3.0))
    assert np.allclose(as_nibabel(load(path)), nib.load(path).get_fdata())
    assert load(path).array.dtype == np.float32


def test_colour_nifti_has_three_channels(tmp_path):
    pixels = voxels((4, 5, 6, 3), dtype=np.uint8)
    structured = np.ascontiguousarray(pixels).view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    nib.save(nib.Nifti1Image(structured, np.eye(4)), tmp_path / "a.nii.gz")
    volume = load(tmp_path / "a.nii.gz")
    assert volume.channels == "colour"
    assert np.array_equal(volume.array, pixels.transpose(3, 2, 1, 0))


@pytest.mark.parametrize(
    ("offset", "content", "code"),
    [
        (76 + 4, struct.pack("<f", 0.0), "spacing_invalid"),
        (76 + 12, struct.pack("<f", np.nan), "spacing_invalid"),
        (76 + 8, struct.pack("<f", np.inf), "spacing_invalid"),
        (76 + 8, struct.pack("<f", -1.0), "spacing_invalid"),
        (280, struct.pack("<f", np.nan), "affine_invalid"),
        (280, struct.pack("<4f", 0, 0, 0, 0), "affine_invalid"),
        (284, struct.pack("<f", 1.0), "affine_sheared"),
        (40, struct.pack("<4h", 3, 32767, 32767, 32767), "too_large"),
        (40, struct.pack("<4h", 3, 700, 700, 700), "truncated"),
        (40, struct.pack("<4h", 3, 0, 6, 5), "header_invalid"),
        (40, struct.pack("<4h", 3, -7, 6, 5), "header_invalid"),
        (40, struct.pack("<h", 9), "header_invalid"),
        (70, struct.pack("<h", 32), "dtype_unsupported"),
        (70, struct.pack("<h", 12345), "header_invalid"),
        (108, struct.pack("<f", -1e9), "header_invalid"),
        (108, struct.pack("<f", np.nan), "header_invalid"),
        (108, struct.pack("<f", 1e9), "truncated"),
        (112, struct.pack("<2f", np.inf, 0), "scaling_invalid"),
        (112, struct.pack("<2f", 2, np.nan), "scaling_invalid"),
        (344, b"bad\0", "header_invalid"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_nifti_header_that_lies_is_refused_with_its_code(tmp_path, offset, content, code, packed):
    path = patch(_sform_only(tmp_path / "a.nii"), offset, content)
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
        if code == "header_invalid" and offset == 344:
            pytest.skip("inside gzip it is no known content")
    assert code_of(path) == code


def _sform_only(path: Path) -> Path:
    write_nifti(path)
    return patch(path, 252, struct.pack("<h", 0))


def test_a_huge_header_costs_no_memory(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = patch(write_nifti(tmp_path / "b.nii"), 40, struct.pack("<4h", 3, 1000, 1000, 1000))
    (tmp_path / "c.nii.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert {code_of(path), code_of(tmp_path / "c.nii.gz")} == {"truncated"}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB; the header asks for 2 GB


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_truncated_nifti_is_refused(tmp_path, name, share):
    path = write_nifti(tmp_path / name, (40, 40, 40))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert code_of(path) == "truncated"


def test_an_unsheared_qform_takes_the_place_of_a_sheared_sform_and_says_so(tmp_path):
    path = write_nifti(tmp_path / "a.nii")
    expected = nib.load(path).affine
    patch(patch(path, 252, struct.pack("<h", 1)), 284, struct.pack("<f", 0.4))
    volume = load(path)
    assert "qform_used" in volume.flags
    assert np.allclose(volume.affine, expected, atol=1e-4)


def test_qform_and_sform_that_differ_are_flagged_and_the_sform_is_taken(tmp_path):
    path = write_nifti(tmp_path / "a.nii")
    image = nib.load(path)
    image.set_qform(image.affine @ np.diag([1, -1, -1, 1]), 1)
    image.set_sform(image.affine, 2)
    nib.save(image, tmp_path / "b.nii")
    volume = load(tmp_path / "b.nii")
    assert "qform_sform_differ" in volume.flags
    assert np.allclose(volume.affine, nib.load(path).affine)
    assert "qform_sform_differ" not in load(path).flags


def test_without_any_matrix_the_orientation_is_nibabels_and_flagged(tmp_path):
    path = patch(patch(write_nifti(tmp_path / "a.nii"), 252, bytes(4)), 280, bytes(48))
    volume = load(path)
    assert volume.flags == ("orientation_unknown",)
    assert np.allclose(volume.affine, nib.load(path).affine)


def test_metres_become_millimetres(tmp_path):
    image = nib.load(write_nifti(tmp_path / "a.nii"))
    metres = nib.Nifti1Image(np.asanyarray(image.dataobj), np.diag([1e-3, 1e-3, 1e-3, 1]) @ image.affine)
    metres.header.set_xyzt_units("meter")
    nib.save(metres, tmp_path / "b.nii")
    volume = load(tmp_path / "b.nii")
    assert "units_converted" in volume.flags
    assert np.allclose(volume.affine, image.affine, atol=1e-4)


def test_few_voxels_that_are_not_finite_are_replaced_and_many_refused(tmp_path):
    array = voxels((7, 6, 5), dtype=np.float32)
    low, high = array.min(), array.max()
    array[0, 0, :3] = np.nan, np.inf, -np.inf
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "a.nii")
    volume = load(tmp_path / "a.nii")
    assert volume.flags == ("non_finite_replaced",)
    assert volume.array[0, :3, 0, 0].tolist() == [low, high, low]
    array[:5] = np.nan
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "b.nii")
    assert code_of(tmp_path / "b.nii") == "not_finite"


def test_a_sheared_grid_is_resampled_under_repair_to_where_its_voxels_lie(tmp_path):
    # A linear ramp in world coordinates survives linear interpolation exactly.
    affine = np.array([[2.0, 0.3, 0, 5], [0, 2, 0, -7], [0, 0, 2, 9], [0, 0, 0, 1]])
    index = np.stack(np.meshgrid(*(np.arange(n) for n in (20, 18, 16)), indexing="ij"), -1)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    ramp = world @ (1.0, 2.0, 3.0) + 1000
    nib.save(nib.Nifti1Image(ramp.astype(np.float32), affine), tmp_path / "a.nii")
    image = nib.load(tmp_path / "a.nii")
    image.set_qform(None, 0)
    nib.save(image, tmp_path / "b.nii")
    assert code_of(tmp_path / "b.nii") == "affine_sheared"
    volume = load(tmp_path / "b.nii", "repair")
    assert volume.geometry == "shear_resampled"
    directions = volume.affine[:3, :3] / np.array(volume.spacing_mm)[::-1]
    assert np.allclose(directions.T @ directions, np.eye(3), atol=1e-9)
    got = as_nibabel(volume)
    index = np.stack(np.meshgrid(*(np.arange(n) for n in got.shape), indexing="ij"), -1)
    expected = (index @ volume.affine[:3, :3].T + volume.affine[:3, 3]) @ (1.0, 2.0, 3.0) + 1000
    inside = got != got.min()
    assert inside.mean() > 0.7
    assert np.allclose(got[inside], expected[inside], atol=0.05)


def test_fields_and_labels_are_told_from_images(tmp_path):
    image = nib.Nifti1Image(voxels((4, 4, 4), dtype=np.uint8), np.eye(4))
    image.header.set_intent("label")
    nib.save(image, tmp_path / "label.nii")
    assert check(tmp_path / "label.nii").related == "label_map"
    field = nib.Nifti1Image(voxels((4, 4, 4, 1, 3), dtype=np.float32), np.eye(4))
    field.header.set_intent(1006)
    nib.save(field, tmp_path / "field.nii")
    assert code_of(tmp_path / "field.nii") == "dimensions_unsupported"


# NRRD, MetaImage


@pytest.mark.parametrize("ending", [".nrrd", ".nhdr", ".mha", ".mhd"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", ["scalar", "frames", "colour", "2d", "4d"])
def test_nrrd_and_metaimage_equal_simpleitk(tmp_path, ending, compressed, kind):
    array = voxels((4, 5, 6))
    image = {
        "scalar": lambda: sitk.GetImageFromArray(array),
        "frames": lambda: sitk.GetImageFromArray(voxels((4, 5, 6, 5), dtype=np.float32), isVector=True),
        "colour": lambda: sitk.GetImageFromArray(voxels((4, 5, 6, 3), dtype=np.uint8), isVector=True),
        "2d": lambda: sitk.GetImageFromArray(array[0]),
        "4d": lambda: sitk.GetImageFromArray(voxels((2, 4, 5, 6), dtype=np.float64), isVector=False),
    }[kind]()
    size = image.GetDimension()
    direction = np.eye(size)
    if size > 2:
        direction[:3, :3] = sitk_rotation()
    image.SetDirection(direction.ravel().tolist())
    image.SetSpacing((0.7, 0.8, 2.5, 1.0)[:size])
    image.SetOrigin((1.0, 2.0, 3.0, 0.0)[:size])
    path = tmp_path / f"a{ending}"
    sitk.WriteImage(image, str(path), compressed)
    volume = load(path)
    expected = sitk.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        expected = np.moveaxis(expected, -1, 0)
    assert np.array_equal(volume.array, expected.reshape(volume.shape).astype(volume.array.dtype))
    assert check(path).shape == volume.shape
    assert volume.channels == {"frames": "frames", "4d": "frames", "colour": "colour"}.get(kind, "scalar")
    assert np.allclose(volume.spacing_mm[-2:], (0.8, 0.7))
    if size > 2:
        place = np.eye(4)
        place[:3, :3] = direction[:3, :3] * (0.7, 0.8, 2.5)
        place[:3, 3] = 1, 2, 3
        assert np.allclose(volume.affine, np.diag([-1, -1, 1, 1]) @ place, atol=1e-5)
    assert [one.name for one in check(path).companions] == (
        [] if ending in (".nrrd", ".mha") else [next(p.name for p in tmp_path.iterdir() if p != path)]
    )


MHD = "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_SHORT\n{}ElementDataFile = {}\n"
NRRD = "NRRD0004\ntype: short\ndimension: 3\nsizes: 4 4 4\nencoding: raw\nendian: little\n{}"


def test_data_outside_the_source_are_never_read(tmp_path):
    (tmp_path / "secret.raw").write_bytes(bytes(128))
    source = tmp_path / "source"
    source.mkdir()
    (source / "link.raw").symlink_to(tmp_path / "secret.raw")
    for name in ("../secret.raw", str(tmp_path / "secret.raw"), "link.raw"):
        (source / "a.mhd").write_text(MHD.format("", name))
        (source / "a.nhdr").write_text(NRRD.format(f"data file: {name}\n\n"))
        (source / "b.nhdr").write_text(NRRD.format(f"data file: LIST\n{name}\n"))
        assert [code_of(source / file) for file in ("a.mhd", "a.nhdr", "b.nhdr")] == ["companion_outside"] * 3


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (MHD.format("ElementSpacing = 1 0 1\n", "LOCAL") + "x" * 128, "spacing_invalid"),
        (MHD.format("ElementSpacing = 1 nan 1\n", "LOCAL") + "x" * 128, "spacing_invalid"),
        (MHD.format("TransformMatrix = 1 0 0 0.5 1 0 0 0 1\n", "LOCAL") + "x" * 128, "affine_sheared"),
        (MHD.format("TransformMatrix = 0 0 0 0 1 0 0 0 1\n", "LOCAL") + "x" * 128, "spacing_invalid"),
        (MHD.format("", "LOCAL") + "x" * 127, "truncated"),
        (MHD.format("", "missing.raw"), "companion_missing"),
        (MHD.format("", "").replace("ElementDataFile", "Other"), "truncated"),
        (MHD.format("", "LOCAL").replace("4 4 4", "99999 99999 99999") + "x", "too_large"),
        (MHD.format("CompressedData = True\n", "LOCAL").replace("4 4 4", "400 400 400") + "x", "truncated"),
        (MHD.format("", "LOCAL").replace("4 4 4", "4 4 x") + "x", "header_invalid"),
        (MHD.format("", "LOCAL").replace("MET_SHORT", "MET_STRING") + "x", "dtype_unsupported"),
        (NRRD.format("\n") + "x" * 127, "truncated"),
        (NRRD.format("spacings: 1 nan 1\n\n") + "x" * 128, "spacing_invalid"),
        (NRRD.format("spacings: 1 0 1\n\n") + "x" * 128, "spacing_invalid"),
        (NRRD.format("space: lps\nspace directions: (1,0,0) (.5,1,0) (0,0,1)\n\n") + "x" * 128, "affine_sheared"),
        (NRRD.format("\n").replace("4 4 4", "90000 90000 9") + "x", "too_large"),
        (NRRD.format("\n").replace("raw", "bzip2") + "x" * 128, "compression_unsupported"),
        (NRRD.format("\n").replace("short", "block") + "x" * 128, "dtype_unsupported"),
        (
            NRRD.format("kinds: domain domain vector\n\n").replace("4 4 4", "4 4 3") + "x" * 128,
            "dimensions_unsupported",
        ),
        (NRRD.format(""), "truncated"),
    ],
)
def test_text_headers_that_lie_are_refused_with_their_code(tmp_path, content, code):
    (tmp_path / "a").write_text(content)
    assert code_of(tmp_path / "a") == code


def test_without_voxel_size_or_matrix_the_flags_say_so(tmp_path):
    (tmp_path / "a").write_bytes(MHD.format("", "LOCAL").encode() + bytes(128))
    (tmp_path / "b").write_bytes(NRRD.format("\n").encode() + bytes(128))
    for name in ("a", "b"):
        assert load(tmp_path / name).flags == ("orientation_unknown", "spacing_unknown")


def test_slicers_segmentations_are_label_maps(tmp_path):
    (tmp_path / "a").write_bytes(NRRD.format("Segment0_ID:=Segment_1\n\n").encode() + bytes(128))
    assert check(tmp_path / "a").related == "label_map"


# MGH


def test_mgz_equals_nibabel(tmp_path):
    affine = nib.affines.from_matvec(sitk_rotation() @ np.diag([-0.7, 0.8, 2.5]), (1, 2, 3))
    for shape, name in (((7, 6, 5), "a.mgz"), ((7, 6, 5, 2), "b.mgh")):
        nib.save(nib.MGHImage(voxels(shape, dtype=np.float32), affine), tmp_path / name)
        volume = load(tmp_path / name)
        assert np.array_equal(as_nibabel(volume), nib.load(tmp_path / name).get_fdata())
        assert np.allclose(volume.affine, affine, atol=1e-4)
        assert check(tmp_path / name).shape == volume.shape


def test_mgh_that_lies_is_refused(tmp_path):
    nib.save(nib.MGHImage(voxels((7, 6, 5), dtype=np.float32), np.eye(4)), tmp_path / "a.mgh")
    raw = (tmp_path / "a.mgh").read_bytes()
    for offset, content, code in (
        (4, struct.pack(">i", 70000), "truncated"),
        (4, struct.pack(">3i", 70000, 70000, 70000), "too_large"),
        (30, struct.pack(">f", 0), "spacing_invalid"),
        (30, struct.pack(">f", np.nan), "spacing_invalid"),
    ):
        (tmp_path / "b.mgh").write_bytes(raw)
        assert code_of(patch(tmp_path / "b.mgh", offset, content)) == code


# Pictures


@pytest.mark.parametrize("ending", [".png", ".tif"])
@pytest.mark.parametrize(
    ("mode", "dtype"), [("L", np.uint8), ("I;16", np.uint16), ("RGB", np.uint8), ("RGBA", np.uint8)]
)
def test_pictures_keep_their_pixels(tmp_path, ending, mode, dtype):
    pixels = (voxels((9, 11, 4)) * 60).astype(dtype)[..., : {"RGB": 3, "RGBA": 4}.get(mode, 1)].squeeze()
    Image.fromarray(pixels).save(tmp_path / f"a{ending}")
    volume = load(tmp_path / f"a{ending}")
    expected = np.moveaxis(pixels[..., :3], -1, 0) if pixels.ndim == 3 else pixels[None]
    assert volume.array.dtype == dtype
    assert np.array_equal(volume.array[:, 0], expected)
    assert volume.channels == ("colour" if "RGB" in mode else "scalar")
    assert ("alpha_dropped" in volume.flags) == (mode == "RGBA")
    assert volume.modality == "IMAGE" and volume.orientation == "RAS" and "spacing_unknown" in volume.flags
    assert check(tmp_path / f"a{ending}").shape == volume.shape


def test_sixteen_bits_of_colour_are_not_cut_to_eight(tmp_path):
    pixels = (voxels((9, 11, 3)) * 60).astype(np.uint16)
    sitk.WriteImage(sitk.GetImageFromArray(pixels, isVector=True), str(tmp_path / "a.png"))
    volume = load(tmp_path / "a.png")
    assert np.array_equal(volume.array[:, 0], np.moveaxis(pixels, -1, 0))


def test_palettes_become_colours_or_grey(tmp_path):
    image = Image.fromarray(voxels((9, 11), dtype=np.uint8), "L")
    image.convert("P").save(tmp_path / "grey.png")
    Image.fromarray(voxels((9, 11, 3), dtype=np.uint8)).quantize(16).save(tmp_path / "colour.png")
    assert load(tmp_path / "grey.png").shape == (1, 1, 9, 11)
    assert np.array_equal(load(tmp_path / "grey.png").array[0, 0], np.asarray(image))
    assert load(tmp_path / "colour.png").shape == (3, 1, 9, 11)


def test_a_turned_photograph_is_turned_back(tmp_path):
    pixels = np.zeros((8, 16), np.uint8)
    pixels[:, :8] = 255
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[274] = 6
    image.save(tmp_path / "a.jpg", exif=exif, quality=100)
    volume = load(tmp_path / "a.jpg")
    assert "exif_rotated" in volume.flags
    assert volume.shape == check(tmp_path / "a.jpg").shape == (1, 1, 16, 8)
    assert volume.array[0, 0, :4].mean() > 200 and volume.array[0, 0, -4:].mean() < 50


def test_pages_of_a_tiff_are_stacked_if_they_agree(tmp_path):
    pages = [Image.fromarray(voxels((9, 11), seed, np.uint8)) for seed in range(4)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    volume = load(tmp_path / "a.tif")
    assert "stack_of_pages" in volume.flags
    assert np.array_equal(volume.array[0], np.stack([np.asarray(page) for page in pages]))
    pages[0].save(tmp_path / "b.tif", save_all=True, append_images=[Image.new("L", (5, 5))])
    assert code_of(tmp_path / "b.tif") == "pages_differ"


def test_physical_resolution_is_used_and_print_resolution_is_not(tmp_path):
    image = Image.fromarray(voxels((9, 11), dtype=np.uint8))
    image.save(tmp_path / "physical.tif", resolution_unit=3, x_resolution=20.0, y_resolution=40.0)
    assert np.allclose(load(tmp_path / "physical.tif").spacing_mm, (1, 0.25, 0.5))
    image.save(tmp_path / "print.tif", dpi=(300, 300))
    image.save(tmp_path / "screen.png", dpi=(96, 96))
    for name in ("print.tif", "screen.png"):
        assert load(tmp_path / name).spacing_mm == (1, 1, 1)
        assert "spacing_unknown" in load(tmp_path / name).flags


def test_damaged_and_monstrous_pictures_are_refused(tmp_path):
    Image.fromarray(voxels((90, 110), dtype=np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(voxels((90, 110), dtype=np.uint8)).save(tmp_path / "a.jpg")
    for name in ("a.png", "a.jpg"):
        raw = (tmp_path / name).read_bytes()
        (tmp_path / f"short_{name}").write_bytes(raw[: len(raw) // 2])
        assert code_of(tmp_path / f"short_{name}") in ("truncated", "decode_failed")
        (tmp_path / f"head_{name}").write_bytes(raw[:20])
        assert code_of(tmp_path / f"head_{name}") in ("truncated", "header_invalid", "decode_failed")
    raw = bytearray((tmp_path / "a.png").read_bytes())
    raw[16:24] = struct.pack(">2I", 60000, 60000)
    raw[29:33] = struct.pack(">I", __import__("zlib").crc32(bytes(raw[12:29])))
    (tmp_path / "bomb.png").write_bytes(raw)
    assert code_of(tmp_path / "bomb.png") in ("too_large", "truncated")


def test_animations_are_refused(tmp_path):
    frames = [Image.fromarray(voxels((9, 11), seed, np.uint8)) for seed in range(3)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:], pnginfo=PngImagePlugin.PngInfo())
    assert code_of(tmp_path / "a.png") == "dimensions_unsupported"


def test_random_damage_of_headers_ends_in_an_image_or_a_code(tmp_path):
    rng = np.random.default_rng(0)
    image = sitk.GetImageFromArray(voxels((4, 5, 6)))
    seeds = [write_nifti(tmp_path / "a.nii"), write_nifti(tmp_path / "b.nii.gz")]
    for name in ("c.nrrd", "d.mha"):
        sitk.WriteImage(image, str(tmp_path / name))
    nib.save(nib.MGHImage(voxels((7, 6, 5), dtype=np.float32), np.eye(4)), tmp_path / "e.mgh")
    for name in ("f.png", "g.jpg", "h.tif"):
        Image.fromarray(voxels((19, 21, 3), dtype=np.uint8)).save(tmp_path / name)
    seeds += [tmp_path / name for name in ("c.nrrd", "d.mha", "e.mgh", "f.png", "g.jpg", "h.tif")]
    damaged, accepted = tmp_path / "damaged", 0
    for number in range(400):
        raw = bytearray(seeds[number % len(seeds)].read_bytes())
        for position in rng.integers(0, min(len(raw), 600), rng.integers(1, 5)):
            raw[position] = rng.integers(256)
        if rng.random() < 0.2:
            raw = raw[: rng.integers(1, len(raw))]
        damaged.write_bytes(raw)
        try:
            kind = sniff(damaged)
            if kind == "dicom":
                continue
            check_file(damaged, kind, tmp_path)
            volume = load_file(damaged, kind, tmp_path, "repair")
        except InputRefused as refusal:
            assert refusal.code in CODES
            continue
        accepted += 1
        assert np.isfinite(volume.array).all() and np.isfinite(volume.affine).all() and min(volume.spacing_mm) > 0
    assert 10 < accepted < 390
