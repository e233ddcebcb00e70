"""Quality of representations without labels: figures, the same of the untrained network, and a verdict in words."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medssl.errors import UsageError
from medssl.files import write_json
from medssl.inference.embedding import Embeddings, embed
from medssl.inference.frozen import load_frozen
from medssl.inference.model import resolve_device
from medssl.inference.tiles import Tile
from medssl.inference.views import view_features
from medssl.inference.volumes import Volume, volumes_of_store
from medssl.networks.pooling import Pooling, Stages
from medssl.preprocessing.store import Store
from medssl.training import quality
from medssl.training.collapse import Verdict, figures, verdict

SCHEMA_VERSION = 1
Floats = NDArray[np.floating[Any]]
_SHOWN = {
    "centred_rank": "directions along which samples differ (of {possible:.0f})",
    "rankme": "RankMe, not centred",
    "lidar": "LiDAR, directions that views do not change",
    "alpha": "alpha-ReQ, decay of the spectrum",
    "alpha_fit": "R squared of that fit",
    "first_direction": "share of variance in the first direction",
    "uniformity": "uniformity (0 is collapsed)",
    "alignment": "alignment of views (0 is best)",
    "cosine": "mean cosine of two samples",
    "norm": "mean length",
    "norm_spread": "spread of the lengths",
    "deviation": "deviation per dimension, relative",
    "idle_dimensions": "share of idle dimensions",
    "duplicates": "share of samples with a twin",
}


@dataclass(frozen=True)
class QualityResult:
    """What was found of an encoder's features.

    Args:
        figures: By name; NaN where not defined.
        untrained: The same of the untrained network, or None.
        follows: Correlation of the first direction with what a shortcut would be: mean intensity, size.
        verdict: In words.
        worst: Ids of the volumes with the longest features, longest first.
        facts: Which encoder, samples and views.
    """

    figures: dict[str, float]
    untrained: dict[str, float] | None
    follows: dict[str, float]
    verdict: Verdict
    worst: tuple[str, ...]
    facts: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the content of `quality.json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "quality evaluation",
            "verdict": self.verdict.to_json(),
            "figures": _plain(self.figures),
            "untrained": None if self.untrained is None else _plain(self.untrained),
            "first_direction_follows": _plain(self.follows),
            "longest": list(self.worst),
            **self.facts,
        }

    def __rich__(self) -> Any:
        """Return a table and the verdict for the terminal."""
        from rich.console import Group
        from rich.table import Table

        table = Table(title=f"{self.figures['samples']:.0f} samples, {self.figures['dimensions']:.0f} dimensions")
        table.add_column("figure")
        table.add_column("trained", justify="right")
        if self.untrained is not None:
            table.add_column("untrained", justify="right")
        possible = min(self.figures["samples"] - 1, self.figures["dimensions"])
        for name, words in _SHOWN.items():
            if name in self.figures:
                values = [self.figures, *([self.untrained] if self.untrained is not None else [])]
                shown = ["-" if math.isnan(one.get(name, math.nan)) else f"{one[name]:.3g}" for one in values]
                table.add_row(words.format(possible=possible), *shown)
        return Group(table, str(self.verdict))


def representation_figures(features: Floats) -> dict[str, float]:
    """Return the figures of features that `medssl.training.collapse.figures` names. Shape: (N, D)."""
    return figures(torch.from_numpy(np.ascontiguousarray(features)))


def judge(features: Floats, untrained: Floats | None = None) -> Verdict:
    """Return the verdict on features, with those of the untrained network where they are known. Shape: (N, D) each."""
    control = None if untrained is None else representation_figures(untrained)
    return verdict(representation_figures(features), untrained=control)


def evaluate_quality(
    checkpoint: Path,
    store: Path,
    out: Path | None = None,
    *,
    split: str = "all",
    most: int = 256,
    views: int = 4,
    purpose: str = "contrastive",
    stages: Stages = "last",
    pooling: Pooling = "mean",
    control: bool = True,
    seed: int = 0,
    device: str = "auto",
    quiet: bool = False,
) -> QualityResult:
    """Look at what an encoder makes of the volumes of a store; write `quality.json` to `out`.

    Args:
        checkpoint: A RUN or a checkpoint file.
        store: A store.
        out: Folder to write to, or None.
        split: `train`, `validation`, `test` or `all`.
        most: Volumes at most, evenly spaced among the sorted ids.
        views: Augmented views of each volume for alignment and LiDAR; 0 leaves both away. LiDAR's paper has 50.
        purpose: Policy that draws the views.
        stages: Stages whose pooled features are looked at; `last` is what most methods train.
        pooling: `mean` or `mean+max`.
        control: Look at the untrained network too, which tells a collapse from what the data or the pooling allow.
        seed: Of the untrained weights and of the views.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        quiet: Show no progress.

    Raises:
        UsageError: If the split is empty or holds one volume, or channels or stages do not fit.
    """
    if views == 1 or views < 0:
        raise UsageError(f"--views takes 0 or at least 2, got {views}.")
    opened = Store.open(store)
    volumes = volumes_of_store(opened, split=split, most=most)
    if len(volumes) < 2:
        raise UsageError(f"Quality needs at least two volumes; the split '{split}' of the store has {len(volumes)}.")
    looks = []
    for untrained in (False, True) if control else (False,):
        frozen = load_frozen(checkpoint, untrained=untrained, seed=seed, device=resolve_device(device))
        seen = _Seen()
        found = embed(frozen, volumes, stages=stages, pooling=pooling, quiet=quiet, change=seen)
        values = representation_figures(found.features)
        if views and not values["not_finite"]:
            drawn = view_features(
                frozen, volumes, views=views, purpose=purpose, stages=stages, pooling=pooling, seed=seed, quiet=quiet
            )
            values |= figures_of_views(drawn)
        looks.append((found, values, seen))
    found, values, seen = looks[0]
    before = looks[1][1] if control else None
    result = QualityResult(
        figures=values,
        untrained=before,
        follows=_follows(found, seen, volumes),
        verdict=verdict(values, untrained=before, copies=seen.copies()),
        worst=tuple(found.ids[row] for row in np.argsort(-_lengths(found.features), kind="stable")[:5]),
        facts={
            **found.facts,
            "views": views,
            "purpose": purpose,
            "split": split,
            "store_hash": opened.hash,
            "seed": seed,
        },
    )
    if out is not None:
        write_json(out / "quality.json", result.to_json())
    return result


def figures_of_views(views: Floats) -> dict[str, float]:
    """Return `lidar` and `alignment` of features of several views. Shape: (N, q, D).

    Before LiDAR the features are divided by the root mean square of their centred values: its constant of 1e-4 is meant
    for features that vary by about 1, and pooled ones vary far less.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(views))
    if not bool(torch.isfinite(tensor).all()):
        return {"lidar": math.nan, "alignment": math.nan}
    pairs = [
        quality.alignment(tensor[:, first], tensor[:, second])
        for first in range(tensor.shape[1])
        for second in range(first)
    ]
    spread = (tensor - tensor.mean(dim=(0, 1))).square().mean().sqrt().clamp(min=1e-30)
    return {"lidar": float(quality.lidar(tensor / spread)), "alignment": float(torch.stack(pairs).mean())}


