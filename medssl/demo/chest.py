"""Lungs with their vessels, the heart, and the great vessels of the chest."""

from __future__ import annotations

import numpy as np

from medssl.demo.parts import Body, Frame, Part, around
from medssl.demo.shapes import (
    Point,
    Shape,
    Vector,
    Waves,
    common,
    cut,
    ellipsoid,
    grown,
    rough,
    smooth_min,
    tube,
    tubes,
    union,
)


def chest(person: Body, rng: np.random.Generator, frame: Frame, *, effusion: bool, nodules: bool) -> None:
    pericardium = ellipsoid(
        (rng.normal(-22, 4), rng.normal(32, 3), rng.normal(38, 4)),
        (rng.normal(56, 3), rng.normal(42, 3), rng.normal(46, 3)),
        tilt=(0, 25, 30),
    )
    above = frame.diaphragm

    def beside(side: int) -> Shape:
        def distance(p: Point) -> np.ndarray:
            x, y, z = p
            bend, spine_y = frame.spine(z)
            middle = 13 + 6 * np.exp(-np.square((z - 95) / 30)) - side * x
            vertebra = 27 - np.hypot(x - bend, (y - spine_y + 4) * 0.9)
            return -smooth_min(-middle, -vertebra, 10)

        return distance

    lungs: dict[str, Shape] = {}
    for side, name in ((1, "lung_right"), (-1, "lung_left")):
        room = common(grown(frame.chest, -2), lambda p: -above(p), 6)
        lung = cut(common(room, beside(side), 8), grown(pericardium, 3), 8)
        lungs[name] = rough(lung, Waves(rng, (40, 90), 1.2))
        box = ((-2, -140, -110), (180, 140, 260)) if side > 0 else ((-180, -140, -110), (2, 140, 260))
        person.parts.append(Part("lung", lungs[name], box, name))
        wet = common(lungs[name], lambda p: p[1] + 40 + 0.25 * p[2])
        if effusion and side == (1 if rng.random() < 0.5 else -1):
            person.findings.append(f"effusion_{name}")
            person.parts.append(Part("fluid", wet, box, ""))
        tree = _tree(rng, (side * 24, -2, 62), side)
        inside = common(tubes(tree), grown(lungs[name], -1.5))
        person.parts.append(Part("lung_vessel", inside, box, None))
        if nodules and rng.random() < 0.7:
            person.findings.append(f"nodule_{name}")
            centre = (side * rng.uniform(50, 95), rng.uniform(-30, 40), rng.uniform(20, 90))
            nodule = common(rough(ellipsoid(centre, (rng.uniform(5, 11),) * 3), Waves(rng, (12, 25), 0.8)), lungs[name])
            person.parts.append(Part("muscle", nodule, around(centre, 16), None))
    chest_box = ((-110, -80, -40), (90, 110, 220))
    person.parts.append(Part("mediastinum", grown(pericardium, 2), chest_box, "heart"))
    person.parts.append(Part("myocardium", pericardium, chest_box, "heart"))
    left = ellipsoid((-40, 26, 32), (30, 17, 22), tilt=(0, 25, 32))
    right = ellipsoid((4, 52, 32), (32, 13, 26), tilt=(0, 20, 12))
    atria = union(ellipsoid((0, 6, 58), (30, 15, 18)), ellipsoid((26, 30, 48), (17, 20, 24)), 4)
    for chamber in (left, right, atria):
        person.parts.append(Part("heart_blood", common(chamber, grown(pericardium, -3), 3), chest_box, "heart"))
    upper = ((-60, -80, 40), (60, 80, 300))
    person.parts += [
        Part("heart_blood", tube([(-14, 38, 66), (-16, 24, 88), (-4, 8, 92), (32, -2, 84)], (13, 13, 11, 9)), upper),
        Part("heart_blood", tube([(-14, 24, 88), (-36, -2, 92)], (11, 9)), upper),
        Part("heart_blood", tube([(22, 26, 60), (22, 20, 110), (20, 10, 300)], (9, 9, 8)), upper),
        Part(
            "muscle", tube([(2, -26, -20), (0, -24, 100), (0, -14, 300)], (7, 7, 7)), ((-30, -60, -30), (30, 20, 300))
        ),
        Part("airway_wall", tube([(4, -2, 300), (2, -8, 100), (34, -6, 74)], (10, 10, 8)), upper),
        Part("airway_wall", tube([(2, -8, 100), (-36, -10, 72)], (10, 7)), upper),
        Part("air", tube([(4, -2, 300), (2, -8, 100), (34, -6, 74)], (8, 8, 6)), upper),
        Part("air", tube([(2, -8, 100), (-36, -10, 72)], (8, 5)), upper),
    ]


def _tree(rng: np.random.Generator, root: Vector, side: int) -> list[tuple[Vector, Vector, float, float]]:
    """Return the vessels of a lung, spreading from its hilum."""
    return [
        piece
        for _ in range(9)
        for piece in _spread(
            rng, np.array(root, float), np.array([side * rng.uniform(0.3, 1), *rng.normal(0, 0.8, 2)]), 4.2, 38.0, 4
        )
    ]


def _spread(
    rng: np.random.Generator, start: np.ndarray, heading: np.ndarray, radius: float, length: float, depth: int
) -> list[tuple[Vector, Vector, float, float]]:
    if depth == 0:
        return []
    heading = heading / np.linalg.norm(heading)
    end = start + heading * length * rng.uniform(0.7, 1.2)
    pieces: list[tuple[Vector, Vector, float, float]] = [(start, end, radius, 0.75 * radius)]
    for _ in range(2 if depth > 2 else 1):
        turn = heading + rng.normal(0, 0.45, 3)
        pieces += _spread(rng, end, turn, 0.68 * radius, 0.75 * length, depth - 1)
    return pieces
