"""What losses on rows of embeddings share: checks, unit rows, products in full precision, and pairs to leave out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.losses.precision import at_least_float32


def checked_rows(name: str, *batches: Tensor, least: int = 1) -> tuple[Tensor, ...]:
    """Return batches of rows in float32 or wider.

    Args:
        name: The loss, for the message.
        batches: Shape of each: (N, D), all of one shape.
        least: Samples that the loss needs at least.

    Raises:
        ValueError: If the shapes differ, are not (N, D), or N is below `least`.
    """
    shapes = [tuple(batch.shape) for batch in batches]
    if len(shapes[0]) != 2 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"{name} needs (N, D) batches of one shape, got {', '.join(map(str, shapes))}")
    if shapes[0][0] < least:
        raise ValueError(
            f"{name} needs at least {least} samples in the global batch, got {shapes[0][0]}: "
            "raise the batch size or gather the rows of all ranks"
        )
    return tuple(at_least_float32(batch) for batch in batches)


def check_positive(name: str, **numbers: float) -> None:
    """Refuse a number that must be above 0 and is not.

    Raises:
        ValueError: With the loss, the number's name and its value.
    """
    for key, value in numbers.items():
        if not value > 0:
            raise ValueError(f"{name} needs {key} above 0, got {value}")


def unit_rows(rows: Tensor) -> Tensor:
    """Return rows of length 1; a row of zeros stays as it is. Shape: (N, D)."""
    return F.normalize(rows, dim=1, eps=1e-8)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return the matrix product in the precision of its factors, also where autocast would narrow it."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


def same_group(name: str, groups: Tensor | None, count: int, others: Tensor | None = None) -> Tensor | None:
    """Return which pairs share a group.

    Args:
        name: The loss, for the message.
        groups: Group of each sample, such as the volume it was cut from, or None. Shape: (N,), integer.
        count: N.
        others: Groups of the other side of the pairs, the same samples by default. Shape: (M,).

    Returns:
        True where two groups are equal, or None without groups. Shape: (N, M).

    Raises:
        ValueError: If the shape is not (N,) or the groups are not integers.
    """
    if groups is None:
        return None
    if groups.shape != (count,) or groups.is_floating_point():
        raise ValueError(
            f"{name} needs one integer group for each of {count} samples, got {tuple(groups.shape)} of {groups.dtype}"
        )
    return groups[:, None] == (groups if others is None else others)[None, :]


def leave_out(logits: Tensor, where: Tensor) -> Tensor:
    """Return the logits with those that do not take part so low that no sum of exponentials sees them.

    Half of the lowest number and not minus infinity: a row of which nothing is left then gives no NaN.
    """
    return logits.masked_fill(where, torch.finfo(logits.dtype).min / 2)
