"""A patient's trunk as a list of parts, painted one over the other.

Millimetres: x to the right, y to the front, z to the head; z = 0 is just under the right dome of the diaphragm. The
proportions are a plain adult's; each patient draws its own size, posture, organs and diseases. Nothing here is measured
from a person.
"""

from __future__ import annotations

import numpy as np

from medssl.demo.abdomen import bowel, great_vessels, kidneys, upper_abdomen
from medssl.demo.chest import chest
from medssl.demo.parts import Body, Frame, Part
from medssl.demo.shapes import Point, Waves, column, common, cut, ellipsoid, generator, grown, rough
from medssl.demo.skeleton import skeleton


def body(seed: int, patient: int, *, healthy: bool = False) -> Body:
    """Return the patient with that number; the same numbers give the same patient.

    Args:
        seed: Seed of the archive.
        patient: Number of the patient.
        healthy: Draw no disease.
    """
    rng = generator("body", seed, patient)
    size = rng.normal(1.0, 0.05)
    person = Body(
        seed=seed,
        patient=patient,
        scale=np.clip(size * rng.normal(1.0, 0.03, 3), 0.86, 1.14),
        warp=(
            Waves(rng, (220, 400), 2.5, 4),
            Waves(rng, (220, 400), 2.5, 4),
            Waves(rng, (220, 400), 2.5, 4),
        ),
    )
    disease = (lambda chance: False) if healthy else (lambda chance: bool(rng.random() < chance))
    frame = _trunk(person, rng)
    chest(person, rng, frame, effusion=disease(0.15), nodules=disease(0.2))
    bowel(person, rng, frame)
    upper_abdomen(person, rng, frame, large_spleen=disease(0.15), lesions=disease(0.3))
    kidneys(person, rng, cysts=disease(0.25), swollen=disease(0.1))
    great_vessels(person, rng, frame, aneurysm=disease(0.1))
    person.parts += skeleton(rng, frame.chest, frame.spine)
    return person


def _trunk(person: Body, rng: np.random.Generator) -> Frame:
    cage, depth = rng.normal(133, 5), rng.normal(88, 4)
    fat = float(np.clip(rng.gamma(3.0, 4.5), 4, 32))
    muscle = rng.uniform(11, 17)
    belly_width, belly_depth = rng.normal(126, 5), rng.normal(84, 5) + 0.5 * fat

    def narrowing(z: np.ndarray) -> np.ndarray:
        return np.sqrt(np.clip(1 - np.square(np.maximum(z - 30, 0) / 165), 0.02, 1)).astype(np.float32)

    def blend(z: np.ndarray, top: float, bottom: float) -> np.ndarray:
        share = 1 / (1 + np.exp(-(z + 50) / 25))
        return (bottom + (top - bottom) * share).astype(np.float32)

    chest = column(lambda z: cage * narrowing(z), lambda z: depth * narrowing(z), 2.3)
    belly = column(lambda z: blend(z, cage, belly_width), lambda z: blend(z, depth, belly_depth), 2.3)
    uneven = Waves(rng, (90, 200), 2.0)
    skin = rough(
        column(
            lambda z: blend(z, cage, belly_width) + muscle + fat + 12 * np.square(np.clip((z - 60) / 120, 0, 1)),
            lambda z: blend(z, depth, belly_depth) + muscle + 0.7 * fat,
            2.5,
        ),
        uneven,
    )
    flesh = rough(
        column(
            lambda z: blend(z, cage, belly_width) + muscle + 12 * np.square(np.clip((z - 60) / 120, 0, 1)),
            lambda z: blend(z, depth, belly_depth) + muscle - 0.1 * fat,
            2.4,
        ),
        uneven,
    )
    # The cavities leave room for the muscles beside the spine.
    back = ellipsoid((0, -depth - 12, 0), (72, 46, 900))
    domes = (
        (rng.normal(70, 4), 5.0, rng.normal(8, 5), 88.0),
        (rng.normal(-72, 4), 0.0, rng.normal(-4, 5), 84.0),
        (-8.0, 32.0, rng.normal(-12, 3), 100.0),
    )

    def diaphragm(p: Point) -> np.ndarray:
        """Negative below the diaphragm."""
        x, y, z = p
        height = np.full(x.shape, -500, np.float32)
        for centre_x, centre_y, top, reach in domes:
            fall = np.square((x - centre_x) / reach) + np.square((y - centre_y) / (reach * 1.05))
            np.maximum(height, top - 68 * fall, out=height)
        return z - np.maximum(height, -95)

    person.back = -(depth + muscle + 0.7 * fat) * 0.99
    frame = Frame(
        chest=cut(chest, back, 12),
        belly=cut(belly, back, 14),
        diaphragm=diaphragm,
        scoliosis=Waves(rng, (380, 600), abs(rng.normal(0, 3)), 2),
        spine_y=rng.normal(-46, 2),
    )
    person.parts += [
        Part("skin", skin),
        Part("fat", grown(skin, -2.5)),
        Part("muscle", flesh),
        Part("fat", cut(common(frame.belly, diaphragm), grown(frame.belly, -3))),
        Part("visceral_fat", frame.belly),
    ]
    # Strands of fat between the muscles of the back and the flanks.
    for side in (-1, 1):
        sheet = ellipsoid((side * 74, -depth + 2, -40), (3, 26, 400), tilt=(0, 0, side * -38))
        person.parts.append(Part("fat", common(sheet, grown(flesh, -3)), ((-140, -160, -400), (140, 0, 400))))
    return frame
