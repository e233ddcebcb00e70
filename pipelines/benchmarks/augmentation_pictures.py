"""What does each family of transforms do? Pictures of the demo's phantom and of a made ultrasound sector.

Command: `python pipelines/benchmarks/augmentation_pictures.py` (writes `results/augmentation_<family>.png`).

Each row shows the image as read, then every transform of a family twice, always applied, at the settings named here.
The same pictures of a policy on a volume of one's own: `medssl preview VOLUME --purpose contrastive --out sheet.png`.
"""

from __future__ import annotations

import dataclasses
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from _common import RESULTS

from medssl.augmentation.catalogue import CATALOGUE
from medssl.augmentation.policy import AugmentationSettings, policy_for
from medssl.augmentation.transform import Facts
from medssl.data.batch import Batch
from medssl.data.draw import Draw
from medssl.demo.archive import HOSPITAL, plan_series
from medssl.demo.phantom import grid
from medssl.files import write_bytes

# HU of the stored 0 and of one unit, as in a store of CT.
RESCALE = (40.0, 250.0)
# Transforms of each picture with the settings that make them visible.
FAMILIES: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "mri": (
        "MR",
        {
            "bias_field": {"strength": (0.3, 0.5)},
            "motion": {"degrees": 10, "mm": 10},
            "ghosting": {"intensity": (0.8, 1.0)},
            "spike": {"intensity": (0.2, 0.4)},
            "gibbs": {"cutoff": (0.2, 0.4)},
            "rician": {"std": (0.2, 0.4)},
            "anisotropy": {},
        },
    ),
    "ct": (
        "CT",
        {
            "hu_window": {"low": (-300, -100), "high": (150, 300), "stretch": True},
            "dose_noise": {"std": (30, 60)},
            "kernel": {},
            "slice_thickness": {"thickness_mm": (10, 20)},
            "beam_hardening": {"amplitude": (-80, 80)},
            "metal": {"radius_mm": (6, 10), "streak": (300, 600)},
        },
    ),
    "ultrasound": (
        "US",
        {"speckle": {}, "depth_attenuation": {"mu": (-2, 2)}, "shadow": {}, "gain_compression": {}},
    ),
    "intensity": (
        "MR",
        {
            "noise": {"std": (0.2, 0.4)},
            "blur": {"sigma": (1.0, 2.0), "per_channel": 1.0},
            "sharpen": {"strength": (1.0, 2.0)},
            "brightness": {"factor": (0.6, 1.4)},
            "contrast": {"factor": (0.5, 2.0)},
            "low_resolution": {"zoom": (0.25, 0.5), "per_channel": 1.0},
            "gamma": {"exponent": (0.5, 2.0)},
            "gamma_inverted": {"exponent": (0.5, 2.0)},
            "bezier": {"strength": 0.7},
            "histogram_shift": {"strength": 0.5},
            "fourier_mix": {"weight": (0.5, 1.0)},
        },
    ),
}
SPATIAL: dict[str, dict[str, Any]] = {
    "rotation": {},
    "scale": {},
    "elastic": {"strength": [0.6, 0.9]},
    "mirror": {"axes": ["y"], "probability": 1.0},
    "rot90": {},
}


def main() -> None:
    """Draw every family."""
    phantoms = {"MR": _volume("MR"), "CT": _volume("CT"), "US": _sector()}
    for family, (modality, transforms) in FAMILIES.items():
        rows = [(name, _changed(name, modality, phantoms[modality], given)) for name, given in transforms.items()]
        _write(family, phantoms[modality].image[0, 0], rows, phantoms[modality].spacing_mm[0])
    moved = [(name, _moved(name, phantoms["MR"], given)) for name, given in SPATIAL.items()]
    _write("spatial", phantoms["MR"].image[0, 0], moved, phantoms["MR"].spacing_mm[0])


def _volume(modality: str) -> Batch:
    """Return a phantom (1, 1, 24, 128, 128), finer than the demo's, normalised, beside another patient."""
    plans = [plan for plan in plan_series(0, HOSPITAL) if plan.header.modality == modality][:2]
    where = grid((24, 128, 128), (4.0, 3.0, 3.0), np.eye(3), np.array([0.0, 0.0, -32.0]))
    images = []
    for plan in plans:
        pixels = torch.from_numpy(np.asarray(dataclasses.replace(plan, where=where).pixels(), dtype=np.float32))
        intercept, slope = RESCALE if modality == "CT" else (float(pixels.mean()), float(pixels.std()))
        images.append((pixels - intercept) / slope)
    return _batch(torch.stack(images)[:, None].clamp(-4.2, 4), modality, (4.0, 3.0, 3.0))


