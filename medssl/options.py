"""The options of the command line, each said once with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer


def _option(text: str, *names: str, **more: object) -> typer.models.OptionInfo:
    return typer.Option(*names, help=text, show_default=False, **more)  # type: ignore[arg-type]


def _argument(text: str) -> typer.models.ArgumentInfo:
    return typer.Argument(help=text, show_default=False)


Sources: TypeAlias = Annotated[list[Path], _argument("Folders or files of the archive.")]
Index: TypeAlias = Annotated[Path, _argument("An INDEX, an nnU-Net raw data set, or a folder of NIfTI files.")]
Run: TypeAlias = Annotated[Path, _argument("A RUN.")]
Runs: TypeAlias = Annotated[list[Path], _argument("Two or more segmentation RUNs; the first is the baseline.")]
Checkpoint: TypeAlias = Annotated[Path, _argument("A pretraining RUN or a checkpoint file.")]
ForeignCheckpoint: TypeAlias = Annotated[Path, _argument("An nnssl, OpenMind or nnU-Net checkpoint.")]

Out: TypeAlias = Annotated[Path, _option("Folder for the result.")]
OutFile: TypeAlias = Annotated[Path, _option("File to write.", "--out")]
OptionalOut: TypeAlias = Annotated[Path | None, _option("Folder for the result.", "--out")]
Resume: TypeAlias = Annotated[bool, _option("Continue what is in --out.", "--resume")]
Overwrite: TypeAlias = Annotated[bool, _option("Replace what is in --out.", "--overwrite")]
AsJson: TypeAlias = Annotated[bool, _option("Print the result as JSON.", "--json")]
Quiet: TypeAlias = Annotated[bool, _option("Show no progress.", "--quiet", "-q")]
Verbose: TypeAlias = Annotated[bool, _option("Log what is done.", "--verbose", "-v")]
Workers: TypeAlias = Annotated[int | None, _option("Processes; by default what the machine has.", min=0)]
Device: TypeAlias = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Seed: TypeAlias = Annotated[int, typer.Option(help="Seed of everything random.")]

Geometry: TypeAlias = Annotated[
    Literal["strict", "repair"],
    typer.Option(
        help="strict refuses irregular slices; repair resamples tilt, interpolates single gaps, and flags both."
    ),
]
KeyFile: TypeAlias = Annotated[
    Path | None,
    _option("Secret of the pseudonyms; by default your own, ~/.config/medssl/pseudonym.key.", envvar="MEDSSL_KEY_FILE"),
]
DatasetName: TypeAlias = Annotated[str, _argument("Name of a public data set; see `medssl list datasets`.")]
Downloaded: TypeAlias = Annotated[Path, _option("What you downloaded and unpacked: a folder, or one file.", "--source")]
Files: TypeAlias = Annotated[
    Literal["copy", "hardlink"],
    typer.Option(help="hardlink costs no space, but what writes into --out in place then changes the source too."),
]
Partial: TypeAlias = Annotated[bool, _option("Write what is whole although something is wrong.", "--partial")]
LabelledIndex: TypeAlias = Annotated[Path, _argument("An INDEX of images with their DICOM SEG or RTSTRUCT.")]
LabelNames: TypeAlias = Annotated[str | None, _option("Names of regions to take: Liver,Spleen; by default all.")]
LabelPriority: TypeAlias = Annotated[
    str | None, _option("Which label wins where two overlap, first to last; without, overlaps are refused.")
]
MissingLabels: TypeAlias = Annotated[
    Literal["refuse", "background"],
    typer.Option(help="What a label that was not drawn means: the volume is left out, or the label is absent."),
]
Select: TypeAlias = Annotated[str | None, _option("SQL condition: \"modality = 'MR' AND body_part = 'BRAIN'\".")]
Spacing: TypeAlias = Annotated[str, typer.Option(help="median, native, or millimetres as Z,Y,X: 1.5,1,1.")]
Normalisation: TypeAlias = Annotated[str, typer.Option(help="by-modality, or the name of one scheme for all.")]
Codec: TypeAlias = Annotated[
    Literal["lossless", "float16", "int16", "int8"],
    typer.Option(help="How intensities are stored; the error of all but lossless is measured and reported."),
]
Scheduler: TypeAlias = Annotated[str | None, _option("Address of a Dask scheduler, or local.")]

Store: TypeAlias = Annotated[Path, _option("A store, or an nnU-Net preprocessed folder.")]
OptionalStore: TypeAlias = Annotated[Path | None, _option("A store, or an nnU-Net preprocessed folder.", "--store")]
Method: TypeAlias = Annotated[str | None, _option("See `medssl list methods`; default: the recipe's, else mae.")]
Recipe: TypeAlias = Annotated[Path | None, _option("YAML file of settings.")]
Overrides: TypeAlias = Annotated[list[str] | None, _option("One setting, a.b=c; may be repeated.", "--set")]
ProtocolRecipe: TypeAlias = Annotated[
    Path | None,
    _option("YAML file: data sets, arms, labels, seeds, rates. With --resume by default that of --out.", "--recipe"),
]
Seconds: TypeAlias = Annotated[float, typer.Option(help="About how long to measure.")]
RecipeSteps: TypeAlias = Annotated[int | None, _option("Steps of the optimiser.", min=1)]
ContinueFrom: TypeAlias = Annotated[
    Path | None,
    _option(
        "RUN or checkpoint to start from: all of a run of the same method with the schedule infinite, from before its "
        "anneal; else the network's weights."
    ),
]

Dataset: TypeAlias = Annotated[Path, _option("nnU-Net raw folder: imagesTr, labelsTr, dataset.json.")]
StartFrom: TypeAlias = Annotated[
    str, _option("A pretraining RUN, a checkpoint file, or none for the scratch twin.", "--checkpoint")
]
SemiStartFrom: TypeAlias = Annotated[
    str, _option("A pretraining RUN, a checkpoint file, or none for random weights.", "--checkpoint")
]
SemiMethod: TypeAlias = Annotated[str, _option("See `medssl list semisupervised`.", "--method")]
Unlabelled: TypeAlias = Annotated[
    Path | None,
    _option(
        "Images without labels: a folder of NIfTI or a STORE (segmentation); a CSV, folder, .npz, INDEX or STORE "
        "(classification). By default the training cases that --labelled leaves over.",
    ),
]
RecipeSeed: TypeAlias = Annotated[int | None, _option("Of everything random; default: the recipe's, else 0.", min=0)]
Steps: TypeAlias = Annotated[int, typer.Option(min=1, help="Steps of the optimiser.")]
ValEvery: TypeAlias = Annotated[int, typer.Option(min=1, help="Steps between two looks at the validation cases.")]
Labelled: TypeAlias = Annotated[int | None, _option("Use only so many labelled cases.", min=1)]
TrainCases: TypeAlias = Annotated[str | None, _option("Names of training cases, with commas.")]
ValidationCases: TypeAlias = Annotated[str | None, _option("Names of validation cases, with commas.")]
LearningRate: TypeAlias = Annotated[float | None, _option("Peak rate; by default what fits schedule and checkpoint.")]
Optimiser: TypeAlias = Annotated[
    Literal["auto", "sgd", "adamw"], typer.Option(help="sgd is nnU-Net's; auto takes adamw for less than 5000 steps.")
]
Schedule: TypeAlias = Annotated[str, typer.Option(help="warmup, sawtooth, frozen, poly or constant.")]
TransferDecoder: TypeAlias = Annotated[
    bool | None,
    _option("By default the decoder comes along where it was pretrained.", "--transfer-decoder/--encoder-only"),
]
PlansFrom: TypeAlias = Annotated[Path | None, _option("Checkpoint whose plans a scratch twin copies.")]
Network: TypeAlias = Annotated[str | None, _option("Network of a run from scratch; see `medssl list networks`.")]
PatchSize: TypeAlias = Annotated[str | None, _option("Voxels as Z,Y,X.")]
BatchSize: TypeAlias = Annotated[int | None, _option("Crops per step.", min=1)]
TargetSpacing: TypeAlias = Annotated[
    str | None, _option("median of the data set, pretraining, or millimetres as Z,Y,X.", "--spacing")
]
LayerDecay: TypeAlias = Annotated[
    float, typer.Option(help="Factor on the rate per level from the decoder down to the stem; 1 is one rate for all.")
]
Cache: TypeAlias = Annotated[Path | None, _option("Folder for preprocessed data that several runs share.", "--cache")]
Laterality: TypeAlias = Annotated[
    Literal["forbid", "swap-labels", "allow"],
    typer.Option(help="Left-right mirroring: forbid it, swap the labels of paired organs, or allow it."),
]

LabelledImages: TypeAlias = Annotated[
    Path,
    _option(
        "CSV (path, label, patient, split), folder with a folder for each class, MedMNIST .npz, INDEX or STORE.",
        "--dataset",
    ),
]
LabelsOf: TypeAlias = Annotated[
    Path | None, _option("CSV (volume_id, label, split) for an INDEX or a STORE.", "--labels")
]
LearntKind: TypeAlias = Annotated[
    Literal["auto", "multiclass", "multilabel", "ordinal"],
    typer.Option(
        "--kind", help="What a label is: one class, any of several, one of an order; auto sees the first two."
    ),
]
Classes: TypeAlias = Annotated[str | None, _option("Names of the classes in order, with commas.")]
Folds: TypeAlias = Annotated[int | None, _option("Deal the patients out anew into so many folds.", min=2)]
OneFold: TypeAlias = Annotated[
    int | None,
    _option("Train this fold only; by default all, each a RUN below --out, and their ensemble.", "--fold", min=0),
]
Fold: TypeAlias = Annotated[int, typer.Option(min=0, help="Which fold validates.")]
IgnoreUnlabelled: TypeAlias = Annotated[
    bool, _option("Leave out images without a label instead of refusing the data set.", "--ignore-unlabelled")
]
Mode: TypeAlias = Annotated[
    Literal["linear", "partial", "full"],
    typer.Option(help="What is trained: the head, also the coarsest stages, or everything."),
]
TrainedStages: TypeAlias = Annotated[int, typer.Option(min=1, help="Stages that --mode partial trains.")]
Balance: TypeAlias = Annotated[
    Literal["none", "weights", "sampling"],
    typer.Option(help="Classes of unequal size: weights by the effective number, or every class shown equally often."),
]
SelectCheckpoint: TypeAlias = Annotated[
    Literal["last", "best"], typer.Option("--select", help="The last checkpoint, or that of the least validation loss.")
]
Fit: TypeAlias = Annotated[
    Literal["whole", "stretch", "crop"],
    typer.Option(help="Whole image, shrunk where larger than the patch; stretched to it; or its middle cut out."),
]
Modality: TypeAlias = Annotated[
    str | None, _option("Modality of all images (MR, CT, US, XR, ...); default: what the files say.")
]
Grey: TypeAlias = Annotated[bool, _option("Average the channels of each image.", "--grey")]
Mirrored: TypeAlias = Annotated[
    Literal["forbid", "allow"], typer.Option("--laterality", help="Left-right mirroring of training images.")
]

Augmentation: TypeAlias = Annotated[
    Literal["nnunet", "medssl", "medssl-strong"],
    typer.Option(help="nnU-Net's own, made by the workers, or our policy fine-tuning or strong, made on the device."),
]

Previewed: TypeAlias = Annotated[Path, _argument("A store, a volume, or a folder with one DICOM series.")]
Purpose: TypeAlias = Annotated[str, typer.Option(help="Purpose of a policy; see `medssl list policies`.")]
Draws: TypeAlias = Annotated[int, typer.Option(min=1, max=20, help="Pictures of each line.")]

Model: TypeAlias = Annotated[Path, _option("A segmentation or classification RUN.")]
AnyModel: TypeAlias = Annotated[
    Path | None, _option("A RUN or checkpoint to load and verify.", "--model", envvar="MEDSSL_MODEL")
]
ModelHash: TypeAlias = Annotated[
    str | None, _option("The hash that the model must have.", "--sha256", envvar="MEDSSL_MODEL_SHA256")
]
Input: TypeAlias = Annotated[Path, _option("A volume or picture, a folder of them, or a DICOM series.")]
StepSize: TypeAlias = Annotated[
    float, typer.Option(min=0.1, max=1.0, help="Step of the sliding window, part of a patch.")
]
Mirroring: TypeAlias = Annotated[
    bool | None, _option("By default where the model's policy allows it.", "--mirroring/--no-mirroring")
]
MemoryMb: TypeAlias = Annotated[
    int | None, _option("Working memory in MiB, 2048 by default; the rest goes to scratch files in --out.", min=256)
]
MaskFormat: TypeAlias = Annotated[
    Literal["nifti", "dicom-seg"],
    typer.Option(help="dicom-seg, for DICOM series: a SEG that belongs to the study and carries the patient's facts."),
]
SegmentCodes: TypeAlias = Annotated[
    Path | None, _option("YAML file of category and type of labels for dicom-seg; goes before the built-in table.")
]
EmptyFrames: TypeAlias = Annotated[
    bool, _option("Write also the frames of a dicom-seg that have no content.", "--empty-frames")
]
GatesMode: TypeAlias = Annotated[
    Literal["report", "enforce", "off"],
    typer.Option(
        "--gates",
        help="By the gates of `medssl calibrate`: report judges each case, enforce refuses strange ones, off neither.",
    ),
]
NameMap: TypeAlias = Annotated[
    Path | None,
    _option("CSV to write, outside of --out: which mask was made of which input files. Paths may name patients."),
]
CalibratedRun: TypeAlias = Annotated[Path, _argument("A segmentation RUN.")]
TrainedOn: TypeAlias = Annotated[
    Path | None, _option("The RUN's nnU-Net raw data set; by default where it was trained on it.", "--dataset")
]
FlagRate: TypeAlias = Annotated[
    float, typer.Option(help="Share of cases like the validation cases that each score may send to review.")
]
Predictions: TypeAlias = Annotated[Path, _option("Folder of masks, or a segmentation RUN.")]
References: TypeAlias = Annotated[Path, _option("Folder of reference masks, or an nnU-Net raw data set.")]
Probabilities: TypeAlias = Annotated[
    Path, _option("CSV with a column case and p_<class> for each class, or a classification RUN.", "--predictions")
]
TrueLabels: TypeAlias = Annotated[
    Path | None,
    _option(
        "CSV with case (or path), label, and optionally patient and split; by default the predictions' own column "
        "target.",
        "--references",
    ),
]
TargetKind: TypeAlias = Annotated[
    Literal["auto", "multiclass", "multilabel", "ordinal"],
    typer.Option("--kind", help="What a case's label is; auto takes several labels where a row does not sum to 1."),
]
OnlySplit: TypeAlias = Annotated[str | None, _option("Only cases of this split.", "--split")]
CommonCases: TypeAlias = Annotated[
    bool, _option("Where the runs have different cases, compare those they share.", "--common-cases")
]
Encoder: TypeAlias = Annotated[Path, _argument("A RUN or a checkpoint file whose encoder is looked through.")]
Stages: TypeAlias = Annotated[str, typer.Option(help="all, last, or numbers with commas; 0 is the finest.")]
Pooling: TypeAlias = Annotated[Literal["mean", "mean+max"], typer.Option(help="Over space, of each feature.")]
Boxes: TypeAlias = Annotated[
    Literal["cover", "centre"], typer.Option(help="Cover each volume with boxes of the patch size, or its middle only.")
]
WhichSplit: TypeAlias = Annotated[
    Literal["all", "train", "validation", "test"], typer.Option("--split", help="Only volumes of this split.")
]
Untrained: TypeAlias = Annotated[bool, _option("Use the checkpoint's network with random weights.", "--untrained")]
Control: TypeAlias = Annotated[bool, typer.Option("--control/--no-control", help="Look at the untrained network too.")]
MostVolumes: TypeAlias = Annotated[int, typer.Option("--most", min=2, help="Volumes at most, evenly spaced.")]
Views: TypeAlias = Annotated[int, typer.Option(min=0, help="Augmented views of each volume, for alignment and LiDAR.")]
ViewPurpose: TypeAlias = Annotated[str, typer.Option("--purpose", help="Policy that draws the views.")]
ProbedImages: TypeAlias = Annotated[
    Path, _option("Images with labels, as for `medssl finetune classification`.", "--dataset")
]
EmbeddedImages: TypeAlias = Annotated[
    Path | None,
    _option("Images, as for `medssl finetune classification`; a CSV of paths may lack labels.", "--dataset"),
]
ProbedStore: TypeAlias = Annotated[Path, _option("Store with labels of voxels.", "--store")]
Probes: TypeAlias = Annotated[str, typer.Option(help="Of linear, knn and prototypes, with commas.")]
Shots: TypeAlias = Annotated[str, typer.Option(help="Cases of each class for the prototypes, with commas.")]
HeadSteps: TypeAlias = Annotated[int, typer.Option("--steps", min=1, help="Steps of the segmentation probe's head.")]
Inside: TypeAlias = Annotated[Path, _option("Store of the known kind.", "--in")]
Outside: TypeAlias = Annotated[list[Path] | None, _option("Store of strangers; may be repeated.", "--out-of")]
VolumeLabels: TypeAlias = Annotated[
    Path | None, _option("CSV of volume_id and label of --in: brings class means, energy and softmax.", "--labels")
]
Artefacts: TypeAlias = Annotated[
    bool, typer.Option("--artefacts/--no-artefacts", help="Known volumes with artefacts count as strangers too.")
]
VoxelModel: TypeAlias = Annotated[Path, _argument("A RUN of voxel contrast, or one of its checkpoints.")]
MatchFrom: TypeAlias = Annotated[Path, _option("Volume in which the points lie: a file or a DICOM series.", "--from")]
MatchTo: TypeAlias = Annotated[Path, _option("Volume in which they are to be found.", "--to")]
Points: TypeAlias = Annotated[list[str] | None, _option("X,Y,Z; may be repeated.", "--point")]
PointsFile: TypeAlias = Annotated[Path | None, _option("CSV with the columns x, y, z and perhaps name.", "--points")]
PointUnits: TypeAlias = Annotated[
    Literal["mm", "voxel"], typer.Option("--units", help="RAS mm as in NIfTI's affine, or voxels as stored, from 0.")
]
VolumeModality: TypeAlias = Annotated[
    str | None, _option("Modality of both volumes; default: what the files say.", "--modality")
]
OptionalJson: TypeAlias = Annotated[Path | None, _option("JSON file to write as well.", "--out")]
Format: TypeAlias = Annotated[Literal["nnunet", "nnssl", "safetensors"], typer.Option(help="Who shall read it.")]
Plans: TypeAlias = Annotated[Path | None, _option("nnU-Net plans the file shall fit (--format nnunet).")]
DemoOut: TypeAlias = Annotated[Path, typer.Option("--out", help="Folder for the result.")]
Quick: TypeAlias = Annotated[
    bool, _option("Fewer patients and steps: shows that it runs, not what it can do.", "--quick")
]
