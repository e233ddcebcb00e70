"""Checkpoint files."""

from __future__ import annotations

import logging
import pickle
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medssl.errors import CheckpointError, MedsslError
from medssl.networks.build import build_network
from medssl.training.checkpoint import (
    checkpoint_name,
    find_checkpoint,
    load_checkpoint,
    newest_intact,
    remove_old,
    save_checkpoint,
    to_cpu,
)


def content(value: float = 1.0) -> dict[str, Any]:
    return {"network_weights": {"a": torch.full((3,), value)}, "medssl": {"step": 1, "names": ["x"], "none": None}}


def several(folder: Path, steps: tuple[int, ...] = (1, 2, 3)) -> list[Path]:
    for step in steps:
        save_checkpoint(folder / checkpoint_name(step), content(step))
    return [folder / checkpoint_name(step) for step in steps]


def flip_a_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)


def test_what_is_saved_is_loaded_with_weights_only(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    save_checkpoint(path, content())
    plain = torch.load(path, weights_only=True)
    loaded = load_checkpoint(path)
    assert torch.equal(plain["network_weights"]["a"], loaded["network_weights"]["a"])
    assert loaded["medssl"] == content()["medssl"]


def test_the_side_file_is_one_that_sha256sum_checks(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pth", content())
    subprocess.run(["sha256sum", "-c", "c.pth.sha256"], cwd=tmp_path, check=True, capture_output=True)


def test_shared_weights_are_stored_once_and_stay_shared(tmp_path: Path) -> None:
    network = build_network("resenc-xs", dimensions=3)
    path = tmp_path / "c.pth"
    save_checkpoint(path, {"network_weights": network.state_dict()})
    numbers = sum(parameter.numel() for parameter in network.parameters())
    assert path.stat().st_size < numbers * 4 * 1.1
    weights = load_checkpoint(path)["network_weights"]
    assert list(weights) == list(network.state_dict())
    first, second = (
        weights["encoder.stem.convs.0.conv.weight"],
        weights["decoder.encoder.stem.convs.0.all_modules.0.weight"],
    )
    assert first.data_ptr() == second.data_ptr()


def test_a_part_of_a_large_tensor_does_not_bring_the_rest_along(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    save_checkpoint(path, {"network_weights": {"a": torch.zeros(1_000_000)[:2]}})
    assert path.stat().st_size < 10_000


def test_tensors_with_gradient_are_detached() -> None:
    moved = to_cpu({"a": [torch.ones(2, requires_grad=True)], "b": (1, "x")})
    assert not moved["a"][0].requires_grad
    assert moved["b"] == (1, "x")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code was run",))


def test_pickles_that_ask_for_code_are_refused_and_nothing_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"network_weights": {"a": torch.ones(1)}, "other": Evil()}, path)
    with pytest.raises(CheckpointError, match="keep the tensors alone") as caught:
        load_checkpoint(path)
    assert "print" in str(caught.value)
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["pickle", "legacy"])
def test_bare_and_legacy_pickles_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "old.pth"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"network_weights": {}}))
    else:
        torch.save(content(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="legacy pickle"):
        load_checkpoint(path)


def test_numpys_numbers_are_taken_only_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "nnunet.pth"
    torch.save({**content(), "_best_ema": np.float64(0.5), "logging": [np.float32(1), np.int64(2)]}, path)
    with pytest.raises(CheckpointError, match="scalar"):
        load_checkpoint(path)
    assert load_checkpoint(path, numpy_scalars=True)["_best_ema"] == 0.5


def test_compressed_parts_are_refused(tmp_path: Path) -> None:
    path, packed = tmp_path / "c.pth", tmp_path / "packed.pth"
    torch.save(content(), path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for part in source.infolist():
            target.writestr(part.filename, source.read(part.filename))
    with pytest.raises(CheckpointError, match="compressed parts"):
        load_checkpoint(packed)


@pytest.mark.parametrize("value", [{"state_dict": {}}, [1, 2], {"network_weights": {"a": 1}}])
def test_files_without_weights_say_what_they_hold(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"network_weights|is a dictionary"):
        load_checkpoint(tmp_path / "c.pth")


@pytest.mark.parametrize("with_side_file", [True, False])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied"])
def test_damaged_files_are_refused(tmp_path: Path, damage: str, with_side_file: bool) -> None:
    path = tmp_path / "c.pth"
    save_checkpoint(path, {"network_weights": {"a": torch.randn(1000)}})
    if not with_side_file:
        (tmp_path / "c.pth.sha256").unlink()
    if damage == "flipped":
        flip_a_byte(path)
    else:
        path.write_bytes(path.read_bytes()[: 1000 if damage == "truncated" else 0])
    with pytest.raises(CheckpointError, match="Use an older checkpoint"):
        load_checkpoint(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(tmp_path / "c.pth")


def test_the_newest_intact_checkpoint_is_taken_and_the_fall_back_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = several(tmp_path)
    assert newest_intact(tmp_path) == third
    flip_a_byte(third)
    with caplog.at_level(logging.WARNING):
        assert newest_intact(tmp_path) == second
    assert third.name in caplog.text and "falling back" in caplog.text
    flip_a_byte(first)
    flip_a_byte(second)
    with pytest.raises(CheckpointError, match="All 3 checkpoints"):
        newest_intact(tmp_path)


def test_a_kill_between_file_and_checksum_loses_nothing(tmp_path: Path) -> None:
    *_, third = several(tmp_path)
    (tmp_path / f"{third.name}.sha256").unlink()
    assert newest_intact(tmp_path) == third


def test_a_checkpoint_written_again_is_not_judged_by_its_old_checksum(tmp_path: Path) -> None:
    path = tmp_path / checkpoint_name(1)
    save_checkpoint(path, content(1))
    save_checkpoint(path, content(2))
    assert load_checkpoint(path)["network_weights"]["a"][0] == 2


def test_only_the_last_are_kept(tmp_path: Path) -> None:
    several(tmp_path, (1, 2, 3, 4))
    (tmp_path / f".{'a' * 32}-step_00000005.pth").write_bytes(b"half")
    remove_old(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_00000003.pth",
        "step_00000003.pth.sha256",
        "step_00000004.pth",
        "step_00000004.pth.sha256",
    ]


def test_a_run_means_its_newest_checkpoint(tmp_path: Path) -> None:
    *_, third = several(tmp_path / "checkpoints")
    assert find_checkpoint(tmp_path) == third
    assert find_checkpoint(tmp_path / "checkpoints") == third
    assert find_checkpoint(third) == third
    with pytest.raises(CheckpointError, match="does not exist"):
        find_checkpoint(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        find_checkpoint(tmp_path / "empty")


def test_a_full_disk_is_named_and_the_checkpoint_before_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.pth"
    save_checkpoint(path, content(1))

    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 832 vs 726")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(MedsslError, match=r"No space left.*--resume"):
        save_checkpoint(path, content(2))
    assert load_checkpoint(path)["network_weights"]["a"][0] == 1
