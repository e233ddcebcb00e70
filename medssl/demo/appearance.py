"""How tissues look: CT in HU with the noise of a scanner, MR with coil shading, breathing ghosts and Rician noise.

The values are textbook orders of magnitude, chosen to look right; they are not measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from medssl.demo.shapes import Point, Shape, Waves, ellipsoid, generator

CT_HU: dict[str, float] = {
    "air": -1000, "skin": 20, "fat": -105, "visceral_fat": -98, "muscle": 55, "lung": -835, "lung_vessel": 40,
    "airway_wall": 0, "mediastinum": -70, "myocardium": 90, "heart_blood": 150, "blood": 130, "aorta_blood": 165,
    "portal_blood": 150, "vessel_wall": 70, "liver": 102, "spleen": 118, "pancreas": 85, "kidney_cortex": 185,
    "kidney_medulla": 140, "urine": 15, "cyst": 6, "tumour": 55, "fluid": 12, "bile": 8, "gut_wall": 65,
    "bowel_content": 25, "stool": -40, "stomach_content": 18, "marrow": 230, "cortical_bone": 620, "cartilage": 110,
    "disc": 85, "canal_fluid": 22, "cord": 42, "couch": -350, "couch_foam": -930, "mattress": -880,
}  # fmt: skip
# Change of a tissue without contrast medium.
UNENHANCED = {
    "myocardium": 50, "heart_blood": 45, "blood": 42, "aorta_blood": 43, "portal_blood": 40, "liver": 58, "spleen": 48,
    "pancreas": 42, "kidney_cortex": 34, "kidney_medulla": 30, "tumour": 42, "vessel_wall": 45, "gut_wall": 40,
}  # fmt: skip
# T1 weighted, T2 weighted, T2 with fat suppression.
MR_SIGNAL: dict[str, tuple[float, float, float]] = {
    "air": (0, 0, 0), "skin": (0.35, 0.3, 0.25), "fat": (1.0, 0.72, 0.12), "visceral_fat": (0.95, 0.70, 0.12),
    "muscle": (0.40, 0.17, 0.22), "lung": (0.05, 0.04, 0.05), "lung_vessel": (0.22, 0.16, 0.2),
    "airway_wall": (0.2, 0.2, 0.2), "mediastinum": (0.7, 0.5, 0.15), "myocardium": (0.42, 0.27, 0.35),
    "heart_blood": (0.22, 0.14, 0.2), "blood": (0.2, 0.12, 0.18), "aorta_blood": (0.12, 0.06, 0.08),
    "portal_blood": (0.3, 0.14, 0.2), "vessel_wall": (0.35, 0.25, 0.3), "liver": (0.60, 0.27, 0.36),
    "spleen": (0.38, 0.50, 0.66), "pancreas": (0.62, 0.32, 0.42), "kidney_cortex": (0.48, 0.50, 0.64),
    "kidney_medulla": (0.34, 0.66, 0.82), "urine": (0.16, 0.98, 1.1), "cyst": (0.18, 1.0, 1.12),
    "tumour": (0.32, 0.52, 0.7), "fluid": (0.2, 0.92, 1.02), "bile": (0.3, 0.95, 1.05), "gut_wall": (0.42, 0.32, 0.4),
    "bowel_content": (0.33, 0.6, 0.7), "stool": (0.4, 0.35, 0.35), "stomach_content": (0.25, 0.8, 0.9),
    "marrow": (0.66, 0.46, 0.22), "cortical_bone": (0.08, 0.06, 0.06), "cartilage": (0.35, 0.3, 0.35),
    "disc": (0.36, 0.5, 0.6), "canal_fluid": (0.17, 1.0, 1.1), "cord": (0.45, 0.38, 0.45),
}  # fmt: skip
SEQUENCES = ("t1", "t2", "t2_fat_suppressed")


@dataclass(frozen=True)
class CtLook:
    """Settings of a CT scanner.

    Args:
        noise_hu: Standard deviation of the noise in the middle of a plain patient.
        blur_mm: Standard deviation of the kernel's blur.
        enhanced: Whether contrast medium was given.
        breath_mm: How far the diaphragm stood below its rest.
        field_of_view_mm: Diameter of the reconstructed circle, or None for the full square.
        padding: Value outside that circle.
    """

    noise_hu: float = 14.0
    blur_mm: float = 1.5
    enhanced: bool = True
    breath_mm: float = 0.0
    field_of_view_mm: float | None = None
    padding: int = -2000

    def contrast(self) -> dict[str, float]:
        """Return the tissues that differ from the enhanced table."""
        return {} if self.enhanced else {name: float(value) for name, value in UNENHANCED.items()}


@dataclass(frozen=True)
class MrLook:
    """Settings of an MR scanner.

    Args:
        sequence: One of `SEQUENCES`.
        noise: Standard deviation in both channels, as a part of the signal of fat.
        shading: Strength of the coil's inhomogeneity.
        ghost: Strength of the ghosts of breathing along the rows.
        gain: What the signal of fat becomes; scanners do not share a unit.
        breath_mm: How far the diaphragm stood below its rest.
        change: Factors of single tissues, for scanners that weigh differently.
    """

    sequence: str = "t1"
    noise: float = 0.02
    shading: float = 0.3
    ghost: float = 0.04
    gain: float = 1200.0
    breath_mm: float = 0.0
    change: dict[str, float] = field(default_factory=dict)

    def tissues(self) -> dict[str, float]:
        """Return the signal of each tissue."""
        column = SEQUENCES.index(self.sequence)
        return {name: values[column] * self.change.get(name, 1.0) for name, values in MR_SIGNAL.items()}


def table_and_mattress(back_mm: float) -> list[tuple[str, Shape]]:
    """Return the curved couch, filled with foam, and the mattress under a back at `back_mm`."""

    def trough(lift: float) -> Shape:
        outer = ellipsoid((0, back_mm + 352 + lift, 0), (420, 352, 1e4))
        return lambda p: np.maximum(np.maximum(outer(p), p[1] - (back_mm + 34 + lift)), np.abs(p[0]) - 205)

    def shell(lift: float, thick: float) -> Shape:
        over, under = trough(lift), trough(lift + thick)
        return lambda p: np.maximum(over(p), -under(p))

    return [
        ("couch", shell(-24.0, 14.0)),
        ("couch_foam", shell(-21.0, 9.0)),
        ("mattress", shell(-9.5, 8.0)),
    ]  # fmt: skip


def finish_ct(value: np.ndarray, spacing_mm: np.ndarray, look: CtLook, key: tuple[int, int, int]) -> np.ndarray:
    """Return CT values with texture, blur, the noise of the beam's way through the body, and padding. int16."""
    rng = generator("ct", *key)
    value = value + _texture(rng, value.shape, spacing_mm, 7.0) * np.where(value > -300, 4.0, 14.0)
    value = ndimage.gaussian_filter(value, (0.0, *(look.blur_mm / spacing_mm[1:])))
    # Quanta are lost along the way: noise grows with the tissue on the row and on the column through a voxel.
    dense = np.clip(value + 1000, 0, 2200) / 1000
    rows = dense.sum(axis=2, keepdims=True) * spacing_mm[2]
    columns = dense.sum(axis=1, keepdims=True) * spacing_mm[1]
    strength = np.clip(np.exp((rows + columns - 520) / 420), 0.35, 3.0)
    white = rng.standard_normal(value.shape, np.float32)
    fine = white - 0.6 * ndimage.gaussian_filter(white, (0, 1.6, 1.6))
    streaks = ndimage.gaussian_filter(rng.standard_normal(value.shape, np.float32), (0, 0.4, 9)) * 5
    noise = look.noise_hu * strength * (fine + 0.35 * streaks * np.clip(rows / 420 - 0.3, 0, 1.5))
    result = np.clip(np.rint(value + noise), -1024, 3071)
    if look.field_of_view_mm is not None:
        _, height, width = value.shape
        y = (np.arange(height) - (height - 1) / 2)[:, None] * spacing_mm[1]
        x = (np.arange(width) - (width - 1) / 2)[None] * spacing_mm[2]
        result[:, np.hypot(x, y) > look.field_of_view_mm / 2] = look.padding
    return result.astype(np.int16)


