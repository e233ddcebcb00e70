"""Voxels from an index, a file or a folder; NIfTI files from an archive; pseudonyms and codes."""

from __future__ import annotations

import gzip
import logging
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medssl.archive.codes import CODES, NOTHING_TO_DO, codes_of, explain
from medssl.archive.convert import convert, to_nifti
from medssl.archive.formats import nifti
from medssl.archive.identity import identity_of
from medssl.archive.index import index
from medssl.archive.load import find_series, load_volume, open_index, read_any, read_volume
from medssl.archive.pseudonym import VALIDATION_SHARE, Pseudonyms, open_key
from medssl.archive.volume import Volume, orientation_of
from medssl.errors import DataError, InputRefused, UsageError
from tests.archive.archive_files import voxels, write_nifti, write_series


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "archive"
    write_series(root / "ct", name="CANARYNAME^X", patient="CANARYID", SeriesDescription="CANARYTEXT")
    write_nifti(root / "four.nii.gz", (7, 6, 5, 3), seed=2)
    pixels = voxels((4, 5, 6, 3), dtype=np.uint8)
    structured = np.ascontiguousarray(pixels).view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    nib.save(nib.Nifti1Image(structured, np.eye(4)), root / "colour.nii.gz")
    (root / "text").write_text("no image")
    return root


def test_convert_writes_each_volume_once_under_its_id_without_identity(archive, tmp_path):
    out = tmp_path / "nifti"
    summary = convert([archive], out, workers=1, quiet=True)
    assert (summary.volumes, summary.converted, summary.exit_code) == (3, 3, 3)
    opened = open_index(out)
    rows = opened.rows().to_dicts()
    assert sorted(path.name for path in out.glob("*.nii.gz")) == [f"{row['volume_id']}.nii.gz" for row in rows]
    for row in rows:
        path = out / f"{row['volume_id']}.nii.gz"
        volume, image = load_volume(opened, row["volume_id"]), nib.load(path)
        assert image.ndim == (4 if row["frames"] > 1 else 3)
        assert np.allclose(image.affine, volume.affine, atol=1e-4)
        again = nifti.load(path)
        assert np.array_equal(again.array, volume.array) and again.channels == volume.channels == row["channels"]
        raw = gzip.decompress(path.read_bytes())
        assert not [text for text in (b"CANARY", str(archive).encode()) if text in raw or text in path.read_bytes()]
    first = {path.name: path.read_bytes() for path in out.glob("*.nii.gz")}
    stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    convert([archive], out, workers=1, quiet=True, resume=True)
    assert stamps == {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    convert([archive], tmp_path / "second", workers=1, quiet=True)
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "second").glob("*.nii.gz")}


def test_convert_removes_what_is_gone(tmp_path):
    for seed in range(2):
        write_nifti(tmp_path / "a" / f"{seed}.nii", seed=seed)
    convert([tmp_path / "a"], tmp_path / "out", workers=1, quiet=True)
    (tmp_path / "a" / "1.nii").unlink()
    convert([tmp_path / "a"], tmp_path / "out", workers=1, quiet=True, resume=True)
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 1


def test_sixteen_bit_colour_survives_conversion(tmp_path):
    volume = Volume(voxels((3, 1, 5, 6), dtype=np.uint16), np.eye(4), channels="colour")
    nib.save(to_nifti(volume), tmp_path / "a.nii.gz")
    again = nifti.load(tmp_path / "a.nii.gz")
    assert again.channels == "colour" and np.array_equal(again.array, volume.array)


def test_rows_are_chosen_by_sql(archive, tmp_path):
    index([archive], tmp_path / "index", workers=1, quiet=True)
    opened = open_index(tmp_path / "index")
    assert opened.rows().height == 3
    assert opened.rows("modality = 'CT' AND body_part = 'CHEST'").height == 1
    assert opened.rows("frames > 1 OR channels = 'colour'").height == 2
    assert opened.rows("modality = 'XX'").height == 0
    for wrong in ("modalty = 'CT'", "modality ==== 'CT'", "1 = 1; DROP TABLE volumes"):
        with pytest.raises(UsageError, match="--select"):
            opened.rows(wrong)


