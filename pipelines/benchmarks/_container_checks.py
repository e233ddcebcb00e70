"""What must hold inside the container."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from _container_bench import PREDICT, Bench, small_model_hash
from _container_run import Ended, Sealed

HERE = Path(__file__).parent
PRETRAIN = ("patch_size=[16,32,16]", "batch_size=4", "mask.block=4", "log_every=1", "pictures_every=0")
MORE_STEPS_THAN_ARE_WAITED_FOR = 100_000
PREDICT_MOUNTED = (*PREDICT, "--model", "/model", "--input", "/input", "--out", "/output")
Row = dict[str, Any]


def all_checks(bench: Bench, sealed: Sequence[Sealed]) -> Iterator[Row]:
    """Go through all checks: for the first user all of them, for the others those that depend on the user."""
    for number, container in enumerate(sealed):
        yield from of_any_user(bench, container)
        if number == 0:
            yield from of_one_user(bench, container)


def of_any_user(bench: Bench, container: Sealed) -> Iterator[Row]:
    """Check what depends on who runs it: names, caches, capabilities, a prediction."""
    user = container.user
    yield row("version", user, "exit code 0", container.run(["--version"], mounts={}), 0, "not a medical device")
    yield row("doctor", user, "exit code 0", container.run(["doctor"], mounts={}), 0)
    yield probe("imports", bench, container, "imported monai, nnunetv2, matplotlib; inductor's cache /tmp/")
    yield probe("capabilities", bench, container, "CapEff 0, CapBnd 0, NoNewPrivs 1")
    yield probe("network", bench, container, "Network is unreachable")
    yield probe("write", bench, container, "Read-only file system")
    out = bench.output(user, "masks")
    ended = container.run(PREDICT_MOUNTED, mounts=bench.prediction(out))
    yield row("predict a real series", user, "exit code 0", ended, 0)
    yield same_masks(bench.expected, out, user)


def of_one_user(bench: Bench, container: Sealed) -> Iterator[Row]:
    """Check health, exit codes, signals and shared memory."""
    yield from of_health(bench, container)
    yield from of_exit_codes(bench, container)
    yield from of_signals(bench, container)
    yield probe("readers", bench, container, "read batches of 31 MB", mounts={"/input": (bench.large_store, "ro")})
    yield probe("fine_tuning", bench, container, "made batches of")


def of_health(bench: Bench, container: Sealed) -> Iterator[Row]:
    """Run the image's own health check with the right model, another one and a damaged one."""
    test = container.configuration["Healthcheck"]["Test"]
    if test[0] != "CMD":
        raise ValueError(f"the health check is {test[0]}, not an argument list")
    model = {"/model": (bench.model, "ro")}
    damaged = {"/model": (bench.damaged_model(), "ro")}
    named = {"MEDSSL_MODEL": "/model"}
    hashed = named | {"MEDSSL_MODEL_SHA256": small_model_hash(bench.model)}
    cases: tuple[tuple[str, Mapping[str, Any], Mapping[str, str], int, str], ...] = (
        ("healthy: model loads, hash as expected", model, hashed, 0, "as expected"),
        ("unhealthy: another hash", model, named | {"MEDSSL_MODEL_SHA256": "0" * 64}, 1, "is expected"),
        ("unhealthy: model damaged", damaged, named, 1, "damaged"),
        # The folder to mount on may have been made before: then it is there and empty.
        ("unhealthy: model not mounted", {}, named, 1, "checkpoint"),
    )
    for name, mounts, variables, code, text in cases:
        ended = container.run([], entrypoint=test[1:], mounts=mounts, variables=variables)
        yield row(name, container.user, f"exit code {code}", ended, code, text)


def of_exit_codes(bench: Bench, container: Sealed) -> Iterator[Row]:
    """Check the documented exit codes on input that earns them."""
    user = container.user
    mixed = bench.output(user, "mixed")
    ended = container.run(PREDICT_MOUNTED, mounts=bench.prediction(mixed, bench.mixed_input))
    yield row("predict: some input refused", user, "exit code 3", ended, 3)
    refused = bench.output(user, "refused")
    ended = container.run(PREDICT_MOUNTED, mounts=bench.prediction(refused, bench.refused_input))
    yield row("predict: all input refused", user, "exit code 4", ended, 4)
    ended = container.run(["predict", "--no-such-option"], mounts={})
    yield row("usage", user, "exit code 2", ended, 2)
    no_output = bench.prediction(bench.output(user, "unwritable"))
    no_output["/output"] = (no_output["/output"][0], "ro")
    ended = container.run(PREDICT_MOUNTED, mounts=no_output)
    yield row("predict: output mounted read-only", user, "an exit code that is not 0", ended, None, "Read-only")


