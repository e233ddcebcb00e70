"""Full float32 for what is computed of positions and spectra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 matrices in float32 while inside.

    Training lets CUDA take TF32 for them, whose ten bits are enough for a layer; a voxel's position and an image's
    spectrum would be rounded visibly.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
