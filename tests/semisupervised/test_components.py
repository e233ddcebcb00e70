"""The largest connected part of each class, against scipy's components."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from medssl.semisupervised import components as module
from medssl.semisupervised.components import components, largest_components, rounds_for


def speckle(part: float, size: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.rand((2, *size), generator=torch.Generator().manual_seed(seed)) < part


def winding(edge: int) -> Tensor:
    """One line that fills a square by going back and forth."""
    mask = torch.zeros(1, edge, edge, dtype=torch.bool)
    mask[:, ::2] = True
    for row in range(1, edge, 2):
        mask[:, row, 0 if row // 2 % 2 else edge - 1] = True
    return mask


def parts_of(mask: Tensor) -> tuple[np.ndarray, int]:
    return ndimage.label(mask.numpy(), structure=np.ones((3,) * mask.ndim))


MASKS = {
    "sparse": speckle(0.08, (12, 12, 12)),
    "tangled": speckle(0.4, (40, 40)),
    "dense": speckle(0.6, (9, 10, 11)),
    "line": winding(41),
    "line from below": winding(41).flip(1),
    "line on its side": winding(41).transpose(1, 2),
    "none": torch.zeros(1, 5, 5, dtype=torch.bool),
    "all": torch.ones(1, 5, 5, dtype=torch.bool),
}


@pytest.mark.parametrize("name", MASKS)
def test_two_voxels_have_one_number_exactly_if_they_are_connected(name: str) -> None:
    mask = MASKS[name]
    for own, numbers in zip(mask, components(mask), strict=True):
        expected, count = parts_of(own)
        pairs = set(zip(numbers[own].tolist(), expected[own.numpy()].tolist(), strict=True))
        assert len(pairs) == count == len({number for number, _ in pairs})


@pytest.mark.parametrize("name", MASKS)
def test_the_rounds_of_a_device_that_is_not_looked_at_are_more_than_enough(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds, near = [], module._largest_near

    def counted(values: Tensor) -> Tensor:
        rounds.append(len(values))
        return near(values)

    monkeypatch.setattr(module, "_largest_near", counted)
    components(MASKS[name])
    assert len(rounds) < rounds_for(MASKS[name][0].numel()) - 4


def test_of_each_class_and_sample_the_largest_part_is_kept() -> None:
    generator = torch.Generator().manual_seed(1)
    classes = torch.randint(4, (3, 14, 15), generator=generator)
    kept = largest_components(classes, 4)
    for row in range(3):
        for number in range(1, 4):
            parts, _ = parts_of(classes[row] == number)
            own = kept[row] == number
            sizes = np.bincount(parts.ravel())[1:]
            assert int(own.sum()) == sizes.max()
            assert len(set(parts[own.numpy()].tolist())) == 1
    assert bool(((kept == classes) | (kept == 0)).all())


def test_a_corner_joins_and_a_gap_does_not() -> None:
    classes = torch.zeros(1, 1, 8, dtype=torch.int64).repeat(1, 3, 1)
    classes[0, 0, 0] = classes[0, 1, 1] = 1
    classes[0, 2, 4] = classes[0, 2, 6] = 1
    kept = largest_components(classes, 2)
    assert kept.nonzero().tolist() == [[0, 0, 0], [0, 1, 1]]


def test_of_two_parts_of_one_size_one_is_kept() -> None:
    classes = torch.tensor([[[1, 1, 0, 1, 1, 0, 1]]])
    assert largest_components(classes, 2).sum().item() == 2


@pytest.mark.parametrize("classes", [torch.zeros(3, 4, dtype=torch.int64), torch.zeros(2, 3, 4)])
def test_other_shapes_and_types_are_named(classes: Tensor) -> None:
    with pytest.raises(ValueError, match="Components need classes"):
        largest_components(classes, 2)
