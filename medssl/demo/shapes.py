"""Implicit shapes: signed distances in mm, negative inside, smooth enough for partial volume.

A shape is a function of coordinates `(x, y, z)`, each a flat float32 array in mm (right, anterior, superior), that
returns one approximate signed distance per point. The blends are Quilez' polynomial smooth minimum and maximum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

Flat: TypeAlias = np.ndarray
Point: TypeAlias = tuple[Flat, Flat, Flat]
Shape: TypeAlias = Callable[[Point], Flat]
Vector: TypeAlias = Sequence[float] | np.ndarray


def generator(*key: int | str) -> np.random.Generator:
    """Return random numbers that are a function of the key alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def ellipsoid(centre: Vector, radii: Vector, *, tilt: Vector = (0.0, 0.0, 0.0)) -> Shape:
    """Return an ellipsoid.

    Args:
        centre: Its middle, mm.
        radii: Its half axes, mm.
        tilt: Rotation about x, y and z in that order, degrees.
    """
    rotation = rotation_matrix(tilt)

    def distance(p: Point) -> Flat:
        offset = np.stack([p[axis] - np.float32(centre[axis]) for axis in range(3)])
        local = rotation.T @ offset if any(tilt) else offset
        scaled = local / np.asarray(radii, np.float32)[:, None]
        near = np.sqrt((scaled * scaled).sum(axis=0))
        steep = np.sqrt(np.square(scaled / np.asarray(radii, np.float32)[:, None]).sum(axis=0))
        return near * (near - 1) / np.maximum(steep, 1e-6)

    return distance


def column(half_width: Callable[[Flat], Flat], half_depth: Callable[[Flat], Flat], power: float) -> Shape:
    """Return a column along z whose cross-section is a superellipse with axes that depend on z."""

    def distance(p: Point) -> Flat:
        x, y, z = p
        width, depth = half_width(z), half_depth(z)
        radius = (np.abs(x / width) ** power + np.abs(y / depth) ** power) ** np.float32(1 / power)
        return (radius - 1) * np.minimum(width, depth)

    return distance


def tube(path: Sequence[Vector], radii: Sequence[float]) -> Shape:
    """Return a tube along a polyline; the radius changes linearly between the corners."""
    return tubes([(path[i], path[i + 1], radii[i], radii[i + 1]) for i in range(len(path) - 1)])


def tubes(segments: Sequence[tuple[Vector, Vector, float, float]]) -> Shape:
    """Return the union of straight pieces of tube, each (start, end, radius at start, radius at end)."""

    def distance(p: Point) -> Flat:
        nearest = np.full(p[0].shape, 1e3, np.float32)
        for start, end, first, last in segments:
            along = [np.float32(b - a) for a, b in zip(start, end, strict=True)]
            offset = [p[axis] - np.float32(start[axis]) for axis in range(3)]
            length = max(float(sum(a * a for a in along)), 1e-6)
            part = np.clip(sum(o * a for o, a in zip(offset, along, strict=True)) / length, 0, 1)
            square = sum(np.square(o - part * a) for o, a in zip(offset, along, strict=True))
            np.minimum(nearest, np.sqrt(square) - (first + part * (last - first)), out=nearest)
        return nearest

    return distance


def before(level: float) -> Shape:
    """Return all that lies in front of y = `level` mm: where gas collects in a patient who lies on the back."""
    return lambda p: np.float32(level) - p[1]


def union(first: Shape, second: Shape, blend: float = 0.0) -> Shape:
    """Return both shapes, melted together over `blend` mm."""
    return lambda p: smooth_min(first(p), second(p), blend)


def common(first: Shape, second: Shape, blend: float = 0.0) -> Shape:
    """Return what lies in both shapes."""
    return lambda p: -smooth_min(-first(p), -second(p), blend)


def cut(shape: Shape, tool: Shape, blend: float = 0.0) -> Shape:
    """Return the shape without what lies in `tool`."""
    return lambda p: -smooth_min(-shape(p), tool(p), blend)


def grown(shape: Shape, margin: float) -> Shape:
    """Return the shape grown by `margin` mm; a negative margin shrinks it."""
    return lambda p: shape(p) - np.float32(margin)


def rough(shape: Shape, waves: Waves) -> Shape:
    """Return the shape with an uneven surface."""
    return lambda p: shape(p) + waves(p)


def smooth_min(a: Flat, b: Flat, blend: float) -> Flat:
    """Return the minimum, rounded where the two are nearer than `blend`."""
    if blend <= 0:
        return np.minimum(a, b)
    overlap = np.maximum(blend - np.abs(a - b), 0) / np.float32(blend)
    return np.minimum(a, b) - overlap * overlap * np.float32(blend / 4)


class Waves:
    """A smooth random field: plane waves of random direction and phase.

    Args:
        rng: Source of the numbers.
        wavelength: Shortest and longest wave, mm.
        amplitude: Standard deviation of the field.
        count: Number of waves.
    """

    def __init__(
        self, rng: np.random.Generator, wavelength: tuple[float, float], amplitude: float, count: int = 5
    ) -> None:
        direction = rng.normal(size=(count, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        self.vectors = (direction * (2 * np.pi / rng.uniform(*wavelength, size=(count, 1)))).astype(np.float32)
        self.phases = rng.uniform(0, 2 * np.pi, count).astype(np.float32)
        self.amplitude = np.float32(amplitude * np.sqrt(2 / count))

    def __call__(self, p: Point) -> Flat:
        total = np.zeros(p[0].shape, np.float32)
        for (kx, ky, kz), phase in zip(self.vectors, self.phases, strict=True):
            total += np.sin(kx * p[0] + ky * p[1] + kz * p[2] + phase)
        return self.amplitude * total


def rotation_matrix(degrees: Vector) -> np.ndarray:
    """Return the rotation about x, then y, then z. Shape: (3, 3), float32."""
    a, b, c = np.deg2rad(np.asarray(degrees, np.float64))
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return (about_z @ about_y @ about_x).astype(np.float32)
