"""The left atrium as the semi-supervised literature has it: volumes to carry, windows, metrics in voxels.

Only `prepare` needs nibabel; all else runs on a machine with torch, lightning, blosc2 and scipy.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medssl.evaluation.overlap import surface_distances
from medssl.files import atomic_path, write_json
from medssl.preprocessing.store import Store, StoreWriter
from medssl.preprocessing.store_files import LABEL_SUFFIX, STORE_FILE

#: Intensities are rounded to this part of a volume's standard deviation: unrounded, what travels would be three times
#: as large. Float16 holds its multiples exactly.
GRAIN = 0.375
METRICS = ("dice", "jaccard", "hd95", "asd", "assd")
#: Validation cases, from the end of the training list: the 20 test volumes are not at hand.
HELD_OUT = 20


def prepare(dataset: Path, out: Path) -> None:
    """Write the volumes as one file that travels: normalised, rounded, a byte a voxel, packed.

    Args:
        dataset: nnU-Net raw folder with `train_order.txt`.
        out: The file, `.npz`.
    """
    import nibabel

    order = (dataset / "train_order.txt").read_text().split()
    content: dict[str, Any] = {"order": np.array(order)}
    for name in order:
        image = nibabel.nifti1.load(dataset / "imagesTr" / f"{name}_0000.nii.gz")
        truth = nibabel.nifti1.load(dataset / "labelsTr" / f"{name}.nii.gz")
        volume = np.asarray(image.dataobj, np.float64).T
        grains = np.rint((volume - volume.mean()) / volume.std() / GRAIN)
        first = grains.min()
        if (grains - first).max() > 255:
            raise SystemExit(f"{name} spans more than 256 grains of {GRAIN} standard deviations.")
        content[f"{name}.first"] = np.float64(first)
        content[f"{name}.spacing"] = np.array(image.header.get_zooms()[::-1]).round(4)
        content[f"{name}.grains"] = _packed((grains - first).astype(np.uint8))
        content[f"{name}.truth"] = _packed((np.asarray(truth.dataobj).T > 0).astype(np.uint8))
    with atomic_path(out) as temporary:
        np.savez(temporary, **content)


def unpacked(packed: Path, out: Path) -> Store:
    """Return the store of what `prepare` wrote, in the order of the public list; made where it is not there yet."""
    if (out / STORE_FILE).is_file():
        return Store.open(out)
    with np.load(packed) as content:
        order = [str(name) for name in content["order"]]
        writer = StoreWriter(out, {"order": order, "rounded_to_deviations": GRAIN}, resume=True)
        for name in order:
            grains, truth = _unpacked(content[f"{name}.grains"]), _unpacked(content[f"{name}.truth"])
            image = (grains + content[f"{name}.first"]) * GRAIN
            _add(writer, name, image, truth, content[f"{name}.spacing"].tolist())
    return writer.finish()


def made(out: Path, cases: int, shape: tuple[int, int, int]) -> Store:
    """Return a store of noise around bright boxes, for a run that only shows that everything runs."""
    rng = np.random.default_rng(0)
    order = [f"made_{number}" for number in range(cases)]
    writer = StoreWriter(out, {"order": order, "rounded_to_deviations": GRAIN})
    for name in order:
        truth = np.zeros(shape, np.uint8)
        truth[tuple(slice(start, start + 10) for start in rng.integers(2, 6, 3))] = 1
        _add(writer, name, 3 * truth + rng.standard_normal(shape), truth, [1.0, 1.0, 1.0])
    return writer.finish()


def _packed(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an array packed as a whole, without the filter that pays in stores, whose crops are read alone."""
    parameters = blosc2.CParams(codec=blosc2.Codec.ZSTD, clevel=9, filters=[blosc2.Filter.NOFILTER], nthreads=1)
    frame = blosc2.asarray(array, chunks=array.shape, blocks=array.shape, cparams=parameters).to_cframe()
    return np.frombuffer(frame, np.uint8)


