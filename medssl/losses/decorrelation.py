"""Losses on the correlations of features over the batch: Barlow Twins, its mixed regulariser, and VICReg."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.losses.similarity import checked_rows, product


def barlow_twins(first: Tensor, second: Tensor, *, off_diagonal_weight: float = 0.005, eps: float = 1e-5) -> Tensor:
    """Return how far the cross-correlation of two views is from the identity (Zbontar et al., ICML 2021, eq. 1).

    Args:
        first: Projections of the first views; standardised over the batch here. Shape: (N, D), N >= 2.
        second: Projections of the second views. Shape: (N, D).
        off_diagonal_weight: The paper's lambda.
        eps: Added to the variance, so that a feature that is constant correlates with nothing and gives no NaN.

    Returns:
        A scalar, float32 or wider; D where all rows are equal.

    Raises:
        ValueError: If the shapes differ or there are fewer than two samples.
    """
    first, second = checked_rows("Barlow Twins", first, second, least=2)
    correlation = product(_standardised(first, eps).T, _standardised(second, eps)) / len(first)
    on_diagonal = (1 - correlation.diagonal()).square().sum()
    return on_diagonal + off_diagonal_weight * _off_diagonal(correlation).square().sum()


def mixed_barlow(
    mixed: Tensor, first: Tensor, second: Tensor, partner: Tensor, *, share: float | Tensor, eps: float = 1e-5
) -> Tensor:
    """Return how far features of mixed images are from the mix of features (Mixed Barlow: Bandara et al., 2023).

    The mixed image of a sample is share x_a + (1 - share) x_b[pi]. With BN for standardisation over the batch and
    target = share BN(a) + (1 - share) BN(b[pi]), the regulariser is the sum of the squares of the entries of
    (BN(mixed) - target)' BN(a) / N and (BN(mixed) - target)' BN(b) / N. As in the authors' code, gradients reach the
    targets too.

    Args:
        mixed: Projections of the mixed images. Shape: (N, D), N >= 2.
        first: Projections of view a. Shape: (N, D).
        second: Projections of view b. Shape: (N, D).
        partner: Those rows of `second` that were mixed in, `second[order]`. Shape: (N, D).
        share: Share of view a: one number for the batch, as in the paper, or one for each sample, shape (N,).
        eps: Added to the variance.

    Returns:
        A scalar, float32 or wider, to be weighed by the paper's regulariser weight times lambda; 0 where all rows are
        equal.

    Raises:
        ValueError: If shapes do not fit or there are fewer than two samples.
    """
    mixed, first, second, partner = (
        _standardised(rows, eps) for rows in checked_rows("Mixed Barlow", mixed, first, second, partner, least=2)
    )
    if isinstance(share, Tensor) and share.ndim:
        if share.shape != mixed.shape[:1]:
            raise ValueError(f"Mixed Barlow needs one share or {len(mixed)}, got {tuple(share.shape)}")
        share = share.to(mixed.dtype)[:, None]
    difference = (mixed - share * first - (1 - share) * partner).T / len(mixed)
    return product(difference, first).square().sum() + product(difference, second).square().sum()


def vicreg_terms(first: Tensor, second: Tensor, *, min_std: float = 1.0, eps: float = 1e-4) -> dict[str, Tensor]:
    """Return the three unweighted terms of VICReg (Bardes et al., ICLR 2022); the paper's weights are 25, 25 and 1.

    Args:
        first: Projections of the first views, not normalised. Shape: (N, D), N >= 2.
        second: Projections of the second views. Shape: (N, D).
        min_std: Standard deviation below which a feature is penalised.
        eps: Added to the variance before its root.

    Returns:
        `invariance` (mean squared difference), `variance` (half of the sum over views of the mean hinge; min_std -
        sqrt(eps) where all rows are equal) and `covariance` (sum over views of the squares off the diagonal, over D):
        scalars, float32 or wider.

    Raises:
        ValueError: If the shapes differ or there are fewer than two samples.
    """
    first, second = checked_rows("VICReg", first, second, least=2)
    return {
        "invariance": F.mse_loss(first, second),
        "variance": (_hinge(first, min_std, eps) + _hinge(second, min_std, eps)) / 2,
        "covariance": _covariance_power(first) + _covariance_power(second),
    }


def _standardised(rows: Tensor, eps: float) -> Tensor:
    rows = rows - rows.mean(dim=0)
    return rows * torch.rsqrt(rows.square().mean(dim=0) + eps)


def _hinge(rows: Tensor, min_std: float, eps: float) -> Tensor:
    return F.relu(min_std - torch.sqrt(rows.var(dim=0) + eps)).mean()


def _covariance_power(rows: Tensor) -> Tensor:
    rows = rows - rows.mean(dim=0)
    covariance = product(rows.T, rows) / (len(rows) - 1)
    return _off_diagonal(covariance).square().sum() / rows.shape[1]


def _off_diagonal(matrix: Tensor) -> Tensor:
    """Return the matrix with zeros on its diagonal."""
    return matrix.masked_fill(torch.eye(len(matrix), dtype=torch.bool, device=matrix.device), 0.0)
