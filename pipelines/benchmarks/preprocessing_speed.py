"""How fast is preprocessing, how much memory does it take, and does it give what nnU-Net gives?

    python pipelines/benchmarks/preprocessing_speed.py [--data FOLDER] [--volumes 6]

nnU-Net 2.8.1's DefaultPreprocessor and medssl preprocess the same volumes to the same voxel size with the same
normalisation (z-score of the whole image), each in fresh processes of this run, one thread per process.

`case` is the work on the volumes alone, read to written, in one warm process: wall-clock and processor seconds.
`command` is everything with 1 and 2 workers, from the call to the last file, start of the workers included. `memory`
is taken in the command with 1 worker: the largest sum over its processes of the proportional set size, in which memory
that processes share counts once. Differences are in standard deviations of the image.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
CASES = (
    ("left_atrium", (1.25, 1.25, 1.25)),
    ("left_atrium", (1.0, 1.0, 1.0)),
    ("left_atrium", (0.5, 0.5, 0.5)),
    ("left_atrium", (2.5, 0.8, 0.8)),
    ("hippocampus", (1.0, 1.0, 1.0)),
    ("hippocampus", (0.8, 0.9, 0.9)),
)
PATCH = (64, 64, 64)
TOOLS = ("nnunet", "medssl")
COMMON = ("data", "spacing_mm")
SECONDS_BETWEEN_LOOKS = 0.05


def main() -> None:
    """Run every case with both tools, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    beside = Path(os.environ.get("MEDSSL_DATA", REPOSITORY.parent / "shared/data"))
    parser.add_argument("--data", type=Path, default=beside)
    parser.add_argument("--volumes", type=int, default=6)
    parser.add_argument("--child", nargs=4, metavar=("TOOL", "MODE", "FOLDER", "SPACING"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        tool, mode, folder, spacing = options.child
        _child(tool, mode, Path(folder), tuple(json.loads(spacing)))
        return
    from _common import print_table, write_results

    load = round(os.getloadavg()[0], 1)
    rows = []
    for name, spacing in CASES:
        if not (options.data / name / "imagesTr").is_dir():
            print(f"{name} is not in {options.data}: left out")
            continue
        print(f"{name} to {spacing} mm ...", flush=True)
        rows.append(_compare(options.data / name, spacing, options.volumes))
    if not rows:
        raise SystemExit("No data: give its folder with --data or MEDSSL_DATA.")
    for kind in ("case", "command", "memory", "differ"):
        print_table(
            [{key: row[key] for key in ("data", "spacing_mm", *row) if key in COMMON or kind in key} for row in rows]
        )
        print()
    # Wall-clock times mean little on a machine that does other work: processor seconds are the steadier figure.
    payload = {"volumes_per_row": options.volumes, "load_average_at_start": load, "rows": rows}
    path = write_results("preprocessing_speed", payload)
    print(f"Written: {path.relative_to(REPOSITORY)}")


def _compare(dataset: Path, spacing: tuple[float, ...], volumes: int) -> dict[str, Any]:
    row: dict[str, Any] = {"data": dataset.name, "spacing_mm": " x ".join(f"{edge:g}" for edge in spacing)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _make_raw(dataset, folder, spacing, volumes)
        for mode in ("case", "command-1", "command-2"):
            found = {tool: _measure(tool, mode, folder, spacing) for tool in TOOLS}
            for what in ("s", "cpu s") if mode == "case" else ("s",):
                row |= {f"{tool} {mode} {what}": round(found[tool][what], 3) for tool in TOOLS}
                row[f"{mode} {what} ratio"] = round(found["nnunet"][what] / found["medssl"][what], 2)
            if mode == "command-1":
                row |= {f"{tool} memory MB": round(found[tool]["memory MB"]) for tool in TOOLS}
                row["memory ratio"] = round(found["nnunet"]["memory MB"] / found["medssl"]["memory MB"], 2)
        return {**row, **_differences(folder)}


def _measure(tool: str, mode: str, folder: Path, spacing: tuple[float, ...]) -> dict[str, float]:
    """Return seconds, processor seconds and MB of one fresh process and its children."""
    import psutil

    environment = {
        **os.environ,
        **{f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")},
        "nnUNet_raw": str(folder / "raw"),
        "nnUNet_preprocessed": str(folder / "nnunet"),
        "nnUNet_results": str(folder / "results"),
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, __file__, "--child", tool, mode, str(folder), json.dumps(spacing)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        peak = 0
        watched = psutil.Process(child.pid)
        while child.poll() is None:
            if mode == "command-1":  # looking costs time: only where it is reported
                peak = max(peak, _memory(watched))
            time.sleep(SECONDS_BETWEEN_LOOKS)
        out, errors = child.communicate()
    if child.returncode:
        raise SystemExit(f"{tool} {mode} failed:\n{errors[-4000:]}")
    return {**json.loads(out.strip().splitlines()[-1]), "memory MB": peak / 2**20}


def _memory(process: Any) -> int:
    """Return the bytes of a process and its children; a process that has just gone counts nothing."""
    import psutil

    total = 0
    try:
        family = (process, *process.children(recursive=True))
    except psutil.Error:
        return 0
    for one in family:
        try:
            total += one.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def _child(tool: str, mode: str, folder: Path, spacing: tuple[float, ...]) -> None:
    """Do the work and print the seconds it took."""
    work = {"nnunet": _nnunet, "medssl": _medssl}[tool](mode, folder, spacing)
    start, cpu = time.perf_counter(), time.process_time()
    work()
    print(json.dumps({"s": time.perf_counter() - start, "cpu s": time.process_time() - cpu}))


def _nnunet(mode: str, folder: Path, _: tuple[float, ...]) -> Callable[[], None]:
    """Return nnU-Net's work on the data set; what is imported and warm before it is called costs nothing."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    preprocessor = DefaultPreprocessor(verbose=False)
    preprocessor.show_progress_bar = False
    if mode.startswith("command"):
        return lambda: preprocessor.run(901, "3d_fullres", "nnUNetPlans", int(mode[-1]))
    prepared = folder / "nnunet" / "Dataset901_Speed"
    plans = PlansManager(json.loads((prepared / "nnUNetPlans.json").read_text()))
    description = json.loads((prepared / "dataset.json").read_text())
    out = prepared / "case"
    out.mkdir(exist_ok=True)
    raw = folder / "raw" / "Dataset901_Speed"
    cases = get_filenames_of_train_images_and_targets(str(raw), description)

    def one(name: str, files: dict[str, Any]) -> None:
        configuration = plans.get_configuration("3d_fullres")
        preprocessor.run_case_save(str(out / name), files["images"], files["label"], plans, configuration, description)

    def work() -> None:
        for name, files in cases.items():
            one(name, files)

    one("warm", next(iter(cases.values())))
    return work


def _medssl(mode: str, folder: Path, spacing: tuple[float, ...]) -> Callable[[], None]:
    """Return our work on the data set."""
    from medssl.preprocessing.case import Plan
    from medssl.preprocessing.run import preprocess
    from medssl.preprocessing.source import open_source
    from medssl.preprocessing.worker import Task, process

    raw, out = folder / "raw" / "Dataset901_Speed", folder / "medssl"
    if mode.startswith("command"):
        options: dict[str, Any] = {"spacing": spacing, "normalisation": "zscore", "overwrite": True, "quiet": True}
        return lambda: _check(preprocess(raw, out, workers=int(mode[-1]), **options).exit_code)
    plan = Plan((spacing[0], spacing[1], spacing[2]), "zscore")
    out = folder / "medssl-case"
    out.mkdir(exist_ok=True)
    jobs = open_source(raw, None, folder / "unused", workers=1, quiet=True).jobs

    def work() -> None:
        for job in jobs:
            _check(process(Task(job, plan, str(out))))

    process(Task(jobs[0], plan, str(out)))
    return work


def _check(failure: object) -> None:
    if failure:
        raise SystemExit(f"medssl failed: {failure}")


def _differences(folder: Path) -> dict[str, Any]:
    """Return how far the two outputs are apart."""
    from medssl.preprocessing.store import Store

    theirs = Store.open(folder / "nnunet" / "Dataset901_Speed" / "nnUNetPlans_3d_fullres")
    ours = Store.open(folder / "medssl")
    if ours.ids != theirs.ids:
        raise SystemExit(f"The tools wrote different volumes: {ours.ids} and {theirs.ids}")
    largest, total, voxels, labels, labelled = 0.0, 0.0, 0, 0, 0
    for name in ours.ids:
        shape = ours.entry(name).shape[1:]
        if theirs.entry(name).shape[1:] != shape:
            raise SystemExit(f"{name}: shapes differ, {theirs.entry(name).shape[1:]} and {shape}")
        difference = np.abs(ours.read(name, (0, 0, 0), shape) - theirs.read(name, (0, 0, 0), shape))
        largest = max(largest, float(difference.max()))
        total += float(difference.sum())
        voxels += difference.size
        mine, other = ours.read_label(name, (0, 0, 0), shape), theirs.read_label(name, (0, 0, 0), shape)
        assert mine is not None and other is not None
        labels += int(np.count_nonzero(mine != other))
        labelled += int(np.count_nonzero(other))
    return {
        "largest difference": largest,
        "mean difference": total / voxels,
        "labels that differ %": round(100 * labels / max(labelled, 1), 3),
    }


def _make_raw(dataset: Path, folder: Path, spacing: tuple[float, ...], volumes: int) -> None:
    """Write the first cases as an nnU-Net data set with plans for the voxel size."""
    raw, prepared = folder / "raw" / "Dataset901_Speed", folder / "nnunet" / "Dataset901_Speed"
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True)
    prepared.mkdir(parents=True)
    labels = sorted((dataset / "labelsTr").iterdir())[:volumes]
    for label in labels:
        image = label.name.replace(".nii.gz", "_0000.nii.gz")
        shutil.copy(dataset / "imagesTr" / image, raw / "imagesTr" / image)
        shutil.copy(label, raw / "labelsTr" / label.name)
    description = json.loads((dataset / "dataset.json").read_text())
    description["numTraining"] = len(labels)
    for place in (raw, prepared):
        (place / "dataset.json").write_text(json.dumps(description))
    (prepared / "nnUNetPlans.json").write_text(json.dumps(_plans(spacing)))


def _plans(spacing: tuple[float, ...]) -> dict[str, Any]:
    """Return the part of nnU-Net's plans that its preprocessor reads, with the planner's own choices."""
    resample = {"order_z": 0, "force_separate_z": None}
    return {
        "dataset_name": "Dataset901_Speed",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "NibabelIOWithReorient",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {}},
        "configurations": {
            "3d_fullres": {
                "data_identifier": "nnUNetPlans_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "spacing": list(spacing),
                "patch_size": list(PATCH),
                "batch_size": 2,
                "normalization_schemes": ["ZScoreNormalization"],
                "use_mask_for_norm": [False],
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **resample},
                "resampling_fn_seg": "resample_data_or_seg_to_shape",
                "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, **resample},
                "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, **resample},
                "architecture": {"network_class_name": "", "arch_kwargs": {}, "_kw_requires_import": []},
            }
        },
    }


if __name__ == "__main__":
    main()
