"""Where crops come from: every volume in turn, tissue preferred, windows inside the volume or padded."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from pydantic import ValidationError

from medssl.data.sampling import CropSettings, Sampler, margin_before, plan_reads
from medssl.errors import DataError
from medssl.preprocessing.store import Store, StoreWriter
from tests.preprocessing.stores import make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return make_store(tmp_path_factory.mktemp("store") / "s", n=5)


def sampler(store, **changes) -> Sampler:
    return Sampler(
        store, CropSettings(**{"patch_size": (8, 8, 8), **changes}), seed=3, split=changes.pop("split", "train")
    )


def test_the_same_index_gives_the_same_window_in_any_order(store):
    first, second = sampler(store), sampler(store)
    forward = [first.group(number) for number in range(20)]
    backward = [second.group(number) for number in reversed(range(20))]
    assert forward == backward[::-1]


def test_each_pass_shows_every_volume_once(store):
    chosen = sampler(store)
    for start in (0, 4, 8):
        assert Counter(chosen.group(start + number)[0].volume for number in range(4)) == dict.fromkeys(
            chosen.volumes, 1
        )
    orders = {tuple(chosen.group(start + number)[0].volume for number in range(4)) for start in range(0, 40, 4)}
    assert len(orders) > 1


def test_patients_with_many_volumes_are_shown_no_more_often_than_others(tmp_path):
    writer = StoreWriter(tmp_path / "s", {})
    for number, patient in enumerate("aaaab"):
        add_volume(writer, f"v{number}", (4, 4, 4), patient=patient)
    chosen = sampler(writer.finish(), patch_size=(2, 2, 2), balance="patient")
    counts = Counter(chosen.group(number)[0].volume for number in range(200))
    assert counts["v4"] == 100 and min(counts.values()) > 10


def test_splits_are_kept_apart(store):
    settings = CropSettings(patch_size=(8, 8, 8))
    train, validation, everything = (
        set(Sampler(store, settings, seed=0, split=split).volumes) for split in ("train", "validation", "all")
    )
    assert train.isdisjoint(validation) and train | validation == everything == set(store.ids)


def test_windows_stay_inside_and_reach_both_ends(store):
    starts = np.array([sampler(store, foreground_probability=0).group(number)[0].start for number in range(400)])
    shape = np.array(store.entry(store.ids[0]).shape[1:])
    assert starts.min() == 0
    for number in range(400):
        crop = sampler(store).group(number)[0]
        assert all(0 <= a <= n - 8 for a, n in zip(crop.start, store.entry(crop.volume).shape[1:], strict=True))
    assert (starts.max(axis=0) >= shape - 8).all()


def test_tissue_is_in_every_crop_that_was_placed_on_it(tmp_path):
    writer = StoreWriter(tmp_path / "s", {})
    add_volume(writer, "one", (60, 60, 60), foreground=[[50, 10, 30]])
    chosen = sampler(writer.finish(), foreground_probability=1.0)
    starts = np.array([chosen.group(number)[0].start for number in range(50)])
    assert ((starts <= [50, 10, 30]) & (starts + 8 > [50, 10, 30])).all()
    assert len(np.unique(starts, axis=0)) > 10, "the voxel is not always at one place of the crop"


def test_a_patch_larger_than_the_volume_is_centred(tmp_path):
    writer = StoreWriter(tmp_path / "s", {})
    add_volume(writer, "one", (5, 20, 20))
    crop = sampler(writer.finish(), patch_size=(8, 8, 8)).group(0)[0]
    assert crop.start[0] == -1


def test_reading_more_around_a_patch_does_not_move_the_patch(store):
    small, large = sampler(store), sampler(store, read_size=(12, 9, 8))
    for number in range(20):
        a, b = small.group(number)[0], large.group(number)[0]
        assert tuple(np.subtract(a.start, b.start)) == margin_before((12, 9, 8), (8, 8, 8)) == (2, 0, 0)


def test_a_slice_is_cut_along_z(store):
    starts = {sampler(store, patch_size=(8, 8)).group(number)[0].start[0] for number in range(200)}
    assert len(starts) > 10


def test_crops_of_one_group_share_a_volume_and_lie_near(store):
    group = sampler(store, crops_per_volume=4, batch_size=4, spread=0.25).group(6)
    assert [crop.sample_index for crop in group] == [24, 25, 26, 27]
    assert len({crop.volume for crop in group}) == 1
    assert all(abs(a - b) <= 2 for crop in group for a, b in zip(crop.start, group[0].start, strict=True))
    flat = sampler(store, patch_size=(8, 8), crops_per_volume=4, batch_size=4, spread=0.25).group(6)
    assert len({crop.start[0] for crop in flat}) == 1, "crops of a group stay in one slice"


def test_windows_are_joined_only_where_the_common_read_is_no_larger():
    near = [((0, 0, 0), (8, 8, 8)), ((0, 0, 4), (8, 8, 12))]
    assert plan_reads(near) == [((0, 0, 0), (8, 8, 12), [0, 1])]
    far = [((0, 0, 0), (8, 8, 8)), ((30, 0, 0), (38, 8, 8))]
    assert plan_reads(far) == [((0, 0, 0), (8, 8, 8), [0]), ((30, 0, 0), (38, 8, 8), [1])]


def test_volumes_that_differ_in_channels_are_refused_or_read_one_channel_at_a_time(tmp_path):
    writer = StoreWriter(tmp_path / "s", {})
    add_volume(writer, "one", (4, 4, 4), channels=1)
    add_volume(writer, "three", (4, 4, 4), channels=3)
    store = writer.finish()
    with pytest.raises(DataError, match=r"\[1, 3\] channels.*channels: random"):
        sampler(store, patch_size=(2, 2, 2))
    chosen = sampler(store, patch_size=(2, 2, 2), channels="random")
    assert chosen.channels == 1
    assert {chosen.group(n)[0].channel for n in range(60) if chosen.group(n)[0].volume == "three"} == {0, 1, 2}


def test_what_cannot_be_sampled_is_refused_with_the_remedy(store):
    with pytest.raises(DataError, match="None of the 4 volumes of the split 'train' has a label"):
        sampler(store, labels=True)
    with pytest.raises(DataError, match="'test'"):
        Sampler(store, CropSettings(patch_size=(8, 8, 8)), seed=0, split="test")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": (8,)}, "2 .* or 3"),
        ({"patch_size": (8, 0, 8)}, "positive"),
        ({"read_size": (4, 8, 8)}, "smaller than patch_size"),
        ({"read_size": (8, 8)}, "differ in dimensions"),
        ({"batch_size": 3, "crops_per_volume": 2}, "not a multiple"),
    ],
)
def test_settings_that_cannot_work_are_named(changes, message):
    with pytest.raises(ValidationError, match=message):
        CropSettings(**{"patch_size": (8, 8, 8), **changes})


def add_volume(writer: StoreWriter, name: str, shape, *, patient="p", foreground=(), channels=1) -> None:
    facts = {"spacing_mm": [1, 1, 1], "modality": "MR", "patient_key": patient, "split": "train", "background": 0.0}
    writer.add(name, np.zeros((channels, *shape), np.float32), {**facts, "foreground": list(foreground)})