def _unpacked(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = blosc2.ndarray_from_cframe(frame.tobytes())[:]
    return found


def _add(writer: StoreWriter, name: str, image: NDArray[Any], truth: NDArray[np.uint8], spacing: list[float]) -> None:
    facts = {
        "spacing_mm": spacing, "modality": "MR", "patient_key": name, "split": "train", "background": 0.0,
        "foreground": [],
    }  # fmt: skip
    writer.add(name, image[None].astype(np.float32), facts, truth.astype(np.int16), "float16")


def subset(store: Store, names: Sequence[str], folder: Path, *, labels: bool) -> Store:
    """Return a store of links to some volumes; without labels nothing in it leads to one.

    Args:
        store: The whole.
        names: Its volumes to take.
        folder: Of the links.
        labels: Whether labels are among them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        for ending in (".b2nd", *([f"{LABEL_SUFFIX}.b2nd"] if labels else [])):
            link = folder / f"{name}{ending}"
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(store.folder / f"{name}{ending}", folder.resolve()))
        facts = json.loads((store.folder / f"{name}.json").read_text())
        write_json(folder / f"{name}.json", {**facts, "has_label": labels})
    rows = [{**store.row(name), "has_label": labels} for name in sorted(names)]
    write_json(folder / STORE_FILE, {**store.info, "volumes": rows})
    return Store.open(folder)


def starts_of(edge: int, window: int, stride: int) -> list[int]:
    """Return where windows begin along an axis; the last one ends with the volume."""
    return [*range(0, edge - window, stride), max(edge - window, 0)]


@torch.no_grad()
def segment(
    network: nn.Module,
    image: NDArray[np.float32],
    window: Sequence[int],
    stride: Sequence[int],
    device: torch.device,
    together: int,
) -> NDArray[np.bool_]:
    """Return where the mean of the windows' probabilities is highest for class 1. Shape: (Z, Y, X).

    Args:
        network: Returns logits of two classes; in evaluation mode, on the device.
        image: At least as large as a window. Shape: (Z, Y, X).
        window: Edges.
        stride: Distance of windows.
        device: Where the network is.
        together: Windows of one call.
    """
    volume = torch.from_numpy(image).to(device)
    # The number of windows over a voxel is the same for both classes, so that the sum decides as the mean does.
    total = torch.zeros(2, *image.shape, device=device)
    axes = [starts_of(*sizes) for sizes in zip(image.shape, window, stride, strict=True)]
    boxes = [
        tuple(slice(start, start + edge) for start, edge in zip(corner, window, strict=True))
        for corner in itertools.product(*axes)
    ]
    for first in range(0, len(boxes), together):
        group = boxes[first : first + together]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = network(torch.stack([volume[box] for box in group])[:, None])
        for box, found in zip(group, logits.float().softmax(dim=1), strict=True):
            total[(slice(None), *box)] += found
    return (total[1] > total[0]).cpu().numpy()


def voxel_scores(prediction: NDArray[np.bool_], truth: NDArray[np.bool_]) -> dict[str, float | None]:
    """Return Dice, Jaccard and distances in voxels, as the literature's program (medpy) defines them, and ASSD.

    `hd95` is the 95th percentile of the distances of both directions together, `asd` the mean distance from the
    prediction's surface to the truth's alone. Where a mask is empty, distances are undefined and None; there the
    literature's program writes 0, which is a perfect distance.
    """
    found, there = int(prediction.sum()), int(truth.sum())
    common = int((prediction & truth).sum())
    scores: dict[str, float | None] = dict.fromkeys(METRICS)
    if found + there:
        scores |= {"dice": 2 * common / (found + there), "jaccard": common / (found + there - common)}
    if found and there:
        forth, back = surface_distances(prediction, truth, (1.0, 1.0, 1.0))
        both = np.concatenate([forth, back])
        scores |= {"hd95": float(np.percentile(both, 95)), "asd": float(forth.mean()), "assd": float(both.mean())}
    return scores
