"""Manifests of public data sets: the schema, what every one of them must say, and where they are found."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from medssl.archive.dataset_files import compiled, layouts_of
from medssl.archive.datasets import ASK, Manifest, manifest, manifest_folder, manifests, read_file
from medssl.errors import DataError, UsageError

REPOSITORY = Path(__file__).resolve().parents[2]
SETS = (
    "openmind left_atrium_2018 acdc btcv amos flare22 brats2019 brats2021 totalsegmentator lits nih_pancreas busi hc18 "
    "oai most pathmnist chestmnist dermamnist octmnist pneumoniamnist retinamnist breastmnist bloodmnist tissuemnist "
    "organamnist organcmnist organsmnist organmnist3d nodulemnist3d adrenalmnist3d fracturemnist3d vesselmnist3d "
    "synapsemnist3d"
)
SAMPLE = """
name: sample
title: A sample
task: segmentation
dimensions: 3
modality: [CT]
channels: [CT]
body_part: abdomen
licence: {verified: false}
ask: someone
paper: none
labels: {background: 0, liver: 1}
layouts:
  - {title: release, writes: nnunet, parts: [{images: "{case}.nii.gz", masks: "{case}_seg.nii.gz"}]}
split: {text: none}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "sample.yaml"
    path.write_text(text)
    return path


def test_every_named_set_has_a_manifest() -> None:
    known = manifests()
    assert set(SETS.split()) <= set(known)
    assert len([name for name in known if name.startswith("msd_task")]) == 10


@pytest.mark.parametrize("entry", manifests().values(), ids=lambda entry: entry.name)
def test_a_manifest_claims_no_licence_that_was_not_read(entry: Manifest) -> None:
    assert (entry.licence.name == ASK) != entry.licence.verified
    if not entry.licence.verified:
        assert any("licence" in fact.lower() or "terms" in fact.lower() for fact in entry.unverified)
    assert entry.ask and entry.paper and entry.split.text


@pytest.mark.parametrize("entry", manifests().values(), ids=lambda entry: entry.name)
def test_the_patterns_of_a_manifest_compile(entry: Manifest) -> None:
    for layout in layouts_of(entry):
        for part in layout.parts:
            for pattern in (*part.images, part.masks or "none"):
                compiled(pattern, part.case)


def test_checksums_name_the_files_of_their_set() -> None:
    for entry in manifests().values():
        for name in entry.checksums:
            assert name.split(".")[0].split("_")[0].lower() in entry.name or name.startswith("Task")


def test_lists_of_the_literature_have_the_published_lengths() -> None:
    assert len(manifest("left_atrium_2018").split.lists["test"]) == 20
    assert [len(manifest("acdc").split.lists[part]) for part in ("validation", "test")] == [10, 20]
    assert [len(manifest("brats2019").split.lists[part]) for part in ("validation", "test")] == [25, 60]
    assert len(manifest("btcv").split.lists["test"]) == 12


def test_the_lists_hold_no_name_twice_or_in_two_splits() -> None:
    for entry in manifests().values():
        names = [name for part in entry.split.lists.values() for name in part]
        assert len(names) == len(set(names)), entry.name


def test_a_sample_is_read(tmp_path: Path) -> None:
    (entry,) = read_file(written(tmp_path, SAMPLE))
    assert entry.cases is None and entry.row()["licence"] == ASK


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: A", "titel: A", "Did you mean title"),
        ("verified: false", "verified: true", "verified and named"),
        ("verified: false", "verified: false, name: CC0", "not verified and 'ask the source'"),
        ("liver: 1", "liver: 2", "labels must be 0, 1, 2"),
        ("{case}.nii.gz", "image.nii.gz", "needs {case}"),
        ("channels: [CT]", "channels: []", "names of its channels"),
        ("split: {text: none}", "split: {text: none}\nchecksums: {a: abc}", "neither an MD5"),
        ("split: {text: none}", "split: {text: none}\npatient: 'a.*'", "needs one group"),
        ("split: {text: none}", "split: {text: none}\npatient: '(a'", "no regular expression"),
        ("writes: nnunet", "writes: npz", "needs arrays"),
        ("writes: nnunet", "writes: nnunet, values: {255: 3}", "values that labels does not name"),
    ],
)
def test_a_manifest_that_does_not_fit_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in SAMPLE
    with pytest.raises(UsageError, match=r"sample\.yaml") as caught:
        read_file(written(tmp_path, SAMPLE.replace(old, new)))
    assert message in str(caught.value)


def test_sets_of_a_file_share_what_stands_above_them(tmp_path: Path) -> None:
    shared = SAMPLE.replace("name: sample\n", "").replace("title: A sample\n", "")
    one, two = read_file(
        written(tmp_path, shared + "sets:\n  one: {title: One}\n  two: {title: Two, modality: [MR]}\n")
    )
    assert (one.name, two.name, one.modality, two.modality) == ("one", "two", ("CT",), ("MR",))


def test_a_file_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sample\.yaml cannot be read as YAML"):
        read_file(written(tmp_path, "a: [1"))


def test_an_unknown_name_lists_near_ones() -> None:
    with pytest.raises(UsageError, match=r"Did you mean .*left_atrium_2018"):
        manifest("left_atrium_2019")


def test_the_wheel_carries_the_manifests() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {manifest_folder().name: f"medssl/{manifest_folder().name}"}


@pytest.mark.parametrize(
    ("pattern", "case", "path", "expected"),
    [
        ("training/patient*/{case}.nii*", r"p\d", "a/training/patient001/p1.nii.gz", "p1"),
        ("{case}/{case}_t1.nii", r"\w+?", "b1/b1_t1.nii", "b1"),
        ("{case}/{case}_t1.nii", r"\w+?", "b1/b2_t1.nii", None),
        ("img/img{case}.nii.gz", r"\d{4}", "xximg/img0001.nii.gz", None),
        ("ds*/**/{case}.nii", r"[^/]+", "ds1/x/y/z.nii", "z"),
        ("ds*/**/{case}.nii", r"[^/]+", "ds1/z.nii", "z"),
        ("a (1)/{case}.png", r"\d", "a (1)/2.png", "2"),
    ],
)
def test_patterns_mean_what_they_say(pattern: str, case: str, path: str, expected: str | None) -> None:
    match = compiled(pattern, case).fullmatch(path)
    assert (match.group("case") if match else None) == expected
