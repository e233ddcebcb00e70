"""A contact sheet shows a policy on a volume of the user's own, and names what it cannot use."""

from __future__ import annotations

from io import BytesIO

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medssl.errors import UsageError
from medssl.report.contact_sheet import contact_sheet
from tests.preprocessing.stores import make_store


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store")


def size_of(path) -> tuple[int, int]:
    return Image.open(BytesIO(path.read_bytes())).size


def test_a_policy_with_more_transforms_gives_a_taller_sheet(store, tmp_path):
    sheets = {
        purpose: contact_sheet(store.folder, tmp_path / f"{purpose}.png", purpose=purpose, draws=2, quiet=True)
        for purpose in ("none", "reconstruction", "fine-tuning")
    }
    heights = [size_of(path)[1] for path in sheets.values()]
    assert heights[0] < heights[1] < heights[2]


def test_the_same_seed_draws_the_same_picture_and_another_seed_another(store, tmp_path):
    first, again, other = (
        contact_sheet(store.folder, tmp_path / f"{n}.png", draws=1, seed=seed, patch_size=(8, 8, 8), quiet=True)
        for n, seed in enumerate((0, 0, 1))
    )
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()


def test_a_single_file_is_preprocessed_on_the_way_and_left_alone(tmp_path):
    path = tmp_path / "scan.nii.gz"
    values = np.random.default_rng(0).normal(100, 20, (20, 24, 22)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.diag([1, 1, 2, 1])), path)
    before = path.read_bytes()
    sheet = contact_sheet(path, tmp_path / "sheet.png", purpose="weak", overrides=["modality=MR"], draws=1, quiet=True)
    assert size_of(sheet)[0] > 200 and path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scan.nii.gz", "sheet.png"]


def test_wrong_names_are_answered_with_near_ones(store, tmp_path):
    with pytest.raises(UsageError, match="contrastive"):
        contact_sheet(store.folder, tmp_path / "s.png", purpose="contrastiv", quiet=True)
    with pytest.raises(UsageError, match="laterality"):
        contact_sheet(store.folder, tmp_path / "s.png", overrides=["lateralty=allow"], quiet=True)
    with pytest.raises(UsageError, match="does not exist"):
        contact_sheet(tmp_path / "nothing", tmp_path / "s.png", quiet=True)
    assert not (tmp_path / "s.png").exists()


def test_a_policy_file_of_ones_own_does_not_change_what_is_shown_as_read(store, tmp_path, monkeypatch):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "spatial: {rotation: {probability: 0}, scale: {probability: 0}}\n"
        "intensity: {brightness: {probability: 1.0, factor: [3, 3]}}\n"
        "library: [{transform: torchio.RandomNoise, probability: 0.5, arguments: {std: [1, 1]}}]\n"
    )
    drawn = []
    monkeypatch.setattr("medssl.report.contact_sheet._picture", lambda rows, *_: drawn.append(rows) or b"png")
    contact_sheet(store.folder, tmp_path / "s.png", overrides=[f"policy={mine}"], draws=1, quiet=True)
    (rows,) = drawn
    assert [row.name for row in rows] == ["whole policy", "torchio.RandomNoise", "brightness"]
    as_read, bright = rows[2].images
    assert np.allclose(bright, 3 * as_read, atol=1e-5)
