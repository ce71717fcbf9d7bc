"""What the training loop knows of a network: how a batch is noised, and what is lost.

A learner is a module whose `forward` gives the losses of a share of a batch, so that every process
computes its own. Each kind of network has one: compact.py and latent.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from cytodiffusion.diffusion.precondition import NetworkDenoiser
from cytodiffusion.errors import SettingsError
from cytodiffusion.types import PIXELS, Space

if TYPE_CHECKING:
    from cytodiffusion.train.settings import TrainSettings

BETAS = (0.9, 0.99)  # of AdamW


class Batch(NamedTuple):
    """Images of a step."""

    rows: Int[np.ndarray, " n"]  # which images of the training set
    canvases: UInt8[Tensor, "n 3 s s"]
    labels: Int[Tensor, " n"]  # UNLABELLED (-1) where not known


class Learner(nn.Module):
    """A network, and how it is trained. `usable` makes a `Denoiser` of its weights."""

    space: Space = PIXELS
    sigmas: tuple[float, float] = (0.002, 80.0)  # lowest and highest noise level of a drawing
    radius: float | None = None  # of the disc within which errors count, pixels of the space
    form: str = ""  # what it is, for the model card

    def place(self, device: torch.device) -> None:
        """Move everything to a device."""
        self.to(device)

    def optimizer(self, settings: TrainSettings) -> torch.optim.Optimizer:
        """For the weights that are trained; the loop sets the learning rate."""
        trained = [weight for weight in self.parameters() if weight.requires_grad]
        return torch.optim.AdamW(
            trained, betas=BETAS, weight_decay=settings.weight_decay, fused=True
        )

    def draw(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, ...]:
        """What `forward` takes, a row for each image: all random numbers are drawn here."""
        raise NotImplementedError

    def usable(self, weights: Mapping[str, Tensor]) -> NetworkDenoiser:
        """A copy for use with these weights (`learned`), on this learner's device."""
        raise NotImplementedError


def learned(module: nn.Module) -> dict[str, Float[Tensor, ...]]:
    """Weights by name, without those that are frozen."""
    frozen = {name for name, weight in module.named_parameters() if not weight.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}


def check_names(given: Mapping[str, Tensor], own: Mapping[str, Tensor], what: str) -> None:
    """Raises SettingsError where weights are not those of a learner."""
    if strange := sorted(given.keys() ^ own.keys()):
        raise SettingsError(
            f"{what} are not of this network: they differ in {len(strange)} ({strange[0]}, ...). Give the "
            "settings of the run, or another folder to start anew."
        )


def make_learner(settings: TrainSettings, classes: int) -> Learner:
    """The learner that the settings ask for, before training. Raises ModelError, MissingExtra."""
    if settings.latent is None:
        from cytodiffusion.train.compact import CompactLearner

        return CompactLearner(settings, classes)
    from cytodiffusion.train.latent import LatentLearner

    return LatentLearner(settings, classes)