def of_signals(bench: Bench, container: Sealed) -> Iterator[Row]:
    """Send SIGTERM to process 1 during pretraining and prediction."""
    user = container.user
    run, stopped = bench.output(user, "run"), bench.output(user, "stopped")
    metrics = run / "out" / "metrics.jsonl"
    settings = [option for setting in PRETRAIN for option in ("--set", setting)]
    ended = container.run(
        ["pretrain", "--method", "mae", "--store", "/input", "--out", "/output/out", "--workers", "2", "--quiet",
         "--device", "cpu", "--steps", str(MORE_STEPS_THAN_ARE_WAITED_FOR), *settings],
        mounts={"/input": (bench.store, "ro"), "/output": (run, "rw")},
        interrupt=lambda: metrics.is_file() and metrics.stat().st_size > 0,
    )  # fmt: skip
    yield row("SIGTERM in pretraining", user, "exit code 143", ended, 143)
    ended = container.run(["doctor", "--model", "/model/out"], mounts={"/model": (run, "ro")})
    yield row("the checkpoint it saved loads", user, "exit code 0", ended, 0, "loaded 1 checkpoint")
    ended = container.run(PREDICT_MOUNTED, mounts=bench.prediction(stopped), interrupt=lambda: any(stopped.iterdir()))
    finding = row("SIGTERM in predicting", user, "exit code 143, no half mask", ended, 143)
    finding["holds"] &= not list(stopped.glob("*.nii*"))
    yield finding


def probe(
    name: str, bench: Bench, container: Sealed, expected: str, mounts: Mapping[str, tuple[Path, str]] | None = None
) -> Row:
    """Run one function of `_container_probe.py` inside."""
    everything = {"/checks": (HERE, "ro"), **bench.inputs(), **(mounts or {})}
    ended = container.run(
        ["/checks/_container_probe.py", name], entrypoint=["tini", "--", "python"], mounts=everything, limit=180
    )
    return row(f"probe: {name}", container.user, expected, ended, 0, expected)


def row(check: str, user: int, expected: str, ended: Ended, code: int | None, text: str = "") -> Row:
    """Return how a command ended beside how it should have.

    Args:
        check: What is checked.
        user: User id inside.
        expected: In words.
        ended: What happened.
        code: The exit code; None takes any but 0.
        text: Must be in the output, whatever its line breaks.
    """
    right = ended.code != 0 if code is None else ended.code == code
    # A table breaks its text into lines.
    holds = right and text.replace(" ", "") in "".join(ended.output.replace("│", "").split())
    lines = ended.output.strip().splitlines()
    found = f"exit code {ended.code}" if holds or not lines else f"exit code {ended.code}: {lines[-1][:200]}"
    return {
        "check": check,
        "user": user,
        "expected": expected,
        "found": found,
        "seconds": round(ended.seconds, 1),
        "holds": holds,
    }


def same_masks(expected: Path, found: Path, user: int) -> Row:
    """Compare the masks of a run inside with those of the run outside, voxel by voxel."""
    pairs = [sorted(folder.glob("*.nii.gz")) for folder in (expected, found)]
    equal = len(pairs[0]) == len(pairs[1]) == 1
    voxels = 0
    if equal:
        images = [nibabel.load(files[0]) for files in pairs]
        arrays = [np.asarray(image.dataobj) for image in images]
        voxels = int(np.count_nonzero(arrays[0]))
        equal = np.array_equal(*arrays) and np.array_equal(images[0].affine, images[1].affine) and voxels > 0
    return {
        "check": "mask equals that of the run outside", "user": user, "expected": "every voxel and the affine",
        "found": f"{'equal' if equal else 'DIFFERENT'}, {voxels} voxels of foreground", "seconds": 0.0, "holds": equal,
    }  # fmt: skip