def _sector() -> Batch:
    """Return a made ultrasound sector: layers, a dark cyst, speckle (1, 1, 160, 200)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:160, 0:200].astype(np.float32)
    depth, angle = np.hypot(y + 40, x - 100), np.arctan2(x - 100, y + 40)
    echo = 90 + 40 * np.sin(depth / 9) * np.exp(-depth / 250) + 25 * np.sin(depth / 23 + 2 * angle)
    echo[np.hypot((y - 90) / 1.0, (x - 115) / 1.4) < 22] *= 0.25
    echo *= rng.rayleigh(0.8, echo.shape)
    echo[(depth < 45) | (depth > 195) | (np.abs(angle) > 0.65)] = 0
    picture = torch.from_numpy(np.clip(echo, 0, 255).astype(np.float32))
    return _batch(((picture - picture.mean()) / picture.std())[None, None], "US", (1.0, 1.0, 1.0))


def _batch(image: Tensor, modality: str, spacing: tuple[float, float, float]) -> Batch:
    size = (1,) * (5 - image.ndim) + tuple(image.shape[2:])
    count = len(image)
    return Batch(
        image=image,
        sample_index=torch.arange(count),
        sample_id=torch.arange(count),
        origin_mm=torch.zeros(count, 3),
        spacing_mm=torch.tensor([spacing]).repeat(count, 1),
        valid=torch.tensor([[0, edge] for edge in size]).repeat(count, 1, 1),
        background=image.flatten(1).amin(dim=1),
        modality=(modality,) * count,
        patient_key=("",) * count,
        rescale=torch.tensor([RESCALE]).repeat(count, 1),
    )


def _changed(name: str, modality: str, batch: Batch, given: dict[str, Any]) -> list[Tensor]:
    kind = CATALOGUE[name]
    transform = kind({modality: kind.settings_class(**{"probability": 1.0, **given})})
    facts = Facts.of(batch, batch.modality, tuple(batch.image.shape[2:]))
    return [
        transform.apply(batch.image, transform.draw(facts, Draw(seed, batch.sample_index)))[0, 0] for seed in range(2)
    ]


def _moved(name: str, batch: Batch, given: dict[str, Any]) -> list[Tensor]:
    still: dict[str, Any] = {"rotation": {"probability": 0}, "scale": {"probability": 0}, "mirror": {"probability": 0}}
    overrides = {"spatial": {**still, name: {"probability": 1.0, **given}}}
    policy = policy_for("none", {"MR"}, batch.image.shape[2:], AugmentationSettings(overrides=overrides))
    return [policy.view(batch, Draw(seed, batch.sample_index)).image[0, 0] for seed in range(2)]


def _write(family: str, image: Tensor, rows: list[tuple[str, list[Tensor]]], spacing_mm: Tensor) -> None:
    from matplotlib.figure import Figure

    flat = image.ndim == 2
    z, y, x = spacing_mm.tolist()
    columns = ["as read", *(name.replace("_", " ") for name, _ in rows)]
    figure = Figure(figsize=(1.35 * len(columns), 2.9), dpi=80)
    axes = figure.subplots(2, len(columns), squeeze=False, gridspec_kw={"wspace": 0.03, "hspace": 0.03})
    low, high = (float(torch.quantile(image.flatten()[:: max(1, image.numel() // 100_000)], q)) for q in (0.01, 0.995))
    for number, title in enumerate(columns):
        for line in range(2):
            shown = image if number == 0 else rows[number - 1][1][line]
            # What happens along Z is seen in the coronal slice.
            coronal = not flat and (title in ("slice thickness", "anisotropy") or (number == 0 and line == 1))
            middle = shown.shape[0] // 2
            if title == "metal":
                middle = int(shown.flatten(1).amax(dim=1).argmax())
            content = shown if flat else shown[:, shown.shape[1] // 2] if coronal else shown[middle]
            axis = axes[line, number]
            up, ratio = ("upper" if flat else "lower"), (z / x if coronal else y / x)
            axis.imshow(content.numpy(), cmap="gray", vmin=low, vmax=high, origin=up, aspect=ratio)
            axis.set_axis_off()
        axes[0, number].set_title(title, fontsize=8)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.9)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    write_bytes(RESULTS / f"augmentation_{family}.png", stream.getvalue())


if __name__ == "__main__":
    main()
