"""Our augmentation in nnU-Net: batched on the training device, or one sample at a time in nnU-Net's own pipelines.

`medssl finetune segmentation --augmentation medssl` uses `DeviceAugmentation`: nnU-Net's loader only reads, and its
workers do nothing else. In a plain nnU-Net trainer `MedsslTransform` takes the place of nnU-Net's transforms:

```python
class MyTrainer(nnUNetTrainer):
    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        rotation, dummy_2d, _, mirror_axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = (0, 1)  # left stays left
        return rotation, dummy_2d, policy_for("fine-tuning", ["MR"], (64, 64, 64)).read_size, mirror_axes

    @staticmethod
    def get_training_transforms(patch_size, rotation, deep_supervision_scales, *args, **kwargs):
        policy = policy_for("fine-tuning", ["MR"], patch_size)
        return ComposeTransforms([
            MedsslTransform(policy, "MR", spacing_mm=(1, 1, 1)),
            RemoveLabelTansform(-1, 0),
            DownsampleSegForDSTransform(deep_supervision_scales),
        ])
```
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from torch import Tensor

from medssl.augmentation.mirror import swap_classes
from medssl.augmentation.policy import AugmentationSettings, Policy, known_modality, policy_for
from medssl.data.batch import Batch
from medssl.data.draw import Draw
from medssl.errors import UsageError
from medssl.transfer.laterality import paired_labels

# nnU-Net's mark in a label for what lies outside of the image, or outside of its content.
OUTSIDE = -1
_QUANTITATIVE = ("CT", "PT", "NM")
_COLOURS = frozenset({"R", "G", "B", "RED", "GREEN", "BLUE"})


def modality_of(channel_names: Mapping[str, Any]) -> str:
    """Return the modality whose policy fits a data set.

    A policy is for whole samples: with a quantitative channel (CT, PET, SPECT) among others, that one decides, since it
    bears least. Names that are no modality count as MR, as in preprocessing, and red, green and blue as a picture.

    Args:
        channel_names: `channel_names` of `dataset.json`.
    """
    texts = [str(channel_names[key]).strip() for key in sorted(channel_names, key=int)]
    if texts and all(text.upper() in _COLOURS for text in texts):
        return "IMAGE"
    found = []
    for text in texts:
        try:
            found.append(known_modality(text))
        except UsageError:
            found.append("MR")
    return next((modality for modality in found if modality in _QUANTITATIVE), found[0] if found else "MR")


def device_augmentation(
    plans: Any,
    configuration: Any,
    labels: Any,
    dataset: Mapping[str, Any],
    scales: Sequence[Sequence[float]] | None,
    *,
    laterality: str,
    seed: int,
    stream: str = "0",
    purpose: str = "fine-tuning",
) -> DeviceAugmentation:
    """Return a policy for a data set of nnU-Net.

    Args:
        plans: nnU-Net's `PlansManager`.
        configuration: Its `ConfigurationManager`.
        labels: Its `LabelManager`.
        dataset: Content of `dataset.json`.
        scales: Part of each axis, for each output of the network; None without deep supervision.
        laterality: forbid, swap-labels or allow.
        seed: The run's seed.
        stream: Separates ranks from each other.
        purpose: Of the policy, a name of `medssl.augmentation.policy.PURPOSES`.

    Raises:
        UsageError: If the plans turn the axes, so that left and right are not along the last.
    """
    if list(plans.transpose_forward) != list(range(len(plans.transpose_forward))):
        raise UsageError(
            f"augmentation medssl: the plans turn the axes ({list(plans.transpose_forward)}), and the policy counts on "
            "(z, y, x). Use augmentation nnunet, or plans of medssl export."
        )
    names = dataset.get("channel_names", {})
    modality = modality_of(names)
    pairs = paired_labels(dict(dataset["labels"])) if laterality == "swap-labels" else []
    settings = AugmentationSettings.model_validate({"laterality": laterality, "swap_labels": _shifted(pairs)})
    rescale = None
    if list(configuration.normalization_schemes) == ["CTNormalization"]:
        intensities = plans.foreground_intensity_properties_per_channel["0"]
        rescale = float(intensities["mean"]), float(intensities["std"])
    targets = Targets(
        scales,
        masked_channels=[number for number, masked in enumerate(configuration.use_mask_for_norm) if masked],
        regions=labels.foreground_regions if labels.has_regions else None,
        ignore_label=labels.ignore_label,
    )
    return DeviceAugmentation(
        policy_for(purpose, [modality], [int(edge) for edge in configuration.patch_size], settings),
        modality,
        targets,
        spacing_mm=configuration.spacing,
        seed=seed,
        stream=stream,
        rescale=rescale,
    )


def as_classes(segmentation: Tensor) -> Tensor:
    """Shift nnU-Net's labels by one, so that what lies outside (-1) is the class 0 that a policy fills with. int64."""
    return segmentation.long() - OUTSIDE


