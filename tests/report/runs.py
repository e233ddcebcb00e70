"""RUNs as the trainings write them, made by hand so that the page can be tested alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import nibabel
import numpy as np
import yaml
from PIL import Image

SECRET = "/srv/hospital/Mueller_Hans_19500101/Dataset004_Hippocampus"


def write_common(run: Path, kind: str, method: str, rows: list[dict]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    steps = rows[-1]["step"]
    (run / "run.json").write_text(
        json.dumps({"kind": kind, "method": method, "schema_version": 1, "steps": steps, "finished": True})
    )
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "method": method,
        "network": "resenc-xs",
        "patch_size": [32, 40, 32],
        "steps": steps,
        "dataset": SECRET,
        "mask": {"block": 8, "ratio": 0.65},
    }
    (run / "recipe.yaml").write_text("# written by medssl\n" + yaml.safe_dump(recipe, sort_keys=False))
    environment = {
        "python": "3.11.9",
        "cpus": 2,
        "gpus": [],
        "cuda": None,
        "libraries": {"torch": "2.8.0", "numpy": "2.2.0"},
    }
    (run / "environment.json").write_text(json.dumps(environment))
    Image.fromarray((np.random.default_rng(0).random((60, 80, 3)) * 255).astype(np.uint8)).save(run / "views.png")


def pretraining_run(run: Path, steps: int = 2000) -> Path:
    """A masked-autoencoder RUN with noisy curves and three reconstructions."""
    rng = np.random.default_rng(1)
    rows = []
    for step in range(10, steps + 1, 10):
        loss = 0.08 + 0.9 * math.exp(-step / 300) + rng.normal(0, 0.02)
        row = {
            "step": step,
            "time": step * 0.4,
            "loss": loss,
            "reconstruction": loss,
            "lr": 1e-3 * (1 - step / steps) ** 0.9,
            "steps_per_second": 2.5 + rng.normal(0, 0.1),
            "waiting_for_data": 0.05,
        }
        if step % 100 == 0:
            row |= {
                "health/std": 0.8 + rng.normal(0, 0.01),
                "health/rank": 40 + step / 100,
                "quality/rankme": 20 + step / 100,
                "probe/knn": 0.6,
                "validation/loss": loss + 0.01,
            }
        rows.append(row)
    write_common(run, "pretraining", "mae", rows)
    (run / "data.json").write_text(
        json.dumps(
            {
                "counts": {"volumes": 195, "patients": 180},
                "modalities": {"MR": 195},
                "spacing_mm": [1.0, 1.0, 1.0],
                "hash": "ab12" * 8,
            }
        )
    )
    (run / "pictures").mkdir()
    for step in (0, 1000, 2000):
        Image.new("RGB", (300, 200), (step // 10, 90, 90)).save(run / "pictures" / f"step_{step:06d}.png")
    return run


def ball(shape: tuple[int, int, int], centre: tuple[float, float, float], radius: float) -> np.ndarray:
    grid = np.indices(shape).astype(float)
    return sum((axis - c) ** 2 for axis, c in zip(grid, centre, strict=True)) < radius**2


def segmentation_run(run: Path, dataset: Path, cases: int = 5) -> Path:
    """A fine-tuned RUN on a synthetic data set stored in LPS axes, one case worse than the other."""
    rng = np.random.default_rng(2)
    shape, affine = (40, 36, 28), np.diag([-1.0, -1.2, 2.0, 1.0])
    affine[:3, 3] = (20, 22, -10)
    listed = {}
    for number in range(cases):
        label = np.zeros(shape, np.uint8)
        label[ball(shape, (14, 16, 14), 8)] = 1
        label[ball(shape, (27, 20, 12), 5)] = 2
        made = np.roll(label, number, axis=0)
        if number == cases - 1:
            made[made == 2] = 0
        image = rng.normal(100, 12, shape) + 60 * (label == 1) + 110 * (label == 2)
        image[:3] = 0
        name = f"case{number}"
        for folder, suffix, voxels in (("imagesTr", "_0000", image.astype(np.int16)), ("labelsTr", "", label)):
            (dataset / folder).mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(voxels, affine), dataset / folder / f"{name}{suffix}.nii.gz")
        (run / "validation").mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(made, affine), run / "validation" / f"{name}.nii.gz")
        listed[name] = {"label": f"labelsTr/{name}.nii.gz", "images": [f"imagesTr/{name}_0000.nii.gz"]}
    rows = []
    for step in range(10, 401, 10):
        rows.append(
            {
                "step": step,
                "time": step * 0.8,
                "loss": 0.2 - 0.9 * (1 - math.exp(-step / 120)),
                "lr": 1e-3 * (1 - step / 401),
            }
        )
        if step % 100 == 0:
            rows.append(
                {
                    "step": step,
                    "time": step * 0.8,
                    "validation_loss": -0.6,
                    "pseudo_dice": 0.8,
                    "pseudo_dice/anterior": 0.82,
                    "pseudo_dice/posterior": 0.78,
                }
            )
    write_common(run, "segmentation", "finetune", rows)
    labels = {"background": 0, "anterior": 1, "posterior": 2}
    (run / "dataset.json").write_text(
        json.dumps({"labels": labels, "channel_names": {"0": "MR"}, "file_ending": ".nii.gz"})
    )
    (run / "plans.json").write_text("{}")
    (run / "validation" / "references.json").write_text(json.dumps({"folder": str(dataset), "cases": listed}))
    (run / "data.json").write_text(
        json.dumps(
            {
                "counts": {"train": 8, "validation": cases, "cases": 8 + cases},
                "train_cases": ["t"],
                "validation_cases": list(listed),
                "labels": labels,
                "patch_size": [32, 40, 32],
            }
        )
    )
    transfer = {
        "checkpoint": "step_00002000.pth",
        "summary": "90 keys taken, 2 of the checkpoint left",
        "taken": ["encoder.stem"] * 90,
        "left": ["a", "b"],
        "mismatched": {},
    }
    (run / "transfer.json").write_text(json.dumps(transfer))
    return run
