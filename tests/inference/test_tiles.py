"""Boxes that cover a volume."""

from __future__ import annotations

import numpy as np
import pytest

from medssl.inference.tiles import centre_tile, read_tile, tile_volume


def reader(array: np.ndarray):  # type: ignore[no-untyped-def]
    return lambda start, stop: array[(slice(None), *(slice(a, b) for a, b in zip(start, stop, strict=True)))]


@pytest.mark.parametrize("shape", [(40, 40, 40), (16, 70, 33), (1, 100, 64), (17, 16, 48)])
def test_every_voxel_is_covered_but_for_narrow_margins(shape: tuple[int, int, int]) -> None:
    size = (1, 16, 16) if shape[0] == 1 else (16, 16, 16)
    seen = np.zeros(shape, int)
    for tile in tile_volume(shape, size, 1000):
        seen[tuple(slice(s, s + n) for s, n in zip(tile.start, tile.size, strict=True))] += 1
    missed = np.argwhere(seen == 0)
    assert (np.minimum(missed, np.array(shape) - 1 - missed).min(axis=1) < 2).all() if len(missed) else True


def test_a_volume_hardly_larger_than_the_box_is_one_box() -> None:
    assert [tile.start for tile in tile_volume((18, 16, 19), (16, 16, 16), 99)] == [(1, 0, 1)]
    assert len(tile_volume((20, 16, 16), (16, 16, 16), 99)) == 2


def test_a_small_volume_lies_in_the_middle_of_its_background() -> None:
    (tile,) = tile_volume((4, 16, 6), (8, 16, 8), 99)
    assert tile.start == (-2, 0, -1)
    image = read_tile(reader(np.ones((2, 4, 16, 6), np.float32)), tile, (4, 16, 6), 2, -3.0)
    assert image.shape == (2, 8, 16, 8)
    assert (image[:, 2:6, :, 1:7] == 1).all() and (image == 1).sum() == 2 * 4 * 16 * 6
    assert (image[:, :2] == -3).all() and (image[..., 7] == -3).all()


def test_of_many_boxes_evenly_spaced_ones_are_kept() -> None:
    starts = [tile.start[0] for tile in tile_volume((100, 16, 16), (1, 16, 16), 10)]
    assert starts == [5, 15, 25, 35, 45, 55, 65, 75, 85, 95]


def test_the_centre_box_is_in_the_centre() -> None:
    assert centre_tile((20, 16, 10), (16, 16, 16)).start == (2, 0, -3)
