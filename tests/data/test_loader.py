"""The batch of step k is a function of the seed and k: not of workers, ranks, restarts or what was asked before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from medssl.data.loader import CropLoader
from medssl.data.sampling import CropSettings
from medssl.errors import DataError, MedsslError, UsageError
from medssl.preprocessing.store import Store
from tests.preprocessing.stores import BACKGROUND, make_store

SETTINGS = CropSettings(
    patch_size=(12, 16, 16), read_size=(16, 20, 18), batch_size=4, crops_per_volume=2, labels=True, spread=0.5
)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return make_store(tmp_path_factory.mktemp("store") / "s", n=4, labels=True)


def take(loader: CropLoader, start: int, count: int) -> list:
    return list(islice(loader.batches(start), count))


def same(a, b) -> bool:
    names = ("image", "label", "sample_index", "sample_id", "origin_mm", "spacing_mm", "valid", "background")
    tensors = all(
        (getattr(a, n) is None and getattr(b, n) is None) or torch.equal(getattr(a, n), getattr(b, n)) for n in names
    )
    return tensors and a.modality == b.modality and a.patient_key == b.patient_key


def test_two_reader_processes_give_the_batches_of_none(store):
    with CropLoader(store, SETTINGS, seed=1) as alone, CropLoader(store, SETTINGS, seed=1, workers=2) as helped:
        assert all(same(a, b) for a, b in zip(take(alone, 0, 6), take(helped, 0, 6), strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_restart_at_any_step_continues_the_same_stream(store, workers):
    with CropLoader(store, SETTINGS, seed=1, workers=workers) as loader:
        whole = take(loader, 0, 6)
        for start in (5, 2, 4):
            assert same(whole[start], take(loader, start, 1)[0])


def test_the_ranks_together_hold_the_batch_of_one(store):
    whole = take(CropLoader(store, SETTINGS, seed=1), 3, 2)
    parts = [take(CropLoader(store, SETTINGS, seed=1, rank=rank, world=2), 3, 2) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        rows = torch.cat([part[step].sample_index for part in parts])
        images = torch.cat([part[step].image for part in parts])
        assert sorted(rows.tolist()) == batch.sample_index.tolist()
        assert torch.equal(images[rows.argsort()], batch.image)


def test_with_single_crops_rank_r_takes_every_sample_of_its_remainder(store):
    settings = CropSettings(patch_size=(8, 8, 8), batch_size=6)
    batch = take(CropLoader(store, settings, seed=1, rank=2, world=3), 1, 1)[0]
    assert batch.sample_index.tolist() == [8, 11]


def test_another_seed_gives_other_crops(store):
    a, b = (take(CropLoader(store, SETTINGS, seed=seed), 0, 1)[0] for seed in (1, 2))
    assert not torch.equal(a.origin_mm, b.origin_mm)


def test_a_crop_holds_the_voxels_that_its_facts_name(store):
    for batch in take(CropLoader(store, SETTINGS, seed=4), 0, 5):
        names = {store.entry(name).number: name for name in store.ids}
        for row in range(len(batch)):
            entry = store.entry(names[int(batch.sample_id[row])])
            start = np.round((batch.origin_mm[row] / batch.spacing_mm[row]).numpy()).astype(int)
            volume = store.read(entry.id, (0, 0, 0), entry.shape[1:])
            label = store.read_label(entry.id, (0, 0, 0), entry.shape[1:])
            inside = tuple(slice(a, b) for a, b in batch.valid[row].tolist())
            source = tuple(slice(o + a, o + b) for o, (a, b) in zip(start, batch.valid[row].tolist(), strict=True))
            assert np.array_equal(batch.image[row, 0][inside].numpy(), volume[0][source])
            assert np.array_equal(batch.label[row][inside].numpy(), label[source])
            outside = torch.ones(batch.image.shape[2:], dtype=torch.bool)
            outside[inside] = False
            assert (batch.image[row, 0][outside] == BACKGROUND).all() and (batch.label[row][outside] == 0).all()


def test_a_crop_larger_than_the_volume_is_padded_on_both_sides(store):
    settings = CropSettings(patch_size=(64, 64, 64), batch_size=1)
    batch = take(CropLoader(store, settings, seed=0), 0, 1)[0]
    shape = next(e.shape[1:] for e in map(store.entry, store.ids) if e.number == int(batch.sample_id[0]))
    assert [b - a for a, b in batch.valid[0].tolist()] == list(shape)
    assert (batch.valid[0, :, 0] > 0).all() and (batch.valid[0, :, 1] < 64).all()
    assert batch.image[0, 0, 0, 0, 0] == BACKGROUND


def test_slices_of_volumes_and_images_have_two_axes(store, tmp_path):
    settings = CropSettings(patch_size=(16, 12), batch_size=2, labels=True)
    batch = take(CropLoader(store, settings, seed=0), 0, 1)[0]
    assert batch.image.shape == (2, 1, 16, 12) and batch.label.shape == (2, 16, 12) and batch.dimensions == 2
    assert batch.valid[:, 0].tolist() == [[0, 1]] * 2 and batch.origin_mm.shape == (2, 3)
    images = make_store(tmp_path / "images", n=2, shape=(1, 20, 24), channels=3, modality="IMAGE")
    batch = take(CropLoader(images, CropSettings(patch_size=(16, 32), batch_size=2), seed=0), 0, 1)[0]
    assert batch.image.shape == (2, 3, 16, 32) and batch.valid[0, 2].tolist() == [4, 28]


def test_only_the_voxels_of_the_crops_are_asked_for(store, monkeypatch):
    asked = []
    read = Store.read

    def spy(self, name, start, stop, channels=None):
        asked.append(int(np.prod(np.subtract(stop, start))))
        return read(self, name, start, stop, channels)

    monkeypatch.setattr(Store, "read", spy)
    single = CropSettings(patch_size=(8, 8, 8), batch_size=4)
    take(CropLoader(store, single, seed=0), 0, 3)
    assert asked == [8**3] * 12
    asked.clear()
    near = CropSettings(patch_size=(8, 8, 8), batch_size=4, crops_per_volume=4, spread=0.1)
    take(CropLoader(store, near, seed=0), 0, 1)
    assert len(asked) == 1 and asked[0] < 4 * 8**3, "crops that overlap are read once"


def test_batches_own_their_memory(store):
    with CropLoader(store, SETTINGS, seed=1, workers=1) as loader:
        iterator = loader.batches(0)
        first = next(iterator)
        kept = first.image.clone()
        for _ in range(5):
            next(iterator)
        assert torch.equal(first.image, kept)


def test_readers_need_no_shared_memory_file_system(store):
    # /dev/shm of a container holds 64 MB; batches must not pass through it.
    folder = Path("/dev/shm")
    if not folder.is_dir():
        pytest.skip("there is no /dev/shm here")
    before = set(folder.iterdir())
    with CropLoader(store, SETTINGS, seed=1, workers=2) as loader:
        take(loader, 0, 2)
        assert not any("torch" in path.name for path in set(folder.iterdir()) - before)


def test_reader_processes_do_not_import_torch():
    code = "import medssl.data.worker, sys; sys.exit('torch' in sys.modules or 'polars' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_killed_reader_is_named_with_its_signal_and_the_remedy(store):
    loader = CropLoader(store, SETTINGS, seed=1, workers=2)
    iterator = loader.batches(0)
    next(iterator)
    victim = loader.reader_processes[1]
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(MedsslError, match=r"Reader process 2 of 2 was killed by signal 9 \(SIGKILL\).*fewer --workers"):
        for _ in range(10):
            next(iterator)
    assert loader.reader_processes == []
    assert same(take(loader, 0, 1)[0], take(CropLoader(store, SETTINGS, seed=1), 0, 1)[0]), "and can start again"
    loader.close()


def test_readers_leave_signals_of_the_job_to_their_parent(store):
    with CropLoader(store, SETTINGS, seed=1, workers=1) as loader:
        iterator = loader.batches(0)
        next(iterator)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(loader.reader_processes[0], number)
        for _ in range(5):
            next(iterator)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_volume_is_named(tmp_path, workers):
    store = make_store(tmp_path / "s", n=2)
    for path in (tmp_path / "s").glob("*.b2nd"):
        path.write_bytes(path.read_bytes()[:200])
    loader = CropLoader(Store.open(tmp_path / "s"), CropSettings(patch_size=(8, 8, 8)), seed=0, workers=workers)
    with pytest.raises(DataError, match=store.ids[0]):
        take(loader, 0, 1)


def test_readers_end_with_their_loader(store):
    loader = CropLoader(store, SETTINGS, seed=1, workers=1)
    take(loader, 0, 1)
    process = loader.reader_processes[0]
    loader.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_readers_end_when_their_parent_is_killed(store):
    code = (
        "import sys; from medssl.data.loader import *; from medssl.preprocessing.store import Store\n"
        "loader = CropLoader(Store.open(sys.argv[1]), CropSettings(patch_size=(8, 8, 8)), seed=0, workers=1)\n"
        "next(loader.batches()); print(loader.reader_processes[0], flush=True); import time; time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(store.folder)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    reader = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        try:
            status = Path(f"/proc/{reader}/stat").read_text().split()[2]
        except FileNotFoundError:
            return
        if status == "Z":
            return
        time.sleep(0.05)
    os.kill(reader, signal.SIGKILL)
    raise AssertionError("the reader outlived its parent")


def test_an_older_iterator_of_the_same_loader_says_that_it_was_replaced(store):
    with CropLoader(store, SETTINGS, seed=1, workers=1) as loader:
        old = loader.batches(0)
        next(old)
        new = loader.batches(3)
        next(new)
        with pytest.raises(UsageError, match="replaced by a newer one"):
            next(old)
        assert same(next(new), take(CropLoader(store, SETTINGS, seed=1), 4, 1)[0])


def test_options_that_cannot_work_are_named(store):
    with pytest.raises(UsageError, match="--workers takes 0 or more, got -1"):
        CropLoader(store, SETTINGS, seed=0, workers=-1)
    with pytest.raises(UsageError, match="multiple of 6"):
        CropLoader(store, SETTINGS, seed=0, world=3)
    with pytest.raises(UsageError, match="Rank 2 does not exist"):
        CropLoader(store, SETTINGS, seed=0, rank=2, world=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_on_the_device_equal_those_on_the_cpu(store, workers):
    with CropLoader(store, SETTINGS, seed=1, workers=workers, device="cuda") as loader:
        for a, b in zip(take(loader, 0, 6), take(CropLoader(store, SETTINGS, seed=1), 0, 6), strict=True):
            assert a.image.is_cuda and same(a.to("cpu"), b)
