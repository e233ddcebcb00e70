"""A contact sheet of an augmentation policy: what it does to a volume of the user's own, all at once and one by one."""

from __future__ import annotations

import dataclasses
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from medssl.augmentation.catalogue import CATALOGUE
from medssl.augmentation.policy import AugmentationSettings, Policy, PolicySettings, known_modality, policy_for
from medssl.config import apply_overrides, check_settings, merged
from medssl.data.batch import Batch
from medssl.data.draw import Draw
from medssl.data.loader import CropLoader
from medssl.data.sampling import CropSettings
from medssl.errors import UsageError
from medssl.files import write_bytes
from medssl.preprocessing.orient import FLAT_MODALITIES
from medssl.preprocessing.store import Store

# Edges of the patch at most: a sheet is looked at, and larger patches show the same.
LARGEST = {2: 224, 3: 96}
# Transforms that mix samples need others beside the one that is drawn.
MATES = 2
INCHES = 1.5
DOTS_PER_INCH = 90
# Inches for the names on the left.
MARGIN = 1.3
MOVES = ("rotation", "scale", "elastic", "rot90", "mirror")


@dataclass(frozen=True)
class _Row:
    """One line of the sheet: a name, and how each of its pictures came about."""

    name: str
    images: list[Tensor]
    notes: list[str]


def contact_sheet(
    source: Path,
    out: Path,
    *,
    purpose: str = "strong",
    patch_size: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    draws: int = 5,
    seed: int = 0,
    quiet: bool = False,
) -> Path:
    """Draw a policy on a volume: a line for the whole of it, then one for each of its transforms, always applied.

    Args:
        source: A store, or a volume, folder or DICOM series, which is preprocessed at its own voxel size first.
        out: The PNG to write.
        purpose: One of `medssl.augmentation.policy.PURPOSES`.
        patch_size: (Z, Y, X) or (Y, X); by default what fits the volume, up to 96 voxels in 3D and 224 in 2D.
        overrides: Settings `a.b=c` of `AugmentationSettings`, for example `modality=MR` or `policy=mine.yaml`.
        draws: Pictures of each line beside the original.
        seed: Of the crop and of what is drawn.
        quiet: Show no progress.

    Raises:
        UsageError: If a name or a setting is unknown, or the source does not exist.
        DataError: If the source holds no usable volume.
    """
    settings = check_settings(AugmentationSettings, apply_overrides({}, overrides), "--set")
    with tempfile.TemporaryDirectory() as scratch:
        store = _store_of(source, Path(scratch), quiet)
        modality = settings.modality or store.entry(store.ids[0]).modality
        patch = _patch_of(store, patch_size)
        policy = policy_for(purpose, {modality}, patch, settings)
        settings = settings.model_copy(update={"modality": known_modality(modality)})
        batch = _read(store, policy, seed)
    rows = [_row("whole policy", policy, batch, draws, seed)]
    for name, only in _one_by_one(policy.by_modality[known_modality(modality)]):
        alone = settings.model_copy(update={"overrides": merged(settings.overrides, only)})
        rows.append(_row(name, policy_for(purpose, {modality}, patch, alone), batch, draws, seed))
    which = f"a crop of 1 of {len(store)} volumes" if len(store) > 1 else "the volume"
    size = " x ".join(map(str, policy.patch_size))
    title = f"policy {purpose} on {known_modality(modality)}: {which}, {size} voxels"
    upright = batch.modality[0] in FLAT_MODALITIES
    write_bytes(out, _picture(rows, batch.spacing_mm[0].tolist(), title, upright))
    return out


def _store_of(source: Path, scratch: Path, quiet: bool) -> Store:
    if not source.exists():
        raise UsageError(f"{source} does not exist. Give a store, a volume, or a folder of one DICOM series.")
    if source.is_dir() and ((source / "store.json").is_file() or next(source.glob("*.b2nd"), None) is not None):
        return Store.open(source)
    from medssl.archive.index import index
    from medssl.preprocessing.run import preprocess

    folder = source
    if not (source.is_dir() and ((source / "volumes.parquet").is_file() or (source / "imagesTr").is_dir())):
        folder = scratch / "index"
        key = scratch / "key"
        key.touch(mode=0o600)
        key.write_bytes(b"a key for pseudonyms that are never shown")
        index([source], folder, key_file=key, workers=1, quiet=quiet)
    preprocess(folder, scratch / "store", spacing="native", workers=1, quiet=quiet)
    return Store.open(scratch / "store")


def _patch_of(store: Store, patch_size: Sequence[int] | None) -> tuple[int, ...]:
    if patch_size is not None:
        return tuple(patch_size)
    shape = store.entry(store.ids[0]).shape[1:]
    size = shape[1:] if shape[0] == 1 else shape
    return tuple(min(edge, LARGEST[len(size)]) for edge in size)


def _read(store: Store, policy: Policy, seed: int) -> Batch:
    crops = CropSettings(
        patch_size=policy.patch_size,
        batch_size=1 + MATES,
        read_size=policy.read_size,
        foreground_probability=1.0,
        channels="random",
    )
    with CropLoader(store, crops, seed=seed, split="all") as loader:
        return next(loader.batches())


