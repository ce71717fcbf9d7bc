"""How the compact network is trained: from scratch, on pixels, at EDM's noise levels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cytodiffusion.data.images import to_tensor
from cytodiffusion.data.transforms import augment, unmoved
from cytodiffusion.diffusion.loss import (
    UNLABELLED,
    Losses,
    Sharpness,
    class_losses,
    edm_weight,
    squared_errors,
)
from cytodiffusion.diffusion.noise import training_sigmas
from cytodiffusion.diffusion.precondition import EDMDenoiser, spread
from cytodiffusion.networks.compact import CompactNetwork, CompactSettings
from cytodiffusion.train.learner import Batch, Learner
from cytodiffusion.train.settings import TrainSettings

CLEAR = 0.15  # noise level of the look that names an unlabelled cell


class CompactLearner(Learner):
    """A denoiser and its loss."""

    def __init__(self, settings: TrainSettings, classes: int) -> None:
        super().__init__()
        shape = CompactSettings(
            classes=classes, size=settings.preprocess.size, **settings.network.model_dump()
        )
        self.settings, self.classes = settings, classes
        self.form = f"compact U-Net, {shape.form}"
        self.denoiser = EDMDenoiser(CompactNetwork(shape), settings.sigma_data)
        self.sharpness = Sharpness(start=settings.sharpness) if shape.form == "heads" else None

    def draw(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Clean images, noise, sigma, labels; for pseudo-labels also the images as they are."""
        s = self.settings
        clean = augment(to_tensor(batch.canvases), s.preprocess.size, s.augmentation, generator)
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        sigma = training_sigmas(len(clean), s.sigma_mean, s.sigma_std, generator)
        given = batch.labels
        if s.network.form == "conditional":
            luck = torch.rand(len(given), generator=generator, device=given.device)
            given = torch.where(luck < s.label_dropout, UNLABELLED, given)
        if self.sharpness is None or not s.pseudo:
            return clean, noise, sigma, given
        return clean, noise, sigma, given, unmoved(to_tensor(batch.canvases), s.preprocess.size)

    def forward(
        self, clean: Tensor, noise: Tensor, sigma: Tensor, labels: Tensor, still: Tensor | None = None
    ) -> Losses:  # fmt: skip
        if still is not None:
            labels = self._pseudo_labels(still, noise, labels)
        noisy = clean + spread(sigma, 4) * noise
        weight = edm_weight(sigma, self.settings.sigma_data)
        if self.sharpness is None:
            return self._conditional(noisy, clean, sigma, labels, weight)
        s = self.settings
        return class_losses(
            self.denoiser(noisy, sigma, self._every(noisy)), clean, labels, weight,
            self.sharpness(sigma), s.any_weight, s.classification,
        )  # fmt: skip

    def _every(self, images: Tensor) -> Tensor:
        """All classes and "any cell", for each image."""
        return torch.arange(self.classes + 1, device=images.device).expand(len(images), -1)

    @torch.no_grad()
    def _pseudo_labels(self, still: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
        """FixMatch: a sure answer for a cell as it is becomes the label of that cell, augmented.

        Source: Sohn et al. 2020 (arXiv 2001.07685).
        """
        unknown = (labels == UNLABELLED).nonzero()[:, 0]
        if self.sharpness is None or not len(unknown):
            return labels
        clean, sigma = still[unknown], torch.full((len(unknown),), CLEAR, device=still.device)
        noisy = clean + CLEAR * noise[unknown]
        self.denoiser.eval()
        errors = squared_errors(self.denoiser(noisy, sigma, self._every(noisy)), clean)
        self.denoiser.train()
        nats = self.sharpness(sigma) * edm_weight(sigma, self.settings.sigma_data)
        sure, name = (-nats[:, None] * errors[:, :-1]).softmax(1).max(1)
        given = labels.clone()
        given[unknown] = torch.where(sure >= self.settings.pseudo, name, UNLABELLED)
        return given

    def _conditional(
        self, noisy: Tensor, clean: Tensor, sigma: Tensor, labels: Tensor, weight: Tensor
    ) -> Losses:
        """One class a pass: the label that was given, or "any cell" where there is none."""
        asked = torch.where(labels == UNLABELLED, self.classes, labels)
        guess = self.denoiser(noisy, sigma, asked[:, None])[:, 0]
        own = ((guess - clean).square().mean((1, 2, 3)) * weight).mean()
        zero = torch.zeros_like(own)
        return Losses(own, own, zero, zero)

    def usable(self, weights: Mapping[str, Tensor]) -> EDMDenoiser:
        """A copy of the denoiser with these weights."""
        made = CompactLearner(self.settings, self.classes)
        made.load_state_dict({name: value.cpu() for name, value in weights.items()})
        device = next(self.parameters()).device
        return made.denoiser.eval().requires_grad_(False).to(device)
