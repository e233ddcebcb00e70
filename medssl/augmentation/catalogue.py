"""All intensity transforms by the name that policies use, in the order in which an image goes through them.

First what happens in the patient and the scanner, then what happens on the way to the screen: an artefact of k-space is
made of a clean image, and noise is not sharpened by a filter that came before the detector.
"""

from __future__ import annotations

from typing import Any

from medssl.augmentation import intensity
from medssl.augmentation.transform import Transform

CATALOGUE: dict[str, type[Transform[Any]]] = {
    transform.name: transform
    for transform in (
        # In the order of nnU-Net's default training.
        intensity.Noise,
        intensity.Blur,
        intensity.Brightness,
        intensity.Contrast,
        intensity.LowResolution,
        intensity.InvertedGamma,
        intensity.Gamma,
    )
}
