"""Label-free quality of representations: pure functions of features, on any device.

None of them knows a label. They tell a collapsed encoder from one that is not; which of two sound encoders transfers
better they predict only loosely, so that they complement a probe and do not replace it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medssl.losses.precision import at_least_float32

#: Rows that measures of pairs look at; of more, so many evenly spaced ones.
MOST_PAIRED_ROWS = 2048


def rankme(features: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Return the smooth rank of a feature matrix, 1 to min(N, D) (RankMe, Garrido et al., ICML 2023, eq. 1).

    The exponential of the entropy of the singular values, which are not centred: a large common part of all features
    lowers it. It needs at least as many rows as dimensions, better several times as many.

    Args:
        features: One row per sample. Shape: (N, D), finite.
        eps: Added to each normalised singular value.

    Returns:
        Scalar, float32 or wider; NaN if all features are zero.

    Raises:
        ValueError: If the features are no table with a row and a column.
    """
    return _smooth_rank(torch.linalg.svdvals(_rows(features)), eps)


def centred_rank(features: Tensor) -> Tensor:
    """Return the same of features less their mean: how many directions tell samples apart. NaN if all are equal.

    Raises:
        ValueError: If the features are no table with a row and a column.
    """
    features = _rows(features)
    centred = features - features.mean(dim=0)
    # What is left of equal rows is rounding, which would look like many directions.
    spread, size = centred.square().mean().sqrt(), features.square().mean().sqrt()
    values = torch.linalg.svdvals(centred)
    return torch.where(spread > 1e-6 * size, _smooth_rank(values, 0.0), torch.nan)


def spectrum(features: Tensor) -> Tensor:
    """Return the eigenvalues of the covariance, largest first. Shape: (min(N, D),).

    Raises:
        ValueError: If the features are no table with a row and a column.
    """
    features = _rows(features)
    return torch.linalg.svdvals(features - features.mean(dim=0)).square() / max(len(features) - 1, 1)


