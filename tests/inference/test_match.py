"""Finding points of one volume in another."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medssl import registry
from medssl.archive.volume import Volume as Decoded
from medssl.augmentation.correspondence import values_at
from medssl.cli import main
from medssl.errors import CheckpointError, DataError, UsageError
from medssl.inference.frozen import Frozen
from medssl.inference.match import Match, match, match_points, place_volume
from medssl.inference.voxel_search import VoxelModel, _along, load_voxel_model, search
from medssl.preprocessing.run import preprocess
from medssl.pretraining.run import pretrain
from medssl.training.checkpoint import find_checkpoint, load_checkpoint

from .tiny_encoders import write_encoder

METHOD = "voxel-contrast"
ENTRY = registry.Entry(
    name=METHOD,
    place="medssl.pretraining.voxel_contrast:VoxelContrast",
    settings="medssl.pretraining.voxel_contrast:VoxelContrastSettings",
    family="anatomy",
    dimensions=(2, 3),
    transfers="encoder",
    source="",
    summary="",
)
AFFINE = np.array([[-1.0, 0, 0, 40], [0, 1, 0, -20], [0, 0, 2, 5], [0, 0, 0, 1]])
POINTS = [(30.0, -8.0, 21.0), (25.0, 1.0, 31.0)]


def blobs(seed: int, shape: tuple[int, ...] = (26, 30, 14)) -> NDArray[np.float32]:
    """Smooth structure without air, (x, y, z)."""
    coarse = torch.rand((1, 1, *(max(edge // 4, 1) for edge in shape)), generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear", align_corners=False)
    return (100 + 200 * fine[0, 0]).numpy().astype(np.float32)


def write(path: Path, voxels: NDArray[np.float32], affine: NDArray[np.float64] = AFFINE) -> Path:
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three volumes and a RUN of two steps on them."""
    out = tmp_path_factory.mktemp("match")
    images = out / "raw" / "imagesTr"
    images.mkdir(parents=True)
    for number in range(3):
        write(images / f"case{number}_0000.nii.gz", blobs(number))
    (out / "raw" / "dataset.json").write_text(json.dumps({"channel_names": {"0": "MR"}, "labels": {"background": 0}}))
    preprocess(out / "raw", out / "store", spacing=(1, 1, 1), workers=0, quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.METHODS, METHOD, ENTRY)
        given = ("patch_size=[16,16,16]", "network=resenc-xs", "batch_size=2", "points=64", "head.hidden=16")
        more = ("head.width=16", "validate_every=0", "pictures_every=0")
        pretrain(
            METHOD, out / "store", out / "run", overrides=given + more, steps=2, device="cpu", workers=0, quiet=True
        )
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> VoxelModel:
    return load_voxel_model(folder / "run")


def find(folder: Path, target: Path, points: Sequence[Sequence[float]] = POINTS, **more: Any) -> list[Match]:
    source = folder / "raw" / "imagesTr" / "case0_0000.nii.gz"
    return match(folder / "run", source, target, points, device="cpu", quiet=True, **more).rows


def test_a_run_keeps_its_heads_and_how_volumes_are_made(folder: Path) -> None:
    facts = load_checkpoint(find_checkpoint(folder / "run"))["medssl"]
    assert any(name.startswith("voxel.fine.") for name in facts["heads"])
    assert any(name.startswith("voxel.coarse.") for name in facts["heads"])
    assert facts["preprocessing"]["spacing"]["mm"] == [1, 1, 1]


class SeesPlaces(nn.Module):
    """An encoder whose features are its three channels, and a head that tells their values apart."""

    in_channels, widths = 3, (3,)

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.strides = ((1,) * dimensions,)

    def stages(self, image: Tensor) -> list[Tensor]:
        return [image]

    def forward(self, features: list[Tensor], voxels: Tensor, size: Sequence[int]) -> Tensor:
        angles = 0.8 * values_at(features[0], voxels, size).transpose(1, 2)
        return torch.cat([angles.sin(), angles.cos()], dim=2) / 3**0.5