def test_an_index_without_its_private_folder_can_be_read_but_not_loaded(archive, tmp_path):
    index([archive], tmp_path / "index", workers=1, quiet=True)
    shutil.rmtree(tmp_path / "index" / "private")
    opened = open_index(tmp_path / "index")
    assert opened.rows().height == 3
    with pytest.raises(DataError, match="private"):
        load_volume(opened, opened.rows()["volume_id"][0])


def test_a_volume_whose_files_changed_since_is_not_loaded(tmp_path):
    path = write_nifti(tmp_path / "a" / "x.nii")
    index([tmp_path / "a"], tmp_path / "index", workers=1, quiet=True)
    opened = open_index(tmp_path / "index")
    (volume_id,) = opened.rows()["volume_id"]
    assert load_volume(opened, volume_id).shape == (1, 5, 6, 7)
    write_nifti(path, (8, 6, 5))
    with pytest.raises(InputRefused, match="changed_while_read"):
        load_volume(opened, volume_id)
    with pytest.raises(DataError, match="no volume"):
        load_volume(opened, "vnothing")


def test_files_and_folders_are_read_without_an_index(archive, tmp_path):
    assert read_volume(archive / "four.nii.gz").shape == (3, 5, 6, 7)
    mask = write_nifti(tmp_path / "labelsTr" / "mask.nii")
    assert read_volume(mask).shape == (1, 5, 6, 7)  # a label is read where it is asked for
    found = find_series(archive)
    assert len(found.series) == 3
    assert [row[:2] for row in found.refused] == [("text", "not_an_image")]
    (ct,) = read_any(archive / "ct")
    assert ct.shape == (1, 4, 16, 16) and ct.modality == "CT" and ct.spacing_mm == (2.0, 0.7, 0.7)
    assert ct.array.min() < 0  # HU
    with pytest.raises(InputRefused, match="not_an_image"):
        read_volume(archive / "text")
    with pytest.raises(UsageError, match="does not exist"):
        read_volume(archive / "nothing")


def test_a_series_found_alone_has_the_id_of_the_index(archive, tmp_path):
    index([archive], tmp_path / "index", workers=1, quiet=True)
    names = {series.name for series in find_series(archive).series}
    assert names == set(open_index(tmp_path / "index").rows()["volume_id"])


# Pseudonyms


def test_pseudonyms_depend_on_key_kind_and_each_part():
    one, two = Pseudonyms(b"a" * 32), Pseudonyms(b"b" * 32)
    names = [one.of("patient", "1"), two.of("patient", "1"), one.of("study", "1"), one.of("patient", "1", "")]
    names += [one.of("patient", "ab", "c"), one.of("patient", "a", "bc")]
    assert len(set(names)) == 6
    assert all(len(name) == 20 and name[0].isalpha() and name.isalnum() and name.islower() for name in names)
    assert one.of("patient", "1") == Pseudonyms(b"a" * 32).of("patient", "1")


def test_a_pseudonym_is_the_hmac_of_rfc_2104():
    import base64
    import hmac

    parts = [b"patient", b"dicom", b"4711"]
    message = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    digest = hmac.digest(b"k" * 32, message, "sha256")
    assert Pseudonyms(b"k" * 32).of("patient", "dicom", "4711") == "p" + base64.b32encode(digest).decode().lower()[:19]


def test_the_split_has_its_share_and_never_moves():
    names = Pseudonyms(b"a" * 32)
    sides = {f"p{number}": names.split(f"p{number}") for number in range(4000)}
    share = sum(side == "validation" for side in sides.values()) / len(sides)
    assert abs(share - VALIDATION_SHARE) < 0.02
    assert all(names.split(patient) == side for patient, side in sides.items())


