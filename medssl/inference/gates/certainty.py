"""How sure the averaged prediction is of the organ it found: mean entropy and largest probability of its voxels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Certainty:
    """Sums over the rows of logits as they pass.

    Args:
        regions: Whether outputs are regions that may overlap (a sigmoid each) instead of classes (a softmax).
        temperature: Divides the logits (Guo et al., ICML 2017).
    """

    def __init__(self, regions: bool, temperature: float = 1.0) -> None:
        self.regions = regions
        self.temperature = temperature
        self._entropy = self._confidence = 0.0
        self._voxels = 0

    def pass_on(self, rows: Iterable[Array]) -> Iterator[Array]:
        """Yield the rows as they are. Shape each: (heads, n, Y, X)."""
        for block in rows:
            for row in range(block.shape[1]):
                self.see(block[:, row].reshape(block.shape[0], -1))
            yield block

    def see(self, logits: Array) -> None:
        """Count the voxels that are labelled. Shape: (heads, N)."""
        found = (logits > 0).any(axis=0) if self.regions else logits.argmax(axis=0) > 0
        if not found.any():
            return
        entropy, confidence = uncertainty(np.asarray(logits[:, found], np.float64) / self.temperature, self.regions)
        self._entropy += float(entropy.sum())
        self._confidence += float(confidence.sum())
        self._voxels += int(found.sum())

    def entropy(self) -> float | None:
        """Return the mean entropy of the labelled voxels, 0 to 1; None if there is none."""
        return self._entropy / self._voxels if self._voxels else None

    def confidence(self) -> float | None:
        """Return the mean largest probability of the labelled voxels; None if there is none."""
        return self._confidence / self._voxels if self._voxels else None


def uncertainty(logits: Array, regions: bool) -> tuple[Array, Array]:
    """Return entropy, as a part of the largest possible one, and largest probability of each voxel.

    Args:
        logits: Shape: (heads, N), float64.
        regions: A sigmoid for each output, of which means are taken, or one softmax.

    Returns:
        Shape: (N,) each.
    """
    if regions:
        p = np.exp(-np.logaddexp(0, -logits))
        q = np.exp(-np.logaddexp(0, logits))
        entropy = p * np.logaddexp(0, -logits) + q * np.logaddexp(0, logits)
        return entropy.mean(axis=0) / np.log(2), np.maximum(p, q).mean(axis=0)
    shifted = logits - logits.max(axis=0)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=0))
    p = np.exp(log_p)
    return -(p * log_p).sum(axis=0) / np.log(len(logits)), p.max(axis=0)
