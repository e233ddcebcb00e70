"""Training of a method's heads alone, on drawn features of three volumes: collapse within a second."""

from __future__ import annotations

import pytest
import torch

from medssl.data.batch import View, Views
from medssl.pretraining.joint import JointEmbedding
from medssl.training.method import Step
from tests.pretraining.joint_cases import total


def train_heads(
    method: JointEmbedding, monkeypatch: pytest.MonkeyPatch, *, steps: int = 200, noise: float = 0.3, rate: float = 3e-3
) -> Views:
    """Train on features that share a mean, differ between volumes, and less so between views; return the last views."""
    monkeypatch.setattr(method, "features", lambda view: view.image)
    module = type(method).__module__
    monkeypatch.setattr(f"{module}.pooled_stages", lambda encoder, image, stages: image, raising=False)
    generator = torch.Generator().manual_seed(0)
    width = int(method.projector[0].in_features)  # type: ignore[arg-type]
    volumes = torch.randn(1, width, generator=generator) + 0.3 * torch.randn(3, width, generator=generator)
    optimiser = torch.optim.AdamW([weight for weight in method.parameters() if weight.requires_grad], lr=rate)
    shown: Views = []
    for index in range(steps):
        drawn = [volumes + noise * torch.randn(3, width, generator=generator) for _ in range(2)]
        shown = [View(image=rows, inside=rows > 0, to_source_mm=torch.zeros(3, 3, 4)) for rows in drawn]
        optimiser.zero_grad()
        total(method.losses(shown, Step(index, steps))).backward()
        optimiser.step()
        method.after_step(Step(index, steps))
    return shown
