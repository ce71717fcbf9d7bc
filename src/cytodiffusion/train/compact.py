"""How the compact network is trained: from scratch, on pixels, at EDM's noise levels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from cytodiffusion.data.images import to_tensor
from cytodiffusion.data.transforms import augment
from cytodiffusion.diffusion.loss import Losses, Sharpness, class_losses, edm_weight
from cytodiffusion.diffusion.noise import training_sigmas
from cytodiffusion.diffusion.precondition import EDMDenoiser, spread
from cytodiffusion.networks.compact import CompactNetwork, CompactSettings
from cytodiffusion.train.learner import BETAS, Batch, Learner
from cytodiffusion.train.muon import Muon
from cytodiffusion.train.settings import TrainSettings
from cytodiffusion.types import UNLABELLED


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

    def optimizer(self, settings: TrainSettings) -> torch.optim.Optimizer:
        """Muon for the convolutions of the trunk and those that lead into it and to the heads."""
        if settings.optimizer == "adamw":
            return super().optimizer(settings)
        network = cast(CompactNetwork, self.denoiser.network)
        parts = [network.stem, network.trunk, *([network.change.spread] if network.change else [])]
        kernels = [weight for part in parts for weight in part.parameters() if weight.ndim == 4]
        # fused, it would leave out a step that overflowed in float16 without telling Muon
        fused = settings.precision != "fp16"
        return Muon(
            self.parameters(), kernels, weight_decay=settings.weight_decay, betas=BETAS, fused=fused
        )

    def draw(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Clean images, noise, sigma, labels."""
        s = self.settings
        clean = augment(to_tensor(batch.canvases), s.preprocess.size, s.augmentation, generator)
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        sigma = training_sigmas(len(clean), s.sigma_mean, s.sigma_std, generator)
        given = batch.labels
        if s.network.form == "conditional":
            luck = torch.rand(len(given), generator=generator, device=given.device)
            given = torch.where(luck < s.label_dropout, UNLABELLED, given)
        return clean, noise, sigma, given

    def forward(self, clean: Tensor, noise: Tensor, sigma: Tensor, labels: Tensor) -> Losses:
        noisy = clean + spread(sigma, 4) * noise
        weight = edm_weight(sigma, self.settings.sigma_data)
        if self.sharpness is None:
            return self._conditional(noisy, clean, sigma, labels, weight)
        every = torch.arange(self.classes + 1, device=clean.device).expand(len(clean), -1)
        s = self.settings
        return class_losses(
            self.denoiser(noisy, sigma, every), clean, labels, weight, self.sharpness(sigma),
            s.any_weight, s.classification,
        )  # fmt: skip

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
