"""The doctor: a model that loads and has its hash, folders, and a user without a name."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from medssl.cli import main
from medssl.doctor import Finding, examine
from medssl.errors import UsageError
from medssl.files import sha256_of
from medssl.training.checkpoint import save_checkpoint

HELPERS = Path(__file__).parent / "inference" / "tiny_models.py"


def tiny_model(folder: Path, **options: object) -> Path:
    """Write a segmentation model with random weights."""
    specification = importlib.util.spec_from_file_location("tiny_models", HELPERS)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return Path(module.make_model(folder, **options))


def findings(model: Path | None = None, sha256: str | None = None) -> dict[str, Finding]:
    """Return the findings by subject."""
    return {finding.subject: finding for finding in examine(model, sha256)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segmentation model."""
    return tiny_model(tmp_path_factory.mktemp("doctor") / "model")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint with its checksum beside it."""
    path = tmp_path / "step_00000001.pth"
    save_checkpoint(path, {"network_weights": {"weight": torch.ones(300)}})
    return path


def doctor(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the verb and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["medssl", "doctor", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_a_model_with_its_hash_is_healthy(model: Path) -> None:
    found = findings(model, sha256_of(next(model.glob("fold_*/*.pth"))).upper())
    assert found["model"].verdict == found["model hash"].verdict == "ok"


def test_a_model_with_another_hash_is_broken_and_both_hashes_are_named(model: Path) -> None:
    finding = findings(model, "0" * 64)["model hash"]
    assert finding.verdict == "broken"
    assert "0" * 64 in finding.detail and sha256_of(next(model.glob("fold_*/*.pth"))) in finding.detail


def test_without_an_expected_hash_the_hash_is_told_and_said_not_to_be_compared(checkpoint: Path) -> None:
    finding = findings(checkpoint)["model hash"]
    assert sha256_of(checkpoint) in finding.detail and "not compared" in finding.detail


def test_a_damaged_checkpoint_is_broken(checkpoint: Path) -> None:
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint.write_bytes(content)
    found = findings(checkpoint)
    assert found["model"].verdict == "broken" and "damaged" in found["model"].detail
    assert "model hash" not in found


def test_weights_that_do_not_fit_the_plans_are_broken(tmp_path: Path) -> None:
    wide = tiny_model(tmp_path / "wide", labels={"background": 0, "one": 1, "two": 2, "three": 3})
    narrow = tiny_model(tmp_path / "narrow")
    source = next(wide.glob("fold_*/*.pth"))
    next(narrow.glob("fold_*/*.pth")).write_bytes(source.read_bytes())
    assert findings(narrow)["model"].verdict == "broken"


def test_the_hash_of_several_folds_depends_on_each(tmp_path: Path) -> None:
    two = tiny_model(tmp_path / "two", folds=2)
    found = findings(two)["model hash"].detail
    hashes = [sha256_of(path) for path in sorted(two.glob("fold_*/*.pth"))]
    assert not any(digest in found for digest in hashes)


def test_a_hash_without_a_model_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="--model"):
        examine(None, "0" * 64)


def test_the_exit_code_and_the_environment_make_it_a_health_check(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEDSSL_MODEL", str(checkpoint))
    monkeypatch.setenv("MEDSSL_MODEL_SHA256", sha256_of(checkpoint))
    assert doctor(monkeypatch, "--json") == 0
    assert "as expected" in capsys.readouterr().out
    monkeypatch.setenv("MEDSSL_MODEL_SHA256", "0" * 64)
    assert doctor(monkeypatch) == 1
    monkeypatch.setenv("MEDSSL_MODEL_SHA256", "")
    assert doctor(monkeypatch) == 0


def test_a_user_id_without_a_name_is_broken_and_the_remedy_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_entry(user: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {user}")

    monkeypatch.setattr("pwd.getpwuid", no_entry)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    finding = findings()["user"]
    assert finding.verdict == "broken" and "set USER" in finding.detail
    monkeypatch.setenv("USER", "anybody")
    assert findings()["user"].verdict == "ok"


def test_no_writable_temporary_folder_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*arguments: object, **options: object) -> None:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "TemporaryFile", nowhere)
    finding = findings()["temporary folder"]
    assert finding.verdict == "broken" and "tmpfs" in finding.detail


def test_the_name_of_the_user_is_not_in_the_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "somebody")
    assert findings()["user"].detail == f"user id {os.getuid()}"
