"""A procedural body phantom: what a CT or an MR scanner, or an annotator, would make of a patient.

`ct`, `mr` and `labels` draw a patient on any grid: any spacing, any orientation, from the same shapes, so that labels
fit the images exactly. All is a function of (seed, patient, series).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from medssl.demo.anatomy import body
from medssl.demo.appearance import CT_HU, CtLook, MrLook, finish_ct, finish_mr, table_and_mattress
from medssl.demo.parts import ORGANS, Body
from medssl.demo.shapes import Point, Vector

__all__ = ["ORGANS", "Body", "CtLook", "Grid", "MrLook", "body", "ct", "labels", "mr"]


@dataclass(frozen=True)
class Grid:
    """Where the voxels are.

    Args:
        shape: Voxels along (Z, Y, X).
        affine: Voxel index (x, y, z, 1) to RAS mm. Shape: (4, 4), float64.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray

    @property
    def spacing_mm(self) -> np.ndarray:
        """Voxel size along (z, y, x), mm."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)[::-1]

    def points(self, through: float = 0.0) -> Point:
        """Return the coordinates of the voxels in RAS mm, flat in (Z, Y, X) order.

        Args:
            through: Shift along z, as a part of the slice distance.
        """
        z, y, x = np.indices(self.shape, dtype=np.float32)
        index = np.stack([x.ravel(), y.ravel(), z.ravel() + np.float32(through)])
        matrix = self.affine.astype(np.float32)
        world = matrix[:3, :3] @ index + matrix[:3, 3:]
        return world[0], world[1], world[2]


def grid(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], directions: np.ndarray, centre: np.ndarray
) -> Grid:
    """Return a grid around a point.

    Args:
        shape: Voxels along (Z, Y, X).
        spacing_mm: Voxel size along (z, y, x).
        directions: Unit vectors of the x, y and z axes as columns, RAS. Shape: (3, 3).
        centre: Middle of the grid, RAS mm. Shape: (3,).
    """
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(directions, np.float64) * np.asarray(spacing_mm[::-1], np.float64)
    affine[:3, 3] = np.asarray(centre) - affine[:3, :3] @ ((np.asarray(shape[::-1]) - 1) / 2)
    return Grid(shape, affine)


def ct(person: Body, where: Grid, look: CtLook, series: int) -> np.ndarray:
    """Return what a CT scanner makes of a patient, in HU. Shape: (Z, Y, X), int16."""
    table = {**CT_HU, **look.contrast()}
    value = _paint_values(person, where, table, breath=look.breath_mm, air=-1000.0, couch=True)
    return finish_ct(value, where.spacing_mm, look, (person.seed, person.patient, series))


def mr(person: Body, where: Grid, look: MrLook, series: int) -> np.ndarray:
    """Return what an MR scanner makes of a patient, in its own unit. Shape: (Z, Y, X), uint16."""
    value = _paint_values(person, where, look.tissues(), breath=look.breath_mm, air=0.0, couch=False)
    return finish_mr(value, where.points(), where.spacing_mm, look, (person.seed, person.patient, series))


def labels(person: Body, where: Grid, *, breath_mm: float = 0.0, organs: Mapping[str, int] | None = None) -> np.ndarray:
    """Return the organ at the middle of each voxel. Shape: (Z, Y, X), uint8.

    Args:
        person: The patient.
        where: The grid.
        breath_mm: The breath of the series that the labels shall fit.
        organs: Number of each organ; those left out become 0.
    """
    numbers = ORGANS if organs is None else organs
    everywhere = person.inside(where.points(), breath_mm)
    label = np.zeros(everywhere[0].size, np.uint8)
    deep, points = _under_skin(person, everywhere)
    for part in person.parts[1:]:
        if part.organ is None:
            continue
        near = _within(points, part.box)
        inside = near[part.shape(_take(points, near)) < 0]
        label[deep[inside]] = numbers.get(part.organ, 0)
    return label.reshape(where.shape)


def _paint_values(
    person: Body, where: Grid, table: Mapping[str, float], *, breath: float, air: float, couch: bool
) -> np.ndarray:
    # A voxel is softened by its own size in the plane, and thick slices are the mean of thin ones.
    thin = max(1, min(3, round(where.spacing_mm[0] / where.spacing_mm[2] * 1.4)))
    soft = np.float32(0.22 * where.spacing_mm[1:].mean())
    total = np.zeros(int(np.prod(where.shape)), np.float32)
    for layer in range(thin):
        world = where.points((layer + 0.5) / thin - 0.5)
        points = person.inside(world, breath)
        value = np.full(world[0].shape, air, np.float32)
        if couch:
            for tissue, shape in table_and_mattress(person.back * float(person.scale[1])):
                _blend(value, np.arange(value.size), shape(world), soft, table[tissue])
        skin = person.parts[0]
        _blend(value, np.arange(value.size), skin.shape(points), soft, table[skin.tissue])
        deep, points = _under_skin(person, points)
        for part in person.parts[1:]:
            near = _within(points, part.box)
            _blend(value, deep[near], part.shape(_take(points, near)), soft, table[part.tissue])
        total += value
    return (total / thin).reshape(where.shape)


def _blend(value: np.ndarray, near: np.ndarray, distance: np.ndarray, soft: np.float32, level: float) -> None:
    reached = distance < 5 * soft
    near, distance = near[reached], distance[reached]
    share = 1 / (1 + np.exp(np.clip(distance / soft, -30, 30)))
    value[near] += share * (np.float32(level) - value[near])


def _under_skin(person: Body, points: Point) -> tuple[np.ndarray, Point]:
    """Return the points inside the body, and their positions among all: nothing is painted outside."""
    deep = np.flatnonzero(person.parts[0].shape(points) < -1.5)
    return deep, _take(points, deep)


def _take(points: Point, chosen: np.ndarray) -> Point:
    return points[0][chosen], points[1][chosen], points[2][chosen]


def _within(points: Point, box: tuple[Vector, Vector]) -> np.ndarray:
    low, high = box
    keep = np.ones(points[0].shape, bool)
    for axis in range(3):
        if low[axis] > -400 or high[axis] < 400:
            keep &= (points[axis] > low[axis]) & (points[axis] < high[axis])
    return np.flatnonzero(keep)
