"""What `medssl bench` found, in words: which part limits, and what would change that."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from medssl import registry
from medssl.preprocessing.codec import LOSSLESS
from medssl.pretraining.recipe import PretrainingSettings
from medssl.training.environment import describe_environment, processors

if TYPE_CHECKING:
    from rich.console import RenderableType

# Input that costs less than this part of the step is not worth a change.
LITTLE = 0.05
# What the augmentation does besides its transforms: masks, and what holds it together.
REST = "masks and the rest"
# A device of which less is used has room for a larger batch.
HALF = 0.5


@dataclass(frozen=True)
class Part:
    """One part of the work.

    Args:
        name: `reading`, `augmentation`, `step` or `whole`.
        seconds: Mean time per batch.
        samples: Samples of a batch.
        batches: How many were measured.
    """

    name: str
    seconds: float
    samples: int
    batches: int

    @property
    def samples_per_second(self) -> float:
        """Throughput."""
        return self.samples / max(self.seconds, 1e-12)

    def to_json(self) -> dict[str, Any]:
        """Return plain types."""
        return {
            "samples_per_second": self.samples_per_second,
            "milliseconds_per_batch": 1000 * self.seconds,
            "batches_measured": self.batches,
        }


@dataclass(frozen=True)
class TransformTime:
    """What one transform costs.

    Args:
        name: As policies call it.
        kind: `ours`, or `library` for one of TorchIO or MONAI.
        seconds: Mean time per batch, the samples included that it did not change.
    """

    name: str
    kind: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return plain types."""
        return {"name": self.name, "kind": self.kind, "milliseconds_per_batch": 1000 * self.seconds}


