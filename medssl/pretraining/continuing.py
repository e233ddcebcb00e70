"""Going on from another RUN: with an archive that has grown, or with a second method on what a first one learned.

A run with the schedule `infinite` (Singh et al., "Beyond Cosine Decay", 2025, arXiv 2503.02844) keeps a checkpoint from
before its last anneal. A new run that goes on from it takes weights, heads, teachers, queues and the optimiser's state,
and starts on the plateau, without a second warm-up. From any other checkpoint the network's weights alone are taken.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from medssl.errors import CheckpointError, UsageError
from medssl.networks.architecture import Architecture
from medssl.training.checkpoint import FOLDER, damage, find_checkpoint, load_checkpoint, save_checkpoint
from medssl.training.loop import PLATEAU

logger = logging.getLogger(__name__)

#: What a continued RUN took over, so that it can be resumed before its first own checkpoint.
START = "start.pth"


@dataclass(frozen=True)
class Start:
    """What a run begins with.

    Args:
        weights: State dict of the network.
        architecture: Of that network.
        in_channels: Its input channels.
        state: State of the training that is gone on with, its step set to 0; None where only the weights are taken.
        facts: Method, step and data hash of the run they come from, for data.json.
    """

    weights: dict[str, Tensor]
    architecture: Architecture
    in_channels: int
    state: dict[str, Any] | None
    facts: dict[str, Any]

    def content(self) -> dict[str, Any]:
        """Return it as a checkpoint holds it."""
        return {
            "network_weights": self.weights,
            "medssl": {**self.facts, "architecture": self._architecture(), "training": self.state},
        }

    def _architecture(self) -> dict[str, Any]:
        plan = self.architecture
        return {
            "dimensions": plan.dimensions,
            "in_channels": self.in_channels,
            "network_class_name": plan.network_class_name,
            "arch_kwargs": plan.arch_kwargs,
            "kw_requires_import": list(plan.kw_requires_import),
        }


def read_start(run_or_file: Path, method: str) -> Start:
    """Read what a new run can take from another.

    Args:
        run_or_file: A pretraining RUN, whose checkpoint from before the anneal is preferred, or a checkpoint file.
        method: The new run's method; heads, teachers and the optimiser are only taken from the same one.

    Raises:
        CheckpointError: If there is no checkpoint, or it does not say what it is.
    """
    plateau = run_or_file / FOLDER / PLATEAU
    fault = damage(plateau) if plateau.is_file() else None
    if fault is not None:
        logger.warning("%s: %s; the newest checkpoint is taken instead.", plateau, fault)
    path = plateau if plateau.is_file() and fault is None else find_checkpoint(run_or_file)
    start = _start_of(path)
    if start.state is None or path.name != PLATEAU or start.facts["method"] != method:
        reason = (
            f"it was trained by {start.facts['method']}" if start.facts["method"] != method
            else "it is not from before the anneal of schedule.name=infinite"
        )  # fmt: skip
        logger.warning("Only the network's weights of %s are taken over: %s.", path.name, reason)
        return Start(start.weights, start.architecture, start.in_channels, None, start.facts)
    return start


def kept_start(out: Path) -> Start | None:
    """Return what a continued RUN began with, or None for one that began from scratch."""
    return _start_of(out / START) if (out / START).is_file() else None


def keep_start(out: Path, start: Start) -> None:
    """Write what a RUN begins with into it."""
    save_checkpoint(out / START, start.content())


def check_start(start: Start, architecture: Architecture, in_channels: int) -> None:
    """Refuse weights of another network.

    Raises:
        UsageError: Naming the difference.
    """
    theirs, ours = start.architecture, architecture
    if (theirs.network_class_name, theirs.arch_kwargs) != (ours.network_class_name, ours.arch_kwargs):
        names = {**theirs.arch_kwargs, **ours.arch_kwargs}
        found = [name for name in names if theirs.arch_kwargs.get(name) != ours.arch_kwargs.get(name)]
        raise UsageError(
            f"--continue-from: the network of that run is another ({', '.join(found) or 'class'} differ). Give the "
            "same network, strides and kernel_sizes, or no recipe to take over that run's."
        )
    if start.in_channels != in_channels:
        raise UsageError(
            f"--continue-from: the network of that run has {start.in_channels} input channels, the store "
            f"{in_channels}. Set sampling.channels=random, or preprocess the same channels."
        )


def check_state(start: Start, method: nn.Module, optimiser: str) -> None:
    """Refuse heads of another size than the method's, and the state of another optimiser.

    Raises:
        UsageError: Naming the first that differs.
    """
    if start.state is None:
        return
    if start.facts["optimiser"] not in (None, optimiser):
        raise UsageError(
            f"--continue-from: the optimiser of that run is {start.facts['optimiser']}, here it is {optimiser}. Set "
            f"optimiser.name={start.facts['optimiser']}, or give no recipe to take over that run's."
        )
    theirs = {name: tuple(value.shape) for name, value in start.state["method"].items()}
    ours = {name: tuple(value.shape) for name, value in method.state_dict().items()}
    for name in sorted({*theirs, *ours}):
        if theirs.get(name) != ours.get(name):
            raise UsageError(
                f"--continue-from: {name} is {theirs.get(name)} there and {ours.get(name)} here. Give the same "
                "settings of the method, or no recipe to take over that run's."
            )


def fitting(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights whose shapes are those of a network's, and name the others: outputs of another method."""
    taken = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    fresh = sorted(own.keys() - taken.keys())
    if fresh:
        logger.warning("%d of %d weights start anew: %s.", len(fresh), len(own), ", ".join(fresh[:4]))
    return taken


def _start_of(path: Path) -> Start:
    content = load_checkpoint(path)
    ours = content.get("medssl")
    if not isinstance(ours, dict) or "architecture" not in ours:
        raise CheckpointError(f"{path} is not a checkpoint of medssl: `medssl import` makes one of it.")
    state = ours.get("training")
    if state is not None:
        # The draws, the sampler and the schedule begin anew; what was learned stays.
        state = {**state, "step": 0, "seconds": 0.0, "window": {"sums": {}, "count": 0}, "collapse": {}, "random": []}
    facts = {name: ours.get(name) for name in ("method", "step", "data_hash")}
    facts["optimiser"] = ((ours.get("recipe") or {}).get("optimiser") or {}).get("name", ours.get("optimiser"))
    plan = ours["architecture"]
    return Start(content["network_weights"], Architecture.from_json(plan), int(plan["in_channels"]), state, facts)
