"""What `augmentation.py` times: each of our transforms beside its peers, on crops of an image and its label."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.augmentation.catalogue import CATALOGUE
from medssl.augmentation.policy import AugmentationSettings, Policy, policy_for
from medssl.augmentation.transform import Facts
from medssl.data.batch import Batch
from medssl.data.draw import Draw

# Takes a running number and changes a batch of crops once.
Program = Callable[[int], Any]
# HU of the stored 0 and of one unit.
RESCALE = (40.0, 250.0)


def crops(edge: int, batch: int) -> tuple[Tensor, Tensor]:
    """Return smooth volumes with some noise (B, 1, Z, Y, X), and label maps of three classes (B, Z, Y, X)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn((batch, 1, 8, 8, 8), generator=generator)
    smooth = F.interpolate(coarse, (edge,) * 3, mode="trilinear")
    label = (smooth[:, 0] > 0).long() + (smooth[:, 0] > 0.5).long()
    return smooth + 0.1 * torch.randn(smooth.shape, generator=generator), label


def batch_of(image: Tensor, label: Tensor | None, modality: str) -> Batch:
    """Return crops as the loader delivers them."""
    count = len(image)
    return Batch(
        image=image,
        sample_index=torch.arange(count),
        sample_id=torch.arange(count),
        origin_mm=torch.zeros(count, 3),
        spacing_mm=torch.ones(count, 3),
        valid=torch.tensor([[0, edge] for edge in image.shape[2:]]).repeat(count, 1, 1),
        background=image.flatten(1).amin(dim=1),
        modality=(modality,) * count,
        patient_key=("",) * count,
        label=label,
        rescale=torch.tensor([RESCALE]).repeat(count, 1),
    )


def our_view(policy: Policy, image: Tensor, label: Tensor | None, modality: str = "MR") -> Program:
    """Return a program that makes a view of each crop."""
    batch = batch_of(image, label, modality)

    def program(number: int) -> Any:
        return policy.view(batch, Draw(number, batch.sample_index))

    return program


def our_transform(name: str, image: Tensor, modality: str, settings: Mapping[str, Any]) -> Program:
    """Return a program that applies one transform of the catalogue, always."""
    kind = CATALOGUE[name]
    transform = kind({modality: kind.settings_class(**{"probability": 1.0, **settings})})

    batch = batch_of(image, None, modality)
    # A policy's transforms work in place on the view that the resampling made; here on a copy, as the peers do.
    own = torch.empty_like(image)

    def program(number: int) -> Tensor:
        facts = Facts.of(batch, batch.modality, tuple(image.shape[2:]))
        return transform.apply_(own.copy_(image), transform.draw(facts, Draw(number, batch.sample_index)))

    return program


def our_spatial(image: Tensor, label: Tensor | None, spatial: Mapping[str, Any]) -> Program:
    """Return a program that applies the spatial transform alone."""
    nothing: dict[str, Any] = {
        "rotation": {"probability": 0},
        "scale": {"probability": 0},
        "mirror": {"probability": 0},
    }
    settings = AugmentationSettings(laterality="allow", overrides={"spatial": {**nothing, **spatial}})
    return our_view(policy_for("none", {"MR"}, image.shape[2:], settings), image, label)


def each(image: Tensor, label: Tensor | None, one: Callable[[Tensor, Tensor | None], Any]) -> Program:
    """Return a program that gives a peer one crop after the other; a copy, since some work in place."""

    def program(_: int) -> None:
        for row in range(len(image)):
            one(image[row].clone(), None if label is None else label[row].clone())

    return program


def torchio_peer(transform: Any) -> Callable[[Tensor, Tensor | None], Any]:
    """Return what applies a TorchIO transform to a Subject."""
    import torchio

    def one(image: Tensor, label: Tensor | None) -> Any:
        images: dict[str, Any] = {"image": torchio.ScalarImage(tensor=image)}
        if label is not None:
            images["label"] = torchio.LabelMap(tensor=label.to(torch.int16)[None])
        return transform(torchio.Subject(**images))

    return one


def bgv2_peer(transform: Any) -> Callable[[Tensor, Tensor | None], Any]:
    """Return what applies a batchgeneratorsv2 transform."""

    def one(image: Tensor, label: Tensor | None) -> Any:
        content = {"image": image}
        if label is not None:
            content["segmentation"] = label.to(torch.int16)[None]
        return transform(**content)

    return one


def array_peer(transform: Any) -> Callable[[Tensor, Tensor | None], Any]:
    """Return what applies an array transform of MONAI."""
    return lambda image, _: transform(image)


