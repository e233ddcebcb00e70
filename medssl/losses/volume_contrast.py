"""VoCo: how much a crop overlaps each base crop of its surroundings, told from the cosines of their embeddings.

Wu et al., CVPR 2024, in the form of the released code with a teacher (Large-Scale-Medical, 2024). Deviations: the
overlap is that of volumes and not of areas in a plane; the logarithm's argument stays above `SOFTENING`, since a target
that lies on a base and looks unlike it would cost infinitely much; bases are pushed apart from both sides, while the
code holds one of each pair still.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.losses.precision import at_least_float32
from medssl.losses.similarity import product

#: What is left of the logarithm's argument where prediction and overlap differ by 1.
SOFTENING = 0.01


def volume_contrast(
    target: Tensor, base: Tensor, teacher_target: Tensor, teacher_base: Tensor, overlap: Tensor
) -> dict[str, Tensor]:
    """Return the three terms of VoCo.

    Args:
        target: The student's embeddings of target crops; all embeddings are normalised here. Shape: (B, N, D).
        base: The student's embeddings of base crops of the same surroundings. Shape: (B, M, D), M >= 2.
        teacher_target: The teacher's of the target crops. Shape: (B, N, D).
        teacher_base: The teacher's of the base crops. Shape: (B, M, D).
        overlap: Which part of each target lies in each base, in [0, 1]. Shape: (B, N, M).

    Returns:
        Scalars, float32 or wider. `overlap`: sum of -y log(1 - |y - s|) over the sum of y, for overlap y and predicted
        overlap s; `absent`: mean of s^2 where y is 0; `bases`: mean squared cosine of two bases, where it is positive.
        A term over nothing is 0.

    Raises:
        ValueError: If the shapes do not fit, or there are fewer than two bases.
    """
    if base.ndim != 3 or base.shape[1] < 2:
        raise ValueError(f"VoCo needs (B, M, D) bases with M of 2 or more, got {tuple(base.shape)}")
    similarity = predicted_overlap(target, base, teacher_target, teacher_base)
    if overlap.shape != similarity.shape:
        raise ValueError(f"VoCo needs overlaps of shape {tuple(similarity.shape)}, got {tuple(overlap.shape)}")
    overlap = overlap.to(similarity.dtype)
    missed = -torch.log1p(-(1 - SOFTENING) * (overlap - similarity).abs())
    absent = (overlap == 0).to(similarity.dtype)
    return {
        "overlap": (overlap * missed).sum() / overlap.sum().clamp(min=1e-6),
        "absent": (absent * similarity.square()).sum() / absent.sum().clamp(min=1),
        "bases": _apart(at_least_float32(base)),
    }


def predicted_overlap(target: Tensor, base: Tensor, teacher_target: Tensor, teacher_base: Tensor) -> Tensor:
    """Return the overlap that embeddings predict: their cosine where it is positive.

    The mean of what student and teacher say of each other: the student's targets with the teacher's bases, and the
    teacher's targets with the student's bases.

    Args:
        target: Shape: (B, N, D).
        base: Shape: (B, M, D).
        teacher_target: Shape: (B, N, D).
        teacher_base: Shape: (B, M, D).

    Returns:
        Shape: (B, N, M), float32 or wider, in [0, 1].

    Raises:
        ValueError: If the shapes do not fit.
    """
    fits = target.ndim == base.ndim == 3 and target.shape[::2] == base.shape[::2]
    if not fits or target.shape != teacher_target.shape or base.shape != teacher_base.shape:
        shapes = ", ".join(str(tuple(rows.shape)) for rows in (target, base, teacher_target, teacher_base))
        raise ValueError(f"VoCo needs targets (B, N, D) and bases (B, M, D) of student and teacher, got {shapes}")
    return (F.relu(_cosines(target, teacher_base)) + F.relu(_cosines(teacher_target, base))) / 2


def _apart(base: Tensor) -> Tensor:
    cosines = F.relu(_cosines(base, base)).square()
    count = base.shape[1]
    others = cosines.sum() - cosines.diagonal(dim1=1, dim2=2).sum()
    return others / (len(base) * count * (count - 1))


def _cosines(left: Tensor, right: Tensor) -> Tensor:
    """Return the cosines of each row with each. Shapes: (B, N, D), (B, M, D) to (B, N, M)."""
    left, right = (F.normalize(at_least_float32(rows), dim=2, eps=1e-8) for rows in (left, right))
    return product(left, right.transpose(1, 2))
