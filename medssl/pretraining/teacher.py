"""A teacher: a copy of the student that follows it slowly and gets no gradient."""

from __future__ import annotations

import copy
import math

import torch
from pydantic import Field
from torch import nn

from medssl.config import Settings
from medssl.networks.encoder import Encoder
from medssl.training.method import Step


class TeacherSettings(Settings):
    """How the teacher follows.

    Args:
        momentum: Part of the teacher that stays at the first step.
        final: Part that stays at the last one; between them it rises along half a cosine (BYOL, 2020).
    """

    momentum: float = Field(default=0.99, ge=0, le=1)
    final: float = Field(default=1.0, ge=0, le=1)

    def at(self, step: Step) -> float:
        """Return the part that stays at a step."""
        return self.final - (self.final - self.momentum) * (1 + math.cos(math.pi * step.fraction)) / 2


class Teacher(nn.Module):
    """Copies of a student's parts, moved towards them after each step.

    The students are kept by reference and are not sub-modules, so that their weights have one name in a method's state.
    Buffers are copied.

    Args:
        settings: How it follows.
        parts: The student's parts by name. An `Encoder` is copied with its U-Net's encoder alone; any other module
            whole.

    Attributes:
        parts: The copies, by the same names; an encoder's copy is reached through `encoder`.
    """

    def __init__(self, settings: TeacherSettings, **parts: nn.Module) -> None:
        super().__init__()
        self.settings = settings
        students = {name: _EncoderOf(part) if isinstance(part, Encoder) else part for name, part in parts.items()}
        self.parts = nn.ModuleDict({name: copy.deepcopy(part) for name, part in students.items()})
        self.parts.requires_grad_(False)
        object.__setattr__(self, "_students", students)

    def __getitem__(self, name: str) -> nn.Module:
        part = self.parts[name]
        return part.access if isinstance(part, _EncoderOf) else part

    @property
    def encoder(self) -> Encoder:
        """The copy of the part named `encoder`."""
        found = self["encoder"]
        assert isinstance(found, Encoder)
        return found

    @torch.no_grad()
    def follow(self, step: Step) -> None:
        """Move towards the students; called after the optimiser's step."""
        stays = self.settings.at(step)
        for name, student in self._students.items():  # type: ignore[union-attr, operator]
            copied = self.parts[name]
            torch._foreach_lerp_(list(copied.parameters()), list(student.parameters()), 1 - stays)
            for mine, theirs in zip(copied.buffers(), student.buffers(), strict=True):
                mine.copy_(theirs)


class _EncoderOf(nn.Module):
    """A U-Net's encoder as a module that can be copied without the decoder, with `Encoder`'s access to it."""

    def __init__(self, student: Encoder) -> None:
        super().__init__()
        self.encoder = student.unet.encoder

    @property
    def access(self) -> Encoder:
        return Encoder(self)
