"""Boxes as an augmentation policy changes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medssl.augmentation.policy import AugmentationSettings, policy_for
from medssl.errors import UsageError
from medssl.inference.embedding import embed
from medssl.inference.frozen import load_frozen
from medssl.inference.tiles import Tile, centre_tile
from medssl.inference.views import changed_by, view_features
from medssl.inference.volumes import Volume, volumes_of_arrays
from tests.inference.tiny_encoders import write_encoder


def volumes(dimensions: int = 3, channels: int = 1) -> list[Volume]:
    image = np.random.default_rng(0).normal(size=(channels, *(16,) * dimensions)).astype(np.float32)
    return volumes_of_arrays([image, image], ["first", "second"], modality="MR")


@pytest.mark.parametrize("dimensions", [2, 3])
def test_each_volume_is_changed_by_its_own_draw_and_all_its_boxes_alike(tmp_path: Path, dimensions: int) -> None:
    frozen = load_frozen(write_encoder(tmp_path / "e.pth", dimensions=dimensions))
    settings = AugmentationSettings(overrides={"intensity": {"brightness": {"probability": 1.0, "factor": [0.5, 2.0]}}})
    change = changed_by(policy_for("none", {"MR"}, frozen.patch_size, settings), frozen)
    first, second = volumes(dimensions)
    tile = centre_tile(first.shape[1:], (1, 16, 16) if dimensions == 2 else (16, 16, 16))
    image = first.read((0, 0, 0), first.shape[1:])
    before = image.copy()
    changed = change(image, first, tile)
    assert changed.shape == image.shape and np.abs(changed - image).max() > 0.05
    np.testing.assert_array_equal(change(image, first, Tile((0, 0, 0), tile.size)), changed)
    assert np.abs(change(image, second, tile) - changed).max() > 0.05
    np.testing.assert_array_equal(image, before)


def test_a_policy_without_changes_changes_nothing(tmp_path: Path) -> None:
    frozen = load_frozen(write_encoder(tmp_path / "e.pth"))
    still = changed_by(policy_for("none", {"MR"}, frozen.patch_size), frozen)
    np.testing.assert_allclose(embed(frozen, volumes(), change=still).features, embed(frozen, volumes()).features)


def test_views_need_all_channels_and_a_known_modality(tmp_path: Path) -> None:
    frozen = load_frozen(write_encoder(tmp_path / "e.pth"))
    with pytest.raises(UsageError, match="first has 2 channels, the encoder takes 1"):
        view_features(frozen, volumes(channels=2), views=2)
    with pytest.raises(UsageError, match="no augmentation purpose named 'strnog'"):
        view_features(frozen, volumes(), views=2, purpose="strnog")