def dictionary_peer(transform: Any) -> Callable[[Tensor, Tensor | None], Any]:
    """Return what applies dictionary transforms of MONAI."""

    def one(image: Tensor, label: Tensor | None) -> Any:
        content = {"image": image}
        if label is not None:
            content["label"] = label[None]
        return transform(content)

    return one


def spatial_programs(edge: int, batch: int, with_label: bool) -> dict[str, Program]:
    """Rotation about all axes and isotropic scaling, linear; the label by the nearest voxel."""
    import monai.transforms as monai
    import torchio
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

    image, label = crops(edge, batch)
    used = label if with_label else None
    spatial = {"rotation": {"probability": 1.0}, "scale": {"probability": 1.0, "range": [0.7, 1.4]}}
    radians = math.pi / 6
    bgv2 = SpatialTransform(
        (edge,) * 3, patch_center_dist_from_border=0, random_crop=False, p_rotation=1.0, rotation=(-radians, radians),
        p_scaling=1.0, scaling=(0.7, 1.4), p_synchronize_scaling_across_axes=1, mode_seg="nearest",
    )  # fmt: skip
    affine = torchio.RandomAffine(scales=(0.7, 1.4), degrees=30, isotropic=True, label_interpolation="nearest")
    keys = ["image", "label"] if with_label else ["image"]
    rand = monai.RandAffined(
        keys, prob=1.0, rotate_range=[(-radians, radians)] * 3, scale_range=[(-0.3, 0.4)] * 3,
        mode=["bilinear", "nearest"][: len(keys)], padding_mode="border",
    )  # fmt: skip
    programs = {
        "medssl": our_spatial(image, used, spatial),
        "batchgeneratorsv2": each(image, used, bgv2_peer(bgv2)),
        "torchio": each(image, used, torchio_peer(affine)),
        "monai": each(image, used, dictionary_peer(rand)),
    }
    if not with_label:
        programs["SimpleITK (resampling alone)"] = each(image, None, _simpleitk_affine())
        kornia = _kornia_affine()
        if kornia is not None:
            programs["kornia"] = lambda _: kornia(image)
    return programs


def elastic_programs(edge: int, batch: int) -> dict[str, Program]:
    """Smooth deformation from a coarse grid of control points."""
    import monai.transforms as monai
    import torchio
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

    image, _ = crops(edge, batch)
    bgv2 = SpatialTransform(
        (edge,) * 3, patch_center_dist_from_border=0, random_crop=False, p_elastic_deform=1.0,
        elastic_deform_scale=(0.2, 0.2), elastic_deform_magnitude=(0.1, 0.1),
    )  # fmt: skip
    return {
        "medssl": our_spatial(image, None, {"elastic": {"probability": 1.0}}),
        "batchgeneratorsv2": each(image, None, bgv2_peer(bgv2)),
        "torchio": each(image, None, torchio_peer(torchio.RandomElasticDeformation())),
        "monai": each(image, None, array_peer(monai.Rand3DElastic((5, 8), (50, 150), prob=1.0))),
    }


def mirror_programs(edge: int, batch: int) -> dict[str, Program]:
    """Mirroring, each axis with probability one half."""
    import monai.transforms as monai
    import torchio
    from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform

    image, _ = crops(edge, batch)
    flips = monai.Compose([monai.RandFlip(prob=0.5, spatial_axis=axis) for axis in range(3)])
    return {
        "medssl": our_spatial(image, None, {"mirror": {"probability": 0.5, "axes": ["z", "y", "x"]}}),
        "batchgeneratorsv2": each(image, None, bgv2_peer(MirrorTransform((0, 1, 2)))),
        "torchio": each(image, None, torchio_peer(torchio.RandomFlip(axes=(0, 1, 2), flip_probability=0.5))),
        "monai": each(image, None, array_peer(flips)),
    }


def intensity_programs(name: str, edge: int, batch: int) -> dict[str, Program]:
    """One transform of the catalogue, always applied, beside the peers that have one of that meaning."""
    modality, settings, peers = SHARED[name]
    image, _ = crops(edge, batch)
    programs = {"medssl": our_transform(name, image, modality, settings)}
    for peer, make in peers().items():
        programs[peer] = each(image, None, make)
    return programs


