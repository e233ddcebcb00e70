"""Checkpoints for other tools: nnU-Net's -pretrained_weights, nnssl's reader, safetensors."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import Tensor

from medssl.errors import CheckpointError, DataError, UsageError, unknown_name
from medssl.files import atomic_path, write_json
from medssl.networks.architecture import Architecture
from medssl.networks.build import build_from_architecture
from medssl.training.checkpoint import save_checkpoint
from medssl.training.nnssl_plan import adaptation_plan
from medssl.transfer.overlay import KeyReport, overlay
from medssl.transfer.plans import PLANS_NAME, configuration_name, fit_patch
from medssl.transfer.source import Source, load_source

logger = logging.getLogger(__name__)

FORMATS = ("nnunet", "nnssl", "safetensors")


def export(run: Path, format: str, out: Path, plans: Path | None = None) -> Path:
    """Write a checkpoint for another tool; a JSON beside it says what became of each key.

    Args:
        run: A pretraining RUN or a checkpoint file.
        format: `nnunet` for `nnUNetv2_train -pretrained_weights`, `nnssl` for nnU-Net's reader of nnssl checkpoints, or
            `safetensors` with the description as JSON.
        out: File to write.
        plans: For `nnunet`: nnU-Net plans that the file shall fit. Where their network is another one,
            `<out>_plans.json` is written beside the file: the same plans with our network, under the name
            `medSSLPlans`, which use the data as they are preprocessed already. Without plans, such a file is made from
            the checkpoint alone.

    Returns:
        The file.

    Raises:
        UsageError: If the format does not exist or plans are given to another one.
        CheckpointError: If the checkpoint cannot be used.
    """
    run, out = Path(run), Path(out)
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    if plans is not None and format != "nnunet":
        raise UsageError(f"--plans is for --format nnunet; {format} does not depend on a data set.")
    if out.is_dir():
        raise UsageError(f"{out} is a folder; --out needs the name of a file.")
    source = load_source(run)
    if format == "nnssl":
        return _nnssl(source, out)
    if format == "safetensors":
        return _safetensors(source, out)
    return _nnunet(source, out, plans)


def _nnunet(source: Source, out: Path, plans: Path | None) -> Path:
    target, channels, notes, fits = _target_plans(source, plans)
    name = configuration_name(source.architecture.dimensions)
    network = Architecture.from_json(target["configurations"][name]["architecture"])
    # nnU-Net never takes the output layers, so their number does not matter.
    unet = build_from_architecture(network, channels, 2, deep_supervision=True, seed=0)
    report = overlay(unet, source.weights, decoder=source.trains_decoder)
    _require_encoder(report)
    weights = {key: value for key, value in unet.state_dict().items() if ".seg_layers." not in key}
    save_checkpoint(out, {"network_weights": weights})
    _beside(out, "_plans.json").unlink(missing_ok=True)
    if not fits:
        write_json(_beside(out, "_plans.json"), target)
        notes.append(
            f"The plans fit {_beside(out, '_plans.json').name}: copy it to "
            f"nnUNet_preprocessed/DATASET/{PLANS_NAME}.json "
            f"and train with -p {PLANS_NAME}."
        )
    _write_report(out, report, notes)
    return out


def _target_plans(source: Source, plans: Path | None) -> tuple[dict[str, Any], int, list[str], bool]:
    """Return plans that the weights fit, their input channels, what to know, and if they are the given ones."""
    name = configuration_name(source.architecture.dimensions)
    if plans is None:
        return _plans_of_checkpoint(source, name), source.in_channels, _notes_of_checkpoint(source), False
    given = _read_plans(plans, name)
    configuration = given["configurations"][name]
    channels = len(configuration["normalization_schemes"])
    notes = []
    if given.get("transpose_forward") != [0, 1, 2]:
        notes.append(
            f"The plans turn the axes ({given.get('transpose_forward')}); the kernels were trained on (z, y, x)."
        )
    if given.get("image_reader_writer") != "NibabelIOWithReorient":
        notes.append(
            f"The plans read images with {given.get('image_reader_writer')}, whose axes depend on the file; the "
            'kernels were trained on RAS+. Set "overwrite_image_reader_writer": "NibabelIOWithReorient" in '
            "dataset.json and plan again."
        )
    if _same_network(Architecture.from_json(configuration["architecture"]), source.architecture):
        return given, channels, notes, True
    adapted = deepcopy(given)
    adapted["plans_name"] = PLANS_NAME
    kept = {
        **configuration,
        "architecture": source.architecture.to_json(),
        "patch_size": fit_patch(source.architecture, configuration["median_image_size_in_voxels"], source.patch_size),
        "batch_size": 2,
    }
    adapted["configurations"] = {name: kept}
    return adapted, channels, notes, False


def _read_plans(plans: Path, name: str) -> dict[str, Any]:
    try:
        given: dict[str, Any] = json.loads(Path(plans).read_text())
        configuration = given["configurations"][name]
        (
            configuration["architecture"],
            configuration["normalization_schemes"],
            configuration["median_image_size_in_voxels"],
        )
    except (OSError, ValueError) as error:
        raise DataError(f"{plans} cannot be read as nnU-Net plans: {error}") from error
    except (KeyError, TypeError) as error:
        known = ", ".join(given.get("configurations", {})) if isinstance(given, dict) else "none"
        raise DataError(
            f"{plans} has no usable configuration {name} ({error} is missing; there are: {known}). Give "
            "nnUNetPlans.json of "
            "nnUNet_preprocessed/DATASET, written by nnU-Net 2.5 or later."
        ) from error
    return given


def _same_network(first: Architecture, second: Architecture) -> bool:
    def plain(value: Architecture) -> Any:
        name = value.network_class_name.rpartition(".")[2]
        return name, json.loads(json.dumps(value.arch_kwargs))

    return bool(plain(first) == plain(second))


def _plans_of_checkpoint(source: Source, name: str) -> dict[str, Any]:
    dimensions = source.architecture.dimensions
    spacing = list(source.spacing_mm or (1.0, 1.0, 1.0))
    patch = list(source.patch_size or [stride * 4 for stride in source.architecture.total_stride])
    resampling = "resample_data_or_seg_to_shape"
    image = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    schemes = ["CTNormalization" if source.facts.get("modalities") == ["CT"] else "ZScoreNormalization"]
    empty = {
        "mean": 0.0,
        "median": 0.0,
        "std": 1.0,
        "min": 0.0,
        "max": 0.0,
        "percentile_00_5": 0.0,
        "percentile_99_5": 0.0,
    }
    return {
        "dataset_name": "Dataset000_any",
        "plans_name": PLANS_NAME,
        "original_median_spacing_after_transp": spacing,
        "original_median_shape_after_transp": [1] * (3 - dimensions) + patch,
        "image_reader_writer": "NibabelIOWithReorient",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {
            name: {
                "data_identifier": f"{PLANS_NAME}_{name}",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": patch,
                "median_image_size_in_voxels": [float(edge) for edge in patch],
                "spacing": spacing[3 - dimensions :],
                "normalization_schemes": schemes * source.in_channels,
                "use_mask_for_norm": [False] * source.in_channels,
                "resampling_fn_data": resampling,
                "resampling_fn_seg": resampling,
                "resampling_fn_data_kwargs": image,
                "resampling_fn_seg_kwargs": {**image, "is_seg": True, "order": 1},
                "resampling_fn_probabilities": resampling,
                "resampling_fn_probabilities_kwargs": {**image, "order": 1},
                "architecture": source.architecture.to_json(),
                "batch_dice": dimensions == 2,
            }
        },
        "experiment_planner_used": "medssl",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(channel): empty for channel in range(source.in_channels)},
    }


def _notes_of_checkpoint(source: Source) -> list[str]:
    notes = ["No --plans were given: these plans know nothing of a data set. Spacing and patch are the pretraining's."]
    if source.facts.get("modalities") == ["CT"]:
        notes.append(
            "CT is normalised by numbers of the data set: give its plans with --plans, or these will blank the images."
        )
    return notes


def _nnssl(source: Source, out: Path) -> Path:
    plan = adaptation_plan(
        source.architecture,
        in_channels=source.in_channels,
        patch_size=source.patch_size or [stride * 4 for stride in source.architecture.total_stride],
        spacing_mm=source.spacing_mm,
        modalities=source.facts.get("modalities") or ["MR"],
    )
    unet, report = _whole(source)
    save_checkpoint(out, {"network_weights": unet, "nnssl_adaptation_plan": plan, "citations": source.citations})
    _write_report(out, report, [])
    # The reader's downloads expect this file beside the checkpoint.
    write_json(_beside(out, "_adaptation_plan.json"), plan)
    return out


def _safetensors(source: Source, out: Path) -> Path:
    from safetensors.torch import save_file

    weights, report = _whole(source)
    # The format has no shared tensors: one name per tensor is written, the aliases are listed in the JSON.
    names: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for key, value in weights.items():
        first = names.setdefault(value.data_ptr(), key)
        if first != key:
            aliases[key] = first
    single = {key: value.contiguous() for key, value in weights.items() if key not in aliases}
    with atomic_path(out) as temporary:
        save_file(single, temporary, metadata={"format": "pt", "producer": "medssl"})
    write_json(
        _beside(out, ".json"),
        {
            "architecture": source.architecture.to_json(),
            "in_channels": source.in_channels,
            "patch_size": source.patch_size,
            "spacing_mm": source.spacing_mm,
            "trains_decoder": source.trains_decoder,
            "aliases": aliases,
            "facts": source.facts,
            "keys": report.to_json()["counts"],
        },
    )
    return out


def _whole(source: Source) -> tuple[dict[str, Tensor], KeyReport]:
    """Return the full state dict of the U-Net, every alias in place."""
    heads = next(
        (value.shape[0] for key, value in source.weights.items() if ".seg_layers." in key and key.endswith("weight")), 1
    )
    unet = build_from_architecture(source.architecture, source.in_channels, int(heads), seed=0)
    report = overlay(unet, source.weights, decoder=True, heads=True)
    _require_encoder(report)
    return unet.state_dict(), report


def _require_encoder(report: KeyReport) -> None:
    lost = [name for name in (*report.missing, *report.mismatched) if name.startswith("encoder.")]
    if lost:
        raise CheckpointError(
            f"{len(lost)} weights of the encoder do not fit the target network, for example {lost[0]}. Use plans "
            "written "
            "from this checkpoint."
        )


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(out.name.removesuffix(out.suffix) + ending)


def _write_report(out: Path, report: KeyReport, notes: list[str]) -> None:
    content: Mapping[str, Any] = {"summary": report.summary(), "notes": notes, **report.to_json()}
    write_json(_beside(out, "_keys.json"), content)
    for note in notes:
        logger.info("%s", note)
