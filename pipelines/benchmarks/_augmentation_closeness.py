"""How near results lie to the peers' where two programs define the same thing, for `augmentation.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _augmentation_programs import crops
from torch import Tensor

from medssl.augmentation.catalogue import CATALOGUE
from medssl.augmentation.geometry import rotation_matrices
from medssl.augmentation.resampling import normalised_theta, resample
from medssl.augmentation.transform import Facts
from medssl.data.draw import Draw


def closeness(edge: int) -> list[dict[str, Any]]:
    """Return the largest and the mean difference of each pair, in standard deviations of the crop.

    Args:
        edge: Of the crop.
    """
    image, _ = crops(edge, 1)
    rows = []
    for task, ours, peers in _pairs(image):
        for peer, theirs in peers.items():
            difference = (ours - theirs().reshape(ours.shape)).abs() / image.std()
            rows.append(
                {
                    "task": task,
                    "peer": peer,
                    "largest difference": float(difference.max()),
                    "mean difference": float(difference.mean()),
                }
            )
    return rows


def _pairs(image: Tensor) -> list[tuple[str, Tensor, dict[str, Callable[[], Tensor]]]]:
    import monai.transforms as monai
    from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
    from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
    from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
    from scipy.ndimage import gaussian_filter

    def bgv2(transform: Any) -> Callable[[], Tensor]:
        return lambda: transform(image=image[0].clone())["image"]

    def dense(transform: Any) -> Callable[[], Tensor]:
        return lambda: torch.as_tensor(np.asarray(transform(image[0].clone())))

    low = monai.RandSimulateLowResolution(prob=1.0, zoom_range=(0.6, 0.6))
    return [
        (
            "blur, sigma 0.8",
            _ours("blur", image, sigma=(0.8, 0.8), per_channel=1.0),
            {
                "batchgeneratorsv2": bgv2(GaussianBlurTransform((0.8, 0.8))),
                "monai (integrated kernel)": dense(monai.GaussianSmooth(0.8)),
                "scipy": lambda: torch.as_tensor(gaussian_filter(image[0, 0].numpy(), 0.8, mode="mirror", truncate=3)),
            },
        ),
        (
            "brightness, factor 1.2",
            _ours("brightness", image, factor=(1.2, 1.2)),
            {"batchgeneratorsv2": bgv2(MultiplicativeBrightnessTransform((1.2, 1.2), False))},
        ),
        (
            "contrast, factor 1.2",
            _ours("contrast", image, factor=(1.2, 1.2)),
            {"batchgeneratorsv2": bgv2(ContrastTransform((1.2, 1.2), True, False))},
        ),
        (
            "gamma, exponent 1.3",
            _ours("gamma", image, exponent=(1.3, 1.3)),
            {
                "batchgeneratorsv2": bgv2(GammaTransform((1.3, 1.3), 0.0, False, 1.0, 1.0)),
                "monai": dense(monai.AdjustContrast(1.3, retain_stats=True)),
            },
        ),
        (
            "low resolution, zoom 0.6",
            _ours("low_resolution", image, zoom=(0.6, 0.6), per_channel=1.0),
            {
                "batchgeneratorsv2": bgv2(SimulateLowResolutionTransform((0.6, 0.6), False, True, ())),
                "monai": dense(low),
            },
        ),
        ("rotation and scaling", _turned(image), {"torch grid_sample": lambda: _grid_sample(image), **_others(image)}),
    ]


def _ours(name: str, image: Tensor, **settings: Any) -> Tensor:
    kind = CATALOGUE[name]
    transform = kind({"MR": kind.settings_class(probability=1.0, **settings)})
    facts = Facts(("MR",), torch.ones(1, 3, dtype=torch.float64), tuple(image.shape[2:]), 1)
    return transform.apply(image, transform.draw(facts, Draw(0, [0])))


def _matrix(image: Tensor) -> Tensor:
    """Return a turn about all axes with a scale of 1.2 about the centre. Shape: (1, 3, 4), float64."""
    linear = 1.2 * rotation_matrices(torch.tensor([[12.0, -8.0, 20.0]]))
    centre = (torch.tensor(image.shape[2:], dtype=torch.float64) - 1) / 2
    return torch.cat([linear, (centre - linear @ centre)[:, :, None]], dim=2)


def _turned(image: Tensor) -> Tensor:
    return resample(image, _matrix(image), image.shape[2:])


def _grid_sample(image: Tensor) -> Tensor:
    theta = normalised_theta(_matrix(image), image.shape[2:], image.shape[2:]).float()
    grid = F.affine_grid(theta, [1, 1, *image.shape[2:]], align_corners=False)
    return F.grid_sample(image, grid, padding_mode="border", align_corners=False)


def _others(image: Tensor) -> dict[str, Callable[[], Tensor]]:
    from scipy.ndimage import affine_transform

    matrix = _matrix(image)[0].numpy()
    return {
        "scipy": lambda: torch.as_tensor(
            affine_transform(image[0, 0].numpy(), matrix[:, :3], matrix[:, 3], order=1, mode="nearest")
        )
    }
