"""Spine, ribs, breastbone and the wings of the pelvis."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from medssl.demo.parts import Part
from medssl.demo.shapes import Point, Shape, common, cut, ellipsoid, grown, smooth_min, tube

VERTEBRA_MM = 34.0
DISC_MM = 8.0
RIB_MM = 29.0


def skeleton(
    rng: np.random.Generator, chest: Shape, spine: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> list[Part]:
    """Return the bones, cortex before marrow.

    Args:
        rng: Source of the patient's own numbers.
        chest: The inside of the rib cage.
        spine: x and y of the middle of the vertebral bodies at a height.
    """
    phase = rng.uniform(0, VERTEBRA_MM)
    width, depth = rng.normal(22, 1.2), rng.normal(16.5, 1.0)
    spine_box = ((-90, -140, -400), (90, 20, 400))

    def level(z: np.ndarray) -> np.ndarray:
        """Height within one vertebra and its disc, in [0, VERTEBRA_MM)."""
        return np.mod(z + np.float32(phase), np.float32(VERTEBRA_MM))

    def bodies(p: Point) -> np.ndarray:
        x, y, z = p
        middle_x, middle_y = spine(z)
        waist = 1 - 0.08 * np.sin(np.pi * level(z) / VERTEBRA_MM)
        radius = (np.abs((x - middle_x) / width) ** 2.4 + np.abs((y - middle_y) / depth) ** 2.4) ** (1 / 2.4)
        return ((radius - waist) * depth).astype(np.float32)

    def discs(p: Point) -> np.ndarray:
        return np.maximum(bodies(p), level(p[2]) - np.float32(DISC_MM))

    def bone(p: Point) -> np.ndarray:
        height = level(p[2])
        plate = np.maximum(np.float32(DISC_MM) - height, height - np.float32(VERTEBRA_MM))
        return np.maximum(bodies(p), plate)

    def arch(p: Point) -> np.ndarray:
        """Pedicles, laminae, transverse and spinous processes, once a vertebra."""
        x, y, z = p
        middle_x, middle_y = spine(z)
        side, back, up = np.abs(x - middle_x), middle_y - y, level(z) - 20
        ring = np.abs(np.hypot(side, back - 27) - 13) - 4
        transverse = np.maximum(np.hypot((back - 26) * 1.1, up) - 5.5, side - 36)
        transverse = np.maximum(transverse, 8 - side)
        spinous = np.maximum(np.hypot(side * 1.4, (up + 6 + 0.25 * (back - 38)) * 0.5) - 4.5, np.abs(back - 50) - 14)
        ring = np.maximum(ring, np.abs(up) - 11)
        return smooth_min(smooth_min(ring, transverse, 4), spinous, 4).astype(np.float32)

    def canal(p: Point) -> np.ndarray:
        middle_x, middle_y = spine(p[2])
        return (np.hypot(p[0] - middle_x, p[1] - middle_y + 26) - 9).astype(np.float32)

    def cord(p: Point) -> np.ndarray:
        middle_x, middle_y = spine(p[2])
        return np.maximum(np.hypot(p[0] - middle_x, p[1] - middle_y + 26) - 5, -45 - p[2]).astype(np.float32)

    parts = [
        Part("cortical_bone", arch, spine_box, "spine"),
        Part("marrow", grown(arch, -2.2), spine_box, "spine"),
        Part("disc", discs, spine_box, "spine"),
        Part("cortical_bone", bone, spine_box, "spine"),
        Part("marrow", grown(bone, -1.8), spine_box, "spine"),
        Part("canal_fluid", canal, spine_box, ""),
        Part("cord", cord, spine_box, ""),
    ]
    return parts + _ribs(rng, chest) + _front_and_pelvis(rng)


def _ribs(rng: np.random.Generator, chest: Shape) -> list[Part]:
    phase, slope = rng.uniform(0, RIB_MM), rng.uniform(0.35, 0.5)

    def rib(p: Point) -> np.ndarray:
        x, y, z = p
        wall = np.abs(chest(p) - 5) - 4.0
        height = np.mod(z + slope * y + np.float32(phase), np.float32(RIB_MM)) - np.float32(RIB_MM / 2)
        ring = np.hypot(np.maximum(wall + 4.0, 0) * 1.2, height * 0.9) - 6.0
        # The costal arch rises towards the middle; the last ribs end at the flank.
        arch = (-112 + 1.05 * np.maximum(y + 20, 0) - 0.25 * np.abs(x)) - z
        return np.maximum(np.maximum(ring, wall), arch).astype(np.float32)

    box = ((-190, -140, -130), (190, 140, 260))

    def front(p: Point) -> np.ndarray:
        return (58 - p[1]).astype(np.float32)

    bony = cut(rib, front)
    return [
        Part("cartilage", common(rib, front), box),
        Part("cortical_bone", bony, box),
        Part("marrow", grown(bony, -2.6), box),
    ]


def _front_and_pelvis(rng: np.random.Generator) -> list[Part]:
    breast = ellipsoid((0, rng.normal(92, 2), 95), (17, 6, 85), tilt=(8, 0, 0))
    box = ((-30, 60, 0), (30, 130, 200))
    parts = [Part("cortical_bone", breast, box), Part("marrow", grown(breast, -2.0), box)]
    for side in (-1, 1):
        wing = ellipsoid((side * 92, -38, -205), (9, 66, 58), tilt=(0, side * -24, side * 28))
        crest = tube([(side * 60, -85, -172), (side * 104, -50, -150), (side * 112, 0, -165)], (7, 8, 7))
        low, high = ((30, -130, -300), (160, 60, -120)) if side > 0 else ((-160, -130, -300), (-30, 60, -120))
        for shape in (wing, crest):
            parts.append(Part("cortical_bone", shape, (low, high)))
            parts.append(Part("marrow", grown(shape, -2.5), (low, high)))
    return parts
