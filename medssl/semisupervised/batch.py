"""Two streams of samples that travel together: labelled ones, and unlabelled ones that never carry labels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from medssl.augmentation.transform import to_device
from medssl.data.batch import Batch, View
from medssl.training.loop import Loader


@dataclass
class PairedBatch:
    """What one step sees.

    Args:
        labelled: Samples with their labels.
        unlabelled: Samples without, or None for a method that looks at none.

    Raises:
        ValueError: If the unlabelled part carries a label.
    """

    labelled: Batch
    unlabelled: Batch | None

    def __post_init__(self) -> None:
        if self.unlabelled is None:
            return
        if self.unlabelled.label is not None or getattr(self.unlabelled, "target", None) is not None:
            raise ValueError("The unlabelled part of a batch carries labels: they must not be read at all.")

    @property
    def sample_index(self) -> Tensor:
        """Positions of the labelled samples in their stream; see `Batch`."""
        return self.labelled.sample_index

    @property
    def spacing_mm(self) -> Tensor:
        """Voxel size of the labelled samples. Shape: (B, 3)."""
        return self.labelled.spacing_mm

    @property
    def modality(self) -> tuple[str, ...]:
        """Modality of each labelled sample."""
        return self.labelled.modality


@dataclass
class SemiView(View):
    """A view with what a semi-supervised method needs beside the image.

    Args:
        shows: Class of each image, for classification, or None. Shape: (B,), int64.
        drawn: Numbers that the method drew for the losses, by name, on the image's device; the first axis is the
            sample's.
    """

    shows: Tensor | None = None
    drawn: dict[str, Tensor] = field(default_factory=dict)

    def with_drawn(self, **values: Tensor) -> SemiView:
        """Return the view with more numbers, brought to the image's device."""
        moved = {name: to_device(value, self.image.device) for name, value in values.items()}
        return SemiView(**{**vars(self), "drawn": self.drawn | moved})


class PairedLoader:
    """Endless pairs of batches; that of a step is a function of (seed, step) alone, as in each of the streams.

    Args:
        labelled: Batches with labels.
        unlabelled: Batches without, or None.
    """

    def __init__(self, labelled: Loader, unlabelled: Loader | None) -> None:
        self.labelled, self.unlabelled = labelled, unlabelled

    def batches(self, start_step: int = 0) -> Iterator[PairedBatch]:
        """Yield the pairs of the steps `start_step` and on, without end."""
        others = itertools.repeat(None) if self.unlabelled is None else self.unlabelled.batches(start_step)
        for labelled, unlabelled in zip(self.labelled.batches(start_step), others, strict=False):
            yield PairedBatch(labelled, unlabelled)