class Targets:
    """Makes nnU-Net's training targets of augmented labels, batched, on any device.

    As nnU-Net's transforms do after augmentation: channels that were normalised within a mask become zero outside of
    it, -1 becomes background, labels become regions where the data set has them (with the ignored voxels as the last),
    and each deep-supervision scale takes the nearest voxels (`nearest-exact`).

    Args:
        scales: Part of each axis, for each output of the network; None without deep supervision.
        masked_channels: Channels that were normalised within a mask.
        regions: Label values of each region, or None.
        ignore_label: Value of voxels that no loss looks at, or None.
    """

    def __init__(
        self,
        scales: Sequence[Sequence[float]] | None,
        *,
        masked_channels: Sequence[int] = (),
        regions: Sequence[int | Sequence[int]] | None = None,
        ignore_label: int | None = None,
    ) -> None:
        self.scales = None if scales is None else [tuple(float(part) for part in scale) for scale in scales]
        self.masked_channels = tuple(masked_channels)
        self.regions: list[tuple[int, ...]] | None = None
        if regions is not None:
            every = [*regions] if ignore_label is None else [*regions, ignore_label]
            self.regions = [(one,) if isinstance(one, int) else tuple(int(value) for value in one) for one in every]

    def __call__(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor | list[Tensor]]:
        """Return image and target.

        Args:
            image: Shape: (B, C, *spatial). Masked channels are changed in place.
            label: Labels with -1 outside. Shape: (B, *spatial), integer.

        Returns:
            The target is int16 (B, 1, *spatial), or bool (B, R, *spatial) for regions; a list of them, one for each
            scale, with deep supervision.
        """
        for channel in self.masked_channels:
            image[:, channel].masked_fill_(label < 0, 0)
        label = label.masked_fill(label == OUTSIDE, 0)[:, None]
        target = label.to(torch.int16)
        if self.regions is not None:
            target = torch.cat([_any_of(label, values) for values in self.regions], dim=1)
        if self.scales is None:
            return image, target
        return image, [self._scaled(target, scale) for scale in self.scales]

    @staticmethod
    def _scaled(target: Tensor, scale: Sequence[float]) -> Tensor:
        if all(part == 1 for part in scale):
            return target
        shape = [round(edge * part) for edge, part in zip(target.shape[2:], scale, strict=True)]
        return F.interpolate(target.float(), shape, mode="nearest-exact").to(target.dtype)


class DeviceAugmentation:
    """Augments the batches of nnU-Net's loader where the network is, as a function of (seed, step).

    Args:
        policy: A policy for labels as `as_classes` makes them.
        modality: The data set's.
        targets: Makes the targets.
        spacing_mm: Voxel size (z, y, x), or (y, x).
        seed: The run's seed.
        stream: Separates ranks from each other.
        rescale: Intercept and slope from normalised intensities to HU, where they are known.
    """

    def __init__(
        self,
        policy: Policy,
        modality: str,
        targets: Targets,
        *,
        spacing_mm: Sequence[float],
        seed: int,
        stream: str = "0",
        rescale: tuple[float, float] | None = None,
    ) -> None:
        self.policy, self.modality, self.targets = policy, modality, targets
        self.spacing_mm, self.rescale = spacing_mm, rescale
        self.seed, self.stream = seed, stream

    @property
    def read_size(self) -> list[int]:
        """Size of the crops that the loader has to read."""
        return list(self.policy.read_size)

    @property
    def mirrored_axes(self) -> tuple[int, ...]:
        """Spatial axes that the policy mirrors."""
        mirror = self.policy.by_modality[self.modality].spatial.mirror
        names = "zyx"[-len(self.policy.patch_size) :]
        return tuple(names.index(axis) for axis in names if axis in mirror.axes and mirror.probability > 0)

    def __call__(self, batch: Mapping[str, Any], step: int, device: torch.device) -> dict[str, Any]:
        """Return the augmented batch on the device.

        Args:
            batch: `data` (B, C, *read_size) float32 and `target` (B, 1, *read_size) int16, as the loader reads them.
            step: Number of the batch.
            device: Where the network is.
        """
        image = batch["data"].to(device, non_blocking=True)
        label = as_classes(batch["target"].to(device, non_blocking=True)[:, 0])
        count = len(image)
        index = range(step * count, (step + 1) * count)
        read = batch_of(image, label, index, self.modality, self.spacing_mm, self.rescale)
        view = self.policy.view(read, Draw(self.seed, index).child("fine-tuning").child(self.stream))
        assert view.label is not None
        data, target = self.targets(view.image, view.label + OUTSIDE)
        return {"data": data, "target": target}