def finish_mr(
    value: np.ndarray, points: Point, spacing_mm: np.ndarray, look: MrLook, key: tuple[int, int, int]
) -> np.ndarray:
    """Return MR values with texture, coil shading, ghosts, truncation of k-space, and Rician noise. uint16."""
    rng = generator("mr", *key)
    value = value * (1 + 0.05 * _texture(rng, value.shape, spacing_mm, 6.0))
    shading = Waves(rng, (450, 900), look.shading, 4)(points).reshape(value.shape)
    x, y, _ = points
    # Surface coils lie on the front and the back: the middle is darker.
    depth = np.hypot(x / 210, y / 150).reshape(value.shape)
    value = value * np.exp(shading + look.shading * 0.7 * (np.minimum(depth, 1.2) - 0.6))
    offset = max(2, value.shape[1] // 7)
    moving = ndimage.gaussian_filter(value, (0, 0.7, 0.7))
    ghosts = sum(np.roll(moving, sign * offset, axis=1) * (-1) ** order for order, sign in enumerate((-1, 1)))
    value = value + look.ghost * ghosts
    value = _truncate(value)
    real = value + rng.normal(0, look.noise, value.shape)
    imaginary = rng.normal(0, look.noise, value.shape)
    return np.clip(np.rint(look.gain * np.hypot(real, imaginary)), 0, 4095).astype(np.uint16)


def _truncate(value: np.ndarray) -> np.ndarray:
    """Drop the outermost tenth of k-space in the plane, softly: edges ring a little, as they do on a scanner."""
    ky = np.abs(np.fft.fftfreq(value.shape[1]))[:, None] * 2
    kx = np.abs(np.fft.fftfreq(value.shape[2]))[None] * 2
    window = 1 / (1 + np.exp((np.maximum(kx, ky) - 0.86) / 0.035))
    return np.real(np.fft.ifft2(np.fft.fft2(value, axes=(1, 2)) * window, axes=(1, 2)))


def _texture(rng: np.random.Generator, shape: tuple[int, ...], spacing_mm: np.ndarray, size_mm: float) -> np.ndarray:
    """Return a random field of unit deviation whose grains are about `size_mm` wide."""
    field_ = ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), size_mm / 2 / spacing_mm)
    return field_ / max(float(field_.std()), 1e-6)
