"""An encoder that is only looked through: loaded from a checkpoint, or untrained as its control."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medssl.errors import CheckpointError
from medssl.files import sha256_of
from medssl.networks.build import build_from_architecture
from medssl.networks.encoder import Encoder
from medssl.networks.pooling import Pooling, Stages, chosen_stages, pooled_width
from medssl.transfer.source import Source, load_source

#: Patch of an encoder whose checkpoint names none, by dimensions.
DEFAULT_PATCH = {2: 224, 3: 96}
# Of what a checkpoint says of itself, what is repeated beside features.
_REPEATED = ("method", "kind", "step", "normalisation", "modalities", "data_hash", "averaged")


@dataclass(frozen=True)
class Frozen:
    """An encoder in evaluation mode, and how it wants to be shown images.

    Args:
        encoder: Its weights need no gradient.
        patch_size: What it was trained on: (Z, Y, X), or (Y, X) in 2D.
        spacing_mm: Spacing (z, y, x) it was trained at if that was one, or None.
        facts: What is known of it; names no path.
        device: Where it is.
    """

    encoder: Encoder
    patch_size: tuple[int, ...]
    spacing_mm: tuple[float, ...] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def dimensions(self) -> int:
        """2 or 3."""
        return len(self.encoder.strides[-1])

    def names(self, stages: Stages, pooling: Pooling) -> list[str]:
        """Return what each number of a pooled feature is: `stage4/017`, or `stage4/max/017`."""
        chosen = chosen_stages(self.encoder, stages)
        parts = [""] + (["max/"] if pooling == "mean+max" else [])
        names = [
            f"stage{stage}/{part}{channel:03d}"
            for part in parts
            for stage in chosen
            for channel in range(self.encoder.widths[stage])
        ]
        assert len(names) == pooled_width(self.encoder, stages, pooling)
        return names


def load_frozen(
    checkpoint: Path,
    *,
    untrained: bool = False,
    seed: int = 0,
    patch_size: tuple[int, ...] | None = None,
    device: torch.device | str = "cpu",
) -> Frozen:
    """Return the encoder of a checkpoint.

    Args:
        checkpoint: A RUN of any kind, or a file that `medssl finetune` would take.
        untrained: Build the same network with weights drawn from `seed`: the control of every probe.
        seed: Of the untrained weights.
        patch_size: What to show it at once instead of the patch of its training.
        device: Where to put it.

    Raises:
        CheckpointError: If it cannot be read, or its weights do not fit its own architecture.
        UsageError: If the patch does not fit the network.
    """
    source = load_source(checkpoint)
    plan = source.architecture
    network = build_from_architecture(plan, source.in_channels, 1, seed=seed)
    if not untrained:
        _take_encoder(network, source)
    patch = patch_size or source.patch_size or (DEFAULT_PATCH[plan.dimensions],) * plan.dimensions
    plan.check_patch(patch)
    facts: dict[str, Any] = {name: source.facts[name] for name in _REPEATED if name in source.facts}
    if untrained:
        facts = {"method": "untrained", "seed": seed}
    facts["checkpoint_sha256"] = sha256_of(source.path)
    return freeze(network, patch, spacing_mm=source.spacing_mm, facts=facts, device=device)


def freeze(
    network: nn.Module,
    patch_size: tuple[int, ...],
    *,
    spacing_mm: tuple[float, ...] | None = None,
    facts: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> Frozen:
    """Put a U-Net in evaluation mode without gradients and return its encoder."""
    network = network.to(device).eval().requires_grad_(False)
    return Frozen(Encoder(network), tuple(patch_size), spacing_mm, facts or {}, torch.device(device))


def _take_encoder(network: nn.Module, source: Source) -> None:
    own = network.state_dict()
    wanted = {name: value for name, value in own.items() if name.startswith("encoder.")}
    missing = sorted(name for name in wanted if name not in source.weights)
    other = sorted(
        name for name, value in wanted.items() if name in source.weights and source.weights[name].shape != value.shape
    )
    if missing or other:
        kind, names = ("misses", missing) if missing else ("holds in another shape", other)
        raise CheckpointError(
            f"{source.path.name} {kind} {len(names)} of {len(wanted)} weights of its own encoder, for example "
            f"{names[0]}. Import it again with `medssl import`."
        )
    network.load_state_dict({**own, **{name: source.weights[name] for name in wanted}})
