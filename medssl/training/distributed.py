"""What a process must know of the others: its rank, and tensors gathered from all with their gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process among them."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(values: Tensor) -> Tensor:
    """Return the rows of all ranks in the order of one process, with gradients to the rank each came from.

    Rank r holds samples r, r + world, r + 2 world, ... of the batch, so the ranks are interleaved. Where every rank
    computes the same loss from the result, the average of the ranks' gradients, which DDP takes, is that of one
    process.

    Args:
        values: Rows of this rank, equally many on each. Shape: (B, ...).

    Returns:
        Shape: (world * B, ...).
    """
    if world_size() == 1:
        return values
    return _Gather.apply(values).transpose(0, 1).flatten(0, 1)


def mean_across_ranks(values: Tensor) -> Tensor:
    """Return the mean over ranks, without gradient; every rank must call it."""
    result = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(result)
        result /= world_size()
    return result


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, values: Tensor) -> Tensor:
        parts = [torch.empty_like(values) for _ in range(world_size())]
        dist.all_gather(parts, values.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        # Every rank's loss depends on these rows: their gradients are summed before this rank takes its own.
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total[rank()]
