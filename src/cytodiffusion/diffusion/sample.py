"""Draw images: follow the denoiser from noise to a clean image.

Without added noise the image follows  dx/d sigma = (x - D(x, sigma)) / sigma  down the noise levels.

    heun     a step of that slope, corrected with the slope at its end: two passes a step
    ddim     the first half alone: one pass
    dpm++    one pass, and second order all the same: the step of DPM-Solver++(2M),
                 x' = (s'/s) x + (1 - s'/s) (D + (D - D_before) h / (2 h_before)),    h = ln(s/s')
             with D_before the guess of the step before, h_before the length of that step

`churn` raises the noise a little before every step, which forgives a denoiser's errors. After the last
level above 0 the image is the denoiser's guess.

Guidance sharpens a class against "any cell":  D = D_any + guidance (D_class - D_any); 1 leaves D_class.

Source: Karras et al. 2022, arXiv 2206.00364, algorithms 1 and 2; DDIM: Song et al. 2021,
arXiv 2010.02502; DPM-Solver++: Lu et al. 2022, arXiv 2211.01095, algorithm 2, in noise levels as here;
guidance: Ho and Salimans 2022, arXiv 2207.12598.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cytodiffusion.errors import SettingsError
from cytodiffusion.types import Denoiser

Sampler = Literal["heun", "ddim", "dpm++"]
Guess = Callable[[Tensor, Tensor], Tensor]
Fresh = Callable[[int], Tensor]  # the noise that is added before a step


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
    fresh: Fresh | None = None,
) -> Iterator[Float[Tensor, "n c h w"]]:
    """Yield the image after every step; the last one is the drawn image.

    `noise` is N(0, I); `sigmas` fall and end with 0 (`noise.karras_sigmas`). `churn` is the total
    noise added over all steps, as in EDM (S_churn); `fresh(step)` gives that noise, N(0, I), and
    without it SettingsError is raised.
    """
    image = noise * sigmas[0]
    gamma = min(churn / (len(sigmas) - 1), math.sqrt(2) - 1)
    if gamma and fresh is None:
        raise SettingsError("Drawing with churn adds noise: give `fresh`, or a churn of 0.")
    before: tuple[Tensor, Tensor] | None = None
    for step, (level, there) in enumerate(pairwise(sigmas)):
        here = level * (1 + gamma)
        if gamma and fresh is not None:
            image = image + (here**2 - level**2).sqrt() * fresh(step)
        clean = guess(image, here.expand(len(image)))
        if there == 0:
            image = clean
        elif sampler == "heun":
            image = _heun(guess, image, clean, here, there)
        else:
            ahead = clean if sampler == "ddim" else _extrapolated(clean, here, there, before)
            image = ahead + there / here * (image - ahead)
        before = clean, here
        yield image


def _heun(guess: Guess, image: Tensor, clean: Tensor, here: Tensor, there: Tensor) -> Tensor:
    """The image at the level `there`, along the mean of the slopes at both ends."""
    first = (image - clean) / here
    ahead = image + (there - here) * first
    second = (ahead - guess(ahead, there.expand(len(image)))) / there
    return image + (there - here) * (first + second) / 2


def _extrapolated(
    clean: Tensor, here: Tensor, there: Tensor, before: tuple[Tensor, Tensor] | None
) -> Tensor:
    """The guess half a step ahead, from this one and the one before, linear in ln sigma."""
    if before is None:
        return clean
    then, level = before
    return clean + (clean - then) * (here / there).log() / (2 * (level / here).log())
