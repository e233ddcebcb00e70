"""Finding files and telling what they are."""

from __future__ import annotations

import gzip
import os
import socket
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from medssl.archive.find import NOT_WALKED, Source, absolute, path_text, resolve_sources, walk
from medssl.archive.sniff import sniff
from medssl.errors import InputRefused, UsageError
from tests.archive.archive_files import write_nifti, write_series


def found(folder: Path) -> dict[str, str]:
    return {one.path: one.code for one in walk(Source(folder), 0)}


def test_every_file_at_any_depth_is_found_once_in_one_order(tmp_path):
    for name in ("b/2", "b/1", "a/deep/er/3", "c"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    paths = [one.path for one in walk(Source(tmp_path), 0)]
    assert sorted(paths) == ["a/deep/er/3", "b/1", "b/2", "c"]
    assert paths == [one.path for one in walk(Source(tmp_path), 0)]


def test_a_loop_of_links_ends_with_a_code(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("x")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert found(tmp_path) == {"a/file": "", "a/up": "symlink_loop", "self": "symlink_loop"}


def test_links_out_of_the_source_are_followed_and_links_within_are_not_read_twice(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "far").write_text("x")
    archive = tmp_path / "archive"
    archive.mkdir()
    (archive / "near").write_text("x")
    (archive / "folder").symlink_to(outside)
    (archive / "file").symlink_to(outside / "far")
    (archive / "again").symlink_to(archive / "near")
    (archive / "gone").symlink_to(archive / "nothing")
    assert found(archive) == {
        "near": "",
        "folder/far": "",
        "file": "",
        "again": "linked_twice",
        "gone": "broken_link",
    }


def test_two_links_to_one_folder_are_read_once(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "f").write_text("x")
    archive = tmp_path / "archive"
    archive.mkdir()
    for name in ("one", "two"):
        (archive / name).symlink_to(tmp_path / "outside")
    assert found(archive) == {"one/f": "", "two": "linked_twice"}


def test_pipes_sockets_and_empty_files_have_codes_and_nothing_blocks(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        assert found(tmp_path) == {"pipe": "special_file", "empty": "empty_file", "s": "special_file"}


def test_folders_of_version_control_are_left_out(tmp_path):
    for name in sorted(NOT_WALKED):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    (tmp_path / "y").write_text("y")
    assert found(tmp_path) == {"y": ""}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_folder_has_a_code(tmp_path):
    (tmp_path / "locked").mkdir(mode=0)
    assert found(tmp_path) == {"locked": "unreadable"}


def test_names_that_are_not_utf8_survive_the_manifest(tmp_path):
    name = os.fsdecode(b"caf\xe9.nii")
    (tmp_path / name).write_text("x")
    (only,) = walk(Source(tmp_path), 0)
    assert only.path == path_text(name) == r"caf\xe9.nii"
    assert absolute(tmp_path, only.path).read_text() == "x"


@pytest.mark.parametrize(
    ("sources", "out", "message"),
    [
        ([], "out", "No source"),
        (["nothing"], "out", "does not exist"),
        (["data"], "data/out", "lies in the source"),
        (["data/inner"], "data", "lies in --out"),
        (["data", "data/inner"], "out", "overlap"),
        (["data", "data"], "out", "overlap"),
    ],
)
def test_impossible_sources_are_named(tmp_path, sources, out, message):
    (tmp_path / "data" / "inner").mkdir(parents=True)
    with pytest.raises(UsageError, match=message):
        resolve_sources([tmp_path / name for name in sources], tmp_path / out)


def test_content_not_name_tells_the_format(tmp_path):
    write_nifti(tmp_path / "a.nii").rename(tmp_path / "one.jpg")
    write_nifti(tmp_path / "b.nii.gz").rename(tmp_path / "two")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "c.png")
    (tmp_path / "c.png").rename(tmp_path / "three.dcm")
    (dicom, *_) = write_series(tmp_path / "dicom")
    assert [sniff(path) for path in (tmp_path / "one.jpg", tmp_path / "two", tmp_path / "three.dcm", dicom)] == [
        "nifti",
        "nifti",
        "png",
        "dicom",
    ]


def test_dicom_without_preamble_is_dicom_and_text_is_not(tmp_path):
    (path, *_) = write_series(tmp_path / "dicom")
    bare = tmp_path / "bare"
    bare.write_bytes(path.read_bytes()[132:])
    assert sniff(bare) == "dicom"
    dataset_only = tmp_path / "dataset"
    dataset = pydicom.dcmread(path)
    del dataset.file_meta, dataset.preamble
    dataset.save_as(dataset_only, implicit_vr=True, little_endian=True)
    assert dataset_only.read_bytes().startswith(b"\x08\x00")
    assert sniff(dataset_only) == "dicom"
    for content in (b"\x08\x00" * 600, b"Dear colleague, " * 100, bytes(2000), os.urandom(4000)):
        (tmp_path / "text").write_bytes(content)
        with pytest.raises(InputRefused, match="not_an_image"):
            sniff(tmp_path / "text")


def test_packed_archives_are_refused_and_never_unpacked(tmp_path):
    write_nifti(tmp_path / "a.nii")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.nii")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a.nii", "../../a.nii")
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        archive.add(tmp_path / "a.nii")
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(10_000_000)))
    for name in ("a.zip", "a.tar", "a.tgz", "bomb.gz"):
        with pytest.raises(InputRefused, match="archive_not_opened"):
            sniff(tmp_path / name)


def test_a_nifti_with_a_wrong_magic_and_analyze_are_refused(tmp_path):
    path = write_nifti(tmp_path / "a.nii")
    raw = path.read_bytes()
    path.write_bytes(raw[:344] + b"xyz\0" + raw[348:])
    with pytest.raises(InputRefused, match="header_invalid"):
        sniff(path)
    (tmp_path / "b.hdr").write_bytes(raw[:344] + bytes(4))
    with pytest.raises(InputRefused, match="analyze_format"):
        sniff(tmp_path / "b.hdr")
