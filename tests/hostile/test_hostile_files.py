"""Hostile files cost one row with a code: no bomb unfolds, no liar is believed, nothing is written elsewhere."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from medssl.archive.codes import CODES
from medssl.archive.find import Source, walk
from medssl.archive.index import index
from medssl.archive.load import find_series, open_index, read_volume
from medssl.archive.sandbox import Limits, Pool
from medssl.errors import InputRefused
from tests.archive.archive_files import patch, write_nifti, write_series
from tests.archive.dicom import series as s
from tests.hostile import files

LIMITS = Limits(memory_mb=1536, seconds=30.0)


@pytest.fixture(autouse=True)
def own_key(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("configuration")))
    monkeypatch.delenv("MEDSSL_KEY_FILE", raising=False)


def codes_in(folder: Path) -> set[str]:
    """Return the codes that the files of a folder end with; none of them is a volume."""
    found = find_series(folder)
    codes = {code for _, code, _ in found.refused}
    for series in found.series:
        with pytest.raises(InputRefused) as refusal:
            series.load(LIMITS)
        codes.add(refusal.value.code)
    assert codes <= CODES.keys()
    return codes


@pytest.fixture(scope="module")
def headers() -> Iterator[Pool]:
    with Pool(1, LIMITS) as pool:
        yield pool


@pytest.mark.parametrize("kind", ["deflate", "gzip", "gzip that says so"])
def test_a_bomb_is_refused_in_little_memory(tmp_path: Path, headers: Pool, kind: str) -> None:
    if kind == "deflate":
        path = files.deflate_bomb(tmp_path, 300, in_header=True)
    else:
        path = files.gzip_bomb(tmp_path / "a.nii.gz", 200, told=kind != "gzip")
    assert path.stat().st_size < files.MEGABYTE
    ((_, outcome),) = headers.map(files.end_and_peak, [files.file_task(path)])
    code, peak_mb = outcome.value
    assert peak_mb < 300
    if kind == "gzip":
        # The header is honest: what follows its voxels is not read.
        assert code == "" and read_volume(path, limits=LIMITS).shape == (1, 5, 6, 7)
    else:
        assert code == ("deflated_too_large" if kind == "deflate" else "truncated")


def test_a_header_of_32767_cubed_is_refused_before_anything_is_allocated(tmp_path: Path, headers: Pool) -> None:
    path = patch(write_nifti(tmp_path / "a.nii"), 40, struct.pack("<4h", 3, 32767, 32767, 32767))
    ((_, outcome),) = headers.map(files.end_and_peak, [files.file_task(path)])
    assert outcome.value[0] == "too_large" and outcome.value[1] < 300


@pytest.mark.parametrize("depth", [300, 5000])
@pytest.mark.parametrize("ended", [False, True])
def test_sequences_in_sequences_end_with_a_code(tmp_path: Path, depth: int, ended: bool) -> None:
    path = files.nested(tmp_path, depth, ended=ended)
    assert codes_in(path.parent) <= {"dicom_invalid", "multiframe_invalid", "too_few_slices", "truncated"}


@pytest.mark.parametrize(
    ("lie", "codes"),
    [
        ("short", {"decode_failed", "truncated"}),
        ("none", {"decode_failed", "truncated", "no_pixel_data"}),
        ("cut", {"decode_failed", "truncated"}),
    ],
)
def test_fragments_that_lie_or_are_cut_are_refused(tmp_path: Path, lie: str, codes: set[str]) -> None:
    found = codes_in(files.fragments(tmp_path / "f", lie))
    assert found and found <= codes


@pytest.mark.parametrize("lie", ["offsets", "long"])
def test_false_offsets_and_lengths_of_fragments_give_the_right_image_or_none(tmp_path: Path, lie: str) -> None:
    found = find_series(files.fragments(tmp_path / "f", lie))
    for series in found.series:
        try:
            volume = series.load(LIMITS)
        except InputRefused as refusal:
            assert refusal.code in CODES
        else:
            assert s.world_error(volume) < s.QUANTUM


def test_a_codec_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    assert codes_in(files.unknown_codec(tmp_path / "f")) == {"compression_unsupported"}


def test_packed_archives_are_never_unpacked(tmp_path: Path) -> None:
    source = tmp_path / "deep" / "source"
    packed = files.slips(source)
    write_series(source / "good", slices=4)
    before = set(tmp_path.rglob("*"))
    summary = index([source], tmp_path / "index", workers=1, quiet=True)
    assert summary.volumes == 1 and summary.refused == {"archive_not_opened": len(packed)}
    inside = tmp_path / "index"
    assert {path for path in tmp_path.rglob("*") if path != inside and inside not in path.parents} == before
    assert not list(tmp_path.rglob("owned*")) and not Path("/tmp/owned-by-medssl-test.txt").exists()
    assert sum(path.stat().st_size for path in inside.rglob("*") if path.is_file()) < files.MEGABYTE


def test_links_out_of_the_archive_give_no_content_away_and_do_not_block(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_series(source / "good", slices=4)
    secret = tmp_path / "outside" / "secret.txt"
    secret.parent.mkdir()
    secret.write_text("root:SECRETCONTENT:0:0")
    for name, target in {
        "a": secret,
        "b": Path("/dev/zero"),
        "c": Path("/etc/passwd"),
        "d": source,
        "e": Path("/none"),
    }.items():
        (source / name).symlink_to(target)
    os.mkfifo(source / "pipe")
    ends = {found.path: found.code for found in walk(Source(source), 0) if not found.path.startswith("good")}
    assert ends == {
        "a": "",
        "b": "special_file",
        "c": "",
        "d": "symlink_loop",
        "e": "broken_link",
        "pipe": "special_file",
    }
    summary = index([source], tmp_path / "index", workers=1, quiet=True)
    assert summary.volumes == 1 and summary.refused["not_an_image"] == 2
    told = b"".join(path.read_bytes() for path in (tmp_path / "index").rglob("*") if path.is_file())
    assert b"SECRETCONTENT" not in told and str(secret).encode() not in told


def test_each_hostile_file_costs_its_own_row(tmp_path: Path) -> None:
    source = tmp_path / "source"
    files.deflate_bomb(source / "deflate", 150, in_header=True)
    files.nested(source / "nested", 5000, ended=True)
    files.fragments(source / "fragments", "short")
    patch(write_nifti(source / "big" / "a.nii"), 40, struct.pack("<4h", 3, 32767, 32767, 32767))
    files.slips(source / "packed")
    write_series(source / "good", slices=4)
    summary = index([source], tmp_path / "index", workers=1, quiet=True)
    assert summary.volumes == 1
    refused = open_index(tmp_path / "index").refused()
    assert set(refused["code"]) <= CODES.keys()
    assert summary.files == summary.files_in_volumes + sum(summary.refused.values()) + sum(summary.related.values())
