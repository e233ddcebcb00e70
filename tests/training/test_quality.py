"""Label-free quality against hand values, slow definitions and invariances."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pytest import approx
from torch import Tensor

from medssl.training.quality import (
    alignment,
    alpha_req,
    centred_rank,
    dimension_deviation,
    lidar,
    norms,
    rankme,
    spectrum,
    uniformity,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(values: Tensor, n: int = 400) -> Tensor:
    """Centred features whose covariance has exactly these eigenvalues."""
    rows = noise(n, len(values))
    rows = torch.linalg.qr(rows - rows.mean(dim=0)).Q
    turn = torch.linalg.qr(noise(len(values), len(values), seed=1)).Q
    return (rows * (values * (n - 1)).sqrt()) @ turn.T


def test_rankme_of_equal_singular_values_is_their_number() -> None:
    assert rankme(torch.eye(7, dtype=torch.float64), eps=0).item() == approx(7)
    assert rankme(torch.cat([torch.eye(3), torch.zeros(3, 5)], dim=1), eps=0).item() == approx(3, rel=1e-5)
    assert rankme(torch.ones(9, 4, dtype=torch.float64), eps=0).item() == approx(1, abs=1e-6)


def test_rankme_equals_its_definition() -> None:
    z = noise(30, 6)
    sigma = np.linalg.svd(z.numpy(), compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    assert rankme(z).item() == approx(math.exp(-sum(x * math.log(x) for x in p)))


def test_two_singular_values_by_hand() -> None:
    # Shares 3/4 and 1/4.
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert rankme(torch.diag(torch.tensor([3.0, 1.0])), eps=0).item() == approx(math.exp(entropy))


def test_the_centred_rank_does_not_see_a_common_part() -> None:
    z = noise(200, 8)
    assert centred_rank(z + 1000).item() == approx(centred_rank(z).item(), rel=1e-6)
    assert rankme(z + 1000).item() < 1.1 < centred_rank(z + 1000).item()


def test_equal_rows_have_no_centred_rank() -> None:
    assert math.isnan(centred_rank(torch.full((20, 8), 0.1)).item())
    assert math.isnan(rankme(torch.zeros(20, 8)).item())


@pytest.mark.parametrize("function", [rankme, centred_rank, uniformity])
def test_order_turn_and_size_do_not_matter(function) -> None:  # type: ignore[no-untyped-def]
    z = noise(50, 6) + 0.3
    turn = torch.linalg.qr(noise(6, 6, seed=2)).Q
    for other in (z[torch.randperm(50)], z @ turn, 7 * z):
        assert function(other).item() == approx(function(z).item())


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_of_a_power_law_is_its_exponent(alpha: float) -> None:
    found, fit = alpha_req(with_spectrum(torch.arange(1, 65, dtype=torch.float64) ** -alpha))
    assert found.item() == approx(alpha, rel=1e-6)
    assert fit.item() == approx(1)


def test_every_factor_of_two_of_the_spectrum_counts_alike() -> None:
    values = torch.arange(1, 65, dtype=torch.float64) ** -1 * torch.linspace(1, 3, 64, dtype=torch.float64).cos().exp()
    rank, used = np.arange(3, 33), values[2:32].numpy()
    slope = np.polyfit(np.log(rank), np.log(used), 1, w=rank**-0.5)[0]
    assert alpha_req(with_spectrum(values.sort(descending=True).values))[0].item() == approx(-slope, rel=1e-6)


def test_a_spectrum_that_is_no_power_law_fits_badly() -> None:
    steps = torch.cat([torch.ones(16), 1e-4 * torch.ones(48)]).double()
    assert alpha_req(with_spectrum(steps))[1].item() < 0.9


def test_too_few_eigenvalues_have_no_alpha() -> None:
    assert all(math.isnan(value.item()) for value in alpha_req(noise(5, 64)))


def test_the_spectrum_is_that_of_the_covariance() -> None:
    z = noise(40, 5)
    expected = np.sort(np.linalg.eigvalsh(np.cov(z.numpy().T)))[::-1]
    np.testing.assert_allclose(spectrum(z), expected.copy())


def test_lidar_equals_its_definition() -> None:
    views = noise(9, 4, 5) + 2 * noise(9, 1, 5, seed=1)
    x = views.numpy()
    means = x.mean(axis=1)
    between = np.cov(means.T)
    within = sum(np.outer(v - means[i], v - means[i]) for i in range(9) for v in x[i]) / (9 * 3) + 1e-4 * np.eye(5)
    values, axes = np.linalg.eigh(within)
    root = axes @ np.diag(values**-0.5) @ axes.T
    found = np.linalg.eigvalsh(root @ between @ root)
    p = found / found.sum() + 1e-8
    assert lidar(views).item() == approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)


def test_lidar_does_not_count_directions_of_noise() -> None:
    signal = torch.cat([noise(200, 1, 3), torch.zeros(200, 1, 13)], dim=2)
    jitter = torch.cat([0.1 * noise(200, 8, 3, seed=1), noise(200, 8, 13, seed=2)], dim=2)
    views = signal + jitter
    assert lidar(views).item() < 4.5
    assert rankme(views.flatten(0, 1)).item() > 10


def test_lidar_needs_samples_and_views() -> None:
    for shape in ((1, 4, 3), (4, 1, 3), (4, 3)):
        with pytest.raises(ValueError, match="LiDAR needs"):
            lidar(torch.zeros(shape))


def test_alignment_and_uniformity_by_hand() -> None:
    east, north = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.5]])
    assert alignment(east, east).item() == 0
    assert alignment(east, north).item() == approx(2)
    assert alignment(east, -3 * east).item() == approx(4)
    assert uniformity(torch.cat([east, east])).item() == approx(0, abs=1e-6)
    assert uniformity(torch.cat([east, -east])).item() == approx(-8)
    # Three pairs: at right angles twice, opposite once.
    expected = math.log((2 * math.exp(-4) + math.exp(-8)) / 3)
    assert uniformity(torch.cat([east, -east, north])).item() == approx(expected)


def test_many_rows_are_thinned_and_the_figure_stays() -> None:
    z = noise(5000, 4).float()
    assert uniformity(z).item() == approx(uniformity(z[:2000]).item(), rel=0.05)


def test_lengths_and_deviations_by_hand() -> None:
    z = torch.tensor([[3.0, 4.0], [3.0, -4.0]])
    assert norms(z).tolist() == [5, 5]
    np.testing.assert_allclose(dimension_deviation(z), [0, 4 / math.sqrt(12.5)], rtol=1e-6)


def test_a_collapse_moves_rank_deviation_lengths_and_uniformity() -> None:
    sound, dead = noise(64, 16).float(), torch.full((64, 16), 0.3) + 1e-9 * noise(64, 16).float()
    assert centred_rank(sound) > 12 and dimension_deviation(sound).mean() > 0.9 and uniformity(sound) < -1
    assert not centred_rank(dead) > 2 and dimension_deviation(dead).max() < 1e-4
    assert norms(dead).std() < 1e-4 * norms(dead).mean() and uniformity(dead) > -1e-3


def test_half_precision_is_widened() -> None:
    z = noise(64, 8)
    assert rankme(z.bfloat16()).item() == approx(rankme(z).item(), rel=1e-2)
    assert rankme(z.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 4), (4,), (3, 0)])
@pytest.mark.parametrize("figure", [rankme, centred_rank, spectrum, alpha_req, uniformity, norms, dimension_deviation])
def test_what_is_no_table_of_features_is_refused(figure: Callable[[Tensor], object], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Quality needs"):
        figure(torch.zeros(shape))
