"""Small trees laid out as the public data sets are: what a user has after unpacking a download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from PIL import Image

Array = np.ndarray
SHAPE = (8, 7, 6)


def affine() -> Array:
    matrix = np.diag([-0.8, -0.9, 2.5, 1.0])
    matrix[:3, 3] = 10, 20, -30
    return matrix


def image(path: Path, seed: int = 0, channels: int = 1) -> Path:
    """Write a NIfTI image. Shape: (x, y, z), or (x, y, z, channels)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = SHAPE if channels == 1 else (*SHAPE, channels)
    nib.save(nib.Nifti1Image(np.random.default_rng(seed).integers(0, 1000, shape).astype(np.int16), affine()), path)
    return path


def mask(path: Path, values: tuple[int, ...] = (0, 1), where: Array | None = None) -> Path:
    """Write a label map that holds each of the values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.resize(np.array(values, np.uint8), SHAPE)
    nib.save(nib.Nifti1Image(array, affine() if where is None else where), path)
    return path


def nrrd(path: Path, array: Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = sitk.GetImageFromArray(array)
    written.SetSpacing((0.625, 0.625, 0.625))
    sitk.WriteImage(written, str(path))
    return path


def picture(path: Path, array: Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def arrays(path: Path, samples: dict[str, int], shape: tuple[int, ...], classes: int, columns: int = 1) -> Path:
    """Write a MedMNIST file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {}
    for split, number in samples.items():
        content[f"{split}_images"] = np.zeros((number, *shape), np.uint8)
        content[f"{split}_labels"] = (np.arange(number * columns) % classes).astype(np.uint8).reshape(number, columns)
    np.savez(path, **content)
    return path


def openmind(root: Path) -> None:
    for number, study in enumerate(("ds000001", "ds000002")):
        folder = root / "OpenMind" / study / "sub-01" / "anat"
        image(folder / "sub-01_T1w.nii.gz", seed=number)
        mask(folder / "sub-01_T1w__Data" / "deface_mask.nii.gz")
        mask(folder / "sub-01_T1w__Data" / "fb_mask.nii.gz")


def left_atrium(root: Path) -> None:
    for part, names in (
        ("Training Set", ("06SR5RBREL16DQ6M8LWS", "UPT6DX9IQY9JAZ7HJKA7")),
        ("Testing Set", ("4HOHMV3H7GGRNLQLHHOC",)),
    ):
        for seed, name in enumerate(names):
            voxels = np.random.default_rng(seed).integers(0, 255, (6, 7, 8)).astype(np.uint8)
            nrrd(root / part / name / "lgemri.nrrd", voxels)
            if part == "Training Set":
                nrrd(root / part / name / "laendo.nrrd", np.where(voxels > 128, 255, 0).astype(np.uint8))


def acdc(root: Path) -> None:
    for part, patient in (("training", "patient001"), ("training", "patient005"), ("testing", "patient101")):
        folder = root / "ACDC" / "database" / part / patient
        image(folder / f"{patient}_4d.nii.gz", channels=4)
        (folder / "Info.cfg").write_text("ED: 1\n")
        for frame in ("frame01", "frame12"):
            image(folder / f"{patient}_{frame}.nii.gz")
            mask(folder / f"{patient}_{frame}_gt.nii.gz", (0, 1, 2, 3))


def decathlon(folder: str, case: str, values: tuple[int, ...], channels: int = 1) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        for number in (1, 4):
            name = f"{case}_{number:03d}.nii.gz"
            image(root / folder / "imagesTr" / name, seed=number, channels=channels)
            mask(root / folder / "labelsTr" / name, values)
            (root / folder / "imagesTr" / f"._{name}").write_bytes(b"AppleDouble")
        image(root / folder / "imagesTs" / f"{case}_002.nii.gz", channels=channels)

    return make


def btcv(root: Path) -> None:
    for number in ("0001", "0005"):
        image(root / "RawData" / "Training" / "img" / f"img{number}.nii.gz")
        mask(root / "RawData" / "Training" / "label" / f"label{number}.nii.gz", (0, 5, 13))
    image(root / "RawData" / "Testing" / "img" / "img0061.nii.gz")


def amos(root: Path) -> None:
    for part, number in (("Tr", "0001"), ("Va", "0008"), ("Ts", "0002")):
        image(root / "amos22" / f"images{part}" / f"amos_{number}.nii.gz")
        if part != "Ts":
            mask(root / "amos22" / f"labels{part}" / f"amos_{number}.nii.gz", (0, 15))