def places_model(dimensions: int) -> VoxelModel:
    """A model that knows each place by the values that `ramps` gives it."""
    known = {
        "normalisation": "zscore", "spacing": {"mode": "fixed", "mm": [1, 1, 1]}, "crop": True, "codec": "lossless",
        "fingerprint": {"intensities": {}},
    }  # fmt: skip
    encoder = SeesPlaces(dimensions)
    frozen = Frozen(encoder, (16,) * dimensions)  # type: ignore[arg-type]
    return VoxelModel(frozen, {"fine": encoder}, known, ("MR",))  # type: ignore[dict-item]


def ramps(shape: tuple[int, ...] = (26, 30, 14), step: tuple[float, ...] = (1, 1, 1)) -> NDArray[np.float32]:
    """Voxels (x, y, z, C) whose values are their index along each axis."""
    axes = [100 + per * (np.arange(edge) + 0.5) for edge, per in zip(shape, step, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).astype(np.float32)


def decoded(voxels: NDArray[np.float32], affine: NDArray[np.float64] = AFFINE) -> Decoded:
    return Decoded(voxels.transpose(3, 2, 1, 0), affine, "MR", "frames")


def found_in(target: Decoded, dimensions: int = 3) -> list[Match]:
    model = places_model(dimensions)
    return match_points(
        model, place_volume(model, decoded(ramps())), place_volume(model, target), np.array(POINTS)
    ).rows


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_point_is_found_at_itself_in_its_own_volume(dimensions: int) -> None:
    for row, point in zip(found_in(decoded(ramps()), dimensions), POINTS, strict=True):
        assert row.source_mm == point
        assert np.allclose(row.target_mm, point, atol=0.51) and row.similarity > 0.999
        stored = np.linalg.inv(AFFINE) @ [*row.target_mm, 1]
        assert np.allclose(stored[:3], row.target_voxel, atol=0.51)


def test_places_are_those_of_the_targets_own_world_however_it_is_stored() -> None:
    # The same anatomy with its axes stored in another order and direction, and with its origin elsewhere.
    voxels = ramps()[:, ::-1].transpose(2, 0, 1, 3)
    elsewhere = AFFINE @ np.array([[0, 1.0, 0, 0], [0, 0, -1, 29], [1, 0, 0, 0], [0, 0, 0, 1]])
    elsewhere[:3, 3] += (100, 0, -7)
    for row, point in zip(found_in(decoded(voxels, elsewhere)), POINTS, strict=True):
        assert np.allclose(row.target_mm, np.array(point) + (100, 0, -7), atol=0.51)
        stored = np.linalg.inv(elsewhere) @ [*row.target_mm, 1]
        assert np.allclose(stored[:3], row.target_voxel, atol=0.51)


def test_a_target_of_other_voxels_is_resampled_to_the_models() -> None:
    coarse = np.diag([2.0, 1, 1, 1])
    coarse[0, 3] = 0.5
    target = decoded(ramps((13, 30, 14), (2, 1, 1)), AFFINE @ coarse)
    for row, point in zip(found_in(target), POINTS, strict=True):
        assert np.allclose(row.target_mm, point, atol=1)


def test_points_may_be_voxels_as_stored(folder: Path) -> None:
    target = folder / "raw" / "imagesTr" / "case1_0000.nii.gz"
    voxels = [(np.linalg.inv(AFFINE) @ [*point, 1])[:3].tolist() for point in POINTS]
    assert find(folder, target, voxels, units="voxel") == find(folder, target)


def test_a_table_of_points_gives_the_same_and_keeps_their_names(folder: Path, tmp_path: Path) -> None:
    target = folder / "raw" / "imagesTr" / "case1_0000.nii.gz"
    table = tmp_path / "points.csv"
    table.write_text("name,x,y,z\nfront,30,-8,21\nback,25,1,31\n")
    rows = find(folder, target, table)
    assert [row.name for row in rows] == ["front", "back"]
    assert [row.target_mm for row in rows] == [row.target_mm for row in find(folder, target)]
    table.write_text("name,x,y\nfront,30,-8\n")
    with pytest.raises(DataError, match="line 2: a point needs the columns x, y and z"):
        find(folder, target, table)
    table.write_text("x,y,z\n")
    with pytest.raises(DataError, match="holds no point"):
        find(folder, target, table)


def test_no_more_than_a_patch_is_read_at_once_and_every_voxel_is_compared(model: VoxelModel, folder: Path) -> None:
    placed = place_volume(model, folder / "raw" / "imagesTr" / "case0_0000.nii.gz")
    sizes = []

    def read(start: tuple[int, int, int], stop: tuple[int, int, int]) -> NDArray[np.float32]:
        sizes.append(tuple(b - a for a, b in zip(start, stop, strict=True)))
        return placed.volume.read(start, stop)

    wanted = {name: torch.nn.functional.normalize(torch.randn(2, 16)) for name in model.heads}
    found, similarity = search(model, dataclasses.replace(placed.volume, read=read), wanted, step=1)
    assert len(sizes) > 4 and max(max(size) for size in sizes) <= 16
    assert found.shape == (2, 3) and (similarity <= 1).all()


@pytest.mark.parametrize(("edge", "box"), [(16, 16), (10, 16), (17, 16), (100, 16), (33, 32), (5, 1)])
def test_each_voxel_belongs_to_one_tile_and_lies_within_it(edge: int, box: int) -> None:
    covered = []
    for start, (first, stop) in _along(edge, box):
        assert start <= first and stop <= start + box
        covered += range(first, stop)
    assert covered == list(range(edge))


def test_what_lies_outside_is_refused_with_where_inside_is(folder: Path, model: VoxelModel) -> None:
    target = folder / "raw" / "imagesTr" / "case1_0000.nii.gz"
    with pytest.raises(UsageError, match=r"Point 1 \(500, 0, 0 mm\) lies outside of .* reaches from \(40.0, -20.0, 5"):
        find(folder, target, [(500.0, 0, 0)])
    with pytest.raises(UsageError, match="lies outside"):
        find(folder, target, [(float("nan"), 0, 0)])
    for points in ([(1.0, 2.0)], [(1.0, 2.0, 3.0), (1.0, 2.0)], []):
        with pytest.raises(UsageError, match="three numbers"):
            find(folder, target, points)
    voxels = np.zeros((1, 14, 30, 40), np.float32)
    voxels[0, :, :, :26] = blobs(0).transpose(2, 1, 0)
    placed = place_volume(model, Decoded(voxels, AFFINE))
    with pytest.raises(UsageError, match="empty surroundings"):
        match_points(model, placed, placed, np.array([[40.0 - 35, 0, 15]]))


def test_volumes_that_do_not_fit_the_model_are_refused(folder: Path, model: VoxelModel, tmp_path: Path) -> None:
    voxels = blobs(0).transpose(2, 1, 0)[None]
    with pytest.raises(UsageError, match="is CT; the model was pretrained on MR"):
        place_volume(model, Decoded(voxels, AFFINE, "CT"))
    assert place_volume(model, Decoded(voxels, AFFINE, "CT"), "MR").volume.modality == "MR"
    with pytest.raises(UsageError, match="single slice"):
        place_volume(model, Decoded(voxels[:, :1], AFFINE, "MR"))
    two = place_volume(model, Decoded(np.concatenate([voxels, voxels]), AFFINE, "MR", "frames"))
    with pytest.raises(UsageError, match="has 2 channels, the model takes 1"):
        match_points(model, two, two, np.array([POINTS[0]]))
    nobody_knows = dataclasses.replace(model, preprocessing={})
    with pytest.raises(UsageError, match="does not say how its volumes were made"):
        place_volume(nobody_knows, Decoded(voxels, AFFINE, "MR"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds 0 volumes"):
        place_volume(model, tmp_path / "empty")


def test_a_model_without_a_head_for_points_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="was made by mae and has no head that embeds points"):
        load_voxel_model(write_encoder(tmp_path / "mae.pth"))


def test_the_command_prints_json(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    image = str(folder / "raw" / "imagesTr" / "case0_0000.nii.gz")
    command = ["medssl", "match", str(folder / "run"), "--from", image, "--to", image, "--point=30,-8,21", "--json"]
    monkeypatch.setattr(sys, "argv", [*command, "--quiet", "--device", "cpu", "--out", str(tmp_path / "found.json")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "found.json").read_text())
    (row,) = printed["points"]
    assert set(row) == {"name", "source_mm", "target_mm", "target_voxel", "similarity"}
    monkeypatch.setattr(sys, "argv", [*command, "--points", "x.csv"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
