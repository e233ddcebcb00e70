"""The peak memory of a prediction stays within its bound, measured in a child process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests.inference.tiny_models import make_model

REPOSITORY = Path(__file__).resolve().parents[2]
# One tile of 128^3 voxels through a network of 4 and 8 features, its input, output and weights in float32.
ACTIVATIONS_MB = 450


def write_large(path: Path, shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> None:
    """Write a volume slice by slice, so that the test itself needs little memory."""
    affine = np.diag([*spacing, 1.0])
    header = nibabel.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.int16)
    header.set_sform(affine, 1)
    header.set_qform(affine, 1)
    header["magic"], header["vox_offset"] = b"n+1", 352
    plane = np.random.default_rng(0).normal(0, 100, shape[:2]).astype("<i2")
    with path.open("wb") as file:
        file.write(header.binaryblock + b"\0" * 4)
        for z in range(shape[2]):
            file.write((np.roll(plane, z, axis=0) + z).astype("<i2").tobytes(order="F"))


def measure(model: Path, image: Path, out: Path, memory_mb: int) -> dict[str, float]:
    command = [sys.executable, str(REPOSITORY / "tests" / "inference" / "measure.py"), str(model), str(image), str(out)]
    done = subprocess.run(
        [*command, str(memory_mb)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_peak_on_512_by_512_by_800_voxels_is_bounded_by_the_budget(tmp_path: Path) -> None:
    """Measured on 2 cores: 2.4 GB with a budget of 1 GB, of which 0.9 GB are libraries (53 s of processor time)."""
    model = make_model(tmp_path / "model", patch=(128, 128, 128), spacing=(1.5, 1.5, 1.5))
    write_large(tmp_path / "large.nii", (512, 512, 800), (0.7, 0.7, 1.0))
    found = measure(model, tmp_path / "large.nii", tmp_path / "out", 1024)
    assert nibabel.load(tmp_path / "out" / "large.nii.gz").shape == (512, 512, 800)
    assert found["peak_mb"] < found["libraries_mb"] + 1.25 * 1024 + ACTIVATIONS_MB, found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_peak_does_not_grow_with_the_number_of_classes(tmp_path: Path) -> None:
    """40 classes: all logits would be 0.8 GB in float16 at the source's grid, and nnU-Net's copies in float64 more."""
    labels = {"background": 0} | {f"organ {number}": number for number in range(1, 40)}
    model = make_model(tmp_path / "model", patch=(32, 96, 96), spacing=(2.0, 2.0, 2.0), labels=labels)
    write_large(tmp_path / "large.nii", (256, 256, 160), (1.0, 1.0, 1.0))
    found = measure(model, tmp_path / "large.nii", tmp_path / "out", 128)
    assert found["peak_mb"] < found["libraries_mb"] + 1.25 * 128 + ACTIVATIONS_MB, found
