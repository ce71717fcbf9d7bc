"""A world of Gaussian classes in which every answer is known.

Class k is N(mu_k, s^2 I) and the best denoiser is linear:

    D_k(noisy, sigma) = mu_k + s^2 / (s^2 + sigma^2) (noisy - mu_k)

"Any cell" is the mixture of the classes: its best denoiser is the mean of the D_k, weighted by how
probable each class makes the noisy image. Tests hold the rest of the package to this world.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cytodiffusion.diffusion.precondition import spread


class GaussianWorld(nn.Module):
    """The optimal `Denoiser` for classes N(mean_k, std^2 I), and exact densities."""

    def __init__(self, means: Float[Tensor, "k c h w"], std: float) -> None:
        super().__init__()
        self.means, self.std = means, std

    def forward(
        self,
        noisy: Float[Tensor, "n c h w"],
        sigma: Float[Tensor, " n"],
        labels: Int[Tensor, "n k"],
    ) -> Float[Tensor, "n k c h w"]:
        """Expected clean image given the noisy one, for each class; label K is the mixture."""
        shrink = spread(self.std**2 / (self.std**2 + sigma**2), 5)
        each = self.means + shrink * (noisy[:, None] - self.means)
        weights = self.posterior(noisy, sigma)[:, :, None, None, None]
        mixture = (weights * each).sum(1, keepdim=True)
        every = torch.cat([each, mixture], dim=1)
        return every[torch.arange(len(labels))[:, None], labels]

    def log_density(
        self, image: Float[Tensor, "n c h w"], sigma: Float[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n k"]:
        """ln N(image; mu_k, (s^2 + sigma^2) I) in nats, exactly."""
        added = torch.zeros(len(image)) if sigma is None else sigma
        variance = (self.std**2 + added.to(image) ** 2)[:, None]
        squared = (image[:, None] - self.means).square().sum((2, 3, 4))
        pixels = self.means[0].numel()
        return -squared / (2 * variance) - pixels / 2 * (2 * math.pi * variance).log()

    def posterior(
        self, noisy: Float[Tensor, "n c h w"], sigma: Float[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n k"]:
        """p(k | noisy image) under equal priors."""
        return self.log_density(noisy, sigma).softmax(1)

    def sample(
        self, labels: Int[Tensor, " n"], generator: torch.Generator
    ) -> Float[Tensor, "n c h w"]:
        """Exact draws from the classes."""
        noise = torch.randn((len(labels), *self.means.shape[1:]), generator=generator)
        return self.means[labels] + self.std * noise
