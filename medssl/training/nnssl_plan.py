"""The adaptation plan that nnssl writes into its checkpoints and nnU-Net's reader of them asks for.

Key for key as in nnssl, so that the same line that reads an nnssl checkpoint reads ours. It holds no data-set listing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medssl.networks.architecture import PLAIN, Architecture

# Where the parts of a U-Net are found in its state dict: dynamic-network-architectures says so of each class.
RESIDUAL_KEYS = {
    "key_to_encoder": "encoder.stages",
    "key_to_stem": "encoder.stem",
    "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
    "key_to_lpe": None,
}
PLAIN_KEYS = {
    "key_to_encoder": "encoder.stages",
    "key_to_stem": "encoder.stages.0",
    "keys_to_in_proj": ["encoder.stages.0.0.convs.0.all_modules.0", "encoder.stages.0.0.convs.0.conv"],
    "key_to_lpe": None,
}


def adaptation_plan(
    plan: Architecture,
    *,
    in_channels: int,
    patch_size: Sequence[int],
    spacing_mm: Sequence[float] | None,
    modalities: Sequence[str],
) -> dict[str, Any]:
    """Return `nnssl_adaptation_plan`.

    Args:
        plan: The network.
        in_channels: Channels it was trained with.
        patch_size: Patch it was trained on, in voxels.
        spacing_mm: Spacing that volumes were resampled to, (z, y, x), or None for their own.
        modalities: What it was trained on, for example `["MR"]`.
    """
    keys = PLAIN_KEYS if plan.network_class_name == PLAIN else RESIDUAL_KEYS
    return {
        "architecture_plans": _architecture_plans(plan),
        "pretrain_plan": _pretrain_plan(in_channels, patch_size, spacing_mm, modalities),
        "pretrain_num_input_channels": in_channels,
        "recommended_downstream_patchsize": [int(edge) for edge in patch_size],
        **keys,
    }


def _architecture_plans(plan: Architecture) -> dict[str, Any]:
    if plan.is_resenc_l:
        return {"arch_class_name": "ResEncL", "arch_kwargs": None, "arch_kwargs_requiring_import": None}
    return {
        "arch_class_name": plan.network_class_name.rpartition(".")[2],
        "arch_kwargs": dict(plan.arch_kwargs),
        "arch_kwargs_requiring_import": list(plan.kw_requires_import),
    }


def _pretrain_plan(
    in_channels: int, patch_size: Sequence[int], spacing_mm: Sequence[float] | None, modalities: Sequence[str]
) -> dict[str, Any]:
    # nnssl's three names of a spacing: 1 mm, one for all volumes, each volume's own.
    if spacing_mm is None:
        style = "noresample"
    else:
        style = "onemmiso" if all(abs(edge - 1) < 1e-3 for edge in spacing_mm) else "median"
    spacing = [float(edge) for edge in spacing_mm] if spacing_mm is not None else None
    scheme = "CTNormalization" if set(modalities) == {"CT"} else "ZScoreNormalization"
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    return {
        "dataset_name": "medssl",
        "plans_name": "medsslPlans",
        "original_median_spacing_after_transp": spacing or [1.0, 1.0, 1.0],
        "image_reader_writer": "NibabelIOWithReorient",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {
            style: {
                "data_identifier": f"medssl_{style}",
                "preprocessor_name": "DefaultPreprocessor",
                "spacing_style": style,
                "normalization_schemes": [scheme] * in_channels,
                "use_mask_for_norm": [False] * in_channels,
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": dict(resampling),
                "resampling_fn_mask": "resample_data_or_seg_to_shape",
                "resampling_fn_mask_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
                "spacing": spacing,
                "patch_size": [int(edge) for edge in patch_size],
            }
        },
        "experiment_planner_used": "medssl",
    }
