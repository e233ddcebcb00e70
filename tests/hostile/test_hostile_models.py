"""Models, stores and tables from strangers: nothing in them runs, nothing in them leads out of their folder."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from medssl.errors import CheckpointError, DataError, MedsslError
from medssl.files import write_json
from tests.hostile.files import RunsCode, poisoned_array
from tests.inference.tiny_models import make_model
from tests.preprocessing.stores import make_store


def poison(path: Path, target: Path, how: str) -> Path:
    """Write a checkpoint that makes `target` when it is unpickled."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"network_weights": {"a": torch.ones(1)}, "init_args": RunsCode(target)}
    if how == "bare":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    return path


def pretrain_from(checkpoint: Path, folder: Path) -> None:
    from medssl.pretraining.run import pretrain

    store = make_store(folder / "store", 2, (8, 8, 8))
    pretrain("mae", store.folder, folder / "run", continue_from=checkpoint, steps=1, device="cpu", quiet=True)


def finetune_from(checkpoint: Path, folder: Path) -> None:
    from medssl.transfer.source import load_source

    load_source(checkpoint)


def predict_with(checkpoint: Path, folder: Path) -> None:
    from medssl.inference.model import load_model

    model = make_model(folder / "model")
    (model / "fold_0" / "checkpoint_final.pth").write_bytes(checkpoint.read_bytes())
    load_model(model, torch.device("cpu"))


def import_it(checkpoint: Path, folder: Path) -> None:
    from medssl.transfer.importing import import_checkpoint

    import_checkpoint(checkpoint, folder / "out.pth")


@pytest.mark.parametrize("how", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("door", [pretrain_from, finetune_from, predict_with, import_it])
def test_a_pickle_that_runs_code_is_refused_at_every_door(
    tmp_path: Path, how: str, door: Callable[[Path, Path], None]
) -> None:
    target = tmp_path / "owned"
    checkpoint = poison(tmp_path / "in" / "step_00000001.pth", target, how)
    with pytest.raises(CheckpointError, match="could run code"):
        door(checkpoint, tmp_path)
    assert not target.exists()


def test_pickles_of_nnunets_preprocessed_folders_are_not_read(tmp_path: Path) -> None:
    import blosc2

    from medssl.preprocessing.store import Store

    folder = tmp_path / "data" / "nnUNetPlans_3d_fullres"
    folder.mkdir(parents=True)
    blosc2.asarray(np.ones((1, 8, 8, 8), np.float32), urlpath=str(folder / "case.b2nd"))
    (folder / "case.pkl").write_bytes(pickle.dumps(RunsCode(tmp_path / "owned")))
    plans = {"configurations": {"3d_fullres": {"spacing": [1, 1, 1], "data_identifier": "nnUNetPlans_3d_fullres"}}}
    write_json(folder.parent / "nnUNetPlans.json", plans)
    store = Store.open(folder)
    assert store.entry("case").shape == (1, 8, 8, 8)
    assert not (tmp_path / "owned").exists()


def test_arrays_of_objects_are_not_unpickled(tmp_path: Path) -> None:
    from medssl.data.target_arrays import read_npz_images

    poisoned_array(tmp_path / "x.npy", tmp_path / "owned")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for name in ("train_images", "train_labels", "val_images", "val_labels", "test_images", "test_labels"):
            archive.write(tmp_path / "x.npy", f"{name}.npy")
    with pytest.raises(MedsslError):
        read_npz_images(tmp_path / "x.npz")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "..", "", ".", 7])
def test_a_store_whose_ids_lead_out_of_it_is_refused(tmp_path: Path, name: object) -> None:
    from medssl.preprocessing.store import Store

    store = make_store(tmp_path / "store", 2, (8, 8, 8))
    content = json.loads((store.folder / "store.json").read_text())
    content["volumes"][0]["id"] = name
    write_json(store.folder / "store.json", content)
    with pytest.raises(DataError, match="no plain file name"):
        Store.open(store.folder)
