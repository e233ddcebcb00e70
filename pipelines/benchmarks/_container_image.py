"""Builds docker/Dockerfile with buildah and no engine, on a stand-in for Python's image.

Where no registry of images can be reached, Debian's own packages make a root file system that carries the name which
the Dockerfile starts from. What a build proves is therefore every instruction of the Dockerfile, not the base's
content.
Mirror, package index and certificates are those of this machine, found at run time.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = "docker.io/library/python:3.11-slim-bookworm"
RELEASE = "bookworm"
NEEDED = ("buildah", "debootstrap", "unshare", "setpriv", "chroot")
CERTIFICATES = "/run/certificates.crt"


@dataclass
class Builder:
    """Images of one storage folder; layers of earlier builds there are used again.

    Args:
        state: Folder for storage, root file systems and logs.
    """

    state: Path
    environment: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.state.mkdir(parents=True, exist_ok=True)
        configuration = self.state / "storage.conf"
        configuration.write_text(
            f'[storage]\ndriver = "overlay"\nrunroot = "{self.state}/run"\ngraphroot = "{self.state}/graph"\n'
        )
        self.environment = {
            **os.environ,
            "CONTAINERS_STORAGE_CONF": str(configuration),
            "STORAGE_DRIVER": "overlay",
            "BUILDAH_ISOLATION": "chroot",
            # Blobs on their way go to a folder for temporary files; it must have room for gigabytes.
            "TMPDIR": str(self.state),
        }

    def buildah(self, *arguments: str, log: Path | None = None) -> str:
        """Run buildah and return what it printed.

        Raises:
            RuntimeError: If it fails; names the log or holds its message.
        """
        if log is None:
            ended = subprocess.run(
                ["buildah", *arguments], env=self.environment, capture_output=True, text=True, check=False
            )
            message = ended.stderr.strip()
        else:
            with log.open("w") as handle:
                ended = subprocess.run(
                    ["buildah", *arguments], env=self.environment, stdout=handle, stderr=handle, text=True, check=False
                )
            message = f"see {log}"
        if ended.returncode:
            raise RuntimeError(f"buildah {arguments[0]} ended with {ended.returncode}: {message}")
        return (ended.stdout or "").strip()

    def has(self, image: str) -> bool:
        """Whether an image of this name is stored."""
        try:
            self.buildah("inspect", "--type", "image", image)
        except RuntimeError:
            return False
        return True

    def stand_in(self) -> float:
        """Make Debian's minimal system with python3 under the name of the Dockerfile's base; return the seconds."""
        started = time.monotonic()
        if self.has(BASE):
            return 0.0
        root = self.state / "base"
        if root.exists():
            shutil.rmtree(root)
        included = "ca-certificates,python3,python3-venv"
        run(["debootstrap", "--variant=minbase", f"--include={included}", RELEASE, str(root), debian_mirror()])
        for folder in ("usr/bin", "usr/local/bin"):
            (root / folder / "python").symlink_to("/usr/bin/python3")
        archive = self.state / "base.tar"
        run(["tar", "-C", str(root), "-cf", str(archive), "."])
        shutil.rmtree(root)
        container = self.buildah("from", "scratch")
        self.buildah("add", "-q", container, str(archive), "/")
        archive.unlink()
        variables = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", **pip_settings()}
        options = [option for name, value in variables.items() for option in ("--env", f"{name}={value}")]
        self.buildah("config", "--cmd", "/bin/bash", *options, container)
        self.buildah("commit", "-q", container, BASE)
        self.buildah("rm", container)
        return time.monotonic() - started

    def build(self, target: str) -> dict[str, Any]:
        """Build a target of the Dockerfile.

        Returns:
            Name, seconds, seconds of a processor (fewer where others use it too), instructions, and how many of them
            came from an earlier build.
        """
        name, log = f"localhost/medssl:{target}", self.state / f"build_{target}.log"
        bundle = certificates()
        volumes = ["-v", f"{bundle}:{CERTIFICATES}:ro"] if bundle else []
        started, worked = time.monotonic(), processor_seconds()
        self.buildah(
            "bud", "--pull-never", "--layers", "--isolation", "chroot", "--format", "docker", *volumes,
            "--target", target, "-t", name, "-f", str(REPOSITORY / "docker" / "Dockerfile"), str(REPOSITORY), log=log,
        )  # fmt: skip
        seconds, worked = time.monotonic() - started, processor_seconds() - worked
        text = log.read_text(errors="replace")
        return {
            "image": name,
            "seconds": round(seconds, 1),
            "processor_seconds": round(worked, 1),
            "steps": text.count("STEP "),
            "cached": text.count("Using cache"),
        }

    def configuration(self, image: str) -> dict[str, Any]:
        """Return what an image says about how it is run: Env, Entrypoint, User, Healthcheck."""
        content: dict[str, Any] = json.loads(self.buildah("inspect", "--type", "image", image))
        configuration: dict[str, Any] = content["Docker"]["config"]
        return configuration

    def megabytes(self, image: str) -> int:
        """Return the size of an image with all its layers."""
        rows = json.loads(self.buildah("images", "--json", image))
        return round(parse_size(rows[0]["size"]) / 1e6)

    def prune(self) -> None:
        """Remove containers that are left, and images that a newer build has taken the name of."""
        self.buildah("rm", "-a")
        self.buildah("rmi", "--prune")


def run(command: list[str]) -> str:
    """Run a program and return what it printed, or raise with its last lines."""
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        last = "\n".join((ended.stdout + ended.stderr).strip().splitlines()[-5:])
        raise RuntimeError(f"{command[0]} ended with {ended.returncode}: {last}")
    return ended.stdout


def processor_seconds() -> float:
    """Return what all programs that were run and waited for have used of a processor."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def missing() -> str | None:
    """Return why containers cannot be built on this machine, or None."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "it needs root, for namespaces and mounts"
    absent = [program for program in NEEDED if shutil.which(program) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def debian_mirror() -> str:
    """Return the mirror that this machine's apt uses for the release of the base."""
    for line in run(["apt-get", "indextargets", "--format", "$(SITE) $(RELEASE)", "Created-By: Packages"]).splitlines():
        site, _, release = line.partition(" ")
        if release == RELEASE:
            return site
    raise RuntimeError(f"apt on this machine knows no mirror of Debian {RELEASE}: add one to its sources")


def pip_settings() -> dict[str, str]:
    """Return this machine's package index and certificates as variables for pip in the build."""
    settings = {"PIP_CERT": CERTIFICATES} if certificates() else {}
    index = _pip("index-url")
    return {**settings, "PIP_INDEX_URL": index} if index else settings


def certificates() -> str | None:
    """Return the certificate bundle that pip is told to use, or None for its own."""
    return _pip("cert")


def _pip(name: str) -> str | None:
    variable = os.environ.get(f"PIP_{name.upper().replace('-', '_')}")
    if variable:
        return variable
    listed: Mapping[str, str] = dict(
        line.split("=", 1) for line in run(["python3", "-m", "pip", "config", "list"]).splitlines() if "=" in line
    )
    return next((value.strip("'\"") for key, value in listed.items() if key.endswith(f".{name}")), None)


def parse_size(text: str) -> float:
    """Return the bytes of a size as buildah prints it, for example `1.64 GB`."""
    number, unit = text.split()
    return float(number) * {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}[unit.upper()]
