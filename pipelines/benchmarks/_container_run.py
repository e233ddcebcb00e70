"""Runs a command of a built image as a container engine would, with the strictest of its settings and no engine.

New namespaces for mounts, network, processes, IPC and host name; the image's files read-only; a tmpfs on /tmp and one
of 64 MB on /dev/shm; no loopback, no route; a user id without a name; no capability, and none to be had. The command
is process 1.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED_MEMORY_MB = 64
# $1 is the mount point, $2 the image's files, $3 user and group id, $4 megabytes of shared memory; then what is
# mounted, where, and `ro` or `rw`, up to `--`; then variables and the command.
PROGRAM = r"""
set -euo pipefail
root=$1 image=$2 id=$3 shared=$4; shift 4
mount --make-rprivate /
mount --bind "$image" "$root"
mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
mount -t tmpfs -o nosuid,mode=755,size=1m tmpfs "$root/dev"
for device in null zero full random urandom; do
  touch "$root/dev/$device"
  mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s /proc/self/fd "$root/dev/fd"
mkdir "$root/dev/shm"
mount -t tmpfs -o "nosuid,nodev,mode=1777,size=${shared}m" tmpfs "$root/dev/shm"
mount -t tmpfs -o nosuid,nodev,noexec,mode=1777,size=2g tmpfs "$root/tmp"
while [ "$1" != -- ]; do
  mount --bind "$1" "$root/$2"
  if [ "$3" = ro ]; then mount -o remount,bind,ro "$root/$2"; fi
  shift 3
done
shift
mount -o remount,bind,ro "$root"
exec chroot "$root" setpriv --reuid "$id" --regid "$id" --clear-groups --no-new-privs --bounding-set=-all \
  --inh-caps=-all env -i "$@"
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Args:
        code: Its exit code.
        output: What it printed.
        seconds: How long it took.
    """

    code: int
    output: str
    seconds: float


@dataclass
class Sealed:
    """An image's files and settings, ready to run.

    Args:
        files: The mounted image. Folders to mount on are made in it, as an engine does.
        configuration: Env, Entrypoint and Healthcheck of the image.
        scratch: Folder for the mount point.
        user: User and group id.
        variables: Set beside those of the image.
    """

    files: Path
    configuration: Mapping[str, Any]
    scratch: Path
    user: int
    variables: Mapping[str, str]

    def run(
        self,
        arguments: Sequence[str],
        *,
        mounts: Mapping[str, tuple[Path, str]],
        entrypoint: Sequence[str] | None = None,
        variables: Mapping[str, str] | None = None,
        interrupt: Callable[[], bool] | None = None,
        limit: float = 600,
    ) -> Ended:
        """Run a command to its end.

        Args:
            arguments: After the entry point.
            mounts: From the place in the container to the folder outside and `ro` or `rw`.
            entrypoint: Instead of the image's own.
            variables: Set for this command.
            interrupt: Asked ten times a second; once it says yes, process 1 gets SIGTERM.
            limit: Seconds after which the command is killed; its exit code is then 137.
        """
        place = self.scratch / "root"
        place.mkdir(exist_ok=True)
        mounted: list[str] = []
        for inside, (outside, mode) in mounts.items():
            (self.files / inside.lstrip("/")).mkdir(parents=True, exist_ok=True)
            mounted += [str(outside), inside.lstrip("/"), mode]
        environment = [
            *self.configuration["Env"],
            *(f"{k}={v}" for k, v in (self.variables | dict(variables or {})).items()),
        ]
        command = [*(self.configuration["Entrypoint"] if entrypoint is None else entrypoint), *arguments]
        log = self.scratch / "output.txt"
        started = time.monotonic()
        with log.open("w") as handle:
            process = subprocess.Popen(
                [
                    *("unshare", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child"),
                    *("bash", "-c", PROGRAM, "sealed", str(place), str(self.files), str(self.user)),
                    *(str(SHARED_MEMORY_MB), *mounted, "--", *environment, *command),
                ],
                stdout=handle,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
            self._wait(process, started + limit, interrupt)
        code = process.returncode
        return Ended(code if code >= 0 else 128 - code, log.read_text(errors="replace"), time.monotonic() - started)

    def _wait(self, process: subprocess.Popen[bytes], deadline: float, interrupt: Callable[[], bool] | None) -> None:
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
                process.wait()
            if interrupt is not None and interrupt():
                os.kill(_only_child(process.pid), signal.SIGTERM)
                interrupt = None
            time.sleep(0.1)


def _only_child(parent: int) -> int:
    """Return the process that is number 1 inside."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return int(children[0])
