"""Draw images: follow the denoiser from noise to a clean image.

Without added noise the image follows  dx/d sigma = (x - D(x, sigma)) / sigma  down the noise levels.
Heun takes a step of that slope and corrects it with the slope at its end (two passes a step). DDIM is
the first half alone (one pass). Stochastic Heun raises the noise a little before every step
(`churn`), which forgives a denoiser's errors.

Guidance sharpens a class against "any cell":  D = D_any + guidance (D_class - D_any); 1 leaves D_class.

Source: Karras et al. 2022, arXiv 2206.00364, algorithms 1 and 2; DDIM: Song et al. 2021,
arXiv 2010.02502; guidance: Ho and Salimans 2022, arXiv 2207.12598.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cytodiffusion.types import Denoiser

Sampler = Literal["heun", "ddim"]
Guess = Callable[[Tensor, Tensor], Tensor]


def guided(
    denoiser: Denoiser, labels: Int[Tensor, " n"], any_label: int, guidance: float = 1.0
) -> Guess:
    """One guess for each image: its own class, pushed away from "any cell" by `guidance`."""
    if guidance == 1.0:
        return lambda noisy, sigma: denoiser(noisy, sigma, labels[:, None])[:, 0]
    both = torch.stack([labels, torch.full_like(labels, any_label)], dim=1)

    def guess(noisy: Tensor, sigma: Tensor) -> Tensor:
        own, anyone = denoiser(noisy, sigma, both).unbind(1)
        return anyone + guidance * (own - anyone)

    return guess


@torch.inference_mode()
def sample(
    guess: Guess,
    noise: Float[Tensor, "n c h w"],
    sigmas: Float[Tensor, " s"],
    *,
    sampler: Sampler = "heun",
    churn: float = 0.0,
    generator: torch.Generator | None = None,
) -> Iterator[Float[Tensor, "n c h w"]]:
    """Yield the image after every step; the last one is the drawn image.

    `noise` is N(0, I); `sigmas` fall and end with 0 (`noise.karras_sigmas`). `churn` is the total
    noise added over all steps, as in EDM (S_churn); it needs a generator.
    """
    image = noise * sigmas[0]
    gamma = min(churn / (len(sigmas) - 1), math.sqrt(2) - 1)
    for here, there in pairwise(sigmas):
        raised = here * (1 + gamma)
        if gamma:
            fresh = torch.randn(image.shape, generator=generator, device=image.device)
            image = image + (raised**2 - here**2).sqrt() * fresh
        slope = _slope(guess, image, raised)
        ahead = image + (there - raised) * slope
        if sampler == "heun" and there > 0:
            slope = (slope + _slope(guess, ahead, there)) / 2
            ahead = image + (there - raised) * slope
        image = ahead
        yield image


def _slope(guess: Guess, image: Tensor, sigma: Tensor) -> Tensor:
    return (image - guess(image, sigma.expand(len(image)))) / sigma
