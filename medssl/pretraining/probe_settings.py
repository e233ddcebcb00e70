"""What a pretraining looks at now and then beside its own loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import Field

from medssl.config import Settings

#: Crops of those looked at without labels that are also seen in two views, for their alignment.
VIEWED = 16
#: Samples to train on for each image that is looked at: training on one takes five to six times as long as the
#: encoder's pass (`pipelines/benchmarks/results/online_probes.json`), so that looking takes less than 3 % of the time.
SAMPLES_PER_PASS = 7
#: A crop with a mask costs more: its logits are brought to the size of the image.
MASK_PASSES = 2

ProbeKind = Literal["linear", "knn", "prototypes", "segmentation"]


class ProbeSettings(Settings):
    """Looks at the encoder while it trains, without labels and with; they change neither its weights nor its steps.

    All samples are read once, before the first step, and are the same at every look.

    Args:
        every: Steps between two looks; 0 for none. None takes `validate_every` (ten times `log_every` where nothing is
            validated), or the first multiple of it at which looking takes less than 3 % of the time.
        crops: Crops of the store whose features are judged without labels (`quality/...`), of validation volumes where
            there are eight or more, else of training volumes; 0 for none.
        labels: Labels for `linear`, `knn` and `prototypes` (`probe/...`): a CSV (volume_id, label, and optionally
            split) for volumes of the store that is pretrained on, or a labelled data set as `medssl finetune
            classification` takes one (CSV of paths, a folder per class, a MedMNIST .npz). A RUN does not keep it: to
            resume with the same probes, give it again.
        kinds: Which probes. `segmentation` takes the masks of the store.
        cases: Labelled images that a probe learns from, and as many that it is measured on, at most.
        masks: Crops with a mask that `segmentation` learns from, and as many that it is measured on.
    """

    every: int | None = Field(default=None, ge=0)
    crops: int = Field(default=32, ge=0)
    labels: Path | None = None
    kinds: tuple[ProbeKind, ...] = ("linear", "knn", "prototypes")
    cases: int = Field(default=64, ge=4)
    masks: int = Field(default=8, ge=1)

    def interval(self, usual: int, samples: int) -> int:
        """Return the first multiple of the usual interval at which looking costs little.

        Args:
            usual: Steps.
            samples: Samples that one device trains on in a step.
        """
        passes = self.crops + 2 * min(VIEWED, self.crops)
        if self.labels is not None and set(self.kinds) - {"segmentation"}:
            passes += 2 * self.cases
        if "segmentation" in self.kinds:
            passes += 2 * MASK_PASSES * self.masks
        return usual * max(1, math.ceil(SAMPLES_PER_PASS * passes / samples / usual))
