"""One process at a time in an output folder, and the second one of every verb is refused before it touches anything."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from medssl.archive.index import index
from medssl.archive.private import locked
from medssl.errors import UsageError
from medssl.files import LOCK_FILE
from medssl.lock import claimed_folder, run_lock
from medssl.preprocessing.run import preprocess
from tests.archive.archive_files import write_nifti
from tests.inference.tiny_models import make_model, write_volume
from tests.preprocessing.raw import make_raw
from tests.pretraining.conftest import make_store
from tests.transfer.conftest import LABELS, write_case

HOLD = "import sys; from pathlib import Path; from medssl.lock import run_lock\n"
HOLD += "with run_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
REFUSED = "Another process"


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Hold a folder in another process."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_folder_in_use_is_refused_and_free_again_after_a_kill(tmp_path: Path) -> None:
    (tmp_path / "mask").touch()
    with held(tmp_path) as process:
        for options in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
            with pytest.raises(UsageError, match=REFUSED), claimed_folder(tmp_path, **options):
                pass
        assert (tmp_path / "mask").exists()
        process.kill()
        process.wait()
        with claimed_folder(tmp_path, resume=None, overwrite=True):
            assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_refused_gets_no_lock(tmp_path: Path) -> None:
    (tmp_path / "thesis.docx").touch()
    for overwrite in (False, True):
        with (
            pytest.raises(UsageError),
            claimed_folder(tmp_path, resume=False, overwrite=overwrite, owned=lambda _: False),
        ):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.docx"]


def test_what_a_command_left_that_was_killed_at_once_counts_as_empty(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).touch()
    (tmp_path / f".{'0f' * 16}-predictions.json").write_text("{")
    with claimed_folder(tmp_path, resume=None, overwrite=False, owned=lambda _: False):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


def test_what_a_killed_command_left_in_its_folders_is_removed_by_the_next_one_but_not_what_another_writes(
    tmp_path: Path,
) -> None:
    name = f".{'0f' * 16}-checkpoint.pth"
    (tmp_path / "fold_0").mkdir()
    (tmp_path / "other").mkdir()
    for place in (tmp_path, tmp_path / "fold_0", tmp_path / "other"):
        (place / name).touch()
        (place / "checkpoint.pth").touch()
    (tmp_path / ".notes").touch()
    with held(tmp_path / "other"), claimed_folder(tmp_path, resume=True, overwrite=False):
        assert (tmp_path / "other" / name).exists()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        ".notes",
        "checkpoint.pth",
        "fold_0/checkpoint.pth",
        "other/" + name,
        "other/.lock",
        "other/checkpoint.pth",
    ]


def test_a_lock_whose_file_was_removed_by_its_last_holder_is_taken_anew(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        (tmp_path / LOCK_FILE).unlink()
        with held(tmp_path):
            pass


def _pretrain(scratch: Path, out: Path) -> object:
    from medssl.pretraining.run import pretrain

    store = make_store(scratch / "store").folder
    return pretrain(
        "mae", store, out, overrides=["patch_size=[16,16,16]", "mask.block=4"], steps=1, device="cpu", overwrite=True
    )


def _finetune(scratch: Path, out: Path) -> object:
    from medssl.transfer.segmentation import finetune_segmentation

    return finetune_segmentation(_balls(scratch), None, out, network="resenc-xs", device="cpu", overwrite=True)


def _semisupervise(scratch: Path, out: Path) -> object:
    from medssl.semisupervised.segmentation import semisupervise_segmentation

    return semisupervise_segmentation(
        "mean-teacher", _balls(scratch), None, out, network="resenc-xs", patch_size=(16, 16, 16), labelled=1,
        device="cpu", overwrite=True,
    )  # fmt: skip


def _classify(scratch: Path, out: Path) -> object:
    from medssl.transfer.classification import finetune_classification

    rows = ["path,label,patient,split"]
    for number in range(4):
        write_nifti(scratch / f"{number}.nii.gz", (8, 8, 8), seed=number)
        rows.append(f"{number}.nii.gz,{'ab'[number % 2]},p{number},{'train' if number < 2 else 'validation'}")
    (scratch / "labels.csv").write_text("\n".join(rows))
    return finetune_classification(
        scratch / "labels.csv", None, out, network="resenc-xs", device="cpu", overwrite=True, workers=0
    )


def _preprocess(scratch: Path, out: Path) -> object:
    return preprocess(make_raw(scratch / "raw", n=1), out, workers=1, overwrite=True, quiet=True)


def _predict(scratch: Path, out: Path) -> object:
    from medssl.inference.predict import predict

    write_volume(scratch / "images" / "a.nii.gz")
    return predict(make_model(scratch / "model"), scratch / "images", out, device="cpu", overwrite=True, quiet=True)


def _balls(scratch: Path) -> Path:
    folder = scratch / "balls"
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for number in range(3):
        write_case(folder, f"case{number}", seed=number)
    content = {"channel_names": {"0": "MR"}, "labels": LABELS, "numTraining": 3, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("start", [_pretrain, _finetune, _semisupervise, _classify, _preprocess, _predict])
def test_the_second_run_on_a_folder_is_refused_even_with_overwrite(
    tmp_path: Path, start: Callable[[Path, Path], object]
) -> None:
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    for folder in (out, scratch):
        folder.mkdir()
    (out / "run.json").write_text('{"kind": "pretraining"}')
    (out / "predictions.json").write_text("{}")
    (out / "unfinished.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with held(out), pytest.raises(UsageError, match=REFUSED):
        start(scratch, out)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != LOCK_FILE} == before


def test_the_second_index_is_refused_even_with_overwrite(tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    write_nifti(tmp_path / "archive" / "a.nii.gz")
    out = tmp_path / "index"
    (out / "private").mkdir(parents=True)
    (out / "private" / "README").touch()
    with locked(out), pytest.raises(UsageError, match=REFUSED):
        index([tmp_path / "archive"], out, workers=1, overwrite=True, quiet=True)
    assert (out / "private" / "README").exists()
