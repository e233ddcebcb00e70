"""A small raw data set built in code, and a checkpoint as pretraining writes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from medssl.networks.architecture import architecture
from medssl.networks.build import build_network
from medssl.training.checkpoint import save_checkpoint
from medssl.training.nnssl_plan import adaptation_plan

LABELS = {"background": 0, "left_ball": 1, "right_ball": 2}


def write_case(
    folder: Path, name: str, *, channels: int = 1, edge: int = 24, seed: int = 0, affine: np.ndarray | None = None
) -> None:
    """Write a noisy image with two bright balls, one on either side, and their mask."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(edge)] * 3, indexing="ij"), axis=-1)
    mask = np.zeros((edge,) * 3, dtype=np.uint8)
    for value, side in ((1, 0.3), (2, 0.7)):
        centre = np.array([side, 0.5, 0.5]) * edge + rng.uniform(-2, 2, 3)
        mask[np.linalg.norm(grid - centre, axis=-1) < edge * 0.17] = value
    affine = np.diag([1.0, 1.0, 1.2, 1.0]) if affine is None else affine
    for channel in range(channels):
        image = rng.normal(100, 10, mask.shape) + 60 * (mask > 0) + 30 * (mask == 2) + 5 * channel
        nibabel.save(
            nibabel.Nifti1Image(image.astype(np.float32), affine), folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz"
        )
    nibabel.save(nibabel.Nifti1Image(mask, affine), folder / "labelsTr" / f"{name}.nii.gz")


MakeDataset = Callable[..., Path]


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """Return a function that writes a raw data set and gives its folder."""

    def make(name: str = "balls", *, cases: int = 5, channel_names: tuple[str, ...] = ("MR",), edge: int = 24) -> Path:
        folder = tmp_path / name
        for part in ("imagesTr", "labelsTr"):
            (folder / part).mkdir(parents=True)
        for number in range(cases):
            write_case(folder, f"case{number}", channels=len(channel_names), seed=number, edge=edge)
        content = {
            "channel_names": {str(number): text for number, text in enumerate(channel_names)},
            "labels": LABELS,
            "numTraining": cases,
            "file_ending": ".nii.gz",
        }
        (folder / "dataset.json").write_text(json.dumps(content))
        return folder

    return make


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of pretraining: resenc-xs, one channel, patch 24, decoder trained."""
    path = tmp_path_factory.mktemp("pretraining") / "step_00000010.pth"
    plan = architecture("resenc-xs", 3)
    network = build_network("resenc-xs", dimensions=3, seed=7)
    with torch.no_grad():
        for parameter in network.parameters():
            # Norms and biases start at constants, which would hide a weight that was not copied.
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.01
            )
    save_checkpoint(
        path,
        {
            "network_weights": network.state_dict(),
            "nnssl_adaptation_plan": adaptation_plan(
                plan, in_channels=1, patch_size=(24, 24, 24), spacing_mm=(1.0, 1.0, 1.0), modalities=["MR"]
            ),
            "citations": [],
            "medssl": {
                "schema_version": 1,
                "method": "mae",
                "recipe": {},
                "step": 10,
                "architecture": {
                    "name": "resenc-xs",
                    "dimensions": 3,
                    "in_channels": 1,
                    "network_class_name": plan.network_class_name,
                    "arch_kwargs": dict(plan.arch_kwargs),
                    "kw_requires_import": list(plan.kw_requires_import),
                },
                "patch_size": [24, 24, 24],
                "spacing_mm": [1.0, 1.0, 1.0],
                "normalisation": "by-modality",
                "trains_decoder": True,
                "modalities": ["MR"],
                "data_hash": "0",
                "library_versions": {},
            },
        },
    )
    return path
