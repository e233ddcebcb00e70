"""The store gives back what was written, crop by crop, and says what is wrong with it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from medssl.errors import DataError, UsageError
from medssl.preprocessing.store import Store, StoreWriter, number_of
from tests.preprocessing.stores import BACKGROUND, make_store

FACTS = {
    "spacing_mm": [1.0, 1.0, 1.0],
    "modality": "CT",
    "patient_key": "p",
    "split": "train",
    "background": 0.0,
    "foreground": [[0, 0, 0]],
}


def test_any_crop_equals_the_array_that_was_written(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((2, 70, 90, 50)).astype(np.float32)
    label = np.random.default_rng(1).integers(0, 300, array.shape[1:]).astype(np.int16)
    writer = StoreWriter(tmp_path / "s", {})
    writer.add("a", array, FACTS, label)
    store = writer.finish()
    for start, stop in (((0, 0, 0), (70, 90, 50)), ((3, 60, 31), (67, 90, 33)), ((69, 0, 49), (70, 1, 50))):
        box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        crop = store.read("a", start, stop)
        assert crop.dtype == np.float32
        np.testing.assert_array_equal(crop, array[(slice(None), *box)])
        np.testing.assert_array_equal(store.read("a", start, stop, channels=[1]), array[(slice(1, 2), *box)])
        found = store.read_label("a", start, stop)
        assert found is not None and found.dtype == np.int16
        np.testing.assert_array_equal(found, label[box])


def test_facts_come_back(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", labels=True)
    assert store.ids == ["volume_00", "volume_01", "volume_02", "volume_03"]
    assert store.ids_of("validation") == ["volume_03"]
    assert store.ids_of("all") == store.ids
    assert store.modalities == {"MR"}
    entry = store.entry("volume_01")
    assert (entry.shape, entry.spacing_mm, entry.background) == ((1, 25, 41, 33), (1.0, 0.75, 0.75), BACKGROUND)
    assert entry.number == number_of("volume_01") and 0 <= entry.number < 2**63
    assert entry.foreground.shape == (64, 3)
    volume = store.read("volume_01", (0, 0, 0), entry.shape[1:])
    assert (volume[0][tuple(entry.foreground.T)] > BACKGROUND).all()


def test_images_are_volumes_of_one_slice(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", shape=(1, 64, 48), channels=3)
    assert store.entry("volume_00").shape == (3, 1, 64, 48)
    assert store.read("volume_00", (0, 5, 5), (1, 37, 37)).shape == (3, 1, 32, 32)
    assert store.read_label("volume_00", (0, 0, 0), (1, 2, 2)) is None


def test_a_pickled_store_reads_the_same(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s")
    first = store.read("volume_00", (0, 0, 0), (8, 8, 8))
    again = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(again.read("volume_00", (0, 0, 0), (8, 8, 8)), first)


def test_hash_depends_on_the_data_only(tmp_path: Path) -> None:
    one, two = make_store(tmp_path / "one"), make_store(tmp_path / "two")
    assert one.hash == two.hash != make_store(tmp_path / "three", seed=1).hash


def test_facts_of_many_volumes_do_not_pile_up_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medssl.preprocessing.store.MAX_ENTRIES", 2)
    store = make_store(tmp_path / "s")
    first = store.entry("volume_00")
    for name in store.ids:
        store.entry(name)
    assert len(store._entries) == 2
    again = store.entry("volume_00")
    assert again is not first and again.properties == first.properties
    np.testing.assert_array_equal(again.foreground, first.foreground)


def test_the_table_of_volumes_needs_no_file_of_facts(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s")
    (tmp_path / "s" / "volume_02.json").unlink()
    row = store.row("volume_02")
    assert (row["modality"], row["patient_key"], row["split"]) == ("MR", "patient_01", "train")
    with pytest.raises(UsageError, match="no volume 'volume_99'"):
        store.row("volume_99")


def test_half_precision_is_kept_and_read_as_float32(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s", {})
    writer.add("a", np.full((1, 4, 4, 4), 0.5), FACTS, codec="float16")
    store = writer.finish()
    assert store.entry("a").properties["dtype"] == "float16"
    assert store.read("a", (0, 0, 0), (4, 4, 4)).dtype == np.float32


def test_an_interrupted_store_names_the_remedy_and_resumes(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    writer = StoreWriter(folder, {"spacing": 1})
    writer.add("a", np.zeros((1, 4, 4, 4), np.float32), FACTS)
    (folder / f".{'0' * 32}-b.b2nd").write_bytes(b"half")
    with pytest.raises(UsageError, match="--resume"):
        Store.open(folder)
    with pytest.raises(UsageError, match=r"other settings \(spacing\)"):
        StoreWriter(folder, {"spacing": 2}, resume=True)
    writer = StoreWriter(folder, {"spacing": 1}, resume=True)
    assert writer.complete("a") and not writer.complete("b")
    assert not list(folder.glob(".*"))
    assert writer.finish().ids == ["a"]


def test_a_truncated_volume_is_not_complete_and_not_silently_read(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s")
    path = tmp_path / "s" / "volume_00.b2nd"
    path.write_bytes(path.read_bytes()[:-200])
    assert not StoreWriter(tmp_path / "s", store_info(store), resume=True).complete("volume_00")
    with pytest.raises(DataError, match="volume_00"):
        store.read("volume_00", (0, 0, 0), store.entry("volume_00").shape[1:])


def store_info(store: Store) -> dict[str, object]:
    return {key: store.info[key] for key in ("spacing", "normalisation")}


def test_bad_reads_and_bad_folders_are_named(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s")
    with pytest.raises(ValueError, match="not inside"):
        store.read("volume_00", (0, 0, 0), (25, 8, 8))
    with pytest.raises(UsageError, match="no volume 'volume_99'"):
        store.entry("volume_99")
    with pytest.raises(UsageError, match="not a folder"):
        Store.open(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no store"):
        Store.open(tmp_path / "empty")
    (tmp_path / "s" / "volume_00.json").write_text("{")
    with pytest.raises(DataError, match=r"volume_00\.json"):
        Store.open(tmp_path / "s").entry("volume_00")
    (tmp_path / "s" / "store.json").write_text(json.dumps({"kind": "store", "schema_version": 99, "volumes": []}))
    with pytest.raises(DataError, match="schema 99"):
        Store.open(tmp_path / "s")


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".a", "a_seg"])
def test_names_that_leave_the_folder_or_mean_a_label_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a volume"):
        StoreWriter(tmp_path / "s", {}).add(name, np.zeros((1, 2, 2, 2)), FACTS)


def test_shapes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s", {})
    with pytest.raises(ValueError, match="non-empty"):
        writer.add("a", np.zeros((2, 2, 2)), FACTS)
    with pytest.raises(ValueError, match="label has shape"):
        writer.add("a", np.zeros((1, 2, 2, 2)), FACTS, np.zeros((2, 2, 3), np.int16))
    with pytest.raises(ValueError, match="'split' is missing"):
        writer.add("a", np.zeros((1, 2, 2, 2)), {key: value for key, value in FACTS.items() if key != "split"})
    assert not list((tmp_path / "s").glob("a*"))
