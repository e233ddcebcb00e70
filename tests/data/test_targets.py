"""Targets of a classifier: what is read, who is in which split, and what is refused with its row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medssl.data.target_files import read_targets
from medssl.data.targets import Case, Targets, carried, check, draw_labelled, split_by_patient, split_into_folds
from medssl.errors import DataError, UsageError
from tests.preprocessing.stores import make_store


@pytest.fixture(autouse=True)
def own_key(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSSL_KEY_FILE", str(tmp_path_factory.mktemp("key") / "key"))


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(path)


@pytest.fixture
def make_csv(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a CSV and an image for each of its paths."""

    def make(header: str, *lines: str, images: bool = True) -> Path:
        path = tmp_path / "labels.csv"
        path.write_text("\n".join([header, *lines]) + "\n")
        if images:
            for line in lines:
                write_image(tmp_path / line.split(",")[0])
        return path

    return make


FOUR = (
    "images/a.png,sick,p1,train",
    "images/b.png,well,p2,train",
    "images/c.png,sick,p3,val",
    "images/d.png,well,p4,val",
)
HEADER = "path,label,patient,split"


def made(labels: Sequence[int], patients: Sequence[str] | None = None) -> Targets:
    names = patients if patients is not None else [f"p{number}" for number in range(len(labels))]
    cases = [
        Case(f"c{row}", label, f"key-{patient}", "train", row, f"line {row}", Path(f"{row}.png"), shuffle_key=patient)
        for row, (label, patient) in enumerate(zip(labels, names, strict=True))
    ]
    return Targets("multiclass", tuple(str(number) for number in range(max(labels) + 1)), tuple(cases))


def test_a_csv_gives_classes_patients_and_splits(make_csv) -> None:
    targets = read_targets(make_csv(HEADER, *FOUR))
    assert (targets.kind, targets.classes) == ("multiclass", ("sick", "well"))
    assert [case.split for case in targets.cases] == ["train", "train", "validation", "validation"]
    assert [case.target for case in targets.cases] == [0, 1, 0, 1]
    assert [case.row for case in targets.cases] == [2, 3, 4, 5]
    assert targets.counts(targets.of("train")) == {"sick": 1, "well": 1}


def test_neither_patients_nor_paths_show_in_names(make_csv) -> None:
    lines = [line.replace("images/", "john_doe/").replace(",p", ",patient-000") for line in FOUR]
    for case in read_targets(make_csv(HEADER, *lines)).cases:
        assert not any(text in f"{case.name} {case.patient_key}" for text in ("doe", "png", "patient", "000"))


def test_names_stay_when_rows_are_added_and_sorted(make_csv) -> None:
    before = {case.path: (case.name, case.patient_key) for case in read_targets(make_csv(HEADER, *FOUR)).cases}
    more = ("images/0.png,sick,p9,train", *reversed(FOUR))
    after = {case.path: (case.name, case.patient_key) for case in read_targets(make_csv(HEADER, *more)).cases}
    assert all(after[path] == value for path, value in before.items())


def test_semicolons_quotes_and_a_byte_order_mark_are_read(make_csv, tmp_path: Path) -> None:
    make_csv(HEADER, *FOUR)
    path = tmp_path / "labels.csv"
    lines = [line.replace(",", ";") for line in (HEADER, *FOUR)]
    lines[1] = 'images/a.png;"sick";"p1";train'
    path.write_text("\ufeff" + "\r\n".join(lines))
    assert read_targets(path).classes == ("sick", "well")


def test_several_labels_come_from_one_column_or_from_columns_of_ones(make_csv) -> None:
    joined = read_targets(
        make_csv("path,label,split", "a.png,x|y,train", "b.png,-,train", "c.png,y,val", "d.png,x,val")
    )
    apart = read_targets(
        make_csv("path,label_x,label_y,split", "a.png,1,1,train", "b.png,0,0,train", "c.png,0,1,val", "d.png,1,0,val")
    )
    assert joined.kind == apart.kind == "multilabel"
    assert joined.array(joined.cases).tolist() == apart.array(apart.cases).tolist() == [[1, 1], [0, 0], [0, 1], [1, 0]]


