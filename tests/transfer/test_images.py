"""The images of a data set are brought into a store once."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from medssl.archive.volume import Volume
from medssl.data.target_files import read_targets
from medssl.preprocessing.case import prepare
from medssl.preprocessing.packed import PackedStore, PackedWriter
from medssl.preprocessing.survey import plan_of
from medssl.transfer.images import ImageOptions, fitted_store, volume_store
from tests.transfer.toy_images import finetune, write_npz

QUIET = ImageOptions(modality="XR", quiet=True)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that were prepared or fitted."""
    names: list[str] = []
    original = PackedWriter.add

    def noted(self: PackedWriter, volume_id: str, *rest: object) -> None:
        names.append(volume_id)
        original(self, volume_id, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(PackedWriter, "add", noted)
    return names


def test_each_image_of_an_npz_is_what_preprocessing_makes_of_it(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "toy.npz", train=6, validation=4)
    targets = read_targets(path)
    store, ids = volume_store(targets, path, tmp_path, QUIET)
    assert isinstance(store, PackedStore)
    with np.load(path) as content:
        for case in targets.cases:
            array, number = case.array
            volume = Volume(content[array][number][None, None], np.eye(4), "XR", "scalar")
            expected = prepare(volume, plan_of(store.info), name=case.name, modalities=("XR",))
            entry = store.entry(ids[case.name])
            assert np.array_equal(store.read(entry.id, (0, 0, 0), entry.shape[1:]), expected.array)
            assert entry.foreground.tolist() == expected.facts["foreground"]
            assert entry.background == expected.facts["background"] and entry.rescale[1] > 1


def test_runs_that_share_a_cache_prepare_once_whatever_they_learn_from(tmp_path: Path, added: list[str]) -> None:
    path = write_npz(tmp_path / "toy.npz")
    finetune(path, tmp_path / "first", cache=tmp_path / "cache", steps=1, mode="linear")
    assert len(added) == 2 * 40, "40 images, prepared and fitted"
    for number, options in enumerate(({"labelled": 4}, {"labelled": 8, "seed": 1}, {"folds": 3, "fold": 2})):
        finetune(path, tmp_path / f"run{number}", cache=tmp_path / "cache", steps=1, mode="linear", **options)
    assert len(added) == 80


def test_a_store_is_known_by_the_content_of_its_source(tmp_path: Path, added: list[str]) -> None:
    path = write_npz(tmp_path / "toy.npz", train=4, validation=4)
    volume_store(read_targets(path), path, tmp_path / "cache", QUIET)
    count = len(added)
    os.utime(path, (1, 1))
    volume_store(read_targets(path), path, tmp_path / "cache", QUIET)
    assert len(added) == count
    with np.load(path) as content:
        changed = dict(content)
    changed["train_images"][0, 0, 0] ^= 1
    np.savez(path, **changed)
    volume_store(read_targets(path), path, tmp_path / "cache", QUIET)
    assert len(added) == 2 * count


def test_large_images_have_a_file_each_so_that_those_made_are_kept(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "toy.npz", train=2, validation=2)
    store, ids = volume_store(read_targets(path), path, tmp_path, QUIET)
    for edge, packed in ((16, True), (1024, False)):
        fitted = fitted_store(
            store, ids, tmp_path, patch=(1, edge, edge), window=(1, edge, edge), fit="whole", options=QUIET
        )
        assert isinstance(fitted, PackedStore) == packed
        assert fitted.ids == store.ids
