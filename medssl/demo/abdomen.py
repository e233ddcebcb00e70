"""Bowel, stomach, spleen, liver, kidneys and the great vessels of the abdomen."""

from __future__ import annotations

import numpy as np

from medssl.demo.parts import Body, Frame, Part, around, enclose
from medssl.demo.shapes import Shape, Vector, Waves, before, common, cut, ellipsoid, grown, rough, tube, tubes, union


def bowel(person: Body, rng: np.random.Generator, frame: Frame) -> None:
    room = grown(frame.belly, -7)
    for _ in range(9):
        middle = np.array([rng.uniform(-75, 75), rng.uniform(5, 62), rng.uniform(-190, -105)])
        path = [middle + rng.normal(0, (26, 14, 14)) for _ in range(4)]
        radius = rng.uniform(10, 16)
        full = "air" if rng.random() < 0.3 else "bowel_content"
        _hollow(person, tube(path, (radius,) * 4), room, full, enclose(path, radius + 3), 2.5)
    for side, top in ((1, -110), (-1, -75)):
        plain = [(side * 98, -8, -260), (side * 103, -2, -180), (side * 98, 8, top), (side * 70, 40, top - 15)]
        path = [np.array(corner) + rng.normal(0, 5, 3) for corner in plain]
        _hollow(person, tube(path, (18, 19, 19, 15)), room, "stool", enclose(path, 24), 2.5)
        gas = common(tube(path, (14, 15, 15, 12)), before(rng.uniform(2, 14)))
        person.parts.append(Part("air", common(gas, room), enclose(path, 24)))
    for side in (-1, 1):
        psoas = tube([(side * 26, -44, -60), (side * 38, -38, -150), (side * 52, -14, -260)], (8, 19, 19))
        person.parts.append(Part("muscle", psoas, ((-90, -90, -300), (90, 30, -40))))


def upper_abdomen(person: Body, rng: np.random.Generator, frame: Frame, *, large_spleen: bool, lesions: bool) -> None:
    below = frame.diaphragm
    room = common(grown(frame.belly, -4), grown(below, -4), 5)
    stomach = rough(
        tube([(-52, -22, -18), (-66, 12, -42), (-44, 46, -78), (4, 48, -92)], (30, 31, 25, 13)),
        Waves(rng, (50, 120), 2.0),
    )
    stomach = common(stomach, room, 4)
    box = ((-125, -75, -130), (40, 100, 30))
    level = rng.uniform(10, 38)
    person.parts += [
        Part("gut_wall", stomach, box, "stomach"),
        Part("stomach_content", grown(stomach, -4), box, "stomach"),
        Part("air", common(grown(stomach, -4), before(level)), box, "stomach"),
        Part("pancreas", tube([(20, 6, -98), (-4, 14, -88), (-40, -8, -76), (-74, -34, -64)], (14, 10, 9, 8)),
             ((-90, -60, -125), (45, 45, -40))),
    ]  # fmt: skip
    if large_spleen:
        person.findings.append("large_spleen")
    grow = rng.normal(1.32, 0.06) if large_spleen else rng.normal(1.0, 0.08)
    spleen_at = (rng.normal(-98, 3), rng.normal(-34, 5), rng.normal(-46, 6))
    spleen = ellipsoid(spleen_at, np.array([30, 50, 50]) * grow, tilt=(-30, 0, -18))
    spleen = cut(spleen, ellipsoid((-58, -6, -48), (31, 38, 62)), 6)
    spleen = common(rough(spleen, Waves(rng, (60, 110), 1.2)), room, 4)
    person.parts.append(Part("spleen", spleen, around(spleen_at, 85), "spleen"))

    wide, low = rng.normal(1, 0.05), rng.normal(0, 7)
    right = ellipsoid((72, -4, -52), (72 * wide, 84, 82 - low), tilt=(0, -8, 0))
    left = ellipsoid((-4, 44, -34), (74 * rng.normal(1, 0.14), 36, 36), tilt=(0, 14, -12))
    liver = cut(union(right, left, 24), ellipsoid((10, -34, -148 - low), (82, 78, 82)), 14)
    liver = cut(liver, ellipsoid((-12, -62, -30), (42, 58, 120)), 12)
    liver = common(rough(liver, Waves(rng, (70, 150), 2.0)), room, 6)
    liver_box = ((-110, -110, -200), (160, 120, 40))
    person.parts.append(Part("liver", liver, liver_box, "liver"))
    inner = grown(liver, -5)
    veins = _branches(rng, (22, -6, -68), ((70, -10, -60), (60, 30, -40), (0, 45, -45), (75, -30, -20)), 6.0)
    hepatic = _branches(rng, (20, -20, -8), ((85, -20, -20), (50, 35, -22), (-5, 38, -28)), 5.0)
    person.parts.append(Part("portal_blood", common(tubes(veins), inner), liver_box, None))
    person.parts.append(Part("portal_blood", common(tubes(hepatic), inner), liver_box, None))
    bladder_at = (rng.normal(44, 4), rng.normal(40, 4), rng.normal(-98, 5))
    bladder = ellipsoid(bladder_at, (15, 24, 17), tilt=(35, 0, 10))
    person.parts.append(Part("gut_wall", grown(bladder, 2), around(bladder_at, 40)))
    person.parts.append(Part("bile", bladder, around(bladder_at, 40)))
    if lesions:
        person.findings.append("liver_lesions")
        for _ in range(int(rng.integers(1, 5))):
            centre = (rng.uniform(25, 115), rng.uniform(-50, 45), rng.uniform(-90, -15))
            lump = rough(ellipsoid(centre, rng.uniform(7, 20, 3)), Waves(rng, (20, 40), 1.0))
            kind = "cyst" if rng.random() < 0.3 else "tumour"
            person.parts.append(Part(kind, common(lump, grown(liver, -2)), around(centre, 30), None))


