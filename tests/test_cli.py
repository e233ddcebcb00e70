"""The command line: names, exit codes and messages; what the verbs do is tested where it is done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from medssl import registry
from medssl.cli import main

VERBS = (
    ["index"],
    ["convert"],
    ["preprocess"],
    ["pretrain"],
    ["bench"],
    ["finetune", "segmentation"],
    ["finetune", "classification"],
    ["predict"],
    ["calibrate"],
    ["evaluate", "segmentation"],
    ["evaluate", "classification"],
    ["evaluate", "probe"],
    ["evaluate", "segmentation-probe"],
    ["evaluate", "quality"],
    ["evaluate", "ood"],
    ["embed"],
    ["match"],
    ["compare"],
    ["protocol"],
    ["export"],
    ["import"],
    ["report"],
    ["list", "methods"],
    ["list", "networks"],
    ["list", "policies"],
    ["list", "codes"],
    ["list", "datasets"],
    ["dataset", "prepare"],
    ["doctor"],
    ["demo"],
)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["medssl", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    code = end.value.code
    assert isinstance(code, int)
    return code


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_explains_itself(verb: list[str], monkeypatch, capsys) -> None:
    assert run(monkeypatch, *verb, "--help") == 0
    assert "Usage" in capsys.readouterr().out


def test_an_unknown_option_is_wrong_use(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "pretrain", "--stores", "x") == 2
    assert "--store" in capsys.readouterr().err


def test_an_unknown_method_lists_near_names(monkeypatch, capsys, tmp_path: Path) -> None:
    code = run(monkeypatch, "pretrain", "--method", "simclrr", "--store", str(tmp_path), "--out", str(tmp_path / "run"))
    assert code == 2
    assert "Did you mean simclr?" in capsys.readouterr().err


def test_spacing_that_is_no_number_is_wrong_use(monkeypatch, capsys, tmp_path: Path) -> None:
    code = run(monkeypatch, "preprocess", str(tmp_path), "--out", str(tmp_path / "store"), "--spacing", "1,x,1")
    assert code == 2
    assert "--spacing takes numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "typo", "words"),
    [("--stages", "lst", "all, last"), ("--spacing", "medain", "median, native, pretraining")],
)
def test_a_typo_where_words_and_numbers_are_taken_names_the_words(option, typo, words, monkeypatch, capsys) -> None:
    assert run(monkeypatch, "evaluate", "probe", "run", "--dataset", "labels.csv", option, typo) == 2
    message = capsys.readouterr().err
    assert words in message and typo in message


@pytest.mark.parametrize(
    ("verb", "source", "option"),
    [
        ("segmentation-probe", "--store", "--shots"),
        ("probe", "--dataset", "--steps"),
        ("probe", "--dataset", "--store"),
    ],
)
def test_a_probe_refuses_the_options_of_the_other(verb, source, option, monkeypatch, capsys) -> None:
    assert run(monkeypatch, "evaluate", verb, "run", source, "data", option, "5") == 2
    assert f"No such option: {option}" in capsys.readouterr().err


def test_stopping_does_not_promise_to_go_on_where_the_verb_cannot(monkeypatch, capsys) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("medssl.cli.app", interrupt)
    assert run(monkeypatch, "compare") == 130
    assert "Where the verb has --resume" in capsys.readouterr().err


def test_an_output_folder_that_is_not_empty_names_the_ways_out(monkeypatch, capsys, tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "something").touch()
    assert run(monkeypatch, "index", str(tmp_path / "archive"), "--out", str(tmp_path / "out")) == 2
    message = capsys.readouterr().err
    assert "--resume" in message and "--overwrite" in message
    assert (tmp_path / "out" / "something").exists()


def test_lists_can_be_read_by_scripts(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "list", "networks", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == set(registry.NETWORKS)


def test_doctor_finds_every_decoder_here(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "doctor", "--json") == 0
    verdicts = {row["subject"]: row["verdict"] for row in json.loads(capsys.readouterr().out)}
    assert {verdicts[f"DICOM {name}"] for name in ("JPEG 2000", "JPEG lossless", "JPEG-LS", "RLE")} == {"ok"}


def test_help_and_lists_do_not_import_torch() -> None:
    program = "import sys; import medssl.cli, medssl.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--store", "s", "--grey", "--patch-size", "8,8"], "--patch-size, --grey only count with --dataset"),
        (["--store", "s", "--spacing", "median"], "--spacing only count with --dataset"),
        (["--store", "s", "--labels", "l.csv"], "--labels only count"),
        (["--dataset", "d.npz", "--boxes", "cover"], "--boxes only count with --store"),
        (["--store", "s", "--dataset", "d.npz"], "one of them"),
    ],
)
def test_options_of_the_other_kind_of_images_are_named(options: list[str], message: str, monkeypatch, capsys) -> None:
    assert run(monkeypatch, "embed", "run", "--out", "features", *options) == 2
    assert message in " ".join(capsys.readouterr().err.split())
