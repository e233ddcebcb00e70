"""All intensity transforms by the name that policies use, in the order in which an image goes through them.

First what happens in the patient and the scanner, then what happens on the way to the screen: an artefact of k-space is
made of a clean image, a CT's noise passes through the kernel before its window cuts it, and styles are exchanged last.
"""

from __future__ import annotations

from typing import Any

from medssl.augmentation import (
    acquisition,
    ct,
    ct_artefacts,
    curves,
    fourier,
    intensity,
    kspace,
    mri,
    sharpen,
    ultrasound,
)
from medssl.augmentation.transform import Transform

CATALOGUE: dict[str, type[Transform[Any]]] = {
    transform.name: transform
    for transform in (
        mri.BiasField,
        kspace.Motion,
        kspace.Ghosting,
        kspace.Spike,
        kspace.Gibbs,
        mri.Rician,
        ct_artefacts.Metal,
        ct_artefacts.BeamHardening,
        ct.DoseNoise,
        ct.Kernel,
        ct.SliceThickness,
        ultrasound.Speckle,
        ultrasound.Shadow,
        ultrasound.DepthAttenuation,
        ultrasound.GainCompression,
        acquisition.Anisotropy,
        # From here to gamma in the order of nnU-Net's default training, sharpening beside blur.
        intensity.Noise,
        intensity.Blur,
        sharpen.Sharpen,
        intensity.Brightness,
        intensity.Contrast,
        intensity.LowResolution,
        intensity.InvertedGamma,
        intensity.Gamma,
        curves.Bezier,
        curves.HistogramShift,
        ct.HuWindow,
        fourier.FourierMix,
        fourier.BatchStyle,
    )
}
