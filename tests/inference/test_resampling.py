"""Resampling part by part equals nnU-Net's resampling of the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet

from medssl.errors import MedsslError
from medssl.inference.resampling import RowResampler, Scheme, resample_channel
from medssl.inference.workspace import Workspace

SHAPES = [
    ((20, 24, 18), (31, 17, 18)),
    ((9, 20, 22), (30, 20, 22)),
    ((40, 12, 12), (13, 19, 7)),
    ((1, 15, 15), (1, 22, 9)),
]
SPACINGS = [((1.0, 1.0, 1.0), (1.2, 0.9, 1.0)), ((6.0, 1.0, 1.0), (2.0, 1.0, 1.0)), ((1.0, 5.0, 1.0), (1.0, 1.5, 1.0))]


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("spacings", SPACINGS)
def test_channel_equals_nnunets_default_function(
    order: int, shapes: tuple[tuple[int, ...], ...], spacings: tuple[tuple[float, ...], ...], tmp_path: Path
) -> None:
    data = np.random.default_rng(0).normal(size=(1, *shapes[0])).astype(np.float32)
    kwargs = {"is_seg": False, "order": order, "order_z": 0, "force_separate_z": None}
    expected = resample_data_or_seg_to_shape(data, shapes[1], *spacings, **kwargs)[0]
    scheme = Scheme.of("resample_data_or_seg_to_shape", kwargs, *spacings)
    assert scheme.by_rows
    made = np.empty(shapes[1], np.float32)
    workspace = Workspace(1, tmp_path)
    workspace.limit = 30_000
    resample_channel(data[0], shapes[1], scheme, made, workspace)
    np.testing.assert_allclose(made, expected, rtol=0, atol=3e-7)
    assert np.mean(made != expected) < 1e-3


@pytest.mark.parametrize("name", ["resample_data_or_seg_to_shape", "resample_torch_fornnunet"])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("spacings", SPACINGS)
def test_rows_made_as_they_become_known_equal_the_whole(
    name: str, shapes: tuple[tuple[int, ...], ...], spacings: tuple[tuple[float, ...], ...]
) -> None:
    data = np.random.default_rng(1).normal(size=(1, *shapes[0])).astype(np.float32)
    whole = {
        "resample_data_or_seg_to_shape": resample_data_or_seg_to_shape,
        "resample_torch_fornnunet": resample_torch_fornnunet,
    }[name]
    kwargs = {"is_seg": False, "force_separate_z": None} | ({"order": 1, "order_z": 0} if "data" in name else {})
    expected = np.asarray(whole(data, shapes[1], *spacings, **kwargs))[0]
    scheme = Scheme.of(name, kwargs, *spacings)
    resampler = RowResampler(shapes[0], shapes[1], scheme.separate_axis)
    start = unequal = 0
    for known in range(1, shapes[0][0] + 1):
        stop = resampler.ready(known, start)
        if stop > start:
            low, high = resampler.needed(start, stop)
            assert high <= known
            made = resampler.apply(data[0, low:known], low, start, stop)
            if "torch" in name:  # which reckons coordinates in float32
                np.testing.assert_allclose(made, expected[start:stop], rtol=0, atol=1e-5)
            else:
                np.testing.assert_allclose(made, expected[start:stop], rtol=0, atol=3e-7)
                unequal += np.count_nonzero(made.astype(np.float32) != expected[start:stop])
            start = stop
    assert start == shapes[1][0] and unequal <= 1e-3 * expected.size


def test_functions_that_are_not_known_are_left_to_nnunet() -> None:
    assert not Scheme.of("no_resampling_hack", {}, (1, 1, 1), (2, 2, 2)).by_rows
    assert not Scheme.of("resample_data_or_seg_to_shape", {"order": 2}, (1, 1, 1), (2, 2, 2)).by_rows
    assert not Scheme.of("resample_torch_fornnunet", {"mode": "nearest"}, (1, 1, 1), (2, 2, 2)).by_rows


def test_arrays_beyond_the_budget_go_to_files_without_a_name(tmp_path: Path) -> None:
    workspace = Workspace(1, tmp_path)
    small, large = workspace.zeros((1000,), np.float32), workspace.zeros((1000, 1000), np.float32)
    assert not isinstance(small, np.memmap) and isinstance(large, np.memmap)
    large[5] = 3.0
    assert large.sum() == 3000.0 and not list(tmp_path.iterdir())
    assert workspace.held == 4000
    workspace.release(small)
    workspace.release(large)
    assert workspace.held == 0


def test_a_disk_without_room_for_scratch_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(MedsslError, match=r"No room for a scratch file of 4 MiB.*--memory-mb"):
        Workspace(1, tmp_path).empty((1024, 1024), np.float32)
