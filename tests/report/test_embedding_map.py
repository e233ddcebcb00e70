"""The map of features: neighbours that are near, a page that is whole, and nothing told of patients."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from medssl.errors import DataError, UsageError
from medssl.inference.embed import embed_store, thumbnail
from medssl.inference.embedding import Embeddings
from medssl.inference.embedding_file import write_embeddings
from medssl.inference.volumes import volumes_of_arrays
from medssl.report.embedding_map import (
    embedding_report,
    nearest,
    neighbour_map,
    patient_retrieval,
    principal_map,
    spread_out,
)
from medssl.report.page import report
from tests.inference.tiny_encoders import write_encoder
from tests.preprocessing.stores import make_store
from tests.report.test_page import Outline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("map")
    store = make_store(place / "store", n=12, shape=(16, 18, 16))
    embed_store(write_encoder(place / "step_00000001.pth"), store.folder, place / "out", device="cpu", quiet=True)
    return place / "out"


def test_the_page_is_whole_and_loads_nothing(folder: Path) -> None:
    text = report(folder).read_text()
    outline = Outline(text)
    assert all(address.startswith("#volume-") for address in outline.addresses)
    assert {f"#{name}" for name in outline.ids} >= set(outline.addresses)
    assert len(outline.ids) == len(set(outline.ids))
    assert "script" not in outline.tags and "default-src 'none'" in text
    assert "patient_0" not in text and str(folder.parent) not in text
    for number in range(12):
        assert f"volume_{number:02d}" in text


def test_every_volume_has_its_neighbours_and_its_own_picture(folder: Path) -> None:
    text = embedding_report(folder).read_text()
    blocks = re.findall(r'<div class="near" id="volume-(\d+)">(.*?)</div>', text, re.S)
    assert len(blocks) == 12
    for number, block in blocks:
        listed = re.findall(r'<a href="#volume-(\d+)">volume', block)
        assert len(listed) == 6 and number not in listed
        cosines = [float(value) for value in re.findall(r'class="soft">(-?\d\.\d{3})<', block)]
        assert cosines == sorted(cosines, reverse=True)


def test_nearest_neighbours_equal_a_slow_search() -> None:
    rows = np.random.default_rng(0).normal(size=(15, 4))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    order, cosines = nearest(rows, 3)
    for row in range(15):
        others = sorted((other for other in range(15) if other != row), key=lambda other: -rows[row] @ rows[other])
        assert order[row].tolist() == others[:3]
        assert cosines[row][0] == pytest.approx(rows[row] @ rows[others[0]])


def test_two_groups_lie_apart_on_either_map() -> None:
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(size=(20, 8)), rng.normal(size=(20, 8)) + 8])
    for places in (principal_map(rows), neighbour_map(rows)):
        centres = places[:20].mean(axis=0), places[20:].mean(axis=0)
        own = [np.linalg.norm(place - centres[row // 20]) for row, place in enumerate(places)]
        other = [np.linalg.norm(place - centres[1 - row // 20]) for row, place in enumerate(places)]
        assert np.less(own, other).all()
    np.testing.assert_array_equal(neighbour_map(rows), neighbour_map(rows))


@pytest.mark.parametrize("rows", [np.ones((12, 3)), np.eye(3), np.ones((1, 4)), np.zeros((11, 1))])
def test_few_or_equal_volumes_have_a_map_too(rows: np.ndarray) -> None:
    assert np.isfinite(neighbour_map(rows)).all() and neighbour_map(rows).shape == (len(rows), 2)


def test_pictures_do_not_cover_each_other() -> None:
    places = np.random.default_rng(0).uniform(size=(200, 2))
    kept = places[spread_out(places, 50, 0.1)]
    assert 10 < len(kept) <= 50
    apart = np.abs(kept[:, None] - kept).max(axis=-1) + np.eye(len(kept))
    assert apart.min() >= 0.1


def test_patients_with_several_volumes_are_counted() -> None:
    rows = np.array([[1, 0], [0.9, 0.1], [0, 1], [1, 0.05], [-1, 0.0]])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert patient_retrieval(rows, ("a", "a", "b", "a", "b")) == (4, 5)
    assert patient_retrieval(rows, ("a", "b", "c", "d", "e")) is None


def test_a_picture_of_a_volume_has_anterior_up_and_right_on_the_left() -> None:
    image = np.zeros((1, 3, 20, 20), np.float32)
    image[0, 1, 15:, 15:] = 1  # anterior right in memory: Y grows to anterior, X to the right
    picture = thumbnail(volumes_of_arrays([image], ["a"])[0])
    assert picture[:10, :10].mean() > 200 and picture[20:].mean() == picture[:, 20:].mean() == 0
    photo = thumbnail(volumes_of_arrays([image[:, 1]], ["a"])[0])
    assert photo[-10:, -10:].mean() > 200


def test_an_oblong_picture_is_centred_and_nan_is_no_obstacle() -> None:
    image = np.ones((1, 10, 40), np.float32)
    image[0, 0, :20] = 0
    image[0, 5, 5] = np.nan
    picture = thumbnail(volumes_of_arrays([image], ["a"])[0])
    assert picture.shape == (48, 48) and picture[:15].max() == 0 and picture[20:28].max() == 255


def test_equal_features_are_pointed_out(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    features[3] = features[6]
    write_embeddings(tmp_path / "features.parquet", Embeddings(tuple("abcdefgh"), features))
    text = embedding_report(tmp_path).read_text()
    assert "All but equal features" in text and "d and g" in text
    assert "data:image" not in text


def test_files_that_do_not_belong_together_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "features.parquet").write_bytes((folder / "features.parquet").read_bytes())
    np.savez(tmp_path / "thumbnails.npz", ids=np.array(["x"]), pictures=np.zeros((1, 48, 48), np.uint8))
    with pytest.raises(DataError, match="does not belong"):
        embedding_report(tmp_path)
    (tmp_path / "thumbnails.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(DataError, match="Embed again"):
        embedding_report(tmp_path)
    with pytest.raises(UsageError, match="medssl embed"):
        embedding_report(tmp_path / "nowhere")
