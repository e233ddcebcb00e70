"""Tiny nnU-Net model folders with random weights, and the stock predictor as the independent reference."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

ARCHITECTURE = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
RESAMPLE = "resample_data_or_seg_to_shape"


def make_model(
    folder: Path,
    *,
    spacing: tuple[float, ...] = (1.5, 1.5, 1.5),
    patch: tuple[int, ...] = (16, 16, 16),
    labels: dict[str, Any] | None = None,
    regions: list[int] | None = None,
    channels: int = 1,
    normalisation: str = "ZScoreNormalization",
    mask_for_norm: bool = False,
    mirroring: tuple[int, ...] | None = None,
    transpose: tuple[int, int, int] = (0, 1, 2),
    reader: str = "NibabelIOWithReorient",
    resampling: str = RESAMPLE,
    folds: int = 1,
    seed: int = 0,
) -> Path:
    """Write a model folder as nnU-Net's trainer does, with a random network of two stages."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    dimensions = len(patch)
    labels = labels or {"background": 0, "one": 1, "two": 2}
    kwargs = {
        "n_stages": 2,
        "features_per_stage": [4, 8],
        "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
        "kernel_sizes": [[3] * dimensions] * 2,
        "strides": [[1] * dimensions, [2] * dimensions],
        "n_conv_per_stage": [1, 1],
        "n_conv_per_stage_decoder": [1],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    fast = {} if resampling == "resample_torch_fornnunet" else {"order_z": 0}
    configuration = {
        "data_identifier": "tiny",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch),
        "median_image_size_in_voxels": [32.0] * dimensions,
        "spacing": list(spacing),
        "normalization_schemes": [normalisation] * channels,
        "use_mask_for_norm": [mask_for_norm] * channels,
        "resampling_fn_data": resampling,
        "resampling_fn_seg": resampling,
        "resampling_fn_data_kwargs": {
            "is_seg": False,
            "force_separate_z": None,
            **fast,
            **({"order": 3} if fast else {}),
        },
        "resampling_fn_seg_kwargs": {
            "is_seg": True,
            "force_separate_z": None,
            **fast,
            **({"order": 1} if fast else {}),
        },
        "resampling_fn_probabilities": resampling,
        "resampling_fn_probabilities_kwargs": {
            "is_seg": False,
            "force_separate_z": None,
            **fast,
            **({"order": 1} if fast else {}),
        },
        "architecture": {
            "network_class_name": ARCHITECTURE,
            "arch_kwargs": kwargs,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": False,
    }
    name = f"{dimensions}d" if dimensions == 2 else "3d_fullres"
    properties = {
        "mean": 100.0,
        "std": 50.0,
        "percentile_00_5": -50.0,
        "percentile_99_5": 260.0,
        "min": -100.0,
        "max": 300.0,
        "median": 90.0,
    }
    plans = {
        "dataset_name": "Dataset999_tiny",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [32, 32, 32],
        "image_reader_writer": reader,
        "transpose_forward": list(transpose),
        "transpose_backward": list(np.argsort(transpose).tolist()),
        "configurations": {name: configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(channel): properties for channel in range(channels)},
    }
    dataset = {
        "channel_names": {str(channel): "MR" for channel in range(channels)},
        "labels": labels,
        "numTraining": 1,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": reader,
        **({"regions_class_order": regions} if regions else {}),
    }
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    heads = PlansManager(plans).get_label_manager(dataset).num_segmentation_heads
    for fold in range(folds):
        torch.manual_seed(seed + fold)
        network = get_network_from_plans(
            ARCHITECTURE, kwargs, ["conv_op", "norm_op", "dropout_op", "nonlin"], channels, heads, deep_supervision=True
        )
        with torch.no_grad():  # without a bias the random logits of one class would win everywhere
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        (folder / f"fold_{fold}").mkdir()
        torch.save(
            {
                "network_weights": network.state_dict(),
                "init_args": {"configuration": name, "fold": fold},
                "trainer_name": "nnUNetTrainer",
                "inference_allowed_mirroring_axes": mirroring,
            },
            folder / f"fold_{fold}" / "checkpoint_final.pth",
        )
    return folder


def write_volume(
    path: Path,
    shape: tuple[int, int, int] = (30, 26, 22),
    spacing: tuple[float, float, float] = (1.0, 1.2, 1.4),
    orientation: str = "RAS",
    seed: int = 0,
    border: int = 3,
) -> Path:
    """Write a smooth random volume with a zero border, stored in any orientation. `shape` is (x, y, z) in RAS."""
    from nibabel.orientations import axcodes2ornt, ornt_transform
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    voxels = gaussian_filter(rng.normal(size=shape), 2.0)
    voxels = (100 + 80 * voxels / voxels.std()).astype(np.int16)
    inside = np.zeros(shape, bool)
    inside[border : shape[0] - border, border : shape[1] - 1, border - 1 :] = True
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-12.5, 7.25, 30.0)
    image = nibabel.Nifti1Image(np.where(inside, voxels, 0).astype(np.int16), affine)
    turned = image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(tuple(orientation))))
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(turned, path)
    return path


def stock_predict(model: Path, images: Path, out: Path, **options: Any) -> None:
    """Run stock nnU-Net's predictor on a folder, as `nnUNetv2_predict_from_modelfolder` does without its processes."""
    os.environ.setdefault("nnUNet_n_proc_DA", "0")
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False, **options
    )
    predictor.initialize_from_trained_model_folder(str(model), None, "checkpoint_final.pth")
    out.mkdir(parents=True, exist_ok=True)
    predictor.predict_from_files_sequential(str(images), str(out))


def read_mask(path: Path) -> np.ndarray[Any, Any]:
    """Return the mask's voxels as stored."""
    return np.asanyarray(nibabel.load(path).dataobj)
