"""The stores of `out_of_distribution.py`: what is known, and strangers of the same size and resolution.

A stranger that is larger, or whose image is finer, is told by that alone. So the atria are cut to boxes in mm that
hippocampi have, and the ultrasound images are shrunk whole to the 28 x 28 pixels of the X-rays.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from _hippocampus_target import divide
from PIL import Image

from medssl.files import write_text
from medssl.preprocessing.run import check_options, preprocess_source
from medssl.preprocessing.source import Job, Source

SEED = 0
EDGE = 28
#: Folders of the data.
ULTRASOUND, XRAY, ATRIUM, HIPPOCAMPUS = "breast_ultrasound", "pneumoniamnist", "left_atrium", "hippocampus"


def shrunk_ultrasound(data: Path, out: Path, judging: int) -> list[Job]:
    """Write grey images of 28 x 28 pixels, and `OUT.csv` of their classes; `judging` of them are no training images."""
    out.mkdir(parents=True, exist_ok=True)
    paths = {path.stem: path for path in sorted((data / ULTRASOUND).glob("*/*.png"))}
    held = divide(list(paths), judging)
    jobs, lines = [], ["volume_id,label,split"]
    for name, path in paths.items():
        small = out / f"{name}.png"
        if not small.is_file():
            Image.open(path).convert("L").resize((EDGE, EDGE), Image.Resampling.BICUBIC).save(small)
        split = "validation" if name in held else "train"
        jobs.append(Job(name, ("US",), name, split, images=(str(small),)))
        lines.append(f"{name},{path.parent.name},{split}")
    write_text(out.with_suffix(".csv"), "\n".join(lines) + "\n")
    return jobs


def xrays(data: Path, out: Path, count: int) -> list[Job]:
    """Write evenly spaced validation images of PneumoniaMNIST."""
    out.mkdir(parents=True, exist_ok=True)
    images = np.load(data / XRAY / "pneumoniamnist_trainval.npz")["val_images"]
    jobs = []
    for place in np.linspace(0, len(images) - 1, count).round().astype(int):
        path = out / f"xray_{place:03d}.png"
        if not path.is_file():
            Image.fromarray(images[place]).save(path)
        jobs.append(Job(path.stem, ("XR",), path.stem, "test", images=(str(path),)))
    return jobs


def cut_atria(data: Path, out: Path, count: int) -> list[Job]:
    """Write the middle of atria, each as large in mm as a hippocampus that is drawn."""
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    images: list[Any] = [nibabel.load(path) for path in sorted((data / HIPPOCAMPUS / "imagesTr").glob("*.nii.gz"))]
    sizes = [np.multiply(image.shape, image.header.get_zooms()) for image in images]
    jobs = []
    for path in sorted((data / ATRIUM / "imagesTr").glob("*_0000.nii.gz"))[:count]:
        image: Any = nibabel.load(path)
        wanted = sizes[rng.integers(len(sizes))] / image.header.get_zooms()
        edges = np.minimum(wanted.round().astype(int), image.shape)
        start = (np.asarray(image.shape) - edges) // 2
        name = path.name.removesuffix("_0000.nii.gz")
        cut = out / f"{name}.nii.gz"
        if not cut.is_file():
            box = tuple(slice(int(a), int(a + n)) for a, n in zip(start, edges, strict=True))
            nibabel.save(image.slicer[box], cut)
        jobs.append(Job(name, ("MR",), name, "test", images=(str(cut),)))
    return jobs


def store_of(jobs: Sequence[Job], spacing: str | tuple[float, ...], out: Path) -> Path:
    """Make a store of volumes."""
    source = Source("nnunet_raw", f"{out.name}, {len(jobs)}", sorted(jobs, key=lambda job: job.volume_id))
    options = check_options(spacing, "by-modality", True, "lossless", None)
    preprocess_source(source, out, options, workers=0, resume=out.exists(), quiet=True)
    return out
