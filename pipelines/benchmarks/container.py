"""Does medssl work in its container: any user, nothing writable, no network, 64 MB of shared memory?

python pipelines/benchmarks/container.py [--target cpu] [--state FOLDER] [--data FOLDER]

Builds a target of docker/Dockerfile without an engine (`_container_image.py`), then runs the image's own entry point
and health check as users 10001 and 12345 in namespaces of their own (`_container_run.py`): a model is trained by a few
steps outside and predicts a real MR series inside; the masks must be those of the same command outside. Exit codes: 0
all checks hold, 1 one does not, 77 skipped, because MEDSSL_CONTAINER is 0 or this machine cannot do it (the message
says why). It needs root, `apt-get install buildah debootstrap`, and 20 GB of disk; layers are kept in --state.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _common import print_table, write_results
from _container_checks import Bench, all_checks
from _container_image import REPOSITORY, Builder, missing
from _container_run import SHARED_MEMORY_MB, Sealed

SKIPPED = 77
USERS = (10001, 12345)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--state", type=Path, default=Path.home() / ".cache" / "medssl" / "container")
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("MEDSSL_DATA", REPOSITORY.parent / "shared" / "data"))
    )
    options = parser.parse_args()
    reason = "MEDSSL_CONTAINER is 0" if os.environ.get("MEDSSL_CONTAINER") == "0" else missing()
    if reason is None and not options.data.is_dir():
        reason = f"no real data in {options.data}: name its folder with --data"
    if reason:
        print(f"skipped: {reason}")
        sys.exit(SKIPPED)
    started = time.monotonic()
    builder = Builder(options.state.resolve())
    base_seconds = builder.stand_in()
    built = builder.build(options.target)
    checks = run_checks(builder, built["image"], options.data.resolve())
    seconds = time.monotonic() - started
    builder.prune()
    print_table(checks)
    failed = sum(not row["holds"] for row in checks)
    print(f"\n{len(checks) - failed} of {len(checks)} checks hold; {seconds:.0f} s in all")
    print(
        write_results(
            "container",
            {
                "target": options.target,
                "base": "Debian bookworm by debootstrap under the name of python:3.11-slim-bookworm",
                "seconds": {
                    "base": round(base_seconds, 1),
                    "build": built["seconds"],
                    "build_processor": built["processor_seconds"],
                    "all": round(seconds, 1),
                },
                "steps": built["steps"],
                "steps_cached": built["cached"],
                "image_mb": builder.megabytes(built["image"]),
                "shared_memory_mb": SHARED_MEMORY_MB,
                "checks": checks,
            },
        )
    )
    if failed:
        sys.exit(1)


def run_checks(builder: Builder, image: str, data: Path) -> list[dict[str, Any]]:
    """Mount the image and go through all checks, for each user."""
    container = builder.buildah("from", "--pull-never", image)
    try:
        files = Path(builder.buildah("mount", container))
        with tempfile.TemporaryDirectory() as scratch:
            # The users of the container have to reach what is mounted for them.
            Path(scratch).chmod(0o755)
            bench = Bench(Path(scratch), data)
            variables = {"OMP_NUM_THREADS": "1"}
            sealed = [Sealed(files, builder.configuration(image), Path(scratch), user, variables) for user in USERS]
            rows = []
            for row in all_checks(bench, sealed):
                print(
                    f"{'holds' if row['holds'] else 'FAILS'}: {row['check']} ({row['user']}): {row['found']}",
                    flush=True,
                )
                rows.append(row)
            return rows
    finally:
        builder.buildah("rm", container)


if __name__ == "__main__":
    main()
