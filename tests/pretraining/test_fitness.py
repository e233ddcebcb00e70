"""A method that cannot learn from a store is refused before training."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from medssl import registry
from medssl.errors import UsageError
from medssl.preprocessing.store import Store
from medssl.pretraining.recipe import settle
from medssl.training.devices import find_machine
from tests.pretraining.conftest import make_store


def settled(folder: Path, **values: object) -> None:
    settle(
        {"network": "resenc-xs", "patch_size": [16, 16, 16], **values}, Store.open(folder), find_machine("cpu"), "test"
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of one volume."""
    return make_store(tmp_path_factory.mktemp("one") / "store", count=1, validation=0).folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of pictures."""
    return make_store(tmp_path_factory.mktemp("pictures") / "store", shape=(1, 1, 40, 36), modality="IMAGE").folder


@pytest.mark.parametrize("method", ["simclr", "volume-fusion", "position-contrast"])
def test_one_volume_is_refused_where_volumes_are_compared(one: Path, method: str) -> None:
    with pytest.raises(UsageError, match=r"1 training volume.*--method (genesis|simsiam|mae) would work"):
        settled(one, method=method, batch_size=4)


@pytest.mark.parametrize("method", ["simclr", "byol", "vicreg", "barlow-twins", "swav", "dino", "gmml"])
def test_a_batch_of_one_is_refused_where_samples_are_compared(store: Path, method: str) -> None:
    with pytest.raises(UsageError, match=r"batch_size 1: .* needs 2 or more.*--method (mae|genesis) would work"):
        settled(store, method=method, batch_size=1)


def test_a_patch_beyond_the_volumes_is_refused_where_position_is_asked_for(store: Path) -> None:
    with pytest.raises(UsageError, match=r"fit into every volume.*\[22, 26, 20\].*--method mae would work"):
        settled(store, method="voco", patch_size=[32, 32, 32], batch_size=2)


def test_pictures_are_refused_where_the_position_along_z_is_asked_for(pictures: Path) -> None:
    with pytest.raises(UsageError, match="simclr would work"):
        settled(pictures, method="position-contrast", patch_size=[32, 32], batch_size=4)


def test_a_modality_without_policy_is_refused_and_names_the_setting(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "store", modality="XYZ").folder
    with pytest.raises(UsageError, match=r"XYZ.*augmentation\.modality"):
        settled(folder, method="simclr", batch_size=4)


def test_a_small_batch_is_warned_of(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        settled(store, method="vicreg", batch_size=4)
    assert "learns little" in caplog.text


def test_what_a_method_would_be_replaced_by_exists() -> None:
    for entry in registry.METHODS.values():
        assert set(entry.instead) <= set(registry.METHODS) - {entry.name}
        assert entry.instead or entry.name == "mae"
