"""Contrast of queries with keys that a slow copy of the encoder made: MoCo's queue and MoCo v3's batch.

Keys and queues get no gradient. The rows of a queue are what earlier steps left there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.losses.similarity import check_positive, checked_rows, leave_out, product, same_group, unit_rows


def queue_contrast(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float,
    *,
    valid: Tensor | None = None,
    groups: Tensor | None = None,
    queue_groups: Tensor | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """Return InfoNCE with a queue of negatives (MoCo: He et al., CVPR 2020, eq. 1).

    Args:
        query: Embeddings of one view; normalised here, as the others are. Shape: (N, D).
        key: The teacher's embeddings of the other view, one for each query. Shape: (N, D).
        queue: Keys of earlier steps. Shape: (Q, D).
        temperature: Cosines are divided by it.
        valid: Which entries of the queue are filled, shape (Q,), bool; or how many from its start, a scalar integer.
            None takes all.
        groups: Group of each query, such as its volume. Shape: (N,), integer.
        queue_groups: Group of each entry: an entry of a query's group is no negative of it. Shape: (Q,), integer.
        counted: Queries that the mean is taken over; None takes all. Shape: (N,), bool.

    Returns:
        A scalar, float32 or wider; ln(Q + 1) where all rows are equal, 0 while the queue is empty or if no query
        counts.

    Raises:
        ValueError: If shapes do not fit, the temperature is not positive, or one kind of groups is missing.
    """
    check_positive("Queue contrast", temperature=temperature)
    query, key = checked_rows("Queue contrast", query, key)
    count, width = query.shape
    if queue.ndim != 2 or queue.shape[1] != width:
        raise ValueError(f"Queue contrast of width {width} needs a (Q, {width}) queue, got {tuple(queue.shape)}")
    (queue,) = checked_rows("Queue contrast", queue)
    out = _empty(valid, len(queue), query.device)
    if (groups is None) != (queue_groups is None):
        raise ValueError("Queue contrast needs the groups of the queries and of the queue, or neither")
    if queue_groups is not None and queue_groups.shape != (len(queue),):
        raise ValueError(f"A queue of {len(queue)} entries needs as many groups, got {tuple(queue_groups.shape)}")
    alike = same_group("Queue contrast", groups, count, queue_groups)
    if alike is not None:
        out = out | alike
    query, key, queue = unit_rows(query), unit_rows(key.detach()), unit_rows(queue.detach())
    positive = (query * key).sum(dim=1) / temperature
    negatives = torch.logsumexp(leave_out(product(query, queue.T) / temperature, out), dim=1)
    surprise = F.softplus(negatives - positive)
    if counted is None:
        return surprise.mean()
    if counted.shape != (count,) or counted.dtype != torch.bool:
        raise ValueError(f"'counted' needs shape ({count},) and bool, got {tuple(counted.shape)} and {counted.dtype}")
    return torch.where(counted, surprise, 0.0).sum() / counted.sum().clamp(min=1)


def key_contrast(query: Tensor, key: Tensor, *, temperature: float, groups: Tensor | None = None) -> Tensor:
    """Return 2 temperature InfoNCE with the keys of the batch, one direction (MoCo v3: Chen et al., ICCV 2021, alg. 1).

    Args:
        query: The predictor's output for one view; normalised here, as the keys are. Shape: (N, D), N >= 2.
        key: The teacher's embeddings of the other view. Shape: (N, D).
        temperature: Cosines are divided by it.
        groups: Samples of one group are no negatives of each other. Shape: (N,), integer.

    Returns:
        A scalar, float32 or wider; 2 temperature ln N where all rows are equal.

    Raises:
        ValueError: If shapes differ, there are fewer than two samples, or the temperature is not positive.
    """
    check_positive("Key contrast", temperature=temperature)
    query, key = checked_rows("Key contrast", query, key, least=2)
    count = len(query)
    logits = product(unit_rows(query), unit_rows(key.detach()).T) / temperature
    alike = same_group("Key contrast", groups, count)
    if alike is not None:
        logits = leave_out(logits, alike & ~torch.eye(count, dtype=torch.bool, device=query.device))
    return 2 * temperature * F.cross_entropy(logits, torch.arange(count, device=query.device))


def symmetric_key_contrast(
    query_a: Tensor,
    query_b: Tensor,
    key_a: Tensor,
    key_b: Tensor,
    *,
    temperature: float,
    groups: Tensor | None = None,
) -> Tensor:
    """Return the sum of `key_contrast` of a's queries with b's keys and of b's with a's, as MoCo v3 takes it.

    Args:
        query_a: Predictions from view a. Shape: (N, D).
        query_b: Predictions from view b. Shape: (N, D).
        key_a: The teacher's embeddings of view a. Shape: (N, D).
        key_b: The teacher's embeddings of view b. Shape: (N, D).
        temperature: Cosines are divided by it.
        groups: Samples of one group are no negatives of each other. Shape: (N,), integer.
    """
    return key_contrast(query_a, key_b, temperature=temperature, groups=groups) + key_contrast(
        query_b, key_a, temperature=temperature, groups=groups
    )


def _empty(valid: Tensor | None, length: int, device: torch.device) -> Tensor:
    if valid is None:
        return torch.zeros(length, dtype=torch.bool, device=device)
    if valid.ndim == 0 and valid.dtype != torch.bool:
        return torch.arange(length, device=device) >= valid
    if valid.shape != (length,) or valid.dtype != torch.bool:
        raise ValueError(
            f"'valid' needs shape ({length},) and bool, or one integer, got {tuple(valid.shape)} and {valid.dtype}"
        )
    return ~valid