def _one_by_one(policy: PolicySettings) -> list[tuple[str, dict[str, Any]]]:
    """Return, for each transform of a policy, the overrides that leave it alone and apply it always."""
    moves = [name for name in MOVES if hasattr(policy.spatial, name)]
    still: dict[str, Any] = {name: {"probability": 0.0} for name in moves} | {"shift": 0.0}
    quiet = dict.fromkeys(policy.intensity)
    nothing: dict[str, Any] = {"spatial": still, "intensity": quiet, "library": []}
    rows = []
    for name in moves:
        if getattr(policy.spatial, name).probability > 0:
            rows.append((name, {**nothing, "spatial": still | {name: {"probability": 1.0}}}))
    for entry in policy.library:
        always = entry.model_copy(update={"probability": 1.0}).model_dump(mode="json")
        rows.append((entry.transform, {**nothing, "library": [always]}))
    for name, settings in policy.transforms("policy").items():
        if settings.probability > 0:
            always = {"probability": 1.0} | ({"per_channel": 1.0} if hasattr(settings, "per_channel") else {})
            alone = {**(policy.intensity[name] or {}), **always}
            rows.append((name, {**nothing, "intensity": {**quiet, name: alone}}))
    return rows


def _row(name: str, policy: Policy, batch: Batch, draws: int, seed: int) -> _Row:
    as_read = policy.settings.model_copy(update={"overrides": {}, "policy": None})
    plain = policy_for("none", policy.by_modality, policy.patch_size, as_read)
    images = [plain.view(batch, Draw(seed, batch.sample_index)).image[0, 0]]
    notes = ["as read"]
    for number in range(draws):
        drawn = dataclasses.replace(batch, sample_index=batch.sample_index + number * len(batch))
        view = policy.view(drawn, Draw(seed, drawn.sample_index))
        images.append(view.image[0, 0])
        notes.append(_note(name, view.parameters))
    return _Row(name, images, notes)


def _note(name: str, parameters: dict[str, dict[str, Tensor]]) -> str:
    """Return the drawn strength of the transform that a line shows."""
    if name in parameters:
        values = parameters[name][CATALOGUE[name].neutral[0]][0].flatten()
    elif name in ("rotation", "scale"):
        values = parameters["spatial"]["angle_degrees" if name == "rotation" else "scale"][0]
        values = values[-1:] if name == "scale" else values
    else:
        return ""
    return " ".join(f"{value:.2g}" for value in values[:3].tolist())


def _picture(rows: Sequence[_Row], spacing_mm: Sequence[float], title: str, upright: bool) -> bytes:
    from matplotlib.figure import Figure

    lines = [(row, cut) for row in rows for cut in _cuts(row.images, spacing_mm)]
    shares = [float(np.clip(slices[0].shape[0] * aspect / slices[0].shape[1], 0.3, 2)) for _, (slices, aspect) in lines]
    columns = len(rows[0].images)
    width, height = INCHES * columns + MARGIN + 0.05, INCHES * sum(shares) + 0.16 * len(lines) + 0.5
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH)
    figure.suptitle(title, fontsize=10, y=1 - 0.08 / height, va="top")
    margins = {"left": MARGIN / width, "right": 1 - 0.05 / width, "bottom": 0.05 / height, "top": 1 - 0.45 / height}
    spaces = {"wspace": 0.03, "hspace": 0.16 * len(lines) / (INCHES * sum(shares)), "height_ratios": shares}
    axes = np.asarray(figure.subplots(len(lines), columns, squeeze=False, gridspec_kw={**margins, **spaces}))
    low, high = _window(rows[0].images[0])
    # A picture keeps its rows, the first on top; slices of a volume run to anterior or superior.
    origin: Literal["upper", "lower"] = "upper" if upright and rows[0].images[0].ndim == 2 else "lower"
    for number, (line, (row, (slices, aspect))) in enumerate(zip(axes, lines, strict=True)):
        first = number == 0 or lines[number - 1][0] is not row
        for axis, content, note in zip(line, slices, row.notes, strict=True):
            axis.imshow(content, cmap="gray", vmin=low, vmax=high, origin=origin, aspect=aspect)
            axis.set_xticks([])
            axis.set_yticks([])
            if first and note:
                axis.set_title(note, fontsize=6, pad=2)
        if first:
            line[0].set_ylabel(row.name.replace("_", " "), fontsize=8, rotation=0, ha="right", va="center")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _cuts(images: Sequence[Tensor], spacing_mm: Sequence[float]) -> list[tuple[list[NDArray[np.float32]], float]]:
    """Return the axial and the coronal mid-slices of images, or the images themselves in 2D, with their aspect."""
    arrays = [image.float().cpu().numpy() for image in images]
    z, y, x = spacing_mm
    if arrays[0].ndim == 2:
        return [(arrays, y / x)]
    axial = [array[array.shape[0] // 2] for array in arrays]
    coronal = [array[:, array.shape[1] // 2] for array in arrays]
    return [(axial, y / x), (coronal, z / x)] if arrays[0].shape[0] > 1 else [(axial, y / x)]


def _window(image: Tensor) -> tuple[float, float]:
    values = image.float().cpu().numpy()
    low, high = np.percentile(values[np.isfinite(values)], (0.5, 99.5))
    return float(low), float(max(high, low + 1e-6))
