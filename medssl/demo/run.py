"""The whole path on a phantom: archive, pretraining, few labels, prediction, report; each step says what it does."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from medssl.demo.archive import ARCHIVE, HOSPITAL, NEW_PATIENTS, QUICK, Size, Truth, write_archive
from medssl.demo.dataset import TASK, Case, choose_training, converted_cases, write_dataset, write_label
from medssl.errors import MedsslError
from medssl.files import prepare_output_folder, write_json, write_text

if TYPE_CHECKING:
    from medssl.evaluation.compare import Comparison

MARKER = "demo.json"
SEED = 0
STEPS = 10


RECIPE = """\
# medssl pretrain --store store --out pretrained --recipe recipe.yaml
method: mae
network: resenc-xs        # 0.9 M parameters, for two CPU cores
patch_size: {patch}   # most of a trunk at the store's spacing
batch_size: {batch}
steps: {steps}
mask: {{block: 4, ratio: 0.6}}   # blocks of 24 to 32 mm, as wide as a vertebra
optimiser: {{name: adamw, learning_rate: 0.001}}   # SGD needs four times the steps for the same loss
schedule: {{name: cosine, warmup_steps: {warmup}}}
sampling: {{foreground_probability: 0.7}}   # air around the body teaches nothing
augmentation: {{laterality: forbid}}   # the liver has a side
"""


@dataclass(frozen=True)
class Budget:
    """How much is computed.

    Args:
        size: The hospital.
        labelled: Patients of the archive that get a label to learn from.
        spacing_mm: Voxel size of the store, (z, y, x).
        patch_size: Voxels a network sees, (z, y, x).
        batch_size: Crops per step.
        pretrain_steps: Steps without labels.
        finetune_steps: Steps with labels, the same with and without pretraining.
        learning_rate: Peak rate of fine-tuning, the same in both arms.
    """

    size: Size = HOSPITAL
    labelled: int = 4
    spacing_mm: tuple[float, float, float] = (8.0, 7.0, 7.0)
    patch_size: tuple[int, int, int] = (32, 56, 56)
    batch_size: int = 2
    pretrain_steps: int = 250
    finetune_steps: int = 160
    learning_rate: float = 0.003


FULL = Budget()
SMALL = Budget(size=QUICK, labelled=2, pretrain_steps=12, finetune_steps=8)


def demo(out: Path, *, quiet: bool = False, quick: bool = False, overwrite: bool = False) -> Path:
    """Make a phantom archive and take it from DICOM to a report.

    Args:
        out: Folder for everything; nothing is written elsewhere.
        quiet: Say nothing.
        quick: Fewer patients and steps: shows that it runs, not what it can do.
        overwrite: Replace an earlier demo in `out`.

    Returns:
        `out`.
    """
    out = Path(out)
    # Threads that wait for each other without spinning: on cores that others use too a step is four times as fast. Read
    # when torch is loaded, which has not happened yet on the command line.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    prepare_output_folder(out, resume=None, overwrite=overwrite, owned=lambda folder: (folder / MARKER).is_file())
    write_json(out / MARKER, {"kind": "demo", "quick": quick, "seed": SEED})
    tour = _Tour(out, SMALL if quick else FULL, quiet)
    tour.go()
    return out


@dataclass
class _Tour:
    """The steps of the demo, each of which says what it does and by which command a reader does the same."""

    out: Path
    budget: Budget
    quiet: bool
    commands: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    done: int = 0
    training: list[Case] = field(default_factory=list)
    validation: list[Case] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.key_file = self.out / "pseudonyms.key"
        self.console = Console(stderr=True, quiet=self.quiet, highlight=False, soft_wrap=True, markup=False)

    def go(self) -> None:
        """Take every step, then say what came out and where it lies."""
        truths = self._archive()
        counts = self._index()
        self._preprocess()
        self._pretrain()
        self._annotate(truths)
        self._finetune()
        dice = self._predict()
        comparison = self._compare()
        self._report()
        self._end(counts, dice, comparison)

    def _archive(self) -> list[Truth]:
        with self._step("Scanning phantom patients on two sites' CT and MR scanners into DICOM, some of it broken"):
            # A phantom needs no secret; a fixed key makes each run of the demo the same. Without --key-file medssl
            # makes a secret one.
            write_text(self.key_file, "the key of the demo is no secret\n")
            self.key_file.chmod(0o600)
            return write_archive(self.out / "hospital", seed=SEED, size=self.budget.size, quiet=self.quiet)

    def _index(self) -> dict[str, Any]:
        from medssl.archive.index import index

        with self._step("Indexing the archive: each file becomes part of a volume, a related object, or is refused"):
            self._command("index", "hospital/archive", "--out", "index", *self._key())
            index([self.out / "hospital" / ARCHIVE], self.out / "index", key_file=self.key_file, quiet=self.quiet)
        counts: dict[str, Any] = json.loads((self.out / "index" / "index.json").read_text())
        self._say(_refusals(counts))
        return counts

    def _preprocess(self) -> None:
        from medssl.preprocessing.run import preprocess

        with self._step("Making a store of the accepted volumes: one orientation, one spacing, comparable intensities"):
            self._command("preprocess", "index", "--out", "store", "--spacing", self._spacing)
            preprocess(self.out / "index", self.out / "store", spacing=self.budget.spacing_mm, quiet=self.quiet)

    def _pretrain(self) -> None:
        from medssl.pretraining.run import pretrain

        steps = self.budget.pretrain_steps
        with self._step(f"Pretraining without labels: a small U-Net restores hidden blocks for {steps} steps"):
            recipe = self.out / "recipe.yaml"
            write_text(recipe, self._recipe())
            self._command("pretrain", "--store", "store", "--out", "pretrained", "--recipe", "recipe.yaml")
            pretrain("mae", self.out / "store", self.out / "pretrained", recipe=recipe, device="cpu", quiet=self.quiet)

    def _annotate(self, truths: Sequence[Truth]) -> None:
        """Convert the archive and draw the labels of the patients to learn from and to measure on."""
        from medssl.archive.convert import convert

        with self._step("Converting DICOM to NIfTI, and drawing labels for the few patients that an annotator sees"):
            trees = [self.out / "hospital" / tree for tree in (ARCHIVE, NEW_PATIENTS)]
            self._command("convert", "hospital/archive", "hospital/new_patients", "--out", "nifti", *self._key())
            convert(trees, self.out / "nifti", key_file=self.key_file, quiet=self.quiet)
            cases = converted_cases(self.out / "nifti", truths)
            self.training = choose_training(cases, self.budget.labelled)
            new = [case for case in cases if case.tree == NEW_PATIENTS]
            self.last, self.validation = new[-1], new[:-1]
            write_dataset(self.out / "dataset", [*self.training, *self.validation], SEED)
        self._say(
            f"{len(self.training)} labelled patients to learn from, {len(self.validation)} new patients to measure on, "
            "whom pretraining never saw"
        )

    def _finetune(self) -> None:
        from medssl.transfer.segmentation import finetune_segmentation

        steps, val_every = self.budget.finetune_steps, max(self.budget.finetune_steps // 2, 1)
        common: dict[str, Any] = {
            "steps": steps, "val_every": val_every, "learning_rate": self.budget.learning_rate, "seed": SEED,
            "spacing": self.budget.spacing_mm,
            "train_cases": [case.name for case in self.training],
            "validation_cases": [case.name for case in self.validation],
            "device": "cpu", "quiet": self.quiet,
        }  # fmt: skip
        shared = (
            "--steps", str(steps), "--val-every", str(val_every), "--learning-rate", f"{self.budget.learning_rate:g}",
            "--spacing", self._spacing, "--train-cases", ",".join(common["train_cases"]),
            "--validation-cases", ",".join(common["validation_cases"]),
        )  # fmt: skip
        with self._step(f"Fine-tuning the pretrained network for {steps} steps on {len(self.training)} labels"):
            self._command(
                "finetune segmentation", "--dataset", "dataset", "--checkpoint", "pretrained",
                "--out", "finetuned", *shared,
            )  # fmt: skip
            finetune_segmentation(self.out / "dataset", self.out / "pretrained", self.out / "finetuned", **common)
        with self._step("Training its twin from scratch: same plans, same labels, same steps"):
            self._command(
                "finetune segmentation", "--dataset", "dataset", "--checkpoint", "none", "--plans-from", "pretrained",
                "--out", "scratch", *shared,
            )  # fmt: skip
            finetune_segmentation(
                self.out / "dataset", None, self.out / "scratch", plans_from=self.out / "pretrained", **common
            )

    def _predict(self) -> float:
        """Segment one DICOM series that nobody labelled, then ask the phantom how well; return the mean Dice."""
        from medssl.archive.pseudonym import KEY_VARIABLE
        from medssl.evaluation.segmentation import evaluate_segmentation
        from medssl.inference.predict import PredictSummary, predict

        series = (self.out / "hospital" / NEW_PATIENTS / self.last.file).parent
        with self._step("Predicting on the DICOM series of one more new patient"):
            self._command(
                "predict", "--model", "finetuned", "--input", str(series.relative_to(self.out)), "--out", "prediction"
            )
            with _environment(KEY_VARIABLE, str(self.key_file)):
                summary = predict(
                    self.out / "finetuned", series, self.out / "prediction", device="cpu", quiet=self.quiet
                )
            if not isinstance(summary, PredictSummary) or not summary.predictions:
                raise MedsslError(f"The demo's own series was refused: {summary.to_json()['refused']}")
            mask = self.out / "prediction" / summary.predictions[0].mask
            truth = self.out / "prediction_truth" / mask.name
            write_label(truth, self.last, SEED)
            self._command(
                "evaluate segmentation", "--predictions", f"prediction/{mask.name}",
                "--references", f"prediction_truth/{mask.name}",
            )  # fmt: skip
            labels = dict(TASK)
            result = evaluate_segmentation(mask, truth, labels=labels, quiet=True)
        (dice,) = result.per_case("dice").values()
        return dice

    def _compare(self) -> Comparison:
        from medssl.evaluation.compare import compare

        with self._step("Comparing both models case by case on the new patients"):
            self._command("compare", "scratch", "finetuned")
            comparison = compare([self.out / "scratch", self.out / "finetuned"])
            write_json(self.out / "comparison.json", comparison.to_json())
        return comparison

    def _report(self) -> None:
        from medssl.report.page import report

        with self._step("Writing the reports"):
            for run in ("pretrained", "finetuned", "scratch"):
                self._command("report", run)
                report(self.out / run)

    @contextmanager
    def _step(self, what: str) -> Iterator[None]:
        self.done += 1
        self.console.print(f"[{self.done}/{STEPS}] {what}")
        began = time.monotonic()
        yield
        taken = time.monotonic() - began
        self.seconds[what] = round(taken, 1)
        self.console.print(f"      done in {taken:.0f} s", style="dim")

    def _say(self, what: str) -> None:
        self.console.print(f"      {what}")

    def _command(self, verb: str, *arguments: str) -> None:
        line = shlex.join(["medssl", *verb.split(), *arguments])
        self.commands.append(line)
        self.console.print(f"      $ {line}", style="cyan")

    @property
    def _spacing(self) -> str:
        return ",".join(f"{edge:g}" for edge in self.budget.spacing_mm)

    def _key(self) -> tuple[str, str]:
        return "--key-file", self.key_file.name

    def _recipe(self) -> str:
        patch, steps = list(self.budget.patch_size), self.budget.pretrain_steps
        return RECIPE.format(patch=patch, steps=steps, batch=self.budget.batch_size, warmup=min(20, steps // 4))

    def _end(self, counts: dict[str, Any], dice: float, comparison: Comparison) -> None:
        from medssl.evaluation.segmentation import show

        scratch, finetuned = (comparison.means[run]["dice"]["all labels"] for run in comparison.runs)
        gain = next(row for row in comparison.differences if row.metric == "dice" and row.label == "all labels")
        verdict = "made no clear difference"
        if (gain.estimate.low or 0) > 0:
            verdict = "helped"
        elif (gain.estimate.high or 0) < 0:
            verdict = "hurt"
        lines = [
            "",
            f"Dice on {len(comparison.cases)} new patients, mean over {len(TASK)} organs (95% interval):",
            f"  pretrained, then {len(self.training)} labels   {show(finetuned, 'dice')}",
            f"  from scratch, {len(self.training)} labels      {show(scratch, 'dice')}",
            f"  paired difference          {show(gain.estimate, 'dice')}: pretraining {verdict} here",
            f"  the DICOM series predicted on its own: {dice:.3f}",
            "",
            f"Look at (in {self.out}):",
            "  finetuned/report.html    curves, overlays of the best, median and worst case, the recipe",
            "  pretrained/report.html   what the network was shown and what it restored",
            f"  index/                   {_refusals(counts)}; see refused.parquet",
            "  prediction/              the mask of a DICOM series, on its own grid",
            "  commands.sh              every command, to run again or on your own archive",
        ]
        head = [
            "# Run in this folder. What is there already needs --overwrite, or another --out.",
            'cd "$(dirname "$0")"',
        ]
        write_text(self.out / "commands.sh", "\n".join([*head, *self.commands]) + "\n")
        for line in lines:
            self.console.print(line)


def _refusals(counts: dict[str, Any]) -> str:
    """Say in one line what became of the archive's files."""
    refused = counts["refused"]
    reasons = ", ".join(f"{code} {number}" for code, number in sorted(refused.items()))
    return (
        f"{counts['files_in_volumes']} of {counts['files']} files in {counts['volumes']} volumes, "
        f"{sum(counts['related'].values())} related objects, {sum(refused.values())} refused ({reasons})"
    )


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