def policy_programs(edge: int, batch: int) -> dict[str, Program]:
    """nnU-Net's default training transforms on image and label: ours, its own, and the nearest of TorchIO and MONAI."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    image, label = crops(edge, batch)
    settings = AugmentationSettings(laterality="allow")
    policy = policy_for("fine-tuning", {"MR"}, (edge,) * 3, settings)
    radians = math.pi / 6
    stock = nnUNetTrainer.get_training_transforms(
        (edge,) * 3, (-radians, radians), None, (0, 1, 2), do_dummy_2d_data_aug=False
    )

    return {
        "medssl": our_view(policy, image, label),
        "nnU-Net (batchgeneratorsv2)": each(image, label, bgv2_peer(stock)),
        "torchio": each(image, label, torchio_peer(_torchio_policy())),
        "monai": each(image, label, dictionary_peer(_monai_policy())),
    }


# Probability that rotation or scaling, each with 0.2, is drawn.
RESAMPLED = 1 - 0.8 * 0.8


def _torchio_policy() -> Any:
    """Return nnU-Net's policy as far as TorchIO has it: no contrast, and brightness as a power law."""
    import torchio

    return torchio.Compose(
        [
            torchio.RandomAffine(
                scales=(0.7, 1.4), degrees=30, isotropic=True, label_interpolation="nearest", p=RESAMPLED
            ),
            torchio.RandomNoise(std=(0, 0.1), p=0.1),
            torchio.RandomBlur(std=(0.5, 1), p=0.1),
            torchio.RandomAnisotropy(downsampling=(1, 2), p=0.125),
            torchio.RandomGamma(p=0.4),
            torchio.RandomFlip(axes=(0, 1, 2), flip_probability=0.5),
        ]
    )


def _monai_policy() -> Any:
    import monai.transforms as monai

    both, radians = ["image", "label"], math.pi / 6
    return monai.Compose(
        [
            monai.RandAffined(
                both, prob=RESAMPLED, rotate_range=[(-radians, radians)] * 3, scale_range=[(-0.3, 0.4)] * 3,
                mode=["bilinear", "nearest"], padding_mode="border",
            ),
            monai.RandGaussianNoised("image", prob=0.1, std=0.1),
            monai.RandGaussianSmoothd("image", prob=0.1, sigma_x=(0.5, 1), sigma_y=(0.5, 1), sigma_z=(0.5, 1)),
            monai.RandScaleIntensityd("image", prob=0.15, factors=0.25),
            monai.RandScaleIntensityFixedMeand("image", prob=0.15, factors=0.25, preserve_range=True),
            monai.RandSimulateLowResolutiond("image", prob=0.125, zoom_range=(0.5, 1)),
            monai.RandAdjustContrastd("image", prob=0.1, gamma=(0.7, 1.5), invert_image=True, retain_stats=True),
            monai.RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
            *(monai.RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in range(3)),
        ]
    )  # fmt: skip


def _noise() -> dict[str, Any]:
    import monai.transforms as monai
    import torchio
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform

    return {
        "batchgeneratorsv2": bgv2_peer(GaussianNoiseTransform((0.05, 0.1))),
        "torchio": torchio_peer(torchio.RandomNoise(std=(0.05, 0.1))),
        "monai": array_peer(monai.RandGaussianNoise(prob=1.0, std=0.1)),
    }


def _blur() -> dict[str, Any]:
    import monai.transforms as monai
    import torchio
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform

    return {
        "batchgeneratorsv2": bgv2_peer(GaussianBlurTransform((0.5, 1.0), benchmark=True)),
        "torchio": torchio_peer(torchio.RandomBlur(std=(0.5, 1.0))),
        "monai": array_peer(monai.RandGaussianSmooth((0.5, 1.0), (0.5, 1.0), (0.5, 1.0), prob=1.0)),
    }


def _brightness() -> dict[str, Any]:
    import monai.transforms as monai
    from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform

    return {
        "batchgeneratorsv2": bgv2_peer(MultiplicativeBrightnessTransform((0.75, 1.25), False)),
        "monai": array_peer(monai.RandScaleIntensity(0.25, prob=1.0)),
    }


def _contrast() -> dict[str, Any]:
    import monai.transforms as monai
    from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform

    return {
        "batchgeneratorsv2": bgv2_peer(ContrastTransform((0.75, 1.25), True, False)),
        "monai": array_peer(monai.RandScaleIntensityFixedMean(prob=1.0, factors=0.25, preserve_range=True)),
    }


def _low_resolution() -> dict[str, Any]:
    import monai.transforms as monai
    from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform

    return {
        "batchgeneratorsv2": bgv2_peer(SimulateLowResolutionTransform((0.5, 1.0), False, True, ())),
        "monai": array_peer(monai.RandSimulateLowResolution(prob=1.0, zoom_range=(0.5, 1.0))),
    }


