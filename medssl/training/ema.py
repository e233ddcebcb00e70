"""Running average of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AveragedWeights:
    """Exponential moving average of a network's weights, for export: steadier than those of the last step.

    The first steps average less far back, by min(decay, (1 + n) / (10 + n)), so that the initial weights fade soon.

    Args:
        network: The network to follow.
        decay: Part of the average that stays at each step.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        # state_dict lists a shared weight under each of its names; named_parameters under one.
        self.weights = {name: weight.detach().clone() for name, weight in network.named_parameters()}
        self.buffers = {name: buffer.detach().clone() for name, buffer in network.named_buffers()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move towards the network's weights; buffers are copied."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = dict(network.named_parameters())
        torch._foreach_lerp_(list(self.weights.values()), [current[name] for name in self.weights], 1 - decay)
        for name, buffer in network.named_buffers():
            self.buffers[name].copy_(buffer)
        self.updates += 1

    def state_of(self, network: nn.Module) -> dict[str, Tensor]:
        """Return the network's state dict, all of its names, with averaged values."""
        averaged = {
            id(value): self.weights[name] for name, value in network.named_parameters() if name in self.weights
        } | {id(value): self.buffers[name] for name, value in network.named_buffers() if name in self.buffers}
        return {name: averaged.get(id(value), value) for name, value in network.state_dict(keep_vars=True).items()}

    def state_dict(self) -> dict[str, object]:
        """Return what a resumed run needs."""
        return {"updates": self.updates, "weights": self.weights, "buffers": self.buffers}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take up what `state_dict` returned."""
        self.updates = int(state["updates"])  # type: ignore[call-overload]
        for mine, name in ((self.weights, "weights"), (self.buffers, "buffers")):
            saved = state[name]
            assert isinstance(saved, dict)
            for key, value in mine.items():
                value.copy_(saved[key])
