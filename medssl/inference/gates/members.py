"""Disagreement of a model with itself: mirrored predictions and folds, compared tile by tile as they are made.

The window predicts every tile by each fold and mirroring anyway and only keeps their mean. Here each is turned into
labels first and compared, so that no pass of the network is added: the cost is one argmax per member and one product of
matrices per tile and label in it, and the memory two bytes per member and voxel of a tile. Overlap in the sense of Dice
(1945), averaged over pairs and labels, as Roy et al. (2019) and Jungo et al. (2020) use it for Monte Carlo samples.
What Dice a mask has is not claimed: members that share an error agree on it.

Deviation: the counts are sums over tiles, each voxel weighted by the window's Gaussian, and not those of whole masks.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Voxels that are compared at a time.
CHUNK = 1 << 19


class Members:
    """Counts, over all tiles, how much each pair of members labels alike.

    Args:
        regions: Whether outputs are regions that may overlap (a sigmoid each) instead of classes (a softmax).
    """

    def __init__(self, regions: bool) -> None:
        self.regions = regions
        self.count = self.heads = 0
        self._tile: list[Tensor] = []
        self._shared: Tensor | None = None

    def add(self, logits: Tensor) -> None:
        """Take one member's logits of the present tile. Shape: (heads, z, y, x)."""
        self.heads = logits.shape[0]
        self._tile.append((logits > 0).flatten(1) if self.regions else logits.argmax(dim=0).flatten().to(torch.int16))

    def finish_tile(self, weights: Tensor) -> None:
        """Compare the members of the present tile.

        Args:
            weights: Of each voxel, 0 for padding. Shape: (z, y, x).
        """
        answers, self._tile = torch.stack(self._tile), []
        self.count = len(answers)
        if self.count < 2:
            return
        labels = self.heads if self.regions else self.heads - 1
        flat = weights.flatten().to(answers.device, torch.float32)
        if self._shared is None:
            shape = (labels, self.count, self.count)
            self._shared = torch.zeros(shape, dtype=torch.float64, device=answers.device)
        # One label after the other: of a hundred labels and eight mirrorings at once a tile would take gigabytes.
        present = range(labels) if self.regions else [int(label) - 1 for label in answers.unique() if label > 0]
        step = max(1, CHUNK // self.count)
        for label in present:
            for start in range(0, flat.shape[0], step):
                part = answers[..., start : start + step]
                mask = (part[:, label] if self.regions else part == label + 1).float()
                self._shared[label] += ((mask * flat[start : start + step]) @ mask.T).double()

    def overlap(self) -> float | None:
        """Return the mean Dice over pairs and labels; None of one member, or where no member labels anything."""
        if self._shared is None:
            return None
        shared = self._shared.cpu()
        own = torch.diagonal(shared, dim1=1, dim2=2)
        total = own[:, :, None] + own[:, None, :]
        first, second = torch.triu_indices(self.count, self.count, offset=1)
        union = total[:, first, second]
        known = union > 0
        if not bool(known.any()):
            return None
        return float((2 * shared[:, first, second][known] / union[known]).mean())
