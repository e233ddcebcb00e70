"""Contrast of places within a crop, which trains the first blocks of the decoder: the second of two stages.

Chaitanya et al., "Contrastive learning of global and local features", NeurIPS 2020 (arXiv 2006.10511), local loss. The
encoder comes from a first stage, theirs from contrast by position (`position-contrast`), and is frozen there: give
`--continue-from` that run and `freeze_encoder=true`. Without a first stage the encoder has to learn too.

Of two views of a crop that differ in intensity, the features of the decoder at one place have to resemble each other
more than those of other places of the crop that are at least `ignore_mm` away.

The later blocks of the decoder do not learn: they keep what they started with, which is random weights unless the run
continues one that trained them, and are transferred with the others. A place is a mean over `region` positions.

Deviations: places are drawn anew for each crop where theirs are 13 on a fixed grid; negatives are all others that are
far enough in mm where theirs are five listed neighbours; they come from the other view, in both directions, and not
from the anchor's own view too; the views may also be cut and turned apart (`geometry: different`), places being found
again through what moved them.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from medssl.augmentation.policy import Policy
from medssl.config import Settings
from medssl.data.batch import Batch, View, Views
from medssl.data.draw import Draw
from medssl.errors import UsageError
from medssl.losses.precision import at_least_float32
from medssl.losses.voxel_contrast import pairs_by_distance, voxel_contrast
from medssl.networks.decoder import DecoderBlocks
from medssl.networks.encoder import Encoder
from medssl.pretraining.heads import Norm, Projector, ProjectorSettings
from medssl.pretraining.health import feature_std
from medssl.pretraining.joint import joint_health
from medssl.pretraining.places import (
    Places,
    draw_places,
    features_at,
    image_agreement,
    place_error,
    places_of,
    similarity_map,
    voxel_edges_mm,
)
from medssl.training.distributed import mean_across_ranks
from medssl.training.method import Method, Needs, Step


class LocalHeadSettings(ProjectorSettings):
    """The head on the features of a place: linear layers, which are 1 x 1 convolutions of the map.

    Args:
        hidden: Width of the hidden layers.
        width: Width of its output.
        layers: Linear layers; 1 has no hidden one, 0 passes the features through.
        norm: Between the layers: `batch` (over the places of all ranks), `layer`, or `none`.
        last_norm: Whether the output is normalised too, without scale and shift.
    """

    hidden: int = Field(default=128, ge=1)
    norm: Norm = "none"


class LocalContrastSettings(Settings):
    """Settings of contrast within crops.

    Args:
        decoder_stages: Blocks of the decoder that learn, from the coarsest; None takes all but two (three of five, as
            in the paper), and at least one: their last features have a quarter of the input's resolution.
        freeze_encoder: Whether the encoder stays as a first stage left it, as in the paper. Not for a run that starts
            from random weights.
        geometry: `same` shows one cut of the crop in two intensities, as in the paper; `different` cuts and turns the
            views apart.
        places: Places of each crop, drawn evenly.
        region: Edge of the cube (in 2D the square) of positions whose features are averaged, odd; the paper has 3.
        ignore_mm: Places nearer than this are no negatives of each other; None takes the longest edge of a region.
        temperature: Cosines are divided by it.
        projector: The head whose output is contrasted; it is thrown away.
    """

    decoder_stages: int | None = Field(default=None, ge=1)
    freeze_encoder: bool = False
    geometry: Literal["same", "different"] = "same"
    places: int = Field(default=64, ge=2)
    region: int = Field(default=3, ge=1)
    ignore_mm: float | None = Field(default=None, gt=0)
    temperature: float = Field(default=0.1, gt=0)
    projector: LocalHeadSettings = LocalHeadSettings()

    @field_validator("region")
    @classmethod
    def _has_a_middle(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"a region has a position in its middle: use an odd edge, not {value}")
        return value


class LocalContrast(Method):
    """Tells places of a crop from each other by the features of the decoder's first blocks.

    Args:
        network: U-Net; its encoder, unless frozen, and the first blocks of its decoder learn.
        policy: Augmentation for contrastive views.
        settings: See `LocalContrastSettings`.

    Raises:
        UsageError: If the decoder has fewer blocks, or a region is as large as the patch.
    """

    needs: ClassVar[Needs] = Needs(views=2, policy="contrastive")
    trains_decoder: ClassVar[bool] = True

    def __init__(self, network: nn.Module, policy: Policy, settings: LocalContrastSettings) -> None:
        super().__init__()
        self.network = network
        self.encoder = Encoder(network)
        self.policy = policy
        self.settings = settings
        asked = settings.decoder_stages
        self.decoder = DecoderBlocks(self.encoder, max(len(self.encoder.widths) - 3, 1) if asked is None else asked)
        self.decoder.freeze_rest()
        if settings.freeze_encoder:
            self.encoder.unet.encoder.requires_grad_(False)
        self.projector = Projector(self.decoder.width, settings.projector)
        regions = [step * settings.region for step in self.decoder.stride]
        if all(region >= edge for region, edge in zip(regions, policy.patch_size, strict=True)):
            raise UsageError(
                f"patch_size {list(policy.patch_size)}: a region of {settings.region} positions of the decoder covers "
                f"{regions} voxels, so that a crop has one place alone. Raise patch_size or decoder_stages, or lower "
                "region."
            )

    @classmethod
    def output_is_used(cls, settings: Settings) -> bool:
        """Return False: features of the decoder are compared, not its output."""
        return False

    def views(self, batch: Batch, draw: Draw) -> Views:
        """Make two views of each crop, and draw places in the first."""
        if self.settings.geometry == "different":
            views = self.policy.two(batch, draw)
        else:
            place = draw.child("place")
            views = [
                self.policy.view(batch, draw.child(name), place=place.child("both")) for name in ("first", "second")
            ]
        draw_places(views[0], draw.child("places"), self.settings.places)
        return views

    def losses(self, views: Views, step: Step) -> dict[str, Tensor]:
        """Return the contrast of the places of each crop, as `contrast`."""
        places = places_of(*views)
        first, second = self._embedded(views, places)
        anchors = places.usable.sum().float()
        loss = voxel_contrast(
            first.flatten(0, 1),
            second.flatten(0, 1),
            positions_mm=self._in_radii(views[0], places),
            groups=_crops(places),
            positive_mm=0.0,
            ignore_radius_mm=1.0,
            temperature=self.settings.temperature,
            valid=places.usable.flatten(),
            other_volumes=False,
        )
        # The mean over the places of all ranks, not over ranks of the mean of each.
        return {"contrast": loss * (anchors / mean_across_ranks(anchors).clamp(min=1))}

    def map_of(self, view: View) -> Tensor:
        """Return the features of the last of the trained blocks, averaged over regions. Shape: (B, W, *grid)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.settings.freeze_encoder):
            stages = self.encoder.stages(view.image)
        features = at_least_float32(self.decoder(stages))
        pool = F.avg_pool2d if features.ndim == 4 else F.avg_pool3d
        edge = self.settings.region
        return pool(features, edge, stride=1, padding=edge // 2, count_include_pad=False)

    def ignore_mm(self, view: View) -> Tensor:
        """Return how far a negative of each sample is at least. Shape: (B,), float32."""
        if self.settings.ignore_mm is not None:
            return torch.full((len(view.image),), self.settings.ignore_mm, device=view.image.device)
        edges = voxel_edges_mm(view)[:, 3 - len(self.decoder.stride) :].unbind(dim=1)
        regions = [step * self.settings.region * edge for step, edge in zip(self.decoder.stride, edges, strict=True)]
        return torch.stack(regions).amax(dim=0)

    def health(self, views: Views) -> dict[str, float]:
        """Return whether places are told apart, and whether they are the right ones.

        `joint_health` over the places of both views, its features being the decoder's. `place_error`: how far from the
        truth the most similar place of the other view lies, 0 where all are found and about 1 by chance. `agreement`:
        correlation of the two images at the places, near 0 if they are not the same. `usable`: part of the places that
        both views show. `negatives`: negatives of a place.
        """
        places = places_of(*views)
        features, maps = self._features(views, places)
        first, second = self.projector(features[0]), self.projector(features[1])
        usable, crops = places.usable.flatten(), _crops(places)
        _, negative = pairs_by_distance(
            self._in_radii(views[0], places), crops, positive_mm=0.0, ignore_radius_mm=1.0, valid=usable
        )
        of_same_crop = negative & (crops[:, None] == crops)
        figures = {
            "map_std": feature_std(maps[0].flatten(2).transpose(1, 2).flatten(0, 1)),
            "place_error": place_error(first, second, places),
            "agreement": image_agreement(views[0], views[1], places),
            "usable": usable.float().mean(),
            "negatives": of_same_crop.sum() / usable.sum().clamp(min=1),
        }
        rows = [values.flatten(0, 1) for values in (features[0], first, second)]
        return joint_health(*rows) | {name: float(value) for name, value in figures.items()}

    def pictures(self, views: Views) -> dict[str, Tensor]:
        """Return both views, and how similar each place of the second is to the middle of the first."""
        first, second = (self.map_of(view) for view in views)
        size = views[0].image.shape[2:]
        middle = torch.zeros(len(first), 1, 3, device=first.device)
        middle[:, 0, 3 - len(size) :] = torch.tensor([(edge - 1) / 2 for edge in size], device=first.device)
        query = self.projector(features_at(first, middle, size))[:, 0]
        embedded = self.projector(second.movedim(1, -1)).movedim(-1, 1)
        return {
            "first": views[0].image,
            "second": views[1].image,
            "similarity": similarity_map(query, embedded, size),
        }

    def _features(self, views: Views, places: Places) -> tuple[list[Tensor], list[Tensor]]:
        """Return the features of the places in both views, (B, N, W), and the maps they come from."""
        maps = [self.map_of(view) for view in views]
        size = views[0].image.shape[2:]
        both = zip(maps, (places.first, places.second), strict=True)
        return [features_at(features, voxels, size) for features, voxels in both], maps

    def _embedded(self, views: Views, places: Places) -> list[Tensor]:
        """Return the embeddings of the places in both views. Shape of each: (B, N, D)."""
        features, _ = self._features(views, places)
        return [at_least_float32(self.projector(rows)) for rows in features]

    def _in_radii(self, view: View, places: Places) -> Tensor:
        """Return where places lie, in units of the least distance of negatives of their crop. Shape: (B * N, 3)."""
        return (places.mm / self.ignore_mm(view)[:, None, None]).flatten(0, 1)


def _crops(places: Places) -> Tensor:
    """Return the number of the crop of each place. Shape: (B * N,), int64."""
    count, each = places.usable.shape
    return torch.arange(count, device=places.usable.device).repeat_interleave(each)
