"""Brings the images of a data set into a store once, at the size that a classifier is shown."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.archive.volume import IMAGE_MODALITY, Volume
from medssl.data.target_arrays import opened_npz
from medssl.data.targets import Case, Targets, few
from medssl.errors import DataError, InputRefused, UsageError
from medssl.files import sha256_of
from medssl.preprocessing.case import Plan, prepare
from medssl.preprocessing.packed import SMALL, PackedWriter
from medssl.preprocessing.run import check_options, preprocess_source
from medssl.preprocessing.source import Job, Source, open_source
from medssl.preprocessing.store import Store, StoreWriter
from medssl.preprocessing.store_files import FAILED_FILE, PACKED, STORE_FILE
from medssl.preprocessing.survey import plan_of
from medssl.progress import progress
from medssl.transfer.image_fit import fit_image

logger = logging.getLogger(__name__)

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
#: What of a store's information says how a new image becomes like those in it.
INPUT = ("normalisation", "spacing", "crop", "fingerprint", "codec")


@dataclass(frozen=True)
class ImageOptions:
    """What is done to every image.

    Args:
        spacing: `native`, `median`, or voxel size (z, y, x) in mm. For pictures, `median` means `native`.
        normalisation: `by-modality`, or the name of one scheme for all.
        modality: Of every image; None believes the files: IMAGE for pictures, OT for volumes that do not say.
        grey: Average the channels, for pictures in grey that are stored as red, green and blue.
    """

    spacing: str | tuple[float, ...] = "median"
    normalisation: str = "by-modality"
    modality: str | None = None
    grey: bool = False
    workers: int | None = field(default=None, compare=False)
    quiet: bool = field(default=False, compare=False)


def volume_store(targets: Targets, dataset: Path, folder: Path, options: ImageOptions) -> tuple[Store, dict[str, str]]:
    """Return a store with the images of a data set, made in `folder` unless it is there or the data set is one.

    A store is known by what it was made of (a .npz by the hash of its content, files by size and time) and by what was
    done to it, so that runs that share the folder share it. Of a .npz it is made whole or not at all.

    Statistics that normalisation needs (CT and PET) are taken over all images, without looking at labels.

    Args:
        targets: The cases.
        dataset: Where they were read from.
        folder: Where stores are kept.
        options: What is done to every image.

    Returns:
        The store, and the id in it of each case by name.

    Raises:
        DataError: If an image cannot be used; its row and the reason are named.
    """
    ids = {case.name: case.volume_id or case.name for case in targets.cases}
    if targets.source == "volumes" and not (dataset / "volumes.parquet").is_file():
        return Store.open(dataset), ids
    if targets.source == "npz":
        return _of_npz(targets, dataset, folder, options), ids
    source = _source(targets, dataset, folder, options)
    pictures = all(case.path is not None and _is_picture(case.path) for case in targets.cases)
    # A picture keeps its frame: cut to what is not black, pictures of one data set would differ in size.
    # The pixel size of a picture is that of a print, if anything: only one that is asked for counts.
    spacing = "native" if pictures and options.spacing == "median" else options.spacing
    checked = check_options(spacing, options.normalisation, not pictures, "lossless", None)
    out = folder / f"volumes-{_digest(source.hash, repr(checked))}"
    if not (out / STORE_FILE).is_file():
        preprocess_source(
            source, out, checked, workers=options.workers, resume=(out / "unfinished.json").is_file(),
            overwrite=False, quiet=options.quiet,
        )  # fmt: skip
    _refuse_failed(out, targets, ids)
    return Store.open(out), ids


def fitted_store(
    store: Store,
    cases: Mapping[str, str],
    folder: Path,
    *,
    patch: Sequence[int],
    window: Sequence[int],
    fit: str,
    options: ImageOptions,
) -> Store:
    """Return a store of the same images at the size that a patch needs; see `medssl.transfer.image_fit`.

    Small images (`medssl.preprocessing.packed.SMALL`) are packed and made whole or not at all; of larger ones, those
    that an interrupted run made are kept.

    Args:
        store: The images.
        cases: Id in it by the name of each case; the new store has the names.
        folder: Where stores are kept.
        patch: What the network sees, (Z, Y, X).
        window: What augmentation reads around it, (Z, Y, X); counts for `crop` only.
        fit: A key of `image_fit.FITS`.
        options: Whether channels are averaged.

    Raises:
        DataError: If the images differ in their number of channels.
    """
    channels = {int(store.row(name)["shape"][0]) for name in cases.values()}
    if len(channels) > 1 and not options.grey:
        few_, most = min(channels), max(channels)
        odd = next(case for case, name in cases.items() if int(store.row(name)["shape"][0]) == few_)
        raise DataError(
            f"Images have {few_} (first: {odd}) and {most} channels; a network takes one number. Use --grey to average "
            "the channels."
        )
    read = tuple(window) if fit == "crop" else tuple(patch)
    settings = {
        "fit": fit,
        "size": list(read),
        "grey": options.grey,
        "source_hash": store.hash,
        "cases": _digest(*sorted(f"{case}={name}" for case, name in cases.items())),
        "spacing": {"mode": "native", "mm": None},
        "normalisation": store.info.get("normalisation"),
    }
    small = 4 * math.prod(read) * max(channels) <= SMALL
    settings |= {"layout": PACKED} if small else {}
    out = folder / f"images-{_digest(json.dumps(settings, sort_keys=True))}"
    if (out / STORE_FILE).is_file():
        return Store.open(out)

    def fitted(name: str) -> tuple[NDArray[np.float32], dict[str, Any]]:
        entry = store.entry(name)
        image = store.read(name, (0, 0, 0), entry.shape[1:])
        image = image.mean(axis=0, keepdims=True) if options.grey else image
        result, spacing = fit_image(image, entry.spacing_mm, patch, window, fit)
        facts = {
            "spacing_mm": list(spacing),
            "modality": entry.modality,
            "patient_key": entry.patient_key,
            "split": entry.split,
            "background": entry.background,
            "foreground": [],
            "normalisation": entry.properties.get("normalisation"),
        }
        return result, {key: value for key, value in facts.items() if value is not None}

    with progress("Fitting images", len(cases), quiet=options.quiet) as advance:
        if small:
            with PackedWriter(out, settings) as packed:
                for case, name in cases.items():
                    packed.add(case, *fitted(name))
                    advance()
                return packed.finish()
        writer = StoreWriter(out, settings, resume=True)
        for case, name in cases.items():
            if not writer.complete(case):
                writer.add(case, *fitted(name))
            advance()
    return writer.finish()


def input_facts(store: Store, options: ImageOptions) -> dict[str, Any]:
    """Return what a new image needs to become like those of a store; JSON-able."""
    facts = {name: store.info[name] for name in INPUT if name in store.info}
    return {**facts, "modality": options.modality, "grey": options.grey}


def prepare_image(
    volume: Volume, facts: Mapping[str, Any], name: str
) -> tuple[NDArray[np.float32], tuple[float, ...], float]:
    """Return a new image as those that were trained on: array (C, Z, Y, X), voxel size (z, y, x) and background.

    Args:
        volume: As decoded.
        facts: What `input_facts` returned.
        name: Seeds the draw of tissue.

    Raises:
        InputRefused: If it cannot be used.
        UsageError: If the store it was trained on does not say how its images were made.
    """
    if any(key not in facts for key in INPUT):
        raise UsageError(
            "The model was trained on a store that does not say how its images were made, so that no new image can be "
            "made alike. Train on a store of `medssl preprocess`, or on the images themselves."
        )
    modality = facts["modality"]
    prepared = prepare(volume, plan_of(facts), name=name, modalities=(modality,) if modality else ())
    array = prepared.array.mean(axis=0, keepdims=True) if facts["grey"] else prepared.array
    return array, tuple(prepared.facts["spacing_mm"]), float(prepared.facts["background"])


def _source(targets: Targets, dataset: Path, folder: Path, options: ImageOptions) -> Source:
    if targets.source == "volumes":
        wanted = {case.volume_id for case in targets.cases}
        whole = open_source(dataset, None, folder / "index", workers=options.workers, quiet=options.quiet)
        jobs = [job for job in whole.jobs if job.volume_id in wanted]
        return Source(whole.kind, _digest(whole.hash, *(job.volume_id for job in jobs)), jobs)
    jobs, stamps = [], []
    for case in targets.cases:
        assert case.path is not None
        status = case.path.stat()
        stamps.append(f"{case.name}|{status.st_size}|{status.st_mtime_ns}")
        jobs.append(
            Job(
                volume_id=case.name,
                modalities=(options.modality or (IMAGE_MODALITY if _is_picture(case.path) else "OT"),),
                patient_key=case.patient_key,
                split="train" if case.split != "validation" else "validation",
                images=(str(case.path),),
            )
        )
    return Source("files", _digest(*stamps, str(options.modality)), sorted(jobs, key=lambda job: job.volume_id))


def _of_npz(targets: Targets, path: Path, folder: Path, options: ImageOptions) -> Store:
    """Write the images of a .npz; their voxels have no size, so that none is changed."""
    if options.spacing not in ("median", "native"):
        raise UsageError("Images of a .npz have no voxel size: leave --spacing away.")
    # Runs that share the folder may use other cases of the same file.
    source_hash = _digest(sha256_of(path), *(case.name for case in targets.cases))
    info = {
        "normalisation": options.normalisation,
        "spacing": {"mode": "native", "mm": None},
        "crop": False,
        "codec": "lossless",
        "fingerprint": {"intensities": {}},
        "modality": options.modality,
        "provenance": {"source": "npz", "source_hash": source_hash, "volumes_selected": len(targets.cases)},
    }
    out = folder / f"volumes-{_digest(json.dumps(info, sort_keys=True))}"
    if (out / STORE_FILE).is_file():
        return Store.open(out)
    plan = plan_of(info)
    with (
        opened_npz(path) as content,
        progress("Reading images", len(targets.cases), quiet=options.quiet) as advance,
        PackedWriter(out, info) as writer,
    ):
        name, images = "", np.empty(0)
        for case in targets.cases:
            assert case.array is not None
            if case.array[0] != name:
                name = case.array[0]
                images = np.asarray(content[name])
            writer.add(case.name, *_prepared(case, images[case.array[1]], plan, options))
            advance()
        return writer.finish()


def _prepared(
    case: Case, image: NDArray[Any], plan: Plan, options: ImageOptions
) -> tuple[NDArray[np.float32], dict[str, Any]]:
    array, channels = _channels_first(image)
    modality = options.modality or IMAGE_MODALITY
    try:
        if not np.isfinite(array).all():
            raise InputRefused("not_finite", "some voxels are NaN or infinite")
        volume = Volume(array, np.eye(4), modality, channels)  # type: ignore[arg-type]
        prepared = prepare(volume, plan, name=case.name, modalities=(modality,))
    except InputRefused as error:
        place = f"{case.array[0]}[{case.array[1]}]" if case.array else case.where
        raise DataError(f"{place}: {error}. Mend or remove the image.") from error
    return prepared.array, {**prepared.facts, "patient_key": case.patient_key, "split": case.split}


def _channels_first(image: NDArray[Any]) -> tuple[NDArray[Any], str]:
    """Return an image of a .npz as (C, Z, Y, X): (Y, X), (Y, X, 3), (Z, Y, X) or (Z, Y, X, 3)."""
    colour = image.ndim > 2 and image.shape[-1] == 3
    channels = np.moveaxis(image, -1, 0) if colour else image[None]
    return (channels[:, None] if channels.ndim == 3 else channels), "colour" if colour else "scalar"


def _refuse_failed(out: Path, targets: Targets, ids: Mapping[str, str]) -> None:
    path = out / FAILED_FILE
    failed = json.loads(path.read_text())["volumes"] if path.is_file() else []
    reasons = {row["volume_id"]: f"{row['code']}, {row['detail']}" for row in failed}
    broken = [f"{case.where}: {reasons[ids[case.name]]}" for case in targets.cases if ids[case.name] in reasons]
    if broken:
        raise DataError(f"{len(broken)} images cannot be used: {few(broken)}. Mend or remove their rows.")


def _is_picture(path: Path) -> bool:
    return path.name.lower().endswith(PICTURES)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