@dataclass(frozen=True)
class BenchReport:
    """What was measured.

    Args:
        settings: The resolved recipe.
        store: `store.json`.
        device: What trains.
        workers: Reader processes.
        parts: By name: `reading`, `augmentation`, `step`, `whole`.
        transforms: What the augmentation is made of.
        memory: Peaks in GiB: `host` of this process; `device`, and `device_total` that it has, on CUDA.
    """

    settings: PretrainingSettings
    store: dict[str, Any]
    device: str
    workers: int
    parts: dict[str, Part]
    transforms: tuple[TransformTime, ...]
    memory: dict[str, float]

    @property
    def reads_ahead(self) -> bool:
        """Whether the next batch is read while this one is computed."""
        return self.workers > 0 or self.device.startswith("cuda")

    @property
    def limit(self) -> str:
        """The part whose time decides: `reading`, `augmentation` or `step`."""
        cost = {name: self.parts[name].seconds for name in ("reading", "augmentation", "step")}
        computing = "augmentation" if cost["augmentation"] > cost["step"] else "step"
        # What is read ahead costs nothing until it takes longer than everything else together.
        beside = cost["augmentation"] + cost["step"] if self.reads_ahead else cost[computing]
        return "reading" if cost["reading"] > beside else computing

    @property
    def input_overhead(self) -> float:
        """How much longer a step takes with real input than with input that is there already, as a part of it."""
        return self.parts["whole"].seconds / max(self.parts["step"].seconds, 1e-12) - 1

    @property
    def verdict(self) -> str:
        """One sentence that names the limit, with numbers."""
        part, whole = self.parts[self.limit], self.parts["whole"]
        return (
            f"The {part.name} limits: {1000 * part.seconds:.4g} ms per batch of {part.samples} alone, "
            f"{1000 * whole.seconds:.4g} ms for everything. Real input makes a step {self._overhead_in_words()}."
        )

    @property
    def advice(self) -> list[str]:
        """What would change the limit, the most effective first."""
        return {"reading": self._reading, "augmentation": self._augmentation, "step": self._step}[self.limit]()

    def to_json(self) -> dict[str, Any]:
        """Return plain types; no path and no name of a volume."""
        settings = self.settings
        return {
            "schema_version": 1,
            "kind": "bench",
            "recipe": {
                **{name: getattr(settings, name) for name in ("method", "network", "batch_size", "accumulate")},
                **{name: getattr(settings, name) for name in ("precision", "memory_format", "compile")},
                "patch_size": list(settings.patch_size),
                "workers": self.workers,
            },
            "store": {"volumes": len(self.store["volumes"]), "codec": self.store.get("codec", LOSSLESS)},
            "device": self.device,
            "environment": describe_environment(),
            "parts": {name: part.to_json() for name, part in self.parts.items()},
            "transforms": [entry.to_json() for entry in self.transforms],
            "peak_memory_gib": self.memory,
            "input_overhead": self.input_overhead,
            "limit": self.limit,
            "verdict": self.verdict,
            "advice": self.advice,
        }

    def __rich__(self) -> RenderableType:
        """Return tables for the terminal."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        patch = " x ".join(map(str, self.settings.patch_size))
        parts = Table(
            title=f"{self.settings.method}, {self.settings.network}, patch {patch}",
            caption=f"on {self.device} in {self.settings.precision}, {self.workers} reader processes",
        )
        for name in ("part", "samples per second", "ms per batch", "batches measured"):
            parts.add_column(name, justify="left" if name == "part" else "right")
        for name, part in self.parts.items():
            rate, time = f"{part.samples_per_second:.4g}", f"{1000 * part.seconds:.4g}"
            parts.add_row(f"{name} (limits)" if name == self.limit else name, rate, time, str(part.batches))
        step = self.parts["step"].seconds
        transforms = Table(title="Augmentation")
        for name in ("transform", "ms per batch", "% of the step"):
            transforms.add_column(name, justify="left" if name == "transform" else "right")
        for entry in self.transforms:
            name = f"{entry.name} (library)" if entry.kind == "library" else entry.name
            transforms.add_row(name, f"{1000 * entry.seconds:.3g}", f"{100 * entry.seconds / step:.2g}")
        peaks = f"Peak memory: {self.memory['host']:.2g} GiB of this process"
        if "device" in self.memory:
            peaks += f", {self.memory['device']:.3g} of {self.memory['device_total']:.3g} GiB of the device"
        lines = [peaks + ".", self.verdict, *(f"- {line}" for line in self.advice)]
        return Group(parts, transforms, Text("\n".join(lines)))

    def _overhead_in_words(self) -> str:
        part = self.input_overhead
        return f"{100 * part:.2g} % longer" if part > 0.005 else "no longer"

    def _reading(self) -> list[str]:
        cost = self.parts["augmentation"].seconds + self.parts["step"].seconds
        needed = math.ceil(max(self.workers, 1) * self.parts["reading"].seconds / max(cost, 1e-12))
        needed = max(needed, self.workers + 1)
        cores = processors()
        groups = self.parts["reading"].samples // self.settings.sampling.crops_per_volume
        lines = []
        if needed <= min(cores, groups):
            lines.append(f"Raise --workers from {self.workers} to {needed}: then reading keeps up.")
        elif self.workers < min(cores, groups):
            lines.append(
                f"Raise --workers from {self.workers} to {min(cores, groups)}. {needed} would keep up, but there are "
                f"{cores} cores and {groups} reads in a batch."
            )
        if self.store.get("codec", LOSSLESS) == LOSSLESS:
            lines.append("Preprocess with --codec int16: half the bytes of lossless, with an error that is reported.")
        if self.settings.sampling.crops_per_volume == 1:
            lines.append("--set sampling.crops_per_volume=2 cuts two crops near each other out of one read.")
        return [*lines, "Put the store on a local disk if it is not on one."]

    def _augmentation(self) -> list[str]:
        slow = sorted(self.transforms, key=lambda entry: entry.seconds, reverse=True)
        total = max(self.parts["augmentation"].seconds, 1e-12)
        lines = []
        for entry in slow[:2]:
            share = f"{entry.name} takes {1000 * entry.seconds:.3g} ms of {1000 * total:.3g} ms per batch"
            if entry.kind == "library":
                lines.append(f"{share}, one sample at a time on the CPU: remove it from the policy's library list.")
            elif entry.name == "spatial":
                lines.append(f"{share}: lower the probabilities of rotation, scale and elastic under spatial.")
            elif entry.name != REST:
                override = f"augmentation.overrides.intensity.{entry.name}.probability"
                lines.append(f"{share}: lower its probability (--set {override}=...).")
        return [*lines, "More workers do not help: they only read."]

    def _step(self) -> list[str]:
        settings, lines = self.settings, []
        if self.input_overhead <= LITTLE:
            lines.append("Reading and augmentation keep up: more workers change nothing.")
        elif not self.reads_ahead and self.parts["reading"].seconds > LITTLE * self.parts["step"].seconds:
            part = self.parts["reading"].seconds / self.parts["step"].seconds
            lines.append(f"Reading costs {100 * part:.2g} % of a step and waits for nobody: --workers 1 reads ahead.")
        if settings.precision == "float32" and self._has_fast_bfloat16():
            lines.append("--set precision=bf16: this processor multiplies bfloat16 in hardware.")
        if self.device.startswith("cuda") and not settings.compile:
            lines.append("--set compile=true for a long run.")
        used = self.memory.get("device", 1.0) / self.memory.get("device_total", 1.0)
        if used < HALF:
            lines.append(f"A larger batch_size: {100 * used:.2g} % of the device's memory is used.")
        mine = registry.network(settings.network)
        smaller = [
            entry
            for entry in registry.NETWORKS.values()
            if entry.family == mine.family and entry.parameters[3] < mine.parameters[3]
        ]
        if smaller:
            largest = max(smaller, key=lambda entry: entry.parameters[3])
            lines.append(f"A smaller network: {largest.name} has {largest.parameters[3] / 1e6:.2g} M weights in 3D.")
        return lines or ["A smaller patch_size."]

    def _has_fast_bfloat16(self) -> bool:
        if self.device.startswith("cuda"):
            return torch.cuda.is_bf16_supported(including_emulation=False)
        # Private in torch, as are all questions to it about the processor; where it is gone, nothing is advised.
        supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return supported is not None and bool(supported())


def peak_host_gib() -> float:
    """Return the largest memory that this process has held since it began; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