class MedsslTransform(BasicTransform):
    """A policy as a transform of batchgeneratorsv2: (C, ...) image and (S, ...) segmentation of one sample.

    It crops, so it comes first and takes the place of nnU-Net's spatial, intensity and mirror transforms; let the
    loader read `policy.read_size`. It draws from numpy's global generator, which nnU-Net seeds differently in each
    worker. In the segmentation, -1 stays the mark of what lies outside; further channels (a cascade's) move along.

    Args:
        policy: A policy whose `swap_labels`, if any, name nnU-Net's label values.
        modality: The images'.
        spacing_mm: Voxel size (z, y, x), or (y, x): 3D turns keep to the slices where it is anisotropic.
    """

    def __init__(self, policy: Policy, modality: str, *, spacing_mm: Sequence[float]) -> None:
        super().__init__()
        given = policy.settings
        # One class more: see `as_classes`.
        shifted = {"swap_labels": _shifted(given.swap_labels), "classes": given.classes + 1 if given.classes else 0}
        settings = given.model_copy(update=shifted)
        self.policy = Policy(policy.purpose, policy.by_modality, policy.patch_size, settings)
        self.modality, self.spacing_mm = known_modality(modality), spacing_mm

    def __call__(self, **data_dict: Any) -> dict[str, Any]:
        """Return the dictionary with the changed image and segmentation; those that came in are not modified.

        Raises:
            UsageError: If there is something else that would have to move along, or if further channels of the
                segmentation would have to follow a library's transform.
        """
        for name in ("regression_target", "keypoints", "bbox"):
            if data_dict.get(name) is not None:
                raise UsageError(f"MedsslTransform moves image and segmentation; it cannot move {name} along.")
        image, segmentation = data_dict["image"], data_dict.get("segmentation")
        moving = [transform.name for transform in self.policy.library.transforms if transform.moves]
        if segmentation is not None and len(segmentation) > 1 and moving:
            raise UsageError(
                f"MedsslTransform cannot move the {len(segmentation)} channels of the segmentation along with "
                f"{', '.join(moving)}, only the first. Remove it from the policy's library list."
            )
        seed = int(np.random.randint(2**62))
        label = None if segmentation is None else as_classes(segmentation[:1])
        read = batch_of(image[None], label, [0], self.modality, self.spacing_mm)
        view = self.policy.view(read, Draw(seed, [0]))
        result = {**data_dict, "image": view.image[0]}
        if segmentation is not None and view.label is not None:
            channels = [view.label, *(self._moved(read, other, view.parameters) for other in segmentation[1:])]
            result["segmentation"] = (torch.cat(channels) + OUTSIDE).to(segmentation.dtype)
        return result

    def _moved(self, read: Batch, channel: Tensor, drawn: Mapping[str, dict[str, Tensor]]) -> Tensor:
        another = dataclasses.replace(read, image=read.image[:, :1], label=as_classes(channel[None]))
        label = self.policy.spatial.apply(another, drawn["spatial"]).label
        assert label is not None
        if self.policy.settings.laterality != "swap-labels":
            return label
        return swap_classes(label, drawn["spatial"]["mirror"][:, 2], self.policy.settings.swap_labels)


def batch_of(
    image: Tensor,
    label: Tensor | None,
    sample_index: Sequence[int],
    modality: str,
    spacing_mm: Sequence[float],
    rescale: tuple[float, float] | None = None,
) -> Batch:
    """Return crops of nnU-Net's loader as a batch; padding is part of the crop there, with 0 as its value.

    Args:
        image: Shape: (B, C, *spatial).
        label: Classes with 0 outside. Shape: (B, *spatial), int64.
        sample_index: One number for each sample.
        modality: The data set's.
        spacing_mm: Two or three numbers.
        rescale: Intercept and slope to HU, where known.
    """
    count = len(image)
    three = (1,) * (5 - image.ndim) + tuple(image.shape[2:])
    spacing = [1.0] * (3 - len(spacing_mm)) + [float(edge) for edge in spacing_mm]
    return Batch(
        image=image,
        sample_index=torch.tensor(list(sample_index)),
        sample_id=torch.zeros(count, dtype=torch.int64),
        origin_mm=torch.zeros(count, 3),
        spacing_mm=torch.tensor(spacing).repeat(count, 1),
        valid=torch.tensor([[0, edge] for edge in three]).repeat(count, 1, 1),
        background=torch.zeros(count),
        modality=(modality,) * count,
        patient_key=("",) * count,
        label=label,
        rescale=None if rescale is None else torch.tensor(rescale).repeat(count, 1),
    )


def _any_of(label: Tensor, values: Sequence[int]) -> Tensor:
    found = label == values[0]
    for value in values[1:]:
        found = found | (label == value)
    return found


def _shifted(pairs: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    return tuple((left - OUTSIDE, right - OUTSIDE) for left, right in pairs)
