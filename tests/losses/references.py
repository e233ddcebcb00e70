"""What the tests of batch-wise losses share: random rows, plain arithmetic, and tensors without values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from medssl.losses.clustering import dino

Rows = list[list[float]]


def random_rows(seed: int, count: int = 6, width: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows that are not normalised. Shape: (count, width)."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dot(left: Iterable[float], right: Iterable[float]) -> float:
    return sum(x * y for x, y in zip(left, right, strict=True))


def unit(rows: Tensor) -> Rows:
    """Rows of length 1 in plain Python."""
    return [[value / math.sqrt(dot(row, row)) for value in row] for row in rows.tolist()]


def softmax(row: Iterable[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def never_waits(loss: Callable[..., Any], *tensors: Tensor, **keywords: Any) -> None:
    """Run a loss and its gradient on tensors that have no values: whatever asks for one raises."""
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fakes = [mode.from_tensor(tensor).requires_grad_() for tensor in tensors]
        fakes_by_name = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value for name, value in keywords.items()
        }
        result = loss(*fakes, **fakes_by_name)
        torch.stack(list(result.values()) if isinstance(result, dict) else [result]).sum().backward()


def dino_of_two(first: Tensor, second: Tensor, teacher_a: Tensor, teacher_b: Tensor, centre: Tensor) -> Tensor:
    """`dino` with its lists spelled out, for fixtures that pass tensors."""
    return dino([first, second], [teacher_a, teacher_b], centre)
