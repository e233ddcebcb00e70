"""nnU-Net plans written from an architecture: the data decide spacing and normalisation, the checkpoint the network."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from medssl.errors import UsageError
from medssl.networks.architecture import Architecture
from medssl.transfer.nnunet import nnunet_environment, reader_of
from medssl.transfer.raw import RawDataset

logger = logging.getLogger(__name__)

PLANS_NAME = "medSSLPlans"
# Edges of a patch for a network without a pretraining patch; about what fits a GPU with 12 GB at batch size 2.
LONGEST_EDGE = {2: 512, 3: 128}


def configuration_name(dimensions: int) -> str:
    """Return nnU-Net's name of the configuration."""
    return "2d" if dimensions == 2 else "3d_fullres"


def make_plans(
    dataset: RawDataset,
    fingerprint: dict[str, Any],
    architecture: Architecture,
    *,
    patch_size: Sequence[int] | None,
    wanted_patch: Sequence[int] | None = None,
    batch_size: int = 2,
    spacing: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Return plans in nnU-Net's format.

    Axes are never transposed: pretrained kernels must meet the axes they were trained on.

    Args:
        dataset: The data set.
        fingerprint: nnU-Net's fingerprint of it.
        architecture: The network.
        patch_size: Edges in voxels, taken as they are; None derives them from `wanted_patch`.
        wanted_patch: Patch of the pretraining, or None. Edges that are longer than the median image are cut, as
            nnU-Net does.
        batch_size: Crops per step.
        spacing: Target spacing (z, y, x) in mm; None takes the median of the data set by nnU-Net's rule.

    Raises:
        UsageError: If patch or spacing do not fit.
    """
    dimensions = architecture.dimensions
    target = _spacing(fingerprint, spacing)
    shapes = _resampled_shapes(fingerprint, target)
    median_shape = [float(edge) for edge in np.median(shapes, axis=0)]
    if dimensions == 3 and median_shape[0] <= 1:
        raise UsageError("The images are 2D and the network is 3D: use a checkpoint or network with 2 dimensions.")
    if patch_size is None:
        patch = fit_patch(architecture, median_shape[3 - dimensions :], wanted_patch)
    else:
        patch = [int(edge) for edge in patch_size]
        architecture.check_patch(patch)
    schemes, masks = _normalisation(dataset, fingerprint)
    configuration = {
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": int(batch_size),
        "patch_size": patch,
        "median_image_size_in_voxels": [float(edge) for edge in median_shape[3 - dimensions :]],
        "spacing": target[3 - dimensions :],
        "normalization_schemes": schemes,
        "use_mask_for_norm": masks,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
        "architecture": architecture.to_json(),
        "batch_dice": dimensions == 2,
    }
    with nnunet_environment():
        reader = reader_of(dataset).__name__
    plans = {
        "dataset_name": dataset.name,
        "plans_name": PLANS_NAME,
        "original_median_spacing_after_transp": [float(value) for value in np.median(fingerprint["spacings"], axis=0)],
        "original_median_shape_after_transp": [
            round(value) for value in np.median(fingerprint["shapes_after_crop"], axis=0)
        ],
        "image_reader_writer": reader,
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {configuration_name(dimensions): configuration},
        "experiment_planner_used": "medssl",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": fingerprint["foreground_intensity_properties_per_channel"],
    }
    configuration["data_identifier"] = _data_identifier(dataset, plans, configuration, dimensions)
    return plans


def fit_patch(architecture: Architecture, median_shape: Sequence[float], wanted: Sequence[int] | None) -> list[int]:
    """Return a patch the network can take: the wanted one, with no edge longer than the median image needs.

    Args:
        architecture: The network.
        median_shape: Median image in voxels, as many axes as the network.
        wanted: Preferred edges, or None for as much of the image as the longest edge allows.
    """
    dimensions = architecture.dimensions
    strides = architecture.total_stride
    edges = (
        list(wanted) if wanted is not None and len(wanted) == dimensions else [LONGEST_EDGE[dimensions]] * dimensions
    )
    patch = []
    for edge, extent, stride in zip(edges, median_shape, strides, strict=True):
        needed = math.ceil(float(extent) / stride) * stride
        patch.append(max(min(int(edge) // stride * stride, needed), stride))
    if all(edge == stride for edge, stride in zip(patch, strides, strict=True)):
        # One voxel at the coarsest stage cannot be normalised.
        patch[-1] *= 2
    if wanted is not None and list(wanted) != patch:
        logger.info(
            "Patch %s instead of the pretraining's %s: the median image has %s voxels.",
            patch,
            list(wanted),
            [round(float(edge)) for edge in median_shape],
        )
    architecture.check_patch(patch)
    return patch


def _spacing(fingerprint: dict[str, Any], spacing: Sequence[float] | None) -> list[float]:
    if spacing is not None:
        values = [float(value) for value in spacing]
        if len(values) != 3 or any(not math.isfinite(value) or value <= 0 for value in values):
            raise UsageError(f"spacing needs three positive millimetres (z, y, x), got {list(spacing)}.")
        return values
    with nnunet_environment():
        from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

        planner = SimpleNamespace(
            overwrite_target_spacing=None, dataset_fingerprint=fingerprint, anisotropy_threshold=3
        )
        return [float(value) for value in ExperimentPlanner.determine_fullres_target_spacing(planner)]


def _resampled_shapes(fingerprint: dict[str, Any], target: Sequence[float]) -> list[list[int]]:
    pairs = zip(fingerprint["shapes_after_crop"], fingerprint["spacings"], strict=True)
    return [
        [max(round(edge * old / new), 1) for edge, old, new in zip(shape, spacing, target, strict=True)]
        for shape, spacing in pairs
    ]


def _normalisation(dataset: RawDataset, fingerprint: dict[str, Any]) -> tuple[list[str], list[bool]]:
    with nnunet_environment():
        from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

        planner = SimpleNamespace(dataset_json=dataset.content, dataset_fingerprint=fingerprint)
        schemes, masks = ExperimentPlanner.determine_normalization_scheme_and_whether_mask_is_used_for_norm(planner)
    return [str(scheme) for scheme in schemes], [bool(mask) for mask in masks]


def _data_identifier(dataset: RawDataset, plans: dict[str, Any], configuration: dict[str, Any], dimensions: int) -> str:
    """Name the folder of preprocessed data by all that it depends on, so that arms share it when they may."""
    decides = {
        "schemes": configuration["normalization_schemes"],
        "masks": configuration["use_mask_for_norm"],
        "spacing": configuration["spacing"],
        "reader": plans["image_reader_writer"],
        "labels": dataset.content["labels"],
        # Z-score looks at each image alone; only CT takes numbers of the whole data set.
        "intensities": plans["foreground_intensity_properties_per_channel"]
        if "CTNormalization" in configuration["normalization_schemes"]
        else None,
    }
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:10]
    return f"{PLANS_NAME}_{configuration_name(dimensions)}_{digest}"
