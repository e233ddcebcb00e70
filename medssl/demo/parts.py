"""What a phantom is made of: parts in the order of painting, and the patient that owns them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from medssl.demo.shapes import Point, Shape, Vector, Waves

ORGANS: dict[str, int] = {
    "liver": 1,
    "spleen": 2,
    "kidney_right": 3,
    "kidney_left": 4,
    "lung_right": 5,
    "lung_left": 6,
    "heart": 7,
    "spine": 8,
    "aorta": 9,
    "stomach": 10,
}
EVERYWHERE = ((-400.0, -400.0, -500.0), (400.0, 400.0, 500.0))


@dataclass(frozen=True)
class Part:
    """One thing to paint.

    Args:
        tissue: What it consists of; a name of the tables in `appearance`.
        shape: Where it is.
        box: Corners that enclose it, mm; points outside are not computed.
        organ: Its label, "" if it belongs to no organ, None if it leaves the label below it as it is.
    """

    tissue: str
    shape: Shape
    box: tuple[Vector, Vector] = EVERYWHERE
    organ: str | None = ""


@dataclass
class Body:
    """A patient: parts in the order of painting, and how this patient's space is bent.

    Args:
        seed: Seed of the archive.
        patient: Number of the patient.
        scale: Size against the plain adult along x, y and z.
        warp: Three smooth displacement fields, mm.
        parts: What there is inside.
        findings: Names of the diseases that were drawn.
        back: y of the skin of the back, mm; the table lies there.
    """

    seed: int
    patient: int
    scale: np.ndarray
    warp: tuple[Waves, Waves, Waves]
    parts: list[Part] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    back: float = -120.0

    def inside(self, points: Point, breath: float) -> Point:
        """Map scanner coordinates to the plain adult's.

        Args:
            points: Coordinates in the scanner, mm.
            breath: How far the diaphragm stands below its rest, mm; the back moves less than the front.
        """
        x, y, z = (points[axis] / np.float32(self.scale[axis]) for axis in range(3))
        z = z + np.float32(breath) / (1 + np.exp(-(y + 20) / 15))
        at = (x, y, z)
        return x + self.warp[0](at), y + self.warp[1](at), z + self.warp[2](at)


@dataclass(frozen=True)
class Frame:
    """What the organs are fitted into."""

    chest: Shape
    belly: Shape
    diaphragm: Shape
    scoliosis: Waves
    spine_y: float

    def spine(self, z: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """Return x and y of the middle of the vertebral bodies at height z."""
        height = np.asarray(z, np.float32)
        bend = self.scoliosis((np.zeros_like(height), np.zeros_like(height), height))
        curve = 9 * np.sin((height + 40) / 75) * (height < 80)
        return bend, np.float32(self.spine_y) - curve.astype(np.float32)


def around(centre: Vector, reach: float) -> tuple[Vector, Vector]:
    return [c - reach for c in centre], [c + reach for c in centre]


def enclose(path: list[np.ndarray], margin: float) -> tuple[Vector, Vector]:
    corners = np.asarray(path)
    return corners.min(axis=0) - margin, corners.max(axis=0) + margin