def kidneys(person: Body, rng: np.random.Generator, *, cysts: bool, swollen: bool) -> None:
    for side, name in ((1, "kidney_right"), (-1, "kidney_left")):
        centre = np.array([side * rng.normal(60, 4), rng.normal(-46, 4), rng.normal(-104 if side > 0 else -92, 6)])
        radii = np.array([27, 25, 53]) * rng.normal(1, 0.07)
        tilt = (rng.normal(-12, 4), side * rng.normal(14, 4), side * rng.normal(30, 8))
        whole = rough(ellipsoid(centre, radii, tilt=tilt), Waves(rng, (50, 90), 1.2))
        inward = np.array([-side * 24.0, 8.0, 0.0])
        hilum = ellipsoid(centre + inward, (17, 12, 21))
        kidney = cut(whole, hilum, 8)
        box = around(centre, 75)
        sinus = ellipsoid(centre + 0.45 * inward, (12, 9, 27))
        pelvis_size = (1.9 if swollen and side > 0 else 1.0) * np.array([8, 6, 15])
        pyramids = Waves(rng, (22, 32), 3.5, 6)
        person.parts += [
            Part("kidney_cortex", kidney, box, name),
            Part("kidney_medulla", rough(grown(kidney, -9), pyramids), box, name),
            Part("visceral_fat", common(sinus, grown(whole, -3), 4), box, None),
            Part("urine", common(ellipsoid(centre + 0.5 * inward, pelvis_size), grown(whole, -4), 3), box, None),
        ]  # fmt: skip
        vessel = tube([centre + 0.6 * inward, (side * 14, -8, centre[2] + 8)], (4, 5))
        person.parts.append(Part("blood", vessel, ((-80, -70, -170), (80, 30, -40))))
        if swollen and side > 0:
            person.findings.append("hydronephrosis")
        if cysts:
            person.findings.append(f"cyst_{name}")
            at = centre + np.array([side * 22, 6, rng.choice([-30.0, 30.0])])
            person.parts.append(Part("cyst", ellipsoid(at, (rng.uniform(8, 20),) * 3), around(at, 30), name))


def great_vessels(person: Body, rng: np.random.Generator, frame: Frame, *, aneurysm: bool) -> None:
    def beside(x: float, y: float, z: float) -> np.ndarray:
        bend, middle = frame.spine(z)
        return np.array([float(bend) + x, float(middle) + y, z])

    wide = rng.normal(11.5, 1.2)
    heights = (250.0, 105.0, 60.0, 0.0, -60.0, -120.0, -175.0, -260.0)
    path = [beside(-16 if z > 20 else -8, 10 + 0.12 * min(max(30 - z, 0), 110), z) for z in heights[1:-1]]
    radii = [wide * share for share in (1.15, 1.12, 1.05, 1.0, 0.92, 0.85)]
    if aneurysm:
        person.findings.append("aortic_aneurysm")
        radii[4] *= 1.9
    arch = [np.array([4.0, 34.0, 70.0]), np.array([8.0, 28.0, 105.0]), np.array([-8.0, 6.0, 122.0]), path[0]]
    box = ((-70, -110, -280), (60, 80, 240))
    person.parts += [
        Part("vessel_wall", tube(path, [radius + 1.5 for radius in radii]), box, "aorta"),
        Part("aorta_blood", tube(path, radii), box, "aorta"),
        Part("aorta_blood", tube(arch, (15, 15, 13.5, wide * 1.15)), box, "aorta"),
    ]
    legs = [(path[-1], path[-1] + np.array([side * 34.0, 0.0, -70.0]), 0.8 * wide, 7.0) for side in (-1, 1)]
    person.parts.append(Part("aorta_blood", tubes(legs), box, ""))
    cava: list[Vector] = [beside(20, 20, -230), beside(20, 22, -120), beside(20, 26, -60), (22, -4, -10), (24, 18, 30)]
    person.parts.append(Part("blood", tube(cava, (11, 11, 12, 12, 12)), box))
    person.parts.append(Part("portal_blood", tube([(2, 2, -92), (20, -4, -70)], (7, 7)), box))


def _branches(
    rng: np.random.Generator, root: Vector, goals: tuple[Vector, ...], radius: float
) -> list[tuple[Vector, Vector, float, float]]:
    pieces: list[tuple[Vector, Vector, float, float]] = []
    for goal in goals:
        end = np.asarray(goal, float) + rng.normal(0, 6, 3)
        bend = (np.asarray(root, float) + end) / 2 + rng.normal(0, 6, 3)
        pieces += [(root, bend, radius, 0.8 * radius), (bend, end, 0.8 * radius, 0.4 * radius)]
        twig = end + rng.normal(0, 18, 3)
        pieces.append((bend, twig, 0.6 * radius, 0.3 * radius))
    return pieces


def _hollow(person: Body, shape: Shape, room: Shape, content: str, box: tuple[Vector, Vector], wall: float) -> None:
    person.parts.append(Part("gut_wall", common(shape, room), box))
    person.parts.append(Part(content, common(grown(shape, -wall), room), box))
