"""`medssl embed` of data sets that `finetune classification` takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from medssl.errors import DataError, UsageError
from medssl.inference.embed import FEATURES, embed_images
from medssl.inference.embedding_file import read_embeddings
from medssl.report.embedding_map import embedding_report
from medssl.transfer.images import ImageOptions
from tests.transfer.toy_images import finetune, write_npz, write_pictures

OPTIONS = ImageOptions(grey=True, modality="US", quiet=True)


@pytest.fixture(scope="module", autouse=True)
def own_key(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSSL_KEY_FILE", str(tmp_path_factory.mktemp("key") / "key"))
        yield


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_npz(tmp_path_factory.mktemp("npz") / "toy.npz", train=12, validation=6)


@pytest.fixture(scope="module")
def encoder(npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetune(npz, tmp_path_factory.mktemp("runs") / "run", steps=1, mode="linear")


def test_a_medmnist_file_is_embedded_with_its_labels_and_splits(encoder: Path, npz: Path, tmp_path: Path) -> None:
    found = embed_images(encoder, npz, tmp_path / "out", options=OPTIONS, device="cpu", quiet=True)
    table = pl.read_parquet(tmp_path / "out" / FEATURES)
    assert table["id"].to_list()[:2] == ["train-000000", "train-000001"] and table["label"].to_list()[:2] == ["0", "1"]
    assert table["split"].value_counts().sort("split")["count"].to_list() == [4, 12, 6]
    assert np.array_equal(read_embeddings(tmp_path / "out" / FEATURES).features, found.features)
    assert read_embeddings(tmp_path / "out" / FEATURES).labels == found.labels
    part = embed_images(encoder, npz, tmp_path / "part", split="validation", options=OPTIONS, device="cpu", quiet=True)
    assert np.allclose(part.features, found.features[12:18], atol=1e-6)
    page = embedding_report(tmp_path / "out").read_text()
    assert "0, US, train" in page and "1, US, validation" in page


def test_a_csv_of_paths_needs_no_labels(encoder: Path, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures", count=2)
    (tmp_path / "paths.csv").write_text("path\npictures/large/0.png\npictures/small/1.png\n")
    found = embed_images(encoder, tmp_path / "paths.csv", tmp_path / "bare", options=OPTIONS, device="cpu", quiet=True)
    assert len(found) == 2 and found.labels == () and found.splits == ("", "")
    (tmp_path / "some.csv").write_text("path,label\npictures/large/0.png,large\npictures/small/1.png,\n")
    some = embed_images(encoder, tmp_path / "some.csv", tmp_path / "some", options=OPTIONS, device="cpu", quiet=True)
    assert some.labels == ("large", "") and np.array_equal(some.features, found.features)
    whole = embed_images(encoder, folder, tmp_path / "folder", options=OPTIONS, device="cpu", quiet=True)
    assert whole.labels == ("large", "large", "small", "small")
    assert np.allclose(whole.features[[0, 3]], found.features, atol=1e-6)


def test_rows_that_cannot_be_used_are_named_and_nothing_is_written(encoder: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", count=1)
    for text, message in (
        ("path\npictures/large/0.png\npictures/none.png\n", "line 3: there is no file"),
        ("path\npictures/large/0.png\npictures/large/0.png\n", "line 3: pictures/large/0.png stands in line 2"),
    ):
        (tmp_path / "paths.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            embed_images(encoder, tmp_path / "paths.csv", tmp_path / "out", options=OPTIONS, device="cpu", quiet=True)
    (tmp_path / "paths.csv").write_text("path,split\npictures/large/0.png,train\n")
    with pytest.raises(UsageError, match="no image in the split 'test'"):
        embed_images(encoder, tmp_path / "paths.csv", tmp_path / "out", split="test", device="cpu", quiet=True)
    assert not (tmp_path / "out").exists()