def test_numbers_are_ordered_by_value_and_names_as_given(make_csv) -> None:
    lines = [f"{name}.png,{grade},{split}" for name, grade, split in
             [("a", 10, "train"), ("b", 9, "train"), ("c", 10, "val"), ("d", 9, "val")]]  # fmt: skip
    assert read_targets(make_csv("path,label,split", *lines), kind="ordinal").classes == ("9", "10")
    lines = [line.replace("10", "mild").replace("9", "severe") for line in lines]
    path = make_csv("path,label,split", *lines)
    assert read_targets(path, kind="ordinal", classes=["severe", "mild"]).classes == ("severe", "mild")
    with pytest.raises(UsageError, match="need their order: --classes mild,severe"):
        read_targets(path, kind="ordinal")


def test_a_folder_for_each_class_with_and_without_splits(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("x", "y"):
            write_image(tmp_path / "split" / split / name / "1.png")
            write_image(tmp_path / "plain" / name / f"{split}.png")
    (tmp_path / "plain" / "x" / "Thumbs.db").write_bytes(b"junk")
    given = read_targets(tmp_path / "split")
    assert [(case.split, case.target) for case in given.cases] == [
        ("train", 0), ("train", 1), ("validation", 0), ("validation", 1),
    ]  # fmt: skip
    plain = read_targets(tmp_path / "plain", folds=2)
    assert len(plain.cases) == 4 and plain.split_source == "folds"


def npz(path: Path, **more: np.ndarray) -> Path:
    arrays = {}
    for split, count in (("train", 6), ("val", 4)):
        arrays[f"{split}_images"] = np.zeros((count, 8, 8), np.uint8)
        arrays[f"{split}_labels"] = np.arange(count)[:, None] % 2
    np.savez(path, **{**arrays, **more})
    return path


def test_a_medmnist_file_is_read(tmp_path: Path) -> None:
    targets = read_targets(npz(tmp_path / "m.npz"), classes=["no", "yes"])
    assert targets.classes == ("no", "yes")
    assert len(targets.of("train")) == 6 and len(targets.of("validation")) == 4
    assert targets.cases[7].array == ("val_images", 1)


def test_several_labels_of_a_medmnist_file_are_seen(tmp_path: Path) -> None:
    labels = np.array([[1, 0, 1], [0, 1, 0]] * 3)
    path = npz(tmp_path / "m.npz", train_labels=labels, val_labels=labels[:4])
    assert read_targets(path).kind == "multilabel"
    with pytest.raises(UsageError, match="several labels an image: not ordinal"):
        read_targets(path, kind="ordinal")


def test_a_store_brings_patients_and_split_and_a_csv_the_labels(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", n=6)
    labels = tmp_path / "labels.csv"
    labels.write_text("volume_id,label\n" + "".join(f"{name},{i % 2}\n" for i, name in enumerate(store.ids)))
    with pytest.raises(DataError, match="its patient is in the split validation here and in train"):
        # The store's last volume validates and shares its patient with the one before.
        read_targets(tmp_path / "store", labels=labels)
    targets = read_targets(tmp_path / "store", labels=labels, folds=3)
    assert [case.volume_id for case in targets.cases] == store.ids
    assert {case.patient_key for case in targets.cases} == {"patient_00", "patient_01", "patient_02"}


def test_a_patient_is_on_one_side_and_new_patients_move_nobody() -> None:
    patients = [f"p{number // 3}" for number in range(300)]
    targets = split_by_patient(made([number % 2 for number in range(300)], patients))
    sides = {case.patient_key: case.split for case in targets.cases}
    assert all(sides[case.patient_key] == case.split for case in targets.cases)
    assert 0.1 < sum(side == "validation" for side in sides.values()) / 100 < 0.3
    more = split_by_patient(made([number % 2 for number in range(400)], [f"p{number // 3}" for number in range(400)]))
    assert all(sides.get(case.patient_key, case.split) == case.split for case in more.cases)


def test_each_patient_validates_in_one_fold_and_each_fold_has_its_part_of_each_class() -> None:
    labels = [0] * 40 + [1] * 10
    patients = [f"p{number // 2}" for number in range(50)]
    targets = made(labels, patients)
    seen: Counter[str] = Counter()
    for fold in range(5):
        part = split_into_folds(targets, 5, fold)
        validation = part.of("validation")
        assert not {case.patient_key for case in validation} & {case.patient_key for case in part.of("train")}
        assert part.counts(validation) == {"0": 8, "1": 2}
        seen.update(case.name for case in validation)
    assert set(seen.values()) == {1} and len(seen) == 50


def test_cases_for_testing_stay_out_of_the_folds() -> None:
    targets = made([0, 1] * 10)
    cases = list(targets.cases)
    cases[0] = Case("t", 0, "key-t", "test", 0, "line 0", Path("t.png"), shuffle_key="t")
    part = split_into_folds(targets.with_cases(cases), 5, 0)
    assert [case.name for case in part.of("test")] == ["t"]


@pytest.mark.parametrize(("folds", "fold", "message"), [(1, 0, "at least 2 folds"), (5, 5, "a fold from 0 to 4"),
                                                        (30, 0, "there are 20 patients")])  # fmt: skip
def test_folds_that_cannot_be_are_refused(folds: int, fold: int, message: str) -> None:
    with pytest.raises((UsageError, DataError), match=message):
        split_into_folds(made([0, 1] * 10), folds, fold)


def test_fewer_labelled_cases_are_a_part_of_more_and_keep_the_classes() -> None:
    targets = made([0] * 80 + [1] * 20)
    kept = {n: {case.name for case in draw_labelled(targets, n, seed=3).of("train")} for n in (2, 10, 50, 100)}
    assert kept[2] < kept[10] < kept[50] < kept[100]
    counts = {n: draw_labelled(targets, n, seed=3).counts(draw_labelled(targets, n, seed=3).of("train")) for n in kept}
    assert counts[2] == {"0": 1, "1": 1} and counts[10] == {"0": 8, "1": 2} and counts[50] == {"0": 40, "1": 10}
    assert kept[10] != {case.name for case in draw_labelled(targets, 10, seed=4).of("train")}


@pytest.mark.parametrize("count", [1, 101])
def test_labelled_cases_must_reach_every_class_and_exist(count: int) -> None:
    with pytest.raises(UsageError, match="Choose 2 to 100"):
        draw_labelled(made([0] * 80 + [1] * 20), count, seed=0)


def test_a_case_of_several_labels_carries_each_of_them() -> None:
    assert carried(Case("a", (1, 0, 1), "p", "train")) == (0, 2)
    assert carried(Case("a", 2, "p", "train")) == (2,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: "images/d.png,well,p1,val"}, r"line 5: its patient is in the split validation here and in train in "
                                          r"labels.csv line 2"),
        ({3: "images/d.png,odd,p4,val"}, r"Class 'odd': labels.csv line 5 is its only case"),
        ({1: "images/b.png,sick,p2,train"}, r"Class 'well': labels.csv line 5 is its only case"),
        ({3: "images/d.png,,p4,val"}, r"1 rows have no label: labels.csv line 5"),
        ({3: "images/d.png,well,,val"}, r"labels.csv line 5: the column patient is empty"),
        ({3: "images/d.png,well,p4,"}, r"labels.csv line 5: the split is ''"),
        ({3: "images/d.png,well,p4,hold-out"}, r"labels.csv line 5: the split is 'hold-out'"),
        ({3: "images/d.png,well,p4"}, r"labels.csv line 5: 3 fields where the header has 4"),
        ({3: ",well,p4,val"}, r"labels.csv line 5: the column path is empty"),
        ({3: "images/c.png,well,p3,val"}, r"labels.csv line 5: the same image as in labels.csv line 4"),
        ({3: "images/../images/c.png,well,p3,val"}, r"labels.csv line 5: the same image as in labels.csv line 4"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_named(make_csv, change: dict[int, str], message: str) -> None:
    lines = [change.get(number, line) for number, line in enumerate(FOUR)]
    make_csv(HEADER, *FOUR)
    path = make_csv(HEADER, *lines, images=False)
    if "c.png" in lines[3] or lines[3].startswith(","):
        (path.parent / "images" / "d.png").unlink()
    with pytest.raises(DataError, match=message):
        read_targets(path)


def test_a_class_that_is_only_in_validation_is_named(make_csv) -> None:
    lines = (*FOUR, "images/e.png,odd,p5,val", "images/f.png,odd,p6,val")
    with pytest.raises(DataError, match=r"Class 'odd' is only in validation \(labels.csv line 6, labels.csv line 7\)"):
        read_targets(make_csv(HEADER, *lines))


def test_files_that_are_missing_are_named(make_csv) -> None:
    path = make_csv(HEADER, *FOUR)
    (path.parent / "images" / "b.png").unlink()
    with pytest.raises(DataError, match=r"labels.csv line 3: there is no file images/b.png"):
        read_targets(path)


def test_images_without_a_row_are_named_unless_they_may_be_left_out(make_csv) -> None:
    path = make_csv(HEADER, *FOUR)
    write_image(path.parent / "images" / "extra.png")
    with pytest.raises(DataError, match=r"1 images have no row in labels.csv: extra.png"):
        read_targets(path)
    assert len(read_targets(path, ignore_unlabelled=True).cases) == 4


def test_a_file_that_is_no_image_is_named(make_csv) -> None:
    path = make_csv(HEADER, *FOUR)
    (path.parent / "images" / "b.png").write_text("not a picture")
    with pytest.raises(DataError, match=r"labels.csv line 3: "):
        read_targets(path)


def test_volumes_without_a_row_and_rows_without_a_volume_are_named(tmp_path: Path) -> None:
    make_store(tmp_path / "store", n=4)
    labels = tmp_path / "labels.csv"
    labels.write_text("volume_id,label\nvolume_00,0\nvolume_99,1\n")
    with pytest.raises(DataError, match=r"labels.csv line 3: store has no volume volume_99"):
        read_targets(tmp_path / "store", labels=labels)
    labels.write_text("volume_id,label\nvolume_00,0\nvolume_01,1\n")
    with pytest.raises(DataError, match=r"2 of 4 volumes have no row in labels.csv: volume_02, volume_03"):
        read_targets(tmp_path / "store", labels=labels)


def test_pickled_objects_are_refused_and_not_run(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self):
            return (Path(tmp_path / "harm").touch, ())

    for name in ("train_labels", "train_images"):
        objects = np.array([Harmful()] * 6, dtype=object)
        with pytest.raises(DataError, match="pickled objects"):
            read_targets(npz(tmp_path / "m.npz", **{name: objects}))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train_labels": np.arange(5)}, "6 train_images, 5 train_labels"),
        ({"train_labels": np.arange(6) / 2}, "must be whole numbers"),
        ({"train_labels": np.array([0, 1, 0, 1, 0, -1])}, r"train_labels\[5\]: the label \[-1\]"),
        ({"train_images": np.zeros((6, 8))}, "images are"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_targets(npz(tmp_path / "m.npz", **arrays))


def test_a_damaged_npz_is_named(tmp_path: Path) -> None:
    path = npz(tmp_path / "m.npz")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="fresh copy"):
        read_targets(path)


@pytest.mark.parametrize(
    ("header", "message"), [("file,label", "it needs path and label"), ("path,diagnosis", "it needs path and label")]
)
def test_missing_columns_are_named(make_csv, header: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_targets(make_csv(header, "a.png,x"))


def test_unknown_kinds_and_labels_in_the_wrong_place_are_named(make_csv, tmp_path: Path) -> None:
    path = make_csv(HEADER, *FOUR)
    with pytest.raises(UsageError, match="Did you mean multiclass"):
        read_targets(path, kind="multi-class")
    with pytest.raises(UsageError, match="belongs to an INDEX or a STORE"):
        read_targets(path, labels=path)
    make_store(tmp_path / "store", n=2)
    with pytest.raises(UsageError, match="give --labels CSV"):
        read_targets(tmp_path / "store")
    with pytest.raises(UsageError, match="does not exist"):
        read_targets(tmp_path / "nothing")
    with pytest.raises(DataError, match="The label 'sick' is none of --classes well,ill"):
        read_targets(path, classes=["well", "ill"])


def test_a_data_set_of_one_class_is_refused() -> None:
    targets = made([0, 0, 0, 0])
    with pytest.raises(DataError, match="one class"):
        check(targets)
