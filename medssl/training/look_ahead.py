"""Weights and the optimiser's state, kept to go back to after steps that were taken only to look ahead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Snapshot:
    """Copies of what an optimiser changes.

    Args:
        optimiser: Whose weights and state are kept.
        buffers: Further tensors that are put back, for example running statistics of a norm.
    """

    @torch.no_grad()
    def __init__(self, optimiser: torch.optim.Optimizer, buffers: Sequence[Tensor] = ()) -> None:
        self._optimiser = optimiser
        self._tensors = [weight for group in optimiser.param_groups for weight in group["params"]] + list(buffers)
        self._values = [tensor.detach().clone() for tensor in self._tensors]
        self._state = {weight: _copied(state) for weight, state in optimiser.state.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back to what it was; what the optimiser has begun to keep since is forgotten."""
        for tensor, value in zip(self._tensors, self._values, strict=True):
            tensor.copy_(value)
        self._optimiser.state.clear()
        self._optimiser.state.update({weight: _copied(state) for weight, state in self._state.items()})


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
