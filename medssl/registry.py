"""Names of methods and networks and where they live, without importing torch.

`medssl list` and the check of a name must not cost the import of a training stack, so an entry holds the place of its
code as text and is imported only when it is built.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from medssl.errors import unknown_name


@dataclass(frozen=True)
class Entry:
    """One thing that a user can name.

    Args:
        name: The name on the command line.
        place: `module:attribute` of the code.
        family: The group it is listed under.
        dimensions: The numbers of spatial dimensions it works in.
        transfers: What of it is worth transferring: `encoder` or `encoder and decoder`.
        source: Paper or origin.
        summary: One line for a list.
        settings: `module:attribute` of its pydantic settings, empty where it has none.
        sensible_batch: Samples below which it learns little, over all devices.
        instead: Methods to try where it cannot be used, the nearest first.
    """

    name: str
    place: str
    family: str
    dimensions: tuple[int, ...]
    transfers: str
    source: str
    summary: str
    settings: str = ""
    sensible_batch: int = 1
    instead: tuple[str, ...] = ()

    def row(self) -> dict[str, Any]:
        """Return what a list of methods shows."""
        return {
            "name": self.name,
            "family": self.family,
            "dimensions": [f"{number}D" for number in self.dimensions],
            "transfers": self.transfers,
            "batch": self.sensible_batch,
            "summary": self.summary,
            "source": self.source,
        }

    def load(self) -> Any:
        """Import and return the code."""
        return _import(self.place)

    def load_settings(self) -> Any:
        """Import and return the class of its settings."""
        return _import(self.settings)


@dataclass(frozen=True)
class NetworkEntry:
    """One U-Net that a user can name, as plain numbers: listing networks builds none.

    Args:
        name: The name on the command line.
        family: `residual` (residual encoder, plain decoder) or `plain`.
        features: Channels of each stage, fine to coarse. Every stage but the first halves the grid.
        blocks: Residual blocks, or convolutions, of each encoder stage.
        decoder_convolutions: Convolutions of each decoder stage.
        parameters: Number of weights with one input and one output channel, by dimensions. A test builds and counts.
        summary: One line for a list.
    """

    name: str
    family: str
    features: tuple[int, ...]
    blocks: tuple[int, ...]
    decoder_convolutions: int
    parameters: dict[int, int]
    summary: str

    @property
    def total_stride(self) -> int:
        """Factor between the input's grid and the coarsest one; a patch's edge must be a multiple of it."""
        return 2 ** (len(self.features) - 1)

    def row(self) -> dict[str, Any]:
        """Return what a list of networks shows."""
        return {
            "name": self.name,
            "stages": len(self.features),
            "2D": self.parameters[2],
            "3D": self.parameters[3],
            "stride": self.total_stride,
            "summary": self.summary,
        }


NETWORKS: dict[str, NetworkEntry] = {
    entry.name: entry
    for entry in (
        NetworkEntry(
            name="resenc-l",
            family="residual",
            features=(32, 64, 128, 256, 320, 320),
            blocks=(1, 3, 4, 6, 6, 6),
            decoder_convolutions=1,
            parameters={2: 34_530_917, 3: 102_348_965},
            summary="nnssl's ResEnc-L, the network of the OpenMind checkpoints; a GPU with 24 GB and up",
        ),
        NetworkEntry(
            name="resenc-m",
            family="residual",
            features=(32, 64, 128, 256, 256, 256),
            blocks=(1, 2, 2, 3, 3, 3),
            decoder_convolutions=1,
            parameters={2: 14_492_453, 3: 42_653_029},
            summary="Two fifths of resenc-l; a GPU with 12 GB",
        ),
        NetworkEntry(
            name="resenc-s",
            family="residual",
            features=(16, 32, 64, 128, 128),
            blocks=(1, 2, 2, 2, 2),
            decoder_convolutions=1,
            parameters={2: 1_788_948, 3: 5_224_756},
            summary="Fit for a CPU over night or a small GPU; patches from 64",
        ),
        NetworkEntry(
            name="resenc-xs",
            family="residual",
            features=(16, 32, 48, 64),
            blocks=(1, 1, 2, 2),
            decoder_convolutions=1,
            parameters={2: 325_411, 3: 940_611},
            summary="Fit for two CPU cores; patches of 32 to 64",
        ),
        NetworkEntry(
            name="plain-unet",
            family="plain",
            features=(32, 64, 128, 256, 320, 320),
            blocks=(2, 2, 2, 2, 2, 2),
            decoder_convolutions=2,
            parameters={2: 10_710_117, 3: 31_194_789},
            summary="nnU-Net's U-Net without residual blocks",
        ),
        NetworkEntry(
            name="plain-unet-s",
            family="plain",
            features=(16, 32, 64, 128),
            blocks=(2, 2, 2, 2),
            decoder_convolutions=2,
            parameters={2: 483_251, 3: 1_402_067},
            summary="Small U-Net without residual blocks, fit for a CPU",
        ),
    )
}

METHODS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name="mae",
            place="medssl.pretraining.mae:MaskedAutoencoder",
            settings="medssl.pretraining.mae:MaskedAutoencoderSettings",
            family="reconstruction",
            dimensions=(2, 3),
            transfers="encoder and decoder",
            source="He et al., CVPR 2022; convolutional form as in Wald et al., CVPR 2025",
            summary="Hide blocks of the crop and restore them with the whole U-Net",
        ),
        Entry(
            name="s3d",
            place="medssl.pretraining.s3d:S3D",
            settings="medssl.pretraining.s3d:S3DSettings",
            family="reconstruction",
            dimensions=(2, 3),
            transfers="encoder and decoder",
            source="Tian et al., ICLR 2023; on U-Nets Wald et al., CVPR 2025",
            summary="Hide blocks from the encoder altogether and restore them",
            instead=("mae",),
        ),
        Entry(
            name="amaes",
            place="medssl.pretraining.amaes:AMAES",
            settings="medssl.pretraining.amaes:AMAESSettings",
            family="reconstruction",
            dimensions=(2, 3),
            transfers="encoder",
            source="Munk et al., 2024",
            summary="Restore a degraded, masked crop through the bottleneck, without skips",
            instead=("mae",),
        ),
        Entry(
            name="genesis",
            place="medssl.pretraining.genesis:Genesis",
            settings="medssl.pretraining.genesis:GenesisSettings",
            family="reconstruction",
            dimensions=(2, 3),
            transfers="encoder and decoder",
            source="Zhou et al., MICCAI 2019",
            summary="Shuffle, bend and paint over the crop and restore it",
            instead=("mae",),
        ),
        Entry(
            name="gmml",
            place="medssl.pretraining.gmml:GMML",
            settings="medssl.pretraining.gmml:GMMLSettings",
            family="reconstruction",
            dimensions=(2, 3),
            transfers="encoder and decoder",
            source="Atito et al., 2022",
            summary="Replace groups of voxels by noise or another sample and restore them",
            sensible_batch=2,
            instead=("mae",),
        ),
        Entry(
            name="volume-fusion",
            place="medssl.pretraining.volume_fusion:VolumeFusion",
            settings="medssl.pretraining.volume_fusion:VolumeFusionSettings",
            family="reconstruction",
            dimensions=(2, 3),
            transfers="encoder and decoder",
            source="Wang et al., MIS-FM, 2023",
            summary="Mix two crops by a map of boxes and find each voxel's share",
            sensible_batch=2,
            instead=("genesis", "mae"),
        ),
        Entry(
            name="simclr",
            place="medssl.pretraining.simclr:SimCLR",
            settings="medssl.pretraining.simclr:SimCLRSettings",
            family="instance contrast",
            dimensions=(2, 3),
            transfers="encoder",
            source="Chen et al., ICML 2020; DCL, debiased, additive margin and SupCon as objectives",
            summary="Tell two views of a crop from those of all other crops of the batch",
            sensible_batch=8,
            instead=("moco", "simsiam", "mae"),
        ),
        Entry(
            name="moco",
            place="medssl.pretraining.moco:MoCo",
            settings="medssl.pretraining.moco:MoCoSettings",
            family="instance contrast",
            dimensions=(2, 3),
            transfers="encoder",
            source="He et al., CVPR 2020",
            summary="Tell a view from a queue of earlier crops, embedded by a slow copy",
            sensible_batch=4,
            instead=("simsiam", "mae"),
        ),
        Entry(
            name="moco-v3",
            place="medssl.pretraining.moco_v3:MoCoV3",
            settings="medssl.pretraining.moco_v3:MoCoV3Settings",
            family="instance contrast",
            dimensions=(2, 3),
            transfers="encoder",
            source="Chen et al., ICCV 2021",
            summary="Find the slow copy's view of a crop among those of the batch",
            sensible_batch=8,
            instead=("moco", "simsiam", "mae"),
        ),
        Entry(
            name="byol",
            place="medssl.pretraining.byol:BYOL",
            settings="medssl.pretraining.byol:BYOLSettings",
            family="distillation",
            dimensions=(2, 3),
            transfers="encoder",
            source="Grill et al., NeurIPS 2020",
            summary="Guess from one view what a slow copy says of the other",
            sensible_batch=4,
            instead=("mae",),
        ),
        Entry(
            name="simsiam",
            place="medssl.pretraining.simsiam:SimSiam",
            settings="medssl.pretraining.simsiam:SimSiamSettings",
            family="distillation",
            dimensions=(2, 3),
            transfers="encoder",
            source="Chen and He, CVPR 2021",
            summary="Guess from one view what the same network says of the other",
            sensible_batch=4,
            instead=("mae",),
        ),
        Entry(
            name="dino",
            place="medssl.pretraining.dino:DINO",
            settings="medssl.pretraining.dino:DINOSettings",
            family="distillation",
            dimensions=(2, 3),
            transfers="encoder",
            source="Caron et al., ICCV 2021",
            summary="Sort views into prototypes as a slow copy sorts other views",
            sensible_batch=8,
            instead=("byol", "mae"),
        ),
        Entry(
            name="mae-ema",
            place="medssl.pretraining.masked_distillation:MaskedDistillation",
            settings="medssl.pretraining.masked_distillation:MaskedDistillationSettings",
            family="distillation",
            dimensions=(2, 3),
            transfers="encoder and decoder",
            source="Jiang et al., SMIT, MICCAI 2022; Zhou et al., iBOT, ICLR 2022",
            summary="Restore hidden blocks and say what a slow copy says that sees everything",
            sensible_batch=4,
            instead=("mae",),
        ),
        Entry(
            name="barlow-twins",
            place="medssl.pretraining.barlow_twins:BarlowTwins",
            settings="medssl.pretraining.barlow_twins:BarlowTwinsSettings",
            family="decorrelation and clustering",
            dimensions=(2, 3),
            transfers="encoder",
            source="Zbontar et al., ICML 2021; Punn and Agarwal, BT-UNet, 2022; mixing: Bandara et al., 2023",
            summary="Make features of two views equal and of different dimensions uncorrelated",
            sensible_batch=16,
            instead=("simsiam", "mae"),
        ),
        Entry(
            name="vicreg",
            place="medssl.pretraining.vicreg:VICReg",
            settings="medssl.pretraining.vicreg:VICRegSettings",
            family="decorrelation and clustering",
            dimensions=(2, 3),
            transfers="encoder",
            source="Bardes et al., ICLR 2022",
            summary="Draw views together, keep each dimension's variance, remove covariance",
            sensible_batch=16,
            instead=("simsiam", "mae"),
        ),
        Entry(
            name="swav",
            place="medssl.pretraining.swav:SwAV",
            settings="medssl.pretraining.swav:SwAVSettings",
            family="decorrelation and clustering",
            dimensions=(2, 3),
            transfers="encoder",
            source="Caron et al., NeurIPS 2020",
            summary="Guess the cluster of one view from the other, clusters filled evenly",
            sensible_batch=16,
            instead=("simsiam", "mae"),
        ),
        Entry(
            name="voco",
            place="medssl.pretraining.voco:VoCo",
            settings="medssl.pretraining.voco:VoCoSettings",
            family="anatomy and position",
            dimensions=(2, 3),
            transfers="encoder",
            source="Wu et al., CVPR 2024",
            summary="Guess which base crops of its surroundings a crop overlaps, and by how much",
            instead=("mae",),
        ),
        Entry(
            name="voxel-contrast",
            place="medssl.pretraining.voxel_contrast:VoxelContrast",
            settings="medssl.pretraining.voxel_contrast:VoxelContrastSettings",
            family="anatomy and position",
            dimensions=(2, 3),
            transfers="encoder",
            source="Goncharov et al., vox2vec, MICCAI 2023; Yan et al., SAM, IEEE TMI 2022",
            summary="Find the same point of a volume in another view, in mm; medssl match uses it",
            instead=("mae",),
        ),
        Entry(
            name="position-contrast",
            place="medssl.pretraining.positional_contrast:PositionContrast",
            settings="medssl.pretraining.positional_contrast:PositionContrastSettings",
            family="anatomy and position",
            dimensions=(2, 3),
            transfers="encoder",
            source="Chaitanya et al., NeurIPS 2020, global loss",
            summary="Liken crops that lie equally high in different bodies",
            sensible_batch=8,
            instead=("simclr", "mae"),
        ),
        Entry(
            name="local-contrast",
            place="medssl.pretraining.local_contrast:LocalContrast",
            settings="medssl.pretraining.local_contrast:LocalContrastSettings",
            family="anatomy and position",
            dimensions=(2, 3),
            transfers="encoder and decoder",
            source="Chaitanya et al., NeurIPS 2020, local loss",
            summary="Tell places of a crop apart in the first blocks of the decoder",
            instead=("mae",),
        ),
        Entry(
            name="densecl",
            place="medssl.pretraining.dense_contrast:DenseCL",
            settings="medssl.pretraining.dense_contrast:DenseCLSettings",
            family="anatomy and position",
            dimensions=(2, 3),
            transfers="encoder",
            source="Wang et al., CVPR 2021",
            summary="MoCo on whole crops and on places of them at once",
            sensible_batch=4,
            instead=("simsiam", "mae"),
        ),
        Entry(
            name="combined",
            place="medssl.pretraining.combined:Combined",
            settings="medssl.pretraining.combined:CombinedSettings",
            family="several",
            dimensions=(2, 3),
            transfers="encoder and decoder",
            source="FOMO25, arXiv 2604.11679",
            summary="Several methods on one network, for example reconstruction and contrast",
            sensible_batch=8,
            instead=("mae",),
        ),
    )
}


def method(name: str) -> Entry:
    """Return the entry of a pretraining method.

    Raises:
        UsageError: If there is none of that name; near names are listed.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    return METHODS[name]


def network(name: str) -> NetworkEntry:
    """Return the entry of a network.

    Raises:
        UsageError: If there is none of that name; near names are listed.
    """
    if name not in NETWORKS:
        raise unknown_name("network", name, NETWORKS)
    return NETWORKS[name]


def _import(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)
