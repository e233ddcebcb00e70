"""What a resumed run needs beyond the recipe, as content that a checkpoint may hold."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from medssl.training.distributed import rank, world_size
from medssl.training.ema import AveragedWeights
from medssl.training.guards import CollapseGuard


class Window:
    """Sums of figures since the last row of metrics, on the device: adding to it waits for nothing."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, values: dict[str, Tensor]) -> None:
        """Add the figures of one step."""
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.count += 1

    def means(self) -> dict[str, float]:
        """Return the means over steps and ranks; waits for the device. Every rank must call it."""
        if not self.sums:
            return {}
        together = torch.stack(list(self.sums.values())) / max(self.count, 1)
        if world_size() > 1:
            dist.all_reduce(together)
            together /= world_size()
        return dict(zip(self.sums, together.tolist(), strict=True))

    def clear(self) -> None:
        """Start anew."""
        self.sums, self.count = {}, 0


class LoopState:
    """Everything that changes while a run goes on.

    Args:
        method: The method, whose weights and buffers (queues, teachers, prototypes) are part of it.
        optimiser: Its optimiser.
        ema: Averaged weights, or None.
        guard: The guard against collapse.
    """

    def __init__(
        self, method: nn.Module, optimiser: torch.optim.Optimizer, ema: AveragedWeights | None, guard: CollapseGuard
    ) -> None:
        self.method = method
        self.optimiser = optimiser
        self.ema = ema
        self.guard = guard
        self.window = Window()
        self.step = 0
        self.seconds = 0.0

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.optimiser.param_groups

    def capture(self) -> dict[str, Any]:
        """Return the state as tensors and plain values. Every rank must call it."""
        return {
            "method": self.method.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "window": {"sums": self.window.sums, "count": self.window.count},
            "collapse": dict(self.guard.bad),
            "step": self.step,
            "seconds": self.seconds,
            "random": _of_all_ranks(random_state()),
        }

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Take up what `capture` returned."""
        self.method.load_state_dict(state["method"])
        # A run that goes on from another one keeps the numbers of its own recipe; in a resumed run they are equal.
        own = [{name: value for name, value in group.items() if name != "params"} for group in self._groups]
        self.optimiser.load_state_dict(state["optimiser"])
        for group, values in zip(self._groups, own, strict=True):
            group.update(values)
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])
        self.window.sums = {name: value.to(device) for name, value in state["window"]["sums"].items()}
        self.window.count = int(state["window"]["count"])
        self.guard.bad = dict(state["collapse"])
        self.step = int(state["step"])
        self.seconds = float(state["seconds"])
        states = state["random"]
        if rank() < len(states):
            set_random_state(states[rank()])


def random_state() -> dict[str, Any]:
    """Return the state of Python's, numpy's and torch's own generators.

    medssl draws nothing from them, but a layer such as dropout does.
    """
    kind, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, numbers, second = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [kind, [int(word) for word in words], int(position), int(has_gauss), float(gauss)],
        "python": [version, list(numbers), second],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators where `random_state` found them."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    kind, words, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(words, dtype=np.uint32), position, has_gauss, gauss))
    version, numbers, second = state["python"]
    random.setstate((version, tuple(numbers), second))


def _of_all_ranks(state: dict[str, Any]) -> list[dict[str, Any]]:
    if world_size() == 1:
        return [state]
    states: list[Any] = [None] * world_size()
    dist.all_gather_object(states, state)
    return states
