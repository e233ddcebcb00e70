"""A disk that is full at any one of a command's writes: what stood there before is intact, and the remedy is named."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medssl.archive.index import index
from medssl.archive.load import open_index
from medssl.errors import MedsslError
from medssl.inference.predict import predict
from medssl.training.checkpoint import load_checkpoint, newest_intact, save_checkpoint
from tests.archive.archive_files import write_nifti
from tests.inference.tiny_models import make_model, read_mask, write_volume


def at_every_write(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any], check: Callable[[], None]) -> int:
    """Let the flush of the n-th file meet a full disk, for n = 1, 2, ... until the work meets none; return n - 1."""
    flush = os.fsync
    for number in itertools.count(1):
        calls = 0

        def full(descriptor: int, fails_at: int = number) -> None:
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            flush(descriptor)

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            try:
                work()
            except MedsslError as error:
                assert str(error).startswith("No space left") and "free some space" in str(error).lower()
            else:
                return calls
        check()
    raise AssertionError


def test_a_checkpoint_before_a_full_disk_stays_the_newest_that_is_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmp_path / "step_00000001.pth"
    save_checkpoint(first, {"network_weights": {"a": torch.ones(3)}})

    def check() -> None:
        assert load_checkpoint(newest_intact(tmp_path))["network_weights"]["a"].tolist() in ([1.0] * 3, [2.0] * 3)
        assert load_checkpoint(first)["network_weights"]["a"][0] == 1
        assert not list(tmp_path.glob(".*"))

    second = {"network_weights": {"a": torch.full((3,), 2.0)}}
    assert at_every_write(monkeypatch, lambda: save_checkpoint(tmp_path / "step_00000002.pth", second), check) >= 2


def test_a_full_disk_during_an_index_leaves_nothing_half_written_and_resume_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "archive").mkdir()
    write_nifti(tmp_path / "archive" / "a.nii.gz")
    out = tmp_path / "index"

    def work() -> None:
        index([tmp_path / "archive"], out, workers=1, resume=out.exists(), quiet=True)

    def check() -> None:
        assert not list(out.glob(".*")) and not list((out / "private").glob(".*"))

    assert at_every_write(monkeypatch, work, check) >= 4
    assert len(open_index(out).rows()) == 1


@pytest.mark.slow
def test_a_full_disk_during_prediction_leaves_no_half_mask_and_overwrite_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images, out = make_model(tmp_path / "model"), tmp_path / "images", tmp_path / "out"
    write_volume(images / "a.nii.gz")
    predict(model, images, tmp_path / "whole", device="cpu", quiet=True)
    whole = read_mask(tmp_path / "whole" / "a.nii.gz")

    def check() -> None:
        assert not list(out.glob(".*"))
        if (out / "a.nii.gz").exists():
            assert np.array_equal(read_mask(out / "a.nii.gz"), whole)

    at_every_write(
        monkeypatch, lambda: predict(model, images, out, device="cpu", overwrite=out.exists(), quiet=True), check
    )
    assert np.array_equal(read_mask(out / "a.nii.gz"), whole)
