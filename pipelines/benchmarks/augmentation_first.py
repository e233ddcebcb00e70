"""How long one rotated and scaled crop takes: medssl's fused transform, batchgeneratorsv2 and TorchIO, on one thread.

Command: `python pipelines/benchmarks/augmentation_first.py [--repeats 9] [--sizes 64,96]`

Every program gets the same smooth volume of the patch's own size, turns it about three axes by up to 30 degrees and
scales it by 0.7 to 1.4 with linear interpolation, always (nnU-Net does both in a fifth of the cases), and cuts the same
patch. Each crop gets new parameters. The table gives the median time of one crop, with and without a label map, and the
whole policy of nnU-Net's default training with its own probabilities. Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.nn.functional as F
from _common import print_table, write_results

from medssl.augmentation.policy import AugmentationSettings, policy_for
from medssl.data.batch import Batch
from medssl.data.draw import Draw

ALWAYS = {
    "spatial": {"rotation": {"probability": 1.0}, "scale": {"probability": 1.0}, "mirror": {"probability": 0.0}},
    "intensity": {},
}


def main() -> None:
    """Run all programs and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="crops per figure; the median counts")
    parser.add_argument("--sizes", default="64,96", help="edges of the crops")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for edge in (int(size) for size in options.sizes.split(",")):
        for label in (False, True):
            rows += measured(
                f"spatial{' with label' if label else ''}", edge, spatial_programs(edge, label), options.repeats
            )
        # One crop in three is resampled: more crops are needed for a stable mean.
        rows += measured("nnU-Net's whole policy", edge, policy_programs(edge), 4 * options.repeats, statistics.fmean)
    print_table(rows)
    write_results(
        "augmentation_first",
        {"threads": 1, "load_average": os.getloadavg()[0], "repeats": options.repeats, "rows": rows},
    )


def measured(
    task: str,
    edge: int,
    programs: dict[str, Callable[[int], Any]],
    repeats: int,
    summary: Callable[[list[float]], float] = statistics.median,
) -> list[dict[str, Any]]:
    """Time the programs in turns, so that a change of the machine's load meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for program in programs.values():
        program(0)
    for number in range(1, repeats + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            program(number)
            times[name].append(time.perf_counter() - start)
    ours = summary(times["medssl"])
    return [
        {
            "task": task,
            "crop": f"{edge}^3",
            "program": name,
            "milliseconds": round(1000 * summary(values), 2),
            "fastest": round(1000 * min(values), 2),
            "times medssl": round(summary(values) / ours, 2),
        }
        for name, values in times.items()
    ]


def spatial_programs(edge: int, with_label: bool) -> dict[str, Callable[[int], Any]]:
    """Return one function per program that transforms the crop with the parameters of a running number."""
    image, label = volume(edge)
    policy = policy_for(
        "fine-tuning", {"MR"}, (edge,) * 3, AugmentationSettings(overrides={**ALWAYS, "intensity": NOTHING})
    )
    programs = {"medssl": ours(policy, image, label if with_label else None)}
    try:
        from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    except ImportError:
        pass
    else:
        transform = SpatialTransform(
            (edge,) * 3,
            patch_center_dist_from_border=0,
            random_crop=False,
            p_rotation=1.0,
            rotation=(-math.pi / 6, math.pi / 6),
            p_scaling=1.0,
            scaling=(0.7, 1.4),
            p_synchronize_scaling_across_axes=1,
            mode_seg="nearest",
        )

        def batchgenerators(_: int) -> Any:
            content = {"image": image.clone()}
            if with_label:
                content["segmentation"] = label.to(torch.int16)[None].clone()
            return transform(**content)

        programs["batchgeneratorsv2"] = batchgenerators
    try:
        import torchio
    except ImportError:
        pass
    else:
        affine = torchio.RandomAffine(
            scales=(0.7, 1.4), degrees=30, isotropic=True, image_interpolation="linear", label_interpolation="nearest"
        )

        def torchio_program(_: int) -> Any:
            images = {"image": torchio.ScalarImage(tensor=image.clone())}
            if with_label:
                images["label"] = torchio.LabelMap(tensor=label.to(torch.int16)[None].clone())
            return affine(torchio.Subject(**images))

        programs["torchio"] = torchio_program
    return programs


NOTHING = dict.fromkeys(("noise", "blur", "brightness", "contrast", "low_resolution", "gamma", "gamma_inverted"))


def policy_programs(edge: int) -> dict[str, Callable[[int], Any]]:
    """Return our fine-tuning policy for MR and nnU-Net's own training transforms, each on image and label."""
    image, label = volume(edge)
    programs = {"medssl": ours(policy_for("fine-tuning", {"MR"}, (edge,) * 3), image, label)}
    try:
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    except ImportError:
        return programs
    transforms = nnUNetTrainer.get_training_transforms(
        (edge,) * 3, (-math.pi / 6, math.pi / 6), None, (0, 1, 2), do_dummy_2d_data_aug=False
    )

    def nnunet(_: int) -> Any:
        return transforms(image=image.clone(), segmentation=label.to(torch.int16)[None].clone())

    programs["nnunetv2"] = nnunet
    return programs


def ours(policy: Any, image: torch.Tensor, label: torch.Tensor | None) -> Callable[[int], Any]:
    """Return a function that makes a view of one crop."""

    def program(number: int) -> Any:
        batch = Batch(
            image=image[None].clone(),
            sample_index=torch.tensor([number]),
            sample_id=torch.zeros(1, dtype=torch.int64),
            origin_mm=torch.zeros(1, 3),
            spacing_mm=torch.ones(1, 3),
            valid=torch.tensor([[[0, edge] for edge in image.shape[1:]]]),
            background=torch.zeros(1),
            modality=("MR",),
            patient_key=("",),
            label=None if label is None else label[None].clone(),
        )
        return policy.view(batch, Draw(0, batch.sample_index))

    return program


def volume(edge: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a smooth volume (1, Z, Y, X) with some noise, and a label map of three classes (Z, Y, X)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn((1, 1, 8, 8, 8), generator=generator)
    smooth = F.interpolate(coarse, (edge,) * 3, mode="trilinear")[0]
    return smooth + 0.1 * torch.randn(smooth.shape, generator=generator), (smooth[0] > 0).long() + (
        smooth[0] > 0.5
    ).long()


if __name__ == "__main__":
    main()
