"""T-similarity: how far the members of an ensemble agree (Odonnat, Feofanov and Redko, AISTATS 2024)."""

from __future__ import annotations

from torch import Tensor

from medssl.losses.consistency import mean_where
from medssl.losses.precision import at_least_float32


def t_similarities(probabilities: Tensor) -> Tensor:
    """Return the mean over pairs of different members of the inner product of what they predict.

    It is 1 where all are certain of one class, and at most that: in [0, 1]. Members that are sure of different classes
    have 0, members that know nothing 1 / K.

    Args:
        probabilities: Of M >= 2 members. Shape: (B, M, K, *rest).

    Returns:
        Shape: (B, *rest), float32 or wider.

    Raises:
        ValueError: If there are fewer than 2 members or classes.
    """
    if probabilities.ndim < 3 or probabilities.shape[1] < 2 or probabilities.shape[2] < 2:
        raise ValueError(
            f"T-similarity needs (B, M, K, *rest) of 2 members and 2 classes or more, got {tuple(probabilities.shape)}"
        )
    probabilities = at_least_float32(probabilities)
    members = probabilities.shape[1]
    # Pairs of different members: all pairs less those of a member with itself.
    pairs = probabilities.sum(dim=1).square().sum(dim=1) - probabilities.square().sum(dim=(1, 2))
    return pairs / (members * (members - 1))


def t_similarity(probabilities: Tensor, where: Tensor | None = None, *, count: Tensor | None = None) -> Tensor:
    """Return the mean T-similarity of the places that count; to make it small is to make members differ.

    Args:
        probabilities: Shape: (B, M, K, *rest).
        where: Places that count; None counts all. Shape: (B, 1, *rest), bool.
        count: Number to divide by instead of the number counted here; see `medssl.losses.consistency`.

    Raises:
        ValueError: If the shapes do not fit.
    """
    return mean_where(t_similarities(probabilities), where, count)
