"""Heads that a method puts on the encoder's features and throws away when it is done."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from medssl.config import Settings
from medssl.losses.precision import at_least_float32
from medssl.training.distributed import gather

Norm = Literal["batch", "layer", "none"]


class BatchStandardise(nn.Module):
    """Batch normalisation over the samples of all ranks, always with the statistics of the batch at hand.

    Ioffe and Szegedy, ICML 2015, without running statistics: a head never meets a single image after pretraining.
    torch's SyncBatchNorm computes the same on GPUs and does not run on the CPU.

    Args:
        width: Features of a row.
        affine: Whether a learned scale and shift follow.
        eps: Added to the variance.
    """

    def __init__(self, width: int, *, affine: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, rows: Tensor) -> Tensor:
        """Standardise each feature over all rows. Shape: (..., D), float32 or wider."""
        rows = at_least_float32(rows)
        everyone = gather(rows.flatten(0, -2))
        mean = everyone.mean(dim=0)
        rows = (rows - mean) * torch.rsqrt((everyone - mean).square().mean(dim=0) + self.eps)
        return rows if self.weight is None or self.bias is None else rows * self.weight + self.bias


class ProjectorSettings(Settings):
    """A multilayer perceptron on top of the encoder's features.

    Args:
        hidden: Width of the hidden layers.
        width: Width of its output.
        layers: Linear layers; 1 has no hidden one, 0 passes the features through.
        norm: Between the layers: `batch` (over the samples of all ranks), `layer`, or `none`.
        last_norm: Whether the output is normalised too, without scale and shift.
    """

    hidden: int = Field(default=512, ge=1)
    width: int = Field(default=128, ge=1)
    layers: int = Field(default=2, ge=0)
    norm: Norm = "batch"
    last_norm: bool = False


class Projector(nn.Sequential):
    """Linear layers with norms and ReLU between them; rows in, rows out.

    Args:
        in_width: Features of a row.
        settings: Widths and norms.

    Attributes:
        width: Features of a row of the output.
    """

    def __init__(self, in_width: int, settings: ProjectorSettings) -> None:
        hidden = [settings.hidden] * (settings.layers - 1)
        widths = [in_width, *hidden, settings.width] if settings.layers else [in_width]
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(pairwise(widths), start=1):
            last = number == settings.layers
            normed = settings.norm != "none" and (not last or settings.last_norm)
            # The norm's shift takes the place of a bias.
            layers.append(nn.Linear(before, after, bias=not normed))
            if normed:
                layers.append(_norm(settings.norm, after, affine=not last))
            if not last:
                layers.append(nn.ReLU())
        super().__init__(*layers)
        self.width = widths[-1]

    def layer_outputs(self, rows: Tensor) -> list[Tensor]:
        """Return the rows after each linear layer with its norm and ReLU, first to last."""
        found: list[Tensor] = []
        for number, layer in enumerate(self):
            rows = layer(rows)
            if number + 1 == len(self) or isinstance(self[number + 1], nn.Linear):
                found.append(rows)
        return found


def predictor(width: int, hidden: int, norm: Norm = "batch") -> Projector:
    """Return the head with which a student guesses a teacher's projection: two layers, the output free."""
    return Projector(width, ProjectorSettings(hidden=hidden, width=width, layers=2, norm=norm))


def scaled_gradient(values: Tensor, factor: float | Tensor) -> Tensor:
    """Return the values as they are; the gradient that comes back through them is multiplied by `factor`.

    With 0 a layer is held still and still takes part in the step, which DDP insists on.
    """
    result: Tensor = _ScaledGradient.apply(values, factor)
    return result


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, values: Tensor, factor: float | Tensor) -> Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return values.view_as(values)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None  # type: ignore[attr-defined]


def _norm(kind: Norm, width: int, *, affine: bool) -> nn.Module:
    if kind == "batch":
        return BatchStandardise(width, affine=affine)
    return nn.LayerNorm(width, elementwise_affine=affine)
