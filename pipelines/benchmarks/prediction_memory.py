"""How much memory and time does a prediction take, and are the masks stock nnU-Net's?

    python pipelines/benchmarks/prediction_memory.py [--shape 512 512 800] [--classes 3 8] [--memory-mb 1024 2048]

One random network (a plain U-Net of two stages, so that the volume and not the network decides) segments one synthetic
volume of 0.7 x 0.7 x 1 mm at 1.5 mm, in tiles of 128^3 voxels without overlap: `nnUNetv2_predict_from_modelfolder` of
stock nnU-Net with one process each for preprocessing and export, and `medssl predict`, each as its own command.

`peak` is the largest sum over the command's processes of the proportional set size (memory that processes share counts
once), sampled ten times a second; `cpu` the processor seconds of all of them. `different` counts voxels in which
the masks differ. A command that the machine's memory could not hold is reported as such.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from pipelines.benchmarks._common import print_table, write_results  # noqa: E402  (the checkout is put on the path first)

SPACING = (0.7, 0.7, 1.0)
ARCHITECTURE = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
IMPORTS = ["conv_op", "norm_op", "dropout_op", "nonlin"]


def main() -> None:
    """Run both tools on each number of classes, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, default=[512, 512, 800])
    parser.add_argument("--classes", type=int, nargs="+", default=[3, 8])
    parser.add_argument("--memory-mb", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the volume and the masks")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        folder = Path(name)
        (folder / "images").mkdir()
        write_volume(folder / "images" / "large_0000.nii.gz", tuple(options.shape))
        for classes in options.classes:
            model = write_model(folder / f"model_{classes}", classes)
            reference = folder / f"nnunet_{classes}"
            rows.append(
                {"tool": "nnU-Net", "classes": classes, **stock(model, folder / "images", reference), "different": "-"}
            )
            print_table(rows[-1:])
            for memory_mb in options.memory_mb:
                out = folder / f"medssl_{classes}_{memory_mb}"
                row = {
                    "tool": f"medssl, {memory_mb} MB",
                    "classes": classes,
                    **ours(model, folder / "images", out, memory_mb),
                }
                rows.append({**row, "different": differing(reference / "large.nii.gz", out / "large.nii.gz")})
                print_table(rows[-1:])
    print_table(rows)
    print(write_results("prediction_memory", {"shape": options.shape, "spacing_mm": SPACING, "rows": rows}).name)


def stock(model: Path, images: Path, out: Path) -> dict[str, Any]:
    """Run stock nnU-Net's command."""
    code = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder as run; run()"
    arguments = [
        "-i",
        images,
        "-o",
        out,
        "-m",
        model,
        "-f",
        "0",
        "-device",
        "cpu",
        "-step_size",
        "1",
        "-npp",
        "1",
        "-nps",
        "1",
    ]
    return measure(code, arguments, out / "large.nii.gz")


def ours(model: Path, images: Path, out: Path, memory_mb: int) -> dict[str, Any]:
    """Run medssl's command."""
    arguments = ["predict", "--model", model, "--input", images, "--out", out, "--device", "cpu", "--step-size", "1"]
    return measure("from medssl.cli import main; main()", [*arguments, "--memory-mb", memory_mb], out / "large.nii.gz")


def measure(code: str, arguments: list[Any], result: Path) -> dict[str, Any]:
    """Run a command and sample the memory of all its processes."""
    environment = os.environ | {
        "nnUNet_raw": "",
        "nnUNet_preprocessed": "",
        "nnUNet_results": "",
        "OMP_NUM_THREADS": "2",
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    began = time.monotonic()
    peak, cpu = 0, {}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        while process.poll() is None:
            total = 0
            for one in family(process.pid):
                try:
                    total += one.memory_full_info().pss
                    times = one.cpu_times()
                    cpu[one.pid] = times.user + times.system
                except psutil.Error:
                    continue
            peak = max(peak, total)
            time.sleep(0.1)
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines()
    if not result.is_file():
        # Only the kind of failure: the rest may name folders.
        return {"peak GB": peak / 2**30, "s": "failed", "cpu s": (lines or ["no output"])[-1].split(":")[0][:60]}
    return {"peak GB": peak / 2**30, "s": round(time.monotonic() - began, 1), "cpu s": round(sum(cpu.values()), 1)}


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all below it."""
    try:
        head = psutil.Process(pid)
        return [head, *head.children(recursive=True)]
    except psutil.Error:
        return []


def differing(reference: Path, mask: Path) -> Any:
    """Return in how many voxels two masks differ."""
    if not reference.is_file() or not mask.is_file():
        return "-"
    first, second = (nibabel.load(path, mmap=False) for path in (reference, mask))
    slabs = range(0, first.shape[2], 50)
    return sum(
        int(np.count_nonzero(np.asarray(first.dataobj[..., z : z + 50]) != np.asarray(second.dataobj[..., z : z + 50])))
        for z in slabs
    )


def write_volume(path: Path, shape: tuple[int, int, int]) -> None:
    """Write smooth structures and noise, as int16, with air around a body."""
    from scipy.ndimage import gaussian_filter, zoom

    rng = np.random.default_rng(0)
    coarse = gaussian_filter(rng.normal(size=[side // 16 + 1 for side in shape]), 1.0)
    voxels = np.empty(shape, np.int16)
    y, x = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape[:2]), indexing="ij")
    body = y**2 + x**2 < 0.8
    for z in range(shape[2]):
        plane = coarse[:, :, z // 16] * (1 - z % 16 / 16) + coarse[:, :, min(z // 16 + 1, coarse.shape[2] - 1)] * (
            z % 16 / 16
        )
        smooth = zoom(plane, [side / small for side, small in zip(shape[:2], plane.shape, strict=True)], order=1)
        voxels[:, :, z] = np.where(body, 1000 * smooth + rng.normal(0, 20, shape[:2]), -1000)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([*SPACING, 1.0])), path)


def write_model(folder: Path, classes: int) -> Path:
    """Write an nnU-Net model folder with a random network."""
    import torch
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    kwargs = {
        "n_stages": 2, "features_per_stage": [4, 8], "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 2, "strides": [[1, 1, 1], [2, 2, 2]], "n_conv_per_stage": [1, 1],
        "n_conv_per_stage_decoder": [1], "conv_bias": True, "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "dropout_op": None, "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    resampling: dict[str, Any] = {}
    for name, order, is_seg in (("data", 3, False), ("seg", 1, True), ("probabilities", 1, False)):
        resampling[f"resampling_fn_{name}"] = "resample_data_or_seg_to_shape"
        resampling[f"resampling_fn_{name}_kwargs"] = {
            "is_seg": is_seg,
            "order": order,
            "order_z": 0,
            "force_separate_z": None,
        }
    configuration = {
        "data_identifier": "random", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2, "batch_dice": False,
        "patch_size": [128, 128, 128], "median_image_size_in_voxels": [200.0] * 3, "spacing": [1.5, 1.5, 1.5],
        "normalization_schemes": ["CTNormalization"], "use_mask_for_norm": [False], **resampling,
        "architecture": {"network_class_name": ARCHITECTURE, "arch_kwargs": kwargs, "_kw_requires_import": IMPORTS},
    }  # fmt: skip
    statistics = {
        "mean": 0.0,
        "std": 300.0,
        "percentile_00_5": -1000.0,
        "percentile_99_5": 1000.0,
        "min": -1000.0,
        "max": 2000.0,
        "median": 0.0,
    }
    plans = {
        "dataset_name": "Dataset999_random", "plans_name": "nnUNetPlans", "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2], "image_reader_writer": "NibabelIOWithReorient",
        "label_manager": "LabelManager",
        "original_median_spacing_after_transp": [1.0] * 3, "original_median_shape_after_transp": [200] * 3,
        "experiment_planner_used": "ExperimentPlanner", "configurations": {"3d_fullres": configuration},
        "foreground_intensity_properties_per_channel": {"0": statistics},
    }  # fmt: skip
    labels = {"background": 0} | {f"organ {number}": number for number in range(1, classes)}
    dataset = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}
    torch.manual_seed(0)
    network = get_network_from_plans(ARCHITECTURE, kwargs, IMPORTS, 1, classes, deep_supervision=True)
    content = {
        "network_weights": network.state_dict(), "init_args": {"configuration": "3d_fullres", "fold": 0},
        "trainer_name": "nnUNetTrainer", "inference_allowed_mirroring_axes": None,
    }  # fmt: skip
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    torch.save(content, folder / "fold_0" / "checkpoint_final.pth")
    return folder


if __name__ == "__main__":
    main()
