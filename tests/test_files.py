"""Outputs appear whole or not at all."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from medssl.errors import MedsslError, UsageError
from medssl.files import atomic_path, prepare_output_folder, sha256_of, write_json, write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(MedsslError, match=r"No space left.*--resume"), atomic_path(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not any(tmp_path.iterdir())


def test_json_is_the_same_whatever_the_order_of_its_names(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": 2})
    write_json(tmp_path / "b.json", {"a": 2, "b": 1})
    assert sha256_of(tmp_path / "a.json") == sha256_of(tmp_path / "b.json")
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 2, "b": 1}


def test_json_refuses_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not any(tmp_path.iterdir())


def test_overwrite_never_removes_a_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.docx").touch()
    with pytest.raises(UsageError, match="not written by this command"):
        prepare_output_folder(tmp_path, resume=False, overwrite=True, owned=lambda folder: False)
    assert (tmp_path / "thesis.docx").exists()


def test_resume_and_overwrite_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        prepare_output_folder(tmp_path, resume=True, overwrite=True)
