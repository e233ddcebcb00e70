"""Losses are computed in float32 whatever the network computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 if it is narrower; float64 stays, so that gradients can be checked."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
