"""How far from a landmark does `medssl match` find it in another patient?

Command: `python pipelines/benchmarks/landmarks.py --workdir W` (an hour or two on two cores; `--quick` takes a minute).

Voxel contrast is pretrained for a short while on most cases of a data set, without labels. Landmarks of unseen cases
come from their labels: the anterior and the posterior end of the hippocampus (mean of what lies within 2 mm of the
label's last voxel), and the centre of the left atrium. Each unseen case's landmarks are looked for in the next one.
Peers: affine registration with mutual information by SimpleITK, the same registration stopped after its alignment by
moments of intensity, the same relative place in the volume, and the network before training. What is kept of a work
folder is not made again.

Both data sets are cropped around the organ, the hippocampus with almost the same margin in each case: the border of
the image would tell where the landmark is. Each unseen image therefore loses a drawn part of its margin on each side.
Errors in whole scans would still be larger. Errors are in mm; intervals come from resampling patients.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from _anatomy import SEED, Cases, interval, kept, pretrained, store_of
from _common import RESULTS, print_table, write_results

from medssl.inference.match import match_points, place_volume
from medssl.inference.voxel_search import VoxelModel, load_voxel_model

METHOD = "voxel-contrast"
Points = NDArray[np.float64]


@dataclass(frozen=True)
class Task:
    """A data set and its landmarks.

    Args:
        name: Folder of the data.
        spacing: Voxels of the pretraining in mm.
        landmarks: Their names.
        find: Returns them from a label's voxels in RAS mm. Shape: (N, 3) to (L, 3).
        overrides: Settings of the pretraining.
    """

    name: str
    spacing: float
    landmarks: tuple[str, ...]
    find: Callable[[Points], Points]
    overrides: tuple[str, ...]


def ends(voxels: Points) -> Points:
    """Return the anterior and the posterior end of a structure."""
    y = voxels[:, 1]
    return np.stack([voxels[y >= y.max() - 2].mean(axis=0), voxels[y <= y.min() + 2].mean(axis=0)])


def centre(voxels: Points) -> Points:
    """Return the centre of a structure."""
    return voxels.mean(axis=0, keepdims=True)


TASKS = (
    Task("hippocampus", 1.0, ("anterior end", "posterior end"), ends, ("patch_size=[24,40,32]", "batch_size=4")),
    Task(
        "left_atrium", 2.5, ("centre",), centre,
        # Voxels of 2.5 mm: radii of a voxel and of three.
        ("patch_size=[24,32,48]", "batch_size=4", "positive_mm=3", "ignore_radius_mm=9"),
    ),
)  # fmt: skip


def main() -> None:
    """Pretrain, match and register; print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="where stores and runs are made and found again")
    parser.add_argument("--only", nargs="+", choices=[task.name for task in TASKS], help="data sets")
    parser.add_argument("--steps", type=int, default=3000, help="of each pretraining")
    parser.add_argument("--unseen", type=int, default=30, help="cases that are matched")
    parser.add_argument("--quick", action="store_true", help="few steps and cases; writes no results")
    options = parser.parse_args()
    steps, unseen = (4, 3) if options.quick else (options.steps, options.unseen)
    rows = []
    for task in TASKS:
        if options.only is None or task.name in options.only:
            folder = options.workdir / task.name
            errors = kept(folder / "errors.json", lambda task=task, folder=folder: measure(task, folder, steps, unseen))
            rows += table(task, errors)
    print_table(rows)
    if not options.quick:
        payload = {"steps": steps, "rows": rows}
        print(f"Written: {write_results('landmarks', payload).relative_to(RESULTS.parents[2])}")


def measure(task: Task, folder: Path, steps: int, unseen: int) -> dict[str, list[list[float]]]:
    """Return the errors in mm of each way: for each unseen case those of its landmarks in the next one."""
    cases = Cases.of(task.name, unseen)
    store = store_of(cases, cases.seen, task.spacing, folder / "store")
    overrides = (*task.overrides, "health_every=100")
    trained = load_voxel_model(pretrained(METHOD, store, folder / "run", steps, overrides))
    # One step at a rate of almost nothing leaves the network as it was drawn.
    still = (*task.overrides, "optimiser.learning_rate=1e-9")
    untrained = load_voxel_model(pretrained(METHOD, store, folder / "untrained", 1, still))
    points = {case: landmarks_of(task, cases.label(case)) for case in cases.unseen}
    cut = {case: trimmed(cases, case, folder / "trimmed") for case in cases.unseen}
    errors: dict[str, list[list[float]]] = {}
    for source, target in zip(cases.unseen, (*cases.unseen[1:], cases.unseen[0]), strict=True):
        print(f"{time.strftime('%H:%M:%S')} {source} in {target}", flush=True)
        images = cut[source], cut[target]
        found = {
            "medssl match": matched(trained, *images, points[source]),
            "untrained network": matched(untrained, *images, points[source]),
            "SimpleITK affine": registered(*images, points[source], refine=True),
            "moments of intensity": registered(*images, points[source], refine=False),
            "same relative place": same_place(*images, points[source]),
        }
        for way, places in found.items():
            errors.setdefault(way, []).append(np.linalg.norm(places - points[target], axis=1).tolist())
    return errors