class _Seen:
    """Takes down the mean intensity and a hash of what was shown of each volume, without changing it."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}
        self._hashes: dict[str, Any] = {}

    def __call__(self, image: NDArray[np.float32], volume: Volume, tile: Tile) -> NDArray[np.float32]:
        self.sums.setdefault(volume.id, []).append(float(image.mean()))
        self._hashes.setdefault(volume.id, hashlib.sha256()).update(np.ascontiguousarray(image).data)
        return image

    def copies(self) -> float:
        """Return the share of volumes whose image equals another's."""
        digests = [digest.hexdigest() for digest in self._hashes.values()]
        return sum(digests.count(digest) > 1 for digest in digests) / len(digests)


def _follows(found: Embeddings, seen: _Seen, volumes: Sequence[Volume]) -> dict[str, float]:
    """Return how closely the first principal component follows simple properties of the volumes."""
    rows = np.isfinite(found.features).all(axis=1)
    if rows.sum() < 3:
        return {"mean intensity": math.nan, "size": math.nan}
    centred = found.features[rows].astype(np.float64)
    centred -= centred.mean(axis=0)
    first = centred @ np.linalg.svd(centred, full_matrices=False)[2][0]
    intensity = np.array([np.mean(seen.sums[name]) for name in found.ids])[rows]
    size = np.log([math.prod(volume.shape[1:]) for volume in volumes])[rows]
    return {"mean intensity": _correlation(first, intensity), "size": _correlation(first, size)}


def _correlation(first: Floats, second: Floats) -> float:
    spread = first.std() * second.std()
    if not spread > 1e-12 * (1 + abs(second).max()):
        return math.nan
    return float(np.mean((first - first.mean()) * (second - second.mean())) / spread)


def _lengths(features: Floats) -> Floats:
    return np.nan_to_num(np.linalg.norm(features, axis=1), nan=np.inf)


def _plain(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
