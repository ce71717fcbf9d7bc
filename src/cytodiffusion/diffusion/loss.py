"""What training minimises.

The denoising error weighted so that every noise level asks for a change of the same size,

    loss = w(s) mean |D_y - clean|^2,       w(s) = (s^2 + sd^2) / (s sd)^2          (EDM)

and, for a network that guesses for all classes at once, two more terms:

    + any * w(s) mean |D_any - clean|^2  +  classification * CE(softmax_k(-beta(s) w(s) e_k), y)

e_k is the mean squared error of class k. Regression alone teaches each head to draw; the small
classification term teaches the heads to differ. beta is learned for 16 bins of ln s. An image
without a label (-1) trains "any cell" alone.

v: D = alpha noisy_scaled - sigma v in precondition.py; min-SNR caps the weight of small noise levels.

Source: Karras et al. 2022 (arXiv 2206.00364); Hang et al. 2023, min-SNR (arXiv 2303.09556).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from cytodiffusion.types import UNLABELLED


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """1 / c_out^2: the weight under which an untrained network has loss 1 at every noise level."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def min_snr_weight(sigma: Tensor, gamma: float = 5.0) -> Tensor:
    """min(1/sigma^2, gamma), for errors of the clean image.

    Equals min(snr, gamma) / snr for errors of the noise, with snr = 1/sigma^2.
    """
    return (sigma**-2).clamp(max=gamma)


class Sharpness(nn.Module):
    """beta(sigma) > 0: how many nats a unit of weighted error is worth, learned for bins of ln sigma."""

    def __init__(
        self, bins: int = 16, low: float = 0.01, high: float = 10.0, start: float = 300.0
    ) -> None:
        super().__init__()
        self.register_buffer("edges", torch.linspace(low, high, 2).log(), persistent=False)
        self.log_beta = nn.Parameter(torch.full((bins,), start).log())

    edges: Tensor

    def forward(self, sigma: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        bins = len(self.log_beta)
        place = (sigma.log() - self.edges[0]) / (self.edges[1] - self.edges[0]) * bins
        return self.log_beta[place.long().clamp(0, bins - 1)].exp()


class Losses(NamedTuple):
    """The terms of the loss, each a mean over the images it applies to (lower is better)."""

    total: Tensor
    own: Tensor
    any: Tensor
    classification: Tensor


def class_losses(
    guesses: Float[Tensor, "n k c h w"],
    clean: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    weight: Float[Tensor, " n"],
    beta: Float[Tensor, " n"],
    any_weight: float,
    classification_weight: float,
) -> Losses:
    """Losses of guesses for every class and, in the last place, for "any cell".

    labels are class indices, or UNLABELLED.
    """
    errors = (guesses - clean[:, None]).square().mean((2, 3, 4)) * weight[:, None]
    known = labels != UNLABELLED
    target = labels.clamp(min=0)
    count = known.sum().clamp(min=1)
    own = (errors.gather(1, target[:, None])[:, 0] * known).sum() / count
    anyone = errors[:, -1].mean()
    nats = functional.cross_entropy(-beta[:, None] * errors[:, :-1], target, reduction="none")
    named = (nats * known).sum() / count
    total = own + any_weight * anyone + classification_weight * named
    return Losses(total, own, anyone, named)
