"""Features of a store or of labelled images into a folder: the Python twins of `medssl embed`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medssl.data.target_files import read_images
from medssl.errors import UsageError
from medssl.files import atomic_path, prepare_output_folder, write_json
from medssl.inference.embedding import MOST_BOXES, Boxes, Embeddings, embed
from medssl.inference.embedding_file import write_embeddings
from medssl.inference.frozen import load_frozen
from medssl.inference.labelled import prepared_volumes
from medssl.inference.model import resolve_device
from medssl.inference.volumes import Volume, volumes_of_store
from medssl.networks.pooling import Pooling, Stages
from medssl.preprocessing.store import Store
from medssl.transfer.images import ImageOptions

FEATURES, THUMBNAILS, FACTS = "features.parquet", "thumbnails.npz", "run.json"
KIND = "embedding"
EDGE = 48


def embed_store(
    checkpoint: Path,
    store: Path,
    out: Path,
    *,
    stages: Stages = "all",
    pooling: Pooling = "mean",
    boxes: Boxes = "cover",
    most_boxes: int = MOST_BOXES,
    split: str = "all",
    untrained: bool = False,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    quiet: bool = False,
) -> Embeddings:
    """Write a feature of each volume of a store, and a small picture of each for the map in the report.

    `out` gets `features.parquet`, `thumbnails.npz` (uint8, one middle slice per volume) and `run.json`. None of them
    names a path or tells more of a patient than the pseudonym.

    Args:
        checkpoint: A RUN or a checkpoint file.
        store: A store.
        out: Folder to write to.
        stages: `all`, `last`, or numbers of stages.
        pooling: `mean`, or `mean+max`.
        boxes: `cover` the volume, or the `centre` box only.
        most_boxes: Boxes of a volume at most.
        split: `train`, `validation`, `test` or `all`.
        untrained: Use the checkpoint's network with random weights.
        seed: Of the random weights.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        overwrite: Replace what is in `out`.
        quiet: Show no progress.

    Raises:
        UsageError: If the split is empty, channels or stages do not fit, or `out` is taken.
        DataError: If a feature is not a number; nothing is written then.
    """
    frozen = load_frozen(checkpoint, untrained=untrained, seed=seed, device=resolve_device(device))
    opened = Store.open(store)
    volumes = volumes_of_store(opened, split=split)
    prepare_output_folder(out, resume=None, overwrite=overwrite, owned=_is_ours)
    found = embed(frozen, volumes, stages=stages, pooling=pooling, boxes=boxes, most_boxes=most_boxes, quiet=quiet)
    found.facts["store_hash"] = opened.hash
    return _written(out, found, volumes, split)


def embed_images(
    checkpoint: Path,
    dataset: Path,
    out: Path,
    *,
    labels: Path | None = None,
    stages: Stages = "all",
    pooling: Pooling = "mean",
    split: str = "all",
    fit: str = "whole",
    patch_size: tuple[int, ...] | None = None,
    options: ImageOptions | None = None,
    cache: Path | None = None,
    untrained: bool = False,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    quiet: bool = False,
) -> Embeddings:
    """Write a feature of each image of a data set, brought to the patch as by `medssl finetune classification`.

    As `embed_store`, with a column `label` where labels are known.

    Args:
        checkpoint: A RUN or a checkpoint file.
        dataset: A CSV of paths (labels may be missing), a folder for each class, a MedMNIST .npz, an INDEX or a STORE.
        out: Folder to write to.
        labels: CSV of labels for an INDEX or a STORE.
        stages: `all`, `last`, or numbers of stages.
        pooling: `mean`, or `mean+max`.
        split: `train`, `validation`, `test` or `all`.
        fit: How an image is brought to the patch.
        patch_size: What the encoder sees.
        options: What is done to every image.
        cache: Folder for the prepared images; by default a temporary one.
        untrained: Use the checkpoint's network with random weights.
        seed: Of the random weights.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        overwrite: Replace what is in `out`.
        quiet: Show no progress.

    Raises:
        UsageError: If the split is empty, options or channels do not fit, or `out` is taken.
        DataError: If the data set or an image cannot be used, or a feature is not a number; nothing is written then.
    """
    targets, texts = read_images(dataset, labels)
    kept = [row for row, case in enumerate(targets.cases) if split in ("all", case.split)]
    if not kept:
        raise UsageError(f"{dataset} has no image in the split '{split}'. Use --split all.")
    targets = targets.with_cases(targets.cases[row] for row in kept)
    prepare_output_folder(out, resume=None, overwrite=overwrite, owned=_is_ours)
    chosen = options or ImageOptions(quiet=quiet)
    with prepared_volumes(targets, dataset, checkpoint, fit, patch_size, chosen, cache) as (volumes, patch):
        frozen = load_frozen(
            checkpoint, untrained=untrained, seed=seed, patch_size=patch, device=resolve_device(device)
        )
        found = embed(frozen, volumes, stages=stages, pooling=pooling, boxes="centre", quiet=quiet)
        shown = tuple(texts[row] for row in kept)
        found = dataclasses.replace(found, labels=shown if any(shown) else ())
        return _written(out, found, volumes, split)


def _is_ours(folder: Path) -> bool:
    return (folder / FEATURES).is_file()


def _written(out: Path, found: Embeddings, volumes: list[Volume], split: str) -> Embeddings:
    found.require_finite()
    write_embeddings(out / FEATURES, found)
    write_thumbnails(out / THUMBNAILS, volumes)
    write_json(
        out / FACTS,
        {"kind": KIND, "volumes": len(found), "width": found.features.shape[1], "split": split, **found.facts},
    )
    return found


def write_thumbnails(path: Path, volumes: list[Volume]) -> None:
    """Write a picture of each volume's middle, (N, 48, 48) uint8 with their ids; no pickled objects."""
    pictures = np.stack([thumbnail(volume) for volume in volumes])
    ids = np.array([volume.id for volume in volumes])
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        np.savez_compressed(handle, ids=ids, pictures=pictures)


def thumbnail(volume: Volume, edge: int = EDGE) -> NDArray[np.uint8]:
    """Return the middle slice of the first channel, whole, from the 1st to the 99th percentile.

    Radiological view of a volume: anterior is up, the patient's right on the left. Pictures stand as they are.

    Returns:
        Shape: (edge, edge).
    """
    _, depth, height, width = volume.shape
    middle = depth // 2
    image = volume.read((middle, 0, 0), (middle + 1, height, width))[0, 0]
    low, high = np.percentile(image[np.isfinite(image)], (1, 99)) if np.isfinite(image).any() else (0.0, 1.0)
    scaled = np.clip((np.nan_to_num(image, nan=low) - low) / max(high - low, 1e-6), 0, 1)
    # The longest side fills the picture.
    side = max(height, width)
    rows, columns = ((np.arange(edge) + 0.5) * side / edge - (side - size) / 2 for size in (height, width))
    inside = (rows[:, None] >= 0) & (rows[:, None] < height) & (columns >= 0) & (columns < width)
    picked = scaled[np.clip(rows.astype(int), 0, height - 1)[:, None], np.clip(columns.astype(int), 0, width - 1)]
    picture = (255 * np.where(inside, picked, 0)).astype(np.uint8)
    return picture[::-1, ::-1] if depth > 1 else picture
