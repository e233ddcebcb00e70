"""Many small images in few files."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medssl.errors import DataError, UsageError
from medssl.preprocessing.packed import FACTS, VOXELS, PackedWriter
from medssl.preprocessing.store import Store, StoreWriter

INFO = {"spacing": {"mode": "native", "mm": None}, "normalisation": "none"}


def image(number: int) -> tuple[np.ndarray, dict[str, Any]]:
    rng = np.random.default_rng(number)
    array = rng.standard_normal((1 + number % 2, 1, 5 + number, 4)).astype(np.float32)
    facts = {
        "spacing_mm": [1.0, 0.5, 0.25], "modality": "XR", "patient_key": f"patient{number // 2}", "split": "train",
        "background": -1.0, "foreground": [[0, row, 1] for row in range(number)], "flags": ["made"],
    }  # fmt: skip
    return array, facts


def written(folder: Path, count: int = 4, backwards: bool = False) -> Store:
    with PackedWriter(folder, INFO) as writer:
        for number in sorted(range(count), reverse=backwards):
            writer.add(f"image{number}", *image(number))
        return writer.finish()


def test_a_packed_store_reads_as_one_with_a_file_for_each_image(tmp_path: Path) -> None:
    packed, single = written(tmp_path / "packed"), StoreWriter(tmp_path / "single", INFO)
    for number in range(4):
        single.add(f"image{number}", *image(number))
    other = single.finish()
    assert packed.ids == other.ids and packed.modalities == other.modalities
    for name in packed.ids:
        one, two = packed.entry(name), other.entry(name)
        assert (one.shape, one.spacing_mm, one.background, one.number) == (
            two.shape, two.spacing_mm, two.background, two.number
        )  # fmt: skip
        assert np.array_equal(one.foreground, two.foreground) and one.properties["flags"] == ["made"]
        assert np.array_equal(packed.read(name, (0, 0, 0), one.shape[1:]), other.read(name, (0, 0, 0), two.shape[1:]))
        assert np.array_equal(packed.read(name, (0, 1, 1), (1, 3, 4), [0]), other.read(name, (0, 1, 1), (1, 3, 4), [0]))
        assert packed.read_label(name, (0, 0, 0), (1, 1, 1)) is None


def test_what_was_read_may_be_changed_and_the_store_is_not(tmp_path: Path) -> None:
    store = written(tmp_path / "store")
    store.read("image1", (0, 0, 0), (1, 6, 4))[:] = 7
    assert np.array_equal(store.read("image1", (0, 0, 0), (1, 6, 4)), image(1)[0])


def test_the_hash_is_that_of_the_images_and_not_of_their_order(tmp_path: Path) -> None:
    first = written(tmp_path / "a").hash
    assert first == written(tmp_path / "b", backwards=True).hash != written(tmp_path / "c", count=3).hash


def test_a_reading_process_opens_its_own_files(tmp_path: Path) -> None:
    store = written(tmp_path / "store")
    store.read("image1", (0, 0, 0), (1, 6, 4))
    again = pickle.loads(pickle.dumps(store))
    assert np.array_equal(again.read("image1", (0, 0, 0), (1, 6, 4)), image(1)[0])


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), PackedWriter(tmp_path / "store", INFO) as writer:
        writer.add("image1", *image(1))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    killed = PackedWriter(tmp_path / "store", INFO)
    killed.add("image1", *image(1))
    written(tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_file_that_was_cut_off_is_named(tmp_path: Path) -> None:
    written(tmp_path / "store")
    path = tmp_path / "store" / VOXELS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=VOXELS):
        Store.open(tmp_path / "store")


def test_a_name_is_taken_once_and_a_place_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with PackedWriter(tmp_path / "store", INFO) as writer:
        writer.add("image1", *image(1))
        with pytest.raises(ValueError, match="taken"):
            writer.add("image1", *image(1))
        with pytest.raises(UsageError, match="remove it"):
            writer.finish()


def changed(folder: Path, change: Callable[[list[dict[str, Any]]], Any]) -> Path:
    """Write a store and change the rows of its table."""
    written(folder)
    content = json.loads((folder / "store.json").read_text())
    change(content["volumes"])
    (folder / "store.json").write_text(json.dumps(content))
    return folder


def swap(column: str) -> Callable[[list[dict[str, Any]]], Any]:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[0][column], rows[2][column] = rows[2][column], rows[0][column]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1].update(first=0), "image1 does not begin in voxels.f32"),
        (lambda rows: rows[1].update(first=-32), "does not begin"),
        (lambda rows: rows[1].update(first=10**9), "does not begin"),
        (lambda rows: rows[1].update(first=10**30), "whole number as first"),
        (lambda rows: rows[1].update(first=20.0), "whole number as first"),
        (lambda rows: rows[1].pop("first"), "rows with"),
        (lambda rows: rows[1].pop("tissue"), "whole numbers as tissue"),
        (lambda rows: rows[1].update(line=rows[0]["line"]), "does not begin in facts.jsonl"),
        (lambda rows: rows[1].update(tissue=[0, -1]), "less than nothing"),
        (lambda rows: rows[1].update(shape=[12, 4]), "whole numbers as shape"),
        (lambda rows: rows[1].update(shape=[2**16] * 4), "a shape is not"),
        (lambda rows: rows[1].update(shape=[-2, 1, -6, 4]), "a shape is not"),
        (lambda rows: rows[1].update(id="image0"), "twice"),
        (lambda rows: rows.pop(), "bytes of voxels.f32"),
        (lambda rows: rows.clear(), "bytes of voxels.f32"),
        (swap("line"), "does not begin"),
        (swap("first"), "does not begin"),
    ],
)
def test_places_that_cannot_be_those_of_the_images_are_refused(
    tmp_path: Path, change: Callable[[list[dict[str, Any]]], Any], message: str
) -> None:
    with pytest.raises(DataError, match=rf"store.json is damaged: .*{message}.*Remove .* made again"):
        Store.open(changed(tmp_path / "store", change))


def test_a_table_that_names_other_files_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "store")
    content = json.loads((tmp_path / "store" / "store.json").read_text())
    del content["files"][FACTS]
    (tmp_path / "store" / "store.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match='"files" must name'):
        Store.open(tmp_path / "store")


def test_facts_of_another_patient_are_refused(tmp_path: Path) -> None:
    store = Store.open(changed(tmp_path / "store", lambda rows: rows[1].update(patient_key="another")))
    assert store.entry("image0").patient_key == "patient0"
    with pytest.raises(DataError, match="patient_key of image1 differ"):
        store.entry("image1")
    path = tmp_path / "store" / FACTS
    path.write_bytes(path.read_bytes().replace(b'"shape"', b'"shapE"'))
    with pytest.raises(DataError, match=r"is damaged \('shape'\)"):
        Store.open(tmp_path / "store").entry("image0")


def test_a_packed_store_may_be_empty(tmp_path: Path) -> None:
    assert len(written(tmp_path / "store", count=0)) == 0
