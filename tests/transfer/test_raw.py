"""What is wrong with a raw data set is said before anything is trained: case, values, remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medssl.errors import DataError, UsageError
from medssl.transfer.casecheck import check_case
from medssl.transfer.raw import read_dataset
from medssl.transfer.selection import select_cases

from .conftest import MakeDataset


def _rewrite(folder: Path, **changes: object) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _change_mask(folder: Path, case: str, change: object) -> None:
    path = folder / "labelsTr" / f"{case}.nii.gz"
    image = nibabel.load(path)
    array, affine = change(np.asanyarray(image.dataobj).copy(), image.affine.copy())  # type: ignore[operator]
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def test_a_good_data_set_is_read_whole_and_gets_the_reader_of_ras_axes(make_dataset: MakeDataset) -> None:
    dataset = read_dataset(make_dataset("my data (v2)", cases=3, channel_names=("T1", "T2")))
    assert list(dataset.cases) == ["case0", "case1", "case2"]
    assert dataset.channel_names == ["T1", "T2"]
    assert dataset.content["overwrite_image_reader_writer"] == "NibabelIOWithReorient"
    assert dataset.name == "Dataset999_my_data_v2_"
    assert check_case(dataset, dataset.cases["case1"]) == (24, 24, 24)


def test_nnunet_names_of_folders_are_kept(make_dataset: MakeDataset) -> None:
    assert read_dataset(make_dataset("Dataset004_Hippocampus")).name == "Dataset004_Hippocampus"


def test_a_mask_of_another_shape_is_named(make_dataset: MakeDataset) -> None:
    folder = make_dataset()
    _change_mask(folder, "case3", lambda array, affine: (array[:-2], affine))
    dataset = read_dataset(folder)
    with pytest.raises(
        DataError, match=r"case3: case3.nii.gz has the shape \(22, 24, 24\).*has \(24, 24, 24\).*Resample"
    ):
        check_case(dataset, dataset.cases["case3"])


def test_unknown_label_values_are_named_with_the_remedy(make_dataset: MakeDataset) -> None:
    folder = make_dataset()

    def paint(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        array[0, 0, 0] = 255
        return array, affine

    _change_mask(folder, "case1", paint)
    dataset = read_dataset(folder)
    with pytest.raises(
        DataError, match=r"case1: label has values \{0, 1, 2, 255\}; dataset.json knows \{0, 1, 2\}.*add 255"
    ):
        check_case(dataset, dataset.cases["case1"])


def test_a_shifted_mask_is_refused_and_rounding_is_not(make_dataset: MakeDataset) -> None:
    folder = make_dataset()

    def shift(by: float) -> object:
        def change(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            affine[0, 3] += by
            return array, affine

        return change

    _change_mask(folder, "case0", shift(1e-3))
    _change_mask(folder, "case2", shift(2.0))
    dataset = read_dataset(folder)
    check_case(dataset, dataset.cases["case0"])
    with pytest.raises(DataError, match=r"case2: the affine of case2.nii.gz differs.*2.00 voxels"):
        check_case(dataset, dataset.cases["case2"])


def test_nan_and_blank_images_are_refused(make_dataset: MakeDataset) -> None:
    folder = make_dataset()
    for case, value in (("case0", np.nan), ("case1", 0.0)):
        path = folder / "imagesTr" / f"{case}_0000.nii.gz"
        image = nibabel.load(path)
        array = np.asanyarray(image.dataobj).copy()
        array[:] = 0 if value == 0 else array
        array[3, 3, 3] = value
        nibabel.save(nibabel.Nifti1Image(array, image.affine), path)
    dataset = read_dataset(folder)
    with pytest.raises(DataError, match=r"case0: case0_0000.nii.gz has 1 voxels that are NaN"):
        check_case(dataset, dataset.cases["case0"])
    with pytest.raises(DataError, match="case1: the image is zero everywhere"):
        check_case(dataset, dataset.cases["case1"])


@pytest.mark.parametrize("size", [0, 200])
def test_truncated_files_are_named(make_dataset: MakeDataset, size: int) -> None:
    folder = make_dataset()
    path = folder / "imagesTr" / "case0_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:size])
    dataset = read_dataset(folder)
    with pytest.raises(DataError, match=r"case0: case0_0000.nii.gz cannot be read"):
        check_case(dataset, dataset.cases["case0"])


def test_missing_masks_are_listed(make_dataset: MakeDataset) -> None:
    folder = make_dataset()
    (folder / "labelsTr" / "case2.nii.gz").unlink()
    dataset = read_dataset(folder)
    with pytest.raises(DataError, match=r"1 of 5 cases have no mask in labelsTr: case2 .*--train-cases"):
        select_cases(dataset)
    selection = select_cases(dataset, train_cases=["case0", "case1"], validation_cases=["case3"])
    assert selection.train == ["case0", "case1"]


def test_a_data_set_without_labels_points_to_pretraining(make_dataset: MakeDataset) -> None:
    folder = make_dataset()
    shutil.rmtree(folder / "labelsTr")
    with pytest.raises(DataError, match=r"has no labels: none of its 5 images.*medssl pretrain"):
        read_dataset(folder)


def test_a_wrong_number_of_channels_is_named(make_dataset: MakeDataset) -> None:
    folder = make_dataset(channel_names=("T1", "T2"))
    (folder / "imagesTr" / "case4_0001.nii.gz").unlink()
    with pytest.raises(DataError, match=r"case4 has 1 channel files .*knows 2 channels \(T1, T2\)"):
        read_dataset(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": {"0": "background", "1": "ball"}}, "the other way round"),
        ({"labels": {"background": 0, "ball": 3}}, "without gaps"),
        ({"labels": {"background": 0}}, "no label besides"),
        ({"channel_names": {"1": "MR"}}, 'number the channels from "0"'),
        ({"file_ending": ".nrrd"}, "no image that ends in _0000.nrrd"),
    ],
)
def test_a_dataset_json_that_cannot_be_right_is_refused(
    make_dataset: MakeDataset, change: dict[str, object], message: str
) -> None:
    folder = make_dataset()
    _rewrite(folder, **change)
    with pytest.raises(DataError, match=message):
        read_dataset(folder)


def test_missing_pieces_are_named(tmp_path: Path, make_dataset: MakeDataset) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_dataset(tmp_path / "nothing")
    folder = make_dataset()
    (folder / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        read_dataset(folder)
    (folder / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"dataset.json is missing"):
        read_dataset(folder)


def test_fewer_labelled_cases_are_a_part_of_more(make_dataset: MakeDataset) -> None:
    dataset = read_dataset(make_dataset(cases=10))
    draws = [set(select_cases(dataset, labelled=number, seed=3).train) for number in (1, 3, 6)]
    assert draws[0] < draws[1] < draws[2]
    assert [len(draw) for draw in draws] == [1, 3, 6]
    assert set(select_cases(dataset, labelled=3, seed=4).train) != draws[1]


def test_the_default_split_is_nnunets_fold_0(make_dataset: MakeDataset) -> None:
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    dataset = read_dataset(make_dataset(cases=10))
    expected = generate_crossval_split(sorted(dataset.cases), seed=12345, n_splits=5)[0]
    selection = select_cases(dataset)
    assert selection.train == list(expected["train"]) and selection.validation == list(expected["val"])


def test_selections_that_cannot_work_are_refused(make_dataset: MakeDataset) -> None:
    dataset = read_dataset(make_dataset())
    with pytest.raises(UsageError, match=r"no case named 'case9'.*Did you mean"):
        select_cases(dataset, train_cases=["case9"])
    with pytest.raises(UsageError, match="case1 would be in training and in validation"):
        select_cases(dataset, train_cases=["case1"], validation_cases=["case1", "case2"])
    with pytest.raises(UsageError, match="Choose 1 to 4"):
        select_cases(dataset, labelled=5)
    with pytest.raises(UsageError, match="No case is left"):
        select_cases(dataset, validation_cases=list(dataset.cases))


def test_axes_that_nnunet_would_mix_up_are_refused(make_dataset: MakeDataset) -> None:
    import SimpleITK

    folder = make_dataset(cases=2)
    for case, direction in (("case0", np.eye(3)), ("case1", np.eye(3)[[2, 0, 1]])):
        for part, name in (("imagesTr", f"{case}_0000"), ("labelsTr", case)):
            source = folder / part / f"{name}.nii.gz"
            image = SimpleITK.GetImageFromArray(np.asanyarray(nibabel.load(source).dataobj).transpose(2, 1, 0).copy())
            image.SetDirection(direction.ravel().tolist())
            SimpleITK.WriteImage(image, str(folder / part / f"{name}.nrrd"))
            source.unlink()
    _rewrite(folder, file_ending=".nrrd")
    dataset = read_dataset(folder)
    assert check_case(dataset, dataset.cases["case0"]) == (24, 24, 24)
    with pytest.raises(DataError, match=r"case1: the axes of case1_0000.nrrd are turned.*Write NIfTI"):
        check_case(dataset, dataset.cases["case1"])