def _gamma() -> dict[str, Any]:
    import monai.transforms as monai
    import torchio
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform

    return {
        "batchgeneratorsv2": bgv2_peer(GammaTransform((0.7, 1.5), 0.0, False, 1.0, 1.0)),
        "torchio (statistics not restored)": torchio_peer(torchio.RandomGamma()),
        "monai": array_peer(monai.RandAdjustContrast(prob=1.0, gamma=(0.7, 1.5), retain_stats=True)),
    }


def _sharpen() -> dict[str, Any]:
    import monai.transforms as monai
    from batchgeneratorsv2.transforms.noise.sharpen import SharpeningTransform

    return {
        "batchgeneratorsv2 (Laplacian)": bgv2_peer(SharpeningTransform((0.1, 1.0))),
        "monai": array_peer(monai.RandGaussianSharpen(alpha=(0.5, 1.0), prob=1.0)),
    }


def _histogram_shift() -> dict[str, Any]:
    import monai.transforms as monai

    return {"monai": array_peer(monai.RandHistogramShift(10, prob=1.0))}


def _rician() -> dict[str, Any]:
    import monai.transforms as monai
    from batchgeneratorsv2.transforms.noise.rician import RicianNoiseTransform

    return {
        "batchgeneratorsv2": bgv2_peer(RicianNoiseTransform((0.05, 0.1))),
        "monai": array_peer(monai.RandRicianNoise(prob=1.0, std=0.1)),
    }


def _bias_field() -> dict[str, Any]:
    import monai.transforms as monai
    import torchio

    return {
        "torchio": torchio_peer(torchio.RandomBiasField()),
        "monai": array_peer(monai.RandBiasField(prob=1.0, coeff_range=(0.0, 0.5))),
    }


def _gibbs() -> dict[str, Any]:
    import monai.transforms as monai

    return {"monai": array_peer(monai.RandGibbsNoise(prob=1.0, alpha=(0.3, 0.6)))}


def _ghosting() -> dict[str, Any]:
    import torchio

    return {"torchio": torchio_peer(torchio.RandomGhosting())}


def _motion() -> dict[str, Any]:
    import torchio

    return {"torchio": torchio_peer(torchio.RandomMotion(num_transforms=2))}


def _spike() -> dict[str, Any]:
    import monai.transforms as monai
    import torchio

    return {
        "torchio": torchio_peer(torchio.RandomSpike()),
        "monai": array_peer(monai.RandKSpaceSpikeNoise(prob=1.0)),
    }


def _anisotropy() -> dict[str, Any]:
    import torchio

    return {"torchio": torchio_peer(torchio.RandomAnisotropy(downsampling=(1.5, 5)))}


# Transforms that a peer has too: the modality it is measured as, our settings, its peers.
SHARED: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "noise": ("MR", {"std": (0.05, 0.1)}, _noise),
    "blur": ("MR", {"per_channel": 1.0, "sigma": (0.5, 1.0)}, _blur),
    "brightness": ("MR", {}, _brightness),
    "contrast": ("MR", {}, _contrast),
    "low_resolution": ("MR", {"per_channel": 1.0}, _low_resolution),
    "gamma": ("MR", {}, _gamma),
    "sharpen": ("MR", {}, _sharpen),
    "histogram_shift": ("MR", {}, _histogram_shift),
    "rician": ("MR", {}, _rician),
    "bias_field": ("MR", {}, _bias_field),
    "gibbs": ("MR", {}, _gibbs),
    "ghosting": ("MR", {}, _ghosting),
    "motion": ("MR", {}, _motion),
    "spike": ("MR", {}, _spike),
    "anisotropy": ("MR", {}, _anisotropy),
}


def _simpleitk_affine() -> Callable[[Tensor, Tensor | None], Any]:
    import SimpleITK

    def one(image: Tensor, _: Tensor | None) -> Any:
        volume = SimpleITK.GetImageFromArray(image[0].numpy())
        turn = SimpleITK.Euler3DTransform([(edge - 1) / 2 for edge in volume.GetSize()], 0.3, -0.2, 0.4)
        return SimpleITK.GetArrayFromImage(SimpleITK.Resample(volume, volume, turn, SimpleITK.sitkLinear))

    return one


def _kornia_affine() -> Any:
    try:
        from kornia.augmentation import RandomAffine3D
    except ImportError:
        return None
    return RandomAffine3D((30.0, 30.0, 30.0), scale=((0.7, 1.4),) * 3, p=1.0)
