"""medssl's masks are stock nnU-Net's, voxel for voxel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medssl.inference.predict import predict
from tests.inference.tiny_models import make_model, read_mask, stock_predict, write_volume

VARIANTS: dict[str, dict[str, Any]] = {
    "finer network grid": {"spacing": (0.8, 0.9, 1.0)},
    "coarser network grid": {"spacing": (2.0, 2.5, 2.0)},
    "the source's own grid": {"spacing": (1.4, 1.2, 1.0)},
    "anisotropic, coarse along axis 0": {"spacing": (5.0, 1.0, 1.0), "patch": (8, 16, 16)},
    "transposed axes": {"transpose": (2, 0, 1), "spacing": (1.3, 1.6, 1.1)},
    "coarse axis that is not axis 0": {"transpose": (1, 0, 2), "spacing": (1.0, 4.5, 1.0)},
    "patch larger than the volume": {"patch": (48, 32, 40)},
    "mirroring on two axes": {"mirroring": (0, 1)},
    "CT": {"normalisation": "CTNormalization"},
    "normalised within the mask": {"mask_for_norm": True},
    "range": {"normalisation": "RescaleTo01Normalization"},
    "two channels": {"channels": 2},
    "two-dimensional": {"patch": (16, 16), "spacing": (1.5, 1.3)},
    "regions": {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions": [1, 2]},
    "three folds": {"folds": 3},
    "torch resampling": {"resampling": "resample_torch_fornnunet"},
    "nibabel reader without reorientation": {"reader": "NibabelIO"},
    "SimpleITK reader": {"reader": "SimpleITKIO"},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three volumes in three orientations, as channel 0 and 1."""
    folder = tmp_path_factory.mktemp("images")
    for number, orientation in enumerate(("RAS", "LPS", "ASL")):
        for channel in range(2):
            write_volume(
                folder / f"channels{channel + 1}" / f"case{number}_{0:04d}.nii.gz", orientation=orientation, seed=number
            )
        write_volume(
            folder / "channels2" / f"case{number}_{1:04d}.nii.gz", orientation=orientation, seed=10 + number, border=4
        )
    return folder


@pytest.fixture(scope="module")
def stock(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Model and stock masks of a variant, made once for both memory budgets."""
    made: dict[str, tuple[Path, Path, Path]] = {}

    def of(variant: str) -> tuple[Path, Path, Path]:
        if variant not in made:
            folder = tmp_path_factory.mktemp("variant")
            settings = VARIANTS[variant]
            model = make_model(folder / "model", **settings)
            inputs = images / f"channels{settings.get('channels', 1)}"
            stock_predict(model, inputs, folder / "stock")
            made[variant] = model, inputs, folder / "stock"
        return made[variant]

    return of


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("memory_kb", [None, 100, 4], ids=["whole", "slabs", "scratch files and slabs"])
def test_masks_equal_stock_nnunet_voxel_for_voxel(
    variant: str, memory_kb: int | None, stock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, expected = stock(variant)
    monkeypatch.setattr("medssl.inference.workspace.MEBIBYTE", 1024)  # small volumes need a small unit
    summary = predict(model, inputs, tmp_path / "ours", device="cpu", memory_mb=memory_kb or 1_000_000, quiet=True)
    assert summary.exit_code == 0 and len(summary.predictions) == 3
    for number in range(3):
        reference = nibabel.load(expected / f"case{number}.nii.gz")
        ours = nibabel.load(tmp_path / "ours" / f"case{number}.nii.gz")
        source = nibabel.load(inputs / f"case{number}_0000.nii.gz")
        assert ours.shape == source.shape
        np.testing.assert_allclose(ours.affine, source.affine, atol=1e-5)
        assert ours.header["sform_code"] == 1
        different = np.count_nonzero(read_mask(expected / f"case{number}.nii.gz") != np.asanyarray(ours.dataobj))
        assert different == 0, f"{different} of {ours.dataobj.shape} voxels differ"
        np.testing.assert_allclose(ours.affine, reference.affine, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_masks_hold_enough_to_differ_in(variant: str, stock: Any) -> None:
    _, _, expected = stock(variant)
    values, counts = np.unique(read_mask(expected / "case0.nii.gz"), return_counts=True)
    assert len(values) >= 2 and np.sort(counts)[-2] > 100, f"a mask of {values} in {counts} voxels would prove little"
