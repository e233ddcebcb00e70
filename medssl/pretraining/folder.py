"""The RUN folder of a pretraining: who may write to it, and the facts that stand in it."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric

import medssl
from medssl.config import read_yaml, to_yaml
from medssl.errors import CheckpointError, UsageError
from medssl.files import write_json, write_text
from medssl.lock import claimed_folder
from medssl.preprocessing.store import Store
from medssl.pretraining.recipe import ELSEWHERE, POLICY, PretrainingSettings, differences, exported
from medssl.training.checkpoint import FOLDER, SCHEMA_VERSION, newest_intact
from medssl.training.devices import on_main
from medssl.training.environment import describe_environment

logger = logging.getLogger(__name__)

RECIPE = "recipe.yaml"
KIND = "pretraining"


def stored_recipe(out: Path) -> dict[str, Any] | None:
    """Return the resolved recipe that stands in a RUN, or None."""
    path = out / RECIPE
    if not path.is_file():
        return None
    values = read_yaml(path)
    if values.get("augmentation", {}).get("policy") == POLICY:
        values["augmentation"]["policy"] = str(out / POLICY)
    if values.get("probes", {}).get("labels") == ELSEWHERE:
        logger.warning("The labels of the probes are %s: give probes.labels to go on with them.", ELSEWHERE)
        values["probes"]["labels"] = None
    return values


def refuse_changes(out: Path, before: dict[str, Any], recipe: PretrainingSettings, store: Store) -> None:
    """Refuse to resume a RUN with another recipe or other data.

    Raises:
        UsageError: Naming each difference.
    """
    plain = {**before, "augmentation": dict(before.get("augmentation", {}))}
    if plain["augmentation"].get("policy"):
        plain["augmentation"]["policy"] = POLICY
    changed = differences(plain, exported(recipe))
    if changed:
        raise UsageError(
            f"--resume: {out} was started with another recipe: {'; '.join(changed)}. Resume with the same settings (or "
            "give none), or start a new run with another --out."
        )
    own_policy = recipe.augmentation.policy
    if own_policy is not None and (out / POLICY).is_file() and own_policy.read_text() != (out / POLICY).read_text():
        raise UsageError(f"--resume: {own_policy} is not the policy {out} was started with; that is {out / POLICY}.")
    data = out / "data.json"
    if data.is_file() and json.loads(data.read_text()).get("store_hash") != store.hash:
        raise UsageError(
            f"--resume: the store is not the one {out} was started with. Give that store, or start a new run."
        )


@contextmanager
def claim(
    out: Path, fabric: Fabric, *, resume: bool, overwrite: bool, owned: Callable[[Path], bool] | None = None
) -> Iterator[None]:
    """Prepare a RUN and hold it alone; the first process does, the others learn whether it could.

    Args:
        out: The RUN.
        fabric: The processes.
        resume: Go on with what is there.
        overwrite: Replace what is there.
        owned: Tells whether a folder may be replaced; by default whether it is a pretraining.

    Raises:
        UsageError: If it is not empty and neither option is given, belongs to another command, or is being written.
    """
    with ExitStack() as held:
        claimed = claimed_folder(out, resume=resume, overwrite=overwrite, owned=owned or _is_pretraining)
        on_main(fabric, lambda: held.enter_context(claimed))
        yield


def write_facts(
    out: Path, recipe: PretrainingSettings, store: Store, continued_from: dict[str, Any] | None = None
) -> None:
    """Write `run.json`, `recipe.yaml`, `environment.json`, `data.json`: no path, no machine name, no id of data."""
    write_json(
        out / "run.json",
        {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "method": recipe.method,
            "network": recipe.network,
            "steps": recipe.steps,
            "medssl_version": medssl.__version__,
        },
    )
    write_text(out / RECIPE, to_yaml(exported(recipe)))
    own_policy = recipe.augmentation.policy
    if own_policy is not None and own_policy != out / POLICY:
        write_text(out / POLICY, own_policy.read_text())
    write_json(out / "environment.json", describe_environment())
    data = describe_data(store)
    write_json(out / "data.json", data if continued_from is None else {**data, "continued_from": continued_from})


def describe_data(store: Store) -> dict[str, Any]:
    """Return counts and hashes of a store, nothing that names a volume or a patient."""
    rows = store.info["volumes"]
    sizes = sorted(tuple(row["shape"]) for row in rows)
    return {
        "store_hash": store.hash,
        "volumes": dict(Counter(str(row["split"]) for row in rows)),
        "patients": len({row["patient_key"] for row in rows}),
        "modalities": dict(Counter(str(row["modality"]) for row in rows)),
        "channels": sorted({int(size[0]) for size in sizes}),
        "median_shape": list(sizes[len(sizes) // 2]) if sizes else None,
        "spacing_mm": spacing_of(store),
        "normalisation": store.info.get("normalisation"),
    }


def spacing_of(store: Store) -> list[float] | None:
    """Return the spacing that all volumes share, (z, y, x) in mm, or None where each has its own."""
    spacings = [row["spacing_mm"] for row in store.info["volumes"] if "spacing_mm" in row]
    spacings = spacings or [store.info.get("spacing", {}).get("mm")]
    first = spacings[0]
    if first is None or any(abs(a - b) > 1e-3 for spacing in spacings for a, b in zip(first, spacing, strict=True)):
        return None
    return [float(edge) for edge in first]


def newest_checkpoint(out: Path) -> Path | None:
    """Return the newest intact checkpoint, or None for a run that was killed before its first.

    Raises:
        CheckpointError: If there are checkpoints, and all are damaged.
    """
    folder = out / FOLDER
    try:
        return newest_intact(folder)
    except CheckpointError:
        if any(folder.glob("step_*.pth")):
            raise
        return None


def _is_pretraining(out: Path) -> bool:
    facts = out / "run.json"
    return facts.is_file() and json.loads(facts.read_text()).get("kind") == KIND