def alpha_req(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the decay of the eigenvalues, `lambda_i ~ i ** -alpha`, and how well a power law fits (R squared).

    Agrawal et al., "alpha-ReQ", NeurIPS 2022: near 1 is best, well above 1 few directions carry all, well below 1 the
    features are close to noise. The line is fitted to logarithms from the third eigenvalue to the middle of the
    spectrum, weighted by 1/i so that every factor of two counts alike (as Stringer et al., Nature 2019): the first
    ones are structure of their own, the last half is bent by the number of samples.

    Returns:
        Alpha and R squared, scalars; NaN where fewer than five eigenvalues can be used.

    Raises:
        ValueError: If the features are no table with a row and a column.
    """
    values = spectrum(features)
    usable = int((values > 1e-10 * values[:1].clamp(min=1e-30)).sum())
    first, last = 2, max(usable // 2, min(usable, 8))
    if last - first < 5:
        missing = torch.full((), torch.nan, dtype=values.dtype, device=values.device)
        return missing, missing
    rank = torch.arange(first + 1, last + 1, dtype=values.dtype, device=values.device)
    weight = 1 / rank
    weight = weight / weight.sum()
    x, y = rank.log(), values[first:last].log()
    x, y = x - (weight * x).sum(), y - (weight * y).sum()
    slope = (weight * x * y).sum() / (weight * x * x).sum()
    left = (weight * (y - slope * x).square()).sum()
    return -slope, 1 - left / (weight * y * y).sum().clamp(min=1e-30)


def lidar(views: Tensor, *, delta: float = 1e-4, eps: float = 1e-8) -> Tensor:
    """Return the smooth rank of what differs between samples relative to what differs between views of one.

    LiDAR (Thilak et al., ICLR 2024): the exponential of the entropy of the eigenvalues of
    `Sw^-1/2 Sb Sw^-1/2`, with the scatter `Sb` of the samples' means and `Sw` within samples. Unlike RankMe it does not
    count directions of noise. The paper has about 1000 samples with 50 views; with n samples it is at most n - 1.

    Args:
        views: Features of several augmented views of each sample. Shape: (n, q, D), n >= 2, q >= 2, finite.
        delta: Added to the diagonal of `Sw`.
        eps: Added to each normalised eigenvalue.

    Returns:
        Scalar, float32 or wider; NaN if all samples are equal.

    Raises:
        ValueError: If there are fewer than two samples or two views.
    """
    if views.ndim != 3 or views.shape[0] < 2 or views.shape[1] < 2:
        raise ValueError(f"LiDAR needs (samples, views, D) with two samples and two views, got {tuple(views.shape)}")
    # Products of inverse roots lose half of the digits.
    views = views.double()
    n, q, width = views.shape
    means = views.mean(dim=1)
    between = (means - means.mean(dim=0)) / (n - 1) ** 0.5
    within = (views - means[:, None]).reshape(n * q, width) / (n * (q - 1)) ** 0.5
    values, axes = torch.linalg.eigh(
        within.T @ within + delta * torch.eye(width, device=views.device, dtype=views.dtype)
    )
    whitened = between @ axes / values.clamp(min=delta).sqrt()
    return _smooth_rank(torch.linalg.svdvals(whitened).square(), eps)


def alignment(first: Tensor, second: Tensor, *, power: float = 2.0) -> Tensor:
    """Return the mean distance of two views of a sample on the sphere (Wang and Isola, ICML 2020); 0 is best, 4 worst.

    Args:
        first: Features of one view. Shape: (N, D).
        second: Features of the other. Shape: (N, D).
        power: Of the distance.

    Raises:
        ValueError: If the shapes differ, or the features are no table with a row and a column.
    """
    if first.shape != second.shape:
        raise ValueError(f"Alignment needs two views of one shape, got {tuple(first.shape)} and {tuple(second.shape)}")
    return (unit(_rows(first)) - unit(_rows(second))).norm(dim=1).pow(power).mean()


def uniformity(features: Tensor, *, sharpness: float = 2.0) -> Tensor:
    """Return the logarithm of the mean Gaussian potential of pairs on the sphere (Wang and Isola, ICML 2020).

    0 if all are equal; about -2 * sharpness, more in few dimensions, if they are spread evenly. Lower is more spread.

    Args:
        features: Shape: (N, D), N >= 2; of more than 2048 rows so many evenly spaced ones are used.
        sharpness: The paper's t.

    Raises:
        ValueError: If the features are no table with two rows and a column.
    """
    rows = unit(_rows(features, at_least=2))
    if len(rows) > MOST_PAIRED_ROWS:
        rows = rows[torch.linspace(0, len(rows) - 1, MOST_PAIRED_ROWS, device=rows.device).long()]
    squares = torch.pdist(rows).square()
    return torch.logsumexp(-sharpness * squares, dim=0) - torch.log(torch.tensor(float(len(squares))))


def norms(features: Tensor) -> Tensor:
    """Return the length of each feature. Shape: (N,).

    Raises:
        ValueError: If the features are no table with a row and a column.
    """
    return _rows(features).norm(dim=1)


def dimension_deviation(features: Tensor) -> Tensor:
    """Return the standard deviation of each dimension over samples, in units of the features' root mean square.

    About 1 where samples have little in common, near 0 where the dimension is the same for all. Shape: (D,).

    Raises:
        ValueError: If the features are no table with a row and a column.
    """
    features = _rows(features)
    return features.std(dim=0, correction=0) / features.square().mean().sqrt().clamp(min=1e-30)


def unit(features: Tensor) -> Tensor:
    """Return the features at length 1; a feature of zeros stays one. Shape: (N, D)."""
    return features / features.norm(dim=1, keepdim=True).clamp(min=1e-30)


def _rows(features: Tensor, at_least: int = 1) -> Tensor:
    if features.ndim != 2 or len(features) < at_least or features.shape[1] < 1:
        raise ValueError(f"Quality needs (N, D) features with N >= {at_least}, got {tuple(features.shape)}")
    return at_least_float32(features)


def _smooth_rank(values: Tensor, eps: float) -> Tensor:
    """Return the exponential of the entropy of non-negative values; NaN if all are zero."""
    total = values.sum()
    parts = values / total + eps
    entropy = -torch.special.xlogy(parts, parts).sum()
    return torch.where(total > 0, entropy.exp(), torch.nan)
