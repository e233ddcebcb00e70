"""Random numbers depend on the seed, the sample and the name, and on nothing else."""

from __future__ import annotations

import pytest
import torch

from medssl.data.draw import Draw
from medssl.data.generators import generator


def test_the_same_seed_index_and_name_give_the_same_numbers():
    assert torch.equal(Draw(3, [5, 9]).uniform(0, 1, (4,)), Draw(3, [5, 9]).uniform(0, 1, (4,)))


def test_a_sample_draws_the_same_alone_and_in_any_batch():
    together = Draw(1, [10, 11, 12]).child("view").normal(0, 1, (3,))
    alone = Draw(1, torch.tensor([11])).child("view").normal(0, 1, (3,))
    assert torch.equal(together[1], alone[0])


@pytest.mark.parametrize("other", [Draw(2, [0]), Draw(1, [1]), Draw(1, [0]).child("a"), Draw(1, [0]).child("b")])
def test_another_seed_sample_or_name_gives_other_numbers(other):
    assert not torch.equal(Draw(1, [0]).uniform(0, 1, (4,)), other.uniform(0, 1, (4,)))


def test_two_calls_differ_and_a_child_does_not_depend_on_calls_before_it():
    draw = Draw(1, [0])
    assert not torch.equal(draw.uniform(0, 1), draw.uniform(0, 1))
    assert torch.equal(draw.child("x").uniform(0, 1), Draw(1, [0]).child("x").uniform(0, 1))


def test_numbers_do_not_depend_on_how_many_are_asked_for_at_once():
    at_once, one_by_one = Draw(1, [4, 5]), Draw(1, [4, 5])
    numbers = at_once.uniform(0, 1, (100,))
    assert torch.equal(numbers, torch.stack([one_by_one.uniform(0, 1) for _ in range(100)], dim=1))
    assert len(numbers.unique()) == 200


def test_ranges_types_and_shapes_are_as_asked():
    draw = Draw(0, range(2000))
    numbers = draw.uniform(-2, 3, (2,))
    assert numbers.shape == (2000, 2) and numbers.dtype == torch.float32
    assert numbers.min() >= -2 and numbers.max() < 3 and abs(numbers.mean() - 0.5) < 0.1
    whole = draw.integers(0, 4)
    assert whole.dtype == torch.int64 and set(whole.tolist()) == {0, 1, 2, 3}
    assert abs(draw.happens(0.25).float().mean() - 0.25) < 0.04
    assert torch.equal(draw.permutation(5).sort(dim=1).values, torch.arange(5).expand(2000, 5))


def test_noise_is_each_samples_own():
    image = torch.zeros(2, 1, 4, 4)
    both = Draw(7, [3, 4]).noise_like(image)
    assert torch.equal(Draw(7, [4]).noise_like(image[:1])[0], both[1])
    with pytest.raises(ValueError, match="2 samples, the draw has 1"):
        Draw(7, [4]).noise_like(image)


def test_normal_numbers_are_normal():
    numbers = Draw(0, range(200)).normal(2.0, 3.0, (200,)).double()
    standard = (numbers.flatten() - 2) / 3
    assert abs(standard.mean()) < 0.02 and abs(standard.var() - 1) < 0.03
    assert abs((standard**4).mean() - 3) < 0.2 and abs((standard < -1.959964).double().mean() - 0.025) < 0.003


def test_numbers_of_neighbouring_samples_names_and_calls_are_uncorrelated():
    numbers = Draw(0, range(4000)).uniform(-1, 1, (8,))
    other = Draw(0, range(4000)).child("a").uniform(-1, 1, (8,))
    columns = torch.cat([numbers[:-1], numbers[1:], other[:-1]], dim=1)
    off_diagonal = torch.corrcoef(columns.T) - torch.eye(24)
    assert off_diagonal.abs().max() < 0.08
    bits = torch.histc(numbers, 64, -1, 1) / numbers.numel() * 64
    assert (bits - 1).abs().max() < 0.2


def test_permutations_are_evenly_spread():
    order = Draw(0, range(6000)).permutation(3)
    _, counts = order.unique(dim=0, return_counts=True)
    assert len(counts) == 6 and (counts - 1000).abs().max() < 120


def test_streams_never_change_between_releases():
    # A checkpoint that is resumed with a newer medssl must meet the batches that it would have met.
    assert generator(0, 0, "crop").integers(0, 2**31, 3).tolist() == [231140289, 1762308732, 1579719271]
    assert Draw(0, [0, 1]).child("x").integers(0, 1000, (3,)).tolist() == GOLDEN


GOLDEN = [[244, 795, 444], [508, 26, 5]]