def trimmed(cases: Cases, case: str, folder: Path) -> Path:
    """Write an image without a drawn part of what lies around its label on each side; its world stays."""
    image, label = nibabel.load(cases.image(case)), nibabel.load(cases.label(case))
    inside = np.argwhere(np.asarray(label.dataobj) > 0)
    rng = np.random.default_rng([SEED, cases.unseen.index(case)])
    # A voxel beside the label stays.
    first = rng.integers(0, np.maximum(inside.min(axis=0), 1))
    last = np.array(label.shape) - rng.integers(0, np.maximum(np.array(label.shape) - 1 - inside.max(axis=0), 1))
    path = folder / f"{case}.nii.gz"
    folder.mkdir(parents=True, exist_ok=True)
    nibabel.save(image.slicer[tuple(slice(a, b) for a, b in zip(first.tolist(), last.tolist(), strict=True))], path)
    return path


def landmarks_of(task: Task, label: Path) -> Points:
    """Return the landmarks of a case in RAS mm. Shape: (L, 3)."""
    image: Any = nibabel.load(label)
    voxels = np.argwhere(np.asarray(image.dataobj) > 0)
    return task.find(nibabel.affines.apply_affine(image.affine, voxels))


def matched(model: VoxelModel, source: Path, target: Path, points: Points) -> Points:
    """Return where `medssl match` finds points."""
    rows = match_points(model, place_volume(model, source), place_volume(model, target), points).rows
    return np.array([row.target_mm for row in rows])


def registered(source: Path, target: Path, points: Points, *, refine: bool) -> Points:
    """Return where an affine registration of SimpleITK takes points: by moments alone, or refined."""
    import SimpleITK

    fixed, moving = (halved(SimpleITK.ReadImage(str(path), SimpleITK.sitkFloat32)) for path in (source, target))
    # From the source, in which the points are known, to the target.
    transform = SimpleITK.CenteredTransformInitializer(
        fixed, moving, SimpleITK.AffineTransform(3), SimpleITK.CenteredTransformInitializerFilter.MOMENTS
    )
    if refine:
        method = SimpleITK.ImageRegistrationMethod()
        method.SetMetricAsMattesMutualInformation(32)
        method.SetMetricSamplingStrategy(method.RANDOM)
        method.SetMetricSamplingPercentage(0.2, seed=1)
        method.SetInterpolator(SimpleITK.sitkLinear)
        method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, 200)
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetShrinkFactorsPerLevel([4, 2, 1])
        method.SetSmoothingSigmasPerLevel([2, 1, 0])
        method.SetInitialTransform(transform, inPlace=True)
        method.Execute(fixed, moving)
    # ITK's world runs to left and posterior.
    turn = np.array([-1.0, -1.0, 1.0])
    return np.array([transform.TransformPoint((point * turn).tolist()) for point in points]) * turn


def halved(image: Any) -> Any:
    """Return an image with every second voxel where voxels are far below a millimetre: registration gains nothing."""
    import SimpleITK

    return SimpleITK.Shrink(image, [2 if edge < 0.75 else 1 for edge in image.GetSpacing()])


def same_place(source: Path, target: Path, points: Points) -> Points:
    """Return the places of the target that lie at the same part of its extent along each axis."""
    first, second = nibabel.load(source), nibabel.load(target)
    part = (nibabel.affines.apply_affine(np.linalg.inv(first.affine), points) + 0.5) / np.array(first.shape)
    return nibabel.affines.apply_affine(second.affine, part * np.array(second.shape) - 0.5)


def table(task: Task, errors: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    """Return a row for each landmark and way."""
    rows = []
    for number, landmark in enumerate(task.landmarks):
        for way, all_errors in errors.items():
            values = [of_case[number] for of_case in all_errors]
            median, low, high = interval(values, lambda chosen: float(np.median(chosen)))
            rows.append(
                {
                    "data": task.name,
                    "landmark": landmark,
                    "way": way,
                    "median error mm": round(median, 2),
                    "95 % interval": f"{low:.2f} to {high:.2f}",
                    "within 5 mm": f"{np.mean(np.array(values) <= 5):.0%}",
                    "patients": len(values),
                }
            )
    return rows


if __name__ == "__main__":
    main()
