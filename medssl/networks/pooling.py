"""One vector per image from the stages of an encoder: what classifiers, probes and embeddings share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from medssl.errors import UsageError
from medssl.networks.encoder import Encoder

Stages = Literal["all", "last"] | Sequence[int]
Pooling = Literal["mean", "mean+max"]
POOLINGS: tuple[str, ...] = ("mean", "mean+max")


def chosen_stages(encoder: Encoder, stages: Stages = "all") -> tuple[int, ...]:
    """Return the numbers of the stages that are meant, fine to coarse.

    Args:
        encoder: The encoder.
        stages: `all`, `last`, or numbers; negative ones count from the coarsest.

    Raises:
        UsageError: If a stage does not exist or is named twice, or none is named.
    """
    count = len(encoder.widths)
    if isinstance(stages, str):
        if stages not in ("all", "last"):
            raise UsageError(f"stages takes all, last, or numbers below {count}, got '{stages}'.")
        return tuple(range(count)) if stages == "all" else (count - 1,)
    numbers = [int(stage) for stage in stages]
    if not numbers or any(not -count <= number < count for number in numbers):
        raise UsageError(f"stages {numbers}: the encoder has stages 0 to {count - 1}; name at least one of them.")
    found = sorted({number % count for number in numbers})
    if len(found) != len(numbers):
        raise UsageError(f"stages {numbers} name a stage twice.")
    return tuple(found)


def pooled_width(encoder: Encoder, stages: Stages = "all", pooling: Pooling = "mean") -> int:
    """Return the length of the vector that `pooled_stages` gives."""
    return sum(encoder.widths[stage] for stage in chosen_stages(encoder, stages)) * len(pooling.split("+"))


def pooled_stages(encoder: Encoder, image: Tensor, stages: Stages = "all", pooling: Pooling = "mean") -> Tensor:
    """Return the pooled features of some stages, side by side.

    Args:
        encoder: The encoder.
        image: Input. Shape: (B, C, Z, Y, X) or (B, C, Y, X).
        stages: See `chosen_stages`.
        pooling: `mean` over space, or `mean+max`, which appends the largest value of each feature.

    Returns:
        Means of all stages, then largest values. Shape: (B, W), float32 or wider.

    Raises:
        UsageError: If there is no such stage or pooling.
    """
    if pooling not in POOLINGS:
        raise UsageError(f"pooling takes {' or '.join(POOLINGS)}, got '{pooling}'.")
    features = encoder.stages(image)
    flat = [features[stage].flatten(2) for stage in chosen_stages(encoder, stages)]
    # Sums over many voxels need float32, whatever the network computes in.
    flat = [values.to(torch.promote_types(values.dtype, torch.float32)) for values in flat]
    vectors = [values.mean(dim=2) for values in flat]
    if pooling == "mean+max":
        vectors += [values.amax(dim=2) for values in flat]
    return torch.cat(vectors, dim=1)
