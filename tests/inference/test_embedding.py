"""Features of whole volumes: what they are made of, what they do not depend on, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from medssl.errors import CheckpointError, DataError, UsageError
from medssl.inference.embed import FEATURES, embed_store
from medssl.inference.embedding import boxes_of, embed
from medssl.inference.embedding_file import read_embeddings, write_embeddings
from medssl.inference.frozen import load_frozen
from medssl.inference.volumes import volumes_of_arrays, volumes_of_store
from medssl.networks.pooling import pooled_stages
from medssl.preprocessing.store import Store
from tests.inference.tiny_encoders import write_encoder
from tests.preprocessing.stores import make_store


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoders") / "step_00000001.pth")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("stores") / "store", n=3, shape=(20, 33, 18), labels=True)


def arrays(*shape: int, count: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


def test_a_volume_of_one_box_has_the_pooled_features_of_that_box(encoder: Path) -> None:
    frozen = load_frozen(encoder)
    images = arrays(1, 16, 16, 16)
    for pooling in ("mean", "mean+max"):
        found = embed(frozen, volumes_of_arrays(images, ["a", "b"]), pooling=pooling)
        expected = pooled_stages(frozen.encoder, torch.from_numpy(images), "all", pooling).numpy()
        np.testing.assert_allclose(found.features, expected, rtol=1e-5, atol=1e-6)
        assert len(found.names) == found.features.shape[1] == 18 * (2 if "max" in pooling else 1)


def test_boxes_are_averaged_and_their_largest_values_kept(encoder: Path) -> None:
    frozen = load_frozen(encoder)
    image = arrays(1, 32, 16, 16, count=1)
    found = embed(frozen, volumes_of_arrays(image, ["a"]), pooling="mean+max").features[0]
    halves = torch.from_numpy(np.concatenate([image[:, :, :16], image[:, :, 16:]]))
    each = pooled_stages(frozen.encoder, halves, "all", "mean+max").numpy()
    np.testing.assert_allclose(found[:18], each[:, :18].mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[18:], each[:, 18:].max(axis=0), rtol=1e-5, atol=1e-6)


def test_a_volume_does_not_depend_on_its_neighbours(encoder: Path, store: Store) -> None:
    together = embed(encoder, store)
    alone = embed(encoder, volumes_of_store(store, ids=[store.ids[1]]))
    np.testing.assert_allclose(alone.features[0], together.features[1], rtol=1e-5, atol=1e-6)
    assert together.patient_keys == ("patient_00", "patient_00", "patient_01")
    assert together.splits == ("train", "train", "validation")
    np.testing.assert_array_equal(embed(encoder, store).features, together.features)


def test_boxes_without_tissue_are_left_out(encoder: Path, store: Store) -> None:
    from dataclasses import replace

    frozen = load_frozen(encoder)
    volume = volumes_of_store(store)[0]
    everything = boxes_of(frozen, replace(volume, tissue=None), "cover", 99)
    corner = boxes_of(frozen, replace(volume, tissue=np.array([[0, 0, 2]])), "cover", 99)
    assert [tile.start for tile in corner] == [everything[0].start] and len(everything) > 1
    nowhere = boxes_of(frozen, replace(volume, tissue=np.empty((0, 3), np.int64)), "cover", 99)
    assert nowhere == everything


def test_images_and_slices_go_through_a_flat_encoder(tmp_path: Path, store: Store) -> None:
    frozen = load_frozen(write_encoder(tmp_path / "e.pth", dimensions=2))
    images = arrays(1, 16, 16)
    found = embed(frozen, volumes_of_arrays(images, ["a", "b"]), stages="last").features
    expected = pooled_stages(frozen.encoder, torch.from_numpy(images), "last").numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert embed(frozen, store, most_boxes=4).features.shape == (3, 18)


def test_an_encoder_of_one_channel_sees_each_channel_and_the_mean_is_taken(encoder: Path, tmp_path: Path) -> None:
    images = arrays(2, 16, 16, 16)
    both = embed(encoder, volumes_of_arrays(images, ["a", "b"])).features
    each = [embed(encoder, volumes_of_arrays(images[:, c : c + 1], ["a", "b"])).features for c in (0, 1)]
    np.testing.assert_allclose(both, (each[0] + each[1]) / 2, rtol=1e-5, atol=1e-6)
    two = write_encoder(tmp_path / "two.pth", channels=2)
    with pytest.raises(UsageError, match="a has 1 channels, the encoder takes 2"):
        embed(two, volumes_of_arrays(images[:, :1], ["a", "b"]))


def test_the_untrained_network_is_another_and_follows_its_seed(encoder: Path) -> None:
    volumes = volumes_of_arrays(arrays(1, 16, 16, 16), ["a", "b"])
    trained, first, again, second = (
        embed(load_frozen(encoder, **more), volumes).features
        for more in ({}, {"untrained": True}, {"untrained": True}, {"untrained": True, "seed": 1})
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(trained - first).max() > 0.01 and np.abs(first - second).max() > 0.01


def test_features_come_back_from_parquet_and_other_tools_read_them(encoder: Path, store: Store, tmp_path: Path) -> None:
    found = embed(encoder, store)
    write_embeddings(tmp_path / "f.parquet", found)
    back = read_embeddings(tmp_path / "f.parquet")
    np.testing.assert_array_equal(back.features, found.features)
    assert (back.ids, back.patient_keys, back.splits, back.names) == (
        found.ids, found.patient_keys, found.splits, found.names,
    )  # fmt: skip
    assert back.facts["stages"] == [0, 1, 2]
    frame = pl.read_parquet(tmp_path / "f.parquet")
    assert frame.columns == ["id", "patient_key", "split", "modality", "features"]
    np.testing.assert_array_equal(frame["features"].to_numpy(), found.features)
    with pytest.raises(DataError, match="holds no features"):
        read_embeddings(encoder)


def test_the_command_writes_features_pictures_and_no_path(encoder: Path, store: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = embed_store(encoder, store.folder, out, split="train", device="cpu", quiet=True)
    assert read_embeddings(out / FEATURES).ids == found.ids == ("volume_00", "volume_01")
    pictures = np.load(out / "thumbnails.npz", allow_pickle=False)
    assert pictures["pictures"].shape == (2, 48, 48) and pictures["pictures"].max() == 255
    facts = json.loads((out / "run.json").read_text())
    assert facts["kind"] == "embedding" and facts["encoder"]["method"] == "mae"
    for path in out.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()
    with pytest.raises(UsageError, match="--overwrite"):
        embed_store(encoder, store.folder, out, quiet=True)
    embed_store(encoder, store.folder, out, overwrite=True, quiet=True)


def test_features_that_are_not_numbers_are_refused_by_name(encoder: Path, store: Store, tmp_path: Path) -> None:
    images = arrays(1, 16, 16, 16)
    images[1, 0, 3, 3, 3] = np.nan
    found = embed(encoder, volumes_of_arrays(images, ["fine", "broken"]))
    with pytest.raises(DataError, match="1 of 2 volumes have features that are not numbers: broken"):
        found.require_finite()


def test_an_empty_split_or_a_wrong_option_is_said(encoder: Path, store: Store) -> None:
    with pytest.raises(UsageError, match="no volume in the split 'test'"):
        volumes_of_store(store, split="test")
    with pytest.raises(UsageError, match="--boxes takes"):
        embed(encoder, store, boxes="corner")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="stages 0 to 2"):
        embed(encoder, store, stages=(5,))


def test_weights_that_miss_a_part_of_the_encoder_are_refused(encoder: Path, tmp_path: Path) -> None:
    from medssl.training.checkpoint import load_checkpoint, save_checkpoint

    content = load_checkpoint(encoder)
    name = next(name for name in content["network_weights"] if name.startswith("encoder."))
    del content["network_weights"][name]
    save_checkpoint(tmp_path / "half.pth", content)
    with pytest.raises(CheckpointError, match="misses 1 of"):
        load_frozen(tmp_path / "half.pth")


def test_another_voxel_size_is_a_warning(encoder: Path, caplog: pytest.LogCaptureFixture) -> None:
    from dataclasses import replace

    volumes = [replace(volume, spacing_mm=(1.0, 1.0, 3.0)) for volume in volumes_of_arrays(arrays(1, 16, 16, 16), "ab")]
    with caplog.at_level(logging.WARNING):
        embed(encoder, volumes)
    assert "trained at 1 x 1 x 1 mm" in caplog.text