def flare(root: Path) -> None:
    training = root / "Training"
    image(training / "FLARE22_LabeledCase50" / "images" / "FLARE22_Tr_0001_0000.nii.gz")
    mask(training / "FLARE22_LabeledCase50" / "labels" / "FLARE22_Tr_0001.nii.gz", (0, 13))
    image(training / "FLARE22_UnlabeledCase1-1000" / "Case_00001_0000.nii.gz")


def brats2019(root: Path) -> None:
    for grade, name in (("HGG", "BraTS19_CBICA_AAP_1"), ("LGG", "BraTS19_2013_0_1")):
        for channel in ("t1", "t1ce", "t2", "flair"):
            image(root / grade / name / f"{name}_{channel}.nii")
        mask(root / grade / name / f"{name}_seg.nii", (0, 1, 2, 4))


def brats2021(root: Path) -> None:
    name = "BraTS2021_00000"
    for seed, channel in enumerate(("t1", "t1ce", "t2", "flair")):
        image(root / name / f"{name}_{channel}.nii.gz", seed)
    mask(root / name / f"{name}_seg.nii.gz", (0, 1, 2, 4))


def lits(root: Path) -> None:
    image(root / "Training Batch 1" / "volume-0.nii")
    mask(root / "Training Batch 1" / "segmentation-0.nii", (0, 1, 2))
    image(root / "test" / "test-volume-0.nii")


def hc18(root: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("010_", "010_2"):
        picture(root / "training_set" / f"{name}HC.png", rng.integers(0, 255, (54, 80)).astype(np.uint8))
        picture(root / "training_set" / f"{name}HC_Annotation.png", ring((54, 80), (27, 40)))
    picture(root / "test_set" / "010_HC.png", rng.integers(0, 255, (54, 80)).astype(np.uint8))


def ring(shape: tuple[int, int], middle: tuple[int, int]) -> Array:
    """Draw the outline of an ellipse, one pixel wide, open where the picture's edge cuts it."""
    filled = disc(shape, middle)
    wider = np.pad(filled, 1, mode="edge")
    inner = wider[:-2, 1:-1] & wider[2:, 1:-1] & wider[1:-1, :-2] & wider[1:-1, 2:]
    return np.where(filled & ~inner, 255, 0).astype(np.uint8)


def disc(shape: tuple[int, int], middle: tuple[int, int]) -> Array:
    y, x = np.mgrid[: shape[0], : shape[1]]
    return ((y - middle[0]) / 18) ** 2 + ((x - middle[1]) / 25) ** 2 <= 1


def busi(root: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("benign (1)", "malignant (2)", "normal (3)"):
        folder = root / "Dataset_BUSI_with_GT" / name.split()[0]
        picture(folder / f"{name}.png", rng.integers(0, 255, (12, 14, 3)).astype(np.uint8))
        lesion = np.zeros((12, 14), np.uint8)
        if "normal" not in name:
            lesion[2:4, 2:4] = 255
        picture(folder / f"{name}_mask.png", lesion)
    second = np.zeros((12, 14), np.uint8)
    second[8:10, 8:10] = 255
    picture(root / "Dataset_BUSI_with_GT" / "benign" / "benign (1)_mask_1.png", second)


TREES: dict[str, Callable[[Path], None]] = {
    "openmind": openmind,
    "left_atrium_2018": left_atrium,
    "acdc": acdc,
    "msd_task01_braintumour": decathlon("Task01_BrainTumour", "BRATS", (0, 1, 2, 3), channels=4),
    "msd_task02_heart": decathlon("Task02_Heart", "la", (0, 1)),
    "msd_task03_liver": decathlon("Task03_Liver", "liver", (0, 1, 2)),
    "msd_task04_hippocampus": decathlon("Task04_Hippocampus", "hippocampus", (0, 1, 2)),
    "msd_task05_prostate": decathlon("Task05_Prostate", "prostate", (0, 1, 2), channels=2),
    "msd_task06_lung": decathlon("Task06_Lung", "lung", (0, 1)),
    "msd_task07_pancreas": decathlon("Task07_Pancreas", "pancreas", (0, 1, 2)),
    "msd_task08_hepaticvessel": decathlon("Task08_HepaticVessel", "hepaticvessel", (0, 1, 2)),
    "msd_task09_spleen": decathlon("Task09_Spleen", "spleen", (0, 1)),
    "msd_task10_colon": decathlon("Task10_Colon", "colon", (0, 1)),
    "btcv": btcv,
    "amos": amos,
    "flare22": flare,
    "brats2019": brats2019,
    "brats2021": brats2021,
    "lits": lits,
    "hc18": hc18,
    "busi": busi,
}