def test_a_key_is_made_once_readable_by_its_owner_and_kept(tmp_path, own_configuration, caplog):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    first = open_key(tmp_path / "one", None).fingerprint
    assert open_key(tmp_path / "one", None).fingerprint == open_key(tmp_path / "two", None).fingerprint == first
    made = own_configuration / "medssl" / "pseudonym.key"
    assert {path.stat().st_mode & 0o777 for path in (made, tmp_path / "one" / "key")} == {0o600}
    made.unlink()
    assert open_key(tmp_path / "one", None).fingerprint == first
    (tmp_path / "short").write_text("secret")
    with pytest.raises(UsageError, match="at least 16"):
        open_key(tmp_path / "one", tmp_path / "short")
    (tmp_path / "open").write_text("a phrase that is long enough")
    (tmp_path / "open").chmod(0o644)
    with caplog.at_level(logging.WARNING):
        open_key(tmp_path / "one", tmp_path / "open")
    assert "chmod 600" in caplog.text and "long enough" not in caplog.text


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("sub-01/anat/sub-01_T1w.nii", "sub-01/ses-2/sub-01_ses-2_bold.nii.gz", True),
        ("sub-01/a.nii", "sub-02/a.nii", False),
        ("imagesTr/c_0000.nii.gz", "imagesTr/c_0001.nii.gz", True),
        ("imagesTr/c_0000.nii.gz", "imagesTr/d_0000.nii.gz", False),
        ("BraTS_001/BraTS_001_t1.nii.gz", "BraTS_001/BraTS_001_flair.nii.gz", True),
        ("benign/one.png", "benign/two.png", False),
        ("benign/benign_12.png", "benign/benign_13.png", False),
    ],
)
def test_file_names_tell_patients_apart(one, other, same):
    assert (identity_of("data", one).patient == identity_of("data", other).patient) == same
    assert identity_of("data", one).patient != identity_of("other data", one).patient


# Volumes and codes


def _pair(letter: str) -> str:
    return next(pair for pair in ("LR", "PA", "IS") if letter in pair)


def test_orientation_is_that_of_nibabel():
    rng = np.random.default_rng(0)
    for _ in range(200):
        rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0] * rng.uniform(0.5, 3, 3)
        affine = nib.affines.from_matvec(rotation, rng.normal(size=3))
        letters = orientation_of(affine)
        assert {("LR", "PA", "IS").index(pair) for pair in map(_pair, letters)} == {0, 1, 2}
        biggest = np.unravel_index(np.abs(rotation / np.linalg.norm(rotation, axis=0)).argmax(), (3, 3))
        assert letters[biggest[1]] == nib.aff2axcodes(affine)[biggest[1]]
    assert orientation_of(np.diag([-1.0, -1, 1, 1])) == "LPS"


def test_impossible_volumes_are_refused():
    good = np.zeros((1, 2, 3, 4), np.float32)
    for more in (
        {"array": good[0]},
        {"array": good[:, :0]},
        {"affine": np.full((4, 4), np.nan)},
        {"channels": "colour"},
        {"array": np.zeros((2, 2, 3, 4)), "channels": "scalar"},
        {"channels": "many"},
    ):
        with pytest.raises(ValueError, match=r"volume|channels"):
            Volume(**{"array": good, "affine": np.eye(4), **more})  # type: ignore[arg-type]


def test_every_code_has_a_meaning_and_says_what_a_person_should_do():
    assert all(entry.meaning.endswith(".") for entry in CODES.values())
    assert all(entry.remedy.endswith((".", "?")) for entry in CODES.values())
    assert not [entry for entry in codes_of("refused") if entry.remedy == NOTHING_TO_DO]
    assert all(code == entry.code and code == code.lower() for code, entry in CODES.items())
    assert explain("empty_file").startswith("The file has no bytes.")
    assert explain("unheard_of") == "unheard_of"


def test_every_code_in_the_source_is_in_the_list():
    import re

    import medssl.archive

    source = Path(medssl.archive.__file__).parent
    used = set()
    for path in source.rglob("*.py"):
        used |= set(re.findall(r'InputRefused\(\s*"([a-z_]+)"', path.read_text()))
        used |= set(re.findall(r'code="([a-z_]+)"', path.read_text()))
    assert used > {"truncated", "decode_crashed"}
    assert used - {"linked_folder"} <= set(CODES)
