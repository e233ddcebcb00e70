"""What transforms share: parameters are drawn per sample on the CPU, then applied to the batch by a pure function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from medssl.config import Settings
from medssl.data.batch import Batch
from medssl.data.draw import Draw

# What was drawn, one row per sample, on the CPU: it can be logged, shared between views and replayed.
Parameters = dict[str, Tensor]
SettingsT = TypeVar("SettingsT", bound="TransformSettings")
# Columns of settings that a transform keeps: a batch of another make-up of modalities needs others.
MOST_COLUMNS = 256
# Voxels that a transform changes at once on the CPU. From here on torch divides reductions among threads, one channel
# otherwise than several: a sample's result must not depend on its batch mates. It stays in the cache, too.
VOXELS_AT_ONCE = 1 << 15


class TransformSettings(Settings):
    """What every transform can be told.

    Args:
        probability: How often a sample is changed.
    """

    probability: float = Field(default=0.0, ge=0, le=1)


@dataclass(frozen=True)
class Facts:
    """What parameters may depend on.

    Args:
        modality: One known modality per sample.
        spacing_mm: Voxel size (z, y, x) of each sample. Shape: (B, 3), float64, on the CPU.
        size: Spatial size of the image that the transform will meet, (Z, Y, X) or (Y, X).
        channels: Its channels.
        rescale: Intercept and slope to HU or SUVbw; see `Batch`. Shape: (B, 2), or None where not known.
        background: Value of what lies outside the body, the fan or the volume. Shape: (B,), or None where not known.
    """

    modality: tuple[str, ...]
    spacing_mm: Tensor
    size: tuple[int, ...]
    channels: int
    rescale: Tensor | None = None
    background: Tensor | None = None

    def __len__(self) -> int:
        return len(self.modality)

    @staticmethod
    def of(batch: Batch, modality: tuple[str, ...], size: tuple[int, ...]) -> Facts:
        """Return the facts of a batch whose views have a size."""
        spacing = batch.spacing_mm.double()
        return Facts(modality, spacing, size, batch.image.shape[1], batch.rescale, batch.background)


class Transform(Generic[SettingsT]):
    """Base of the intensity transforms.

    A subclass draws with `values` and changes channels with `change`; the base chooses which channels are changed and
    touches no other, so that whoever drew nothing, or a strength without effect, keeps every bit, and a sample's result
    does not depend on its batch mates.

    Args:
        by_modality: Settings for each modality that the policy meets; a modality that is missing is never changed.

    Attributes:
        name: What policies call it.
        settings_class: Its settings.
        neutral: The parameter that carries the strength, and its value without effect.
        family: What it is listed under.
        modalities: The modalities whose physics it imitates; None fits all.
        never: Modalities in which its result cannot exist.
        mixes_samples: Whether a sample's result depends on the batch it travels in.
    """

    name: ClassVar[str]
    settings_class: ClassVar[type[TransformSettings]]
    neutral: ClassVar[tuple[str, float]]
    family: ClassVar[str] = "intensity"
    modalities: ClassVar[frozenset[str] | None] = None
    never: ClassVar[frozenset[str]] = frozenset()
    mixes_samples: ClassVar[bool] = False

    def __init__(self, by_modality: Mapping[str, SettingsT]) -> None:
        self.by_modality = dict(by_modality)
        self._columns: dict[tuple[str, tuple[str, ...]], Tensor] = {}

    def draw(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw one row of parameters per sample; `active` (B, C) tells which channels are changed."""
        probability, per_channel = self._numbers(facts, "probability"), self._numbers(facts, "per_channel", missing=1.0)
        active = rng.uniform(0, 1)[:, None] < probability[:, None]
        chosen = rng.uniform(0, 1, (facts.channels,)) < per_channel[:, None]
        values = self.values(facts, rng)
        strength, without_effect = self.neutral
        effective = (values[strength] != without_effect).reshape(len(facts), facts.channels, -1).any(dim=2)
        return {"active": active & chosen & effective, **values}

    def apply(self, image: Tensor, parameters: Parameters) -> Tensor:
        """Return the changed batch; the input is not modified. Shape: (B, C, ...)."""
        return self.apply_(image.clone(memory_format=torch.contiguous_format), parameters)

    def apply_(self, image: Tensor, parameters: Parameters) -> Tensor:
        """Change a contiguous batch that the caller owns, in place, and return it."""
        chosen = parameters["active"].flatten().nonzero()[:, 0]
        if len(chosen) == 0:
            return image
        values = {name: value.flatten(0, 1)[chosen] for name, value in parameters.items() if name != "active"}
        channels = image.view(-1, *image.shape[2:])
        if image.device.type == "cpu":
            self._change_in_runs(channels, chosen.tolist(), values)
        elif len(chosen) == len(channels):
            after = self.change(channels, values)
            if after is not channels:
                channels.copy_(after)
        else:
            index = to_device(chosen, image.device)
            channels.index_copy_(0, index, self.change(channels.index_select(0, index), values))
        return image

    def _change_in_runs(self, channels: Tensor, chosen: list[int], values: Parameters) -> None:
        """Change neighbouring channels together, so few at once that what a transform makes stays in the cache."""
        most = max(1, VOXELS_AT_ONCE // channels[0].numel())
        first = 0
        while first < len(chosen):
            stop = first + 1
            while stop < len(chosen) and stop - first < most and chosen[stop] == chosen[stop - 1] + 1:
                stop += 1
            part = channels[chosen[first] : chosen[stop - 1] + 1]
            after = self.change(part, {name: value[first:stop] for name, value in values.items()})
            if after is not part:
                part.copy_(after)
            first = stop

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw what this transform needs besides who is changed. Each has the shape (B, C, ...)."""
        raise NotImplementedError

    def change(self, channels: Tensor, values: Parameters) -> Tensor:
        """Return the changed channels; the given ones may be overwritten.

        Args:
            channels: Shape: (N, *spatial).
            values: What `values` drew for these channels, on the CPU. Shapes: (N, ...).
        """
        raise NotImplementedError

    @classmethod
    def fits(cls, modality: str) -> bool:
        """Tell whether a policy may apply the transform to a modality."""
        return modality not in cls.never and (cls.modalities is None or modality in cls.modalities)

    def per_sample(self, facts: Facts, of: Callable[[Any], float], missing: float = 0.0) -> Tensor:
        """Return one number of the settings for each sample. Shape: (B,), float32."""
        known = {modality: float(of(settings)) for modality, settings in self.by_modality.items()}
        return torch.tensor([known.get(modality, missing) for modality in facts.modality], dtype=torch.float32)

    def uniform(self, facts: Facts, rng: Draw, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Draw from the range that the settings call `name`. Shape: (B, *shape)."""
        low, high = self._range(facts, name, shape)
        return low + (high - low) * rng.uniform(0, 1, shape)

    def around_one(self, facts: Facts, rng: Draw, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Draw factors below one as often as above, uniformly on either side, as nnU-Net does. Shape: (B, *shape)."""
        low, high = self._range(facts, name, shape)
        above_one = low.clamp(min=1)
        below = (rng.uniform(0, 1, shape) < 0.5) & (low < 1)
        start = torch.where(below, low, above_one)
        stop = torch.where(below, high.clamp(max=1), high)
        return torch.lerp(start, stop, rng.uniform(0, 1, shape))

    def _range(self, facts: Facts, name: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        ends = self._numbers(facts, name, missing=(1.0, 1.0)).reshape(2, -1, *([1] * len(shape)))
        return ends[0], ends[1]

    def _numbers(self, facts: Facts, name: str, missing: float | tuple[float, float] = 0.0) -> Tensor:
        """Return a setting of each sample; kept, as batches of one make-up follow each other. Shape: (B,) or (2, B)."""
        key = (name, facts.modality)
        if key not in self._columns:
            if len(self._columns) > MOST_COLUMNS:
                self._columns.clear()
            found = {modality: getattr(settings, name, missing) for modality, settings in self.by_modality.items()}
            rows = [found.get(modality, missing) for modality in facts.modality]
            table = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), -1)
            self._columns[key] = table.T.contiguous().squeeze(0)
        return self._columns[key]


def to_device(values: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Move drawn parameters to the image's device without making the host wait."""
    values = values if dtype is None else values.to(dtype)
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def broadcast(values: Tensor, image: Tensor) -> Tensor:
    """Bring parameters of the leading axes to the image's device and number of axes; floats to its dtype."""
    dtype = image.dtype if values.is_floating_point() else None
    moved = to_device(values, image.device, dtype)
    return moved.reshape(*moved.shape, *([1] * (image.ndim - moved.ndim)))


def ranges_are_ordered(value: Sequence[float]) -> Sequence[float]:
    """Check a (low, high) pair of a policy."""
    if value[0] > value[1]:
        raise ValueError(f"the range {tuple(value)} has its larger number first")
    return value
