"""How well does each class explain this cell?

Add noise to the image, ask the denoiser to take it away once for every class, and see which class
leaves the smallest error. All classes are shown the *same* noisy image, so whatever they find
equally hard cancels when two of them are compared.

Divided by sigma^3 and integrated over noise levels, that error is the log-likelihood of the image
under the class, up to a constant that does not depend on the class:

    log p(x | k)  =  constant  -  integral of E||D_k(x + sigma eps, sigma) - x||^2 sigma^-3 d sigma

For Gaussian classes both sides are known exactly; tests/test_evidence.py checks that they agree.

Source: Kong, Brekelmans and Ver Steeg 2023, Information-Theoretic Diffusion, arXiv 2302.03792.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cytodiffusion.types import Denoiser


@runtime_checkable
class Meter(Protocol):
    """Measures how far the guess for each class is from the clean image.

    All that a classifier needs of a network: an engine may compute it without making the guesses.
    """

    def __call__(
        self,
        clean: Float[Tensor, "n c h w"],
        noise: Float[Tensor, "n c h w"],
        sigma: Float[Tensor, " n"],
        labels: Int[Tensor, "n k"],
    ) -> Float[Tensor, "n k"]:
        """Mean squared error of the guess for each label, in squared image units.

        The network is shown clean + sigma noise, each image at its own noise level.
        """
        ...


@runtime_checkable
class LookingMeter(Meter, Protocol):
    """A meter that also tells the features which the network makes its guesses from."""

    @property
    def features(self) -> int:
        """How many there are; 0 for a network without."""
        ...

    def look(
        self,
        clean: Float[Tensor, "n c h w"],
        noise: Float[Tensor, "n c h w"],
        sigma: Float[Tensor, " n"],
        labels: Int[Tensor, "n k"],
    ) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n f"]]:
        """The errors and, from the same pass, the features of each noisy image."""
        ...


def features_of(meter: Meter) -> int:
    """How many features a meter tells."""
    return meter.features if isinstance(meter, LookingMeter) else 0


@dataclass(frozen=True)
class DenoiserMeter:
    """The errors of a `Denoiser`, computed from its guesses: what every engine is held to.

    With a `radius`, in the pixels of the space, only errors within that disc count.
    """

    denoiser: Denoiser
    radius: float | None = None

    @property
    def features(self) -> int:
        """As many as the network says; 0 where the label changes them, or the denoiser tells none."""
        if not hasattr(self.denoiser, "look"):
            return 0
        return getattr(getattr(self.denoiser, "network", None), "features_told", 0)

    def __call__(
        self, clean: Tensor, noise: Tensor, sigma: Float[Tensor, " n"], labels: Tensor
    ) -> Float[Tensor, "n k"]:
        return self._errors(self.denoiser(_noisy(clean, noise, sigma), sigma, labels), clean)

    def look(
        self, clean: Tensor, noise: Tensor, sigma: Float[Tensor, " n"], labels: Tensor
    ) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n f"]]:
        """The errors and the features, from one pass."""
        denoiser = cast(Any, self.denoiser)
        guesses, features = denoiser.look(_noisy(clean, noise, sigma), sigma, labels)
        return self._errors(guesses, clean), features

    def _errors(self, guesses: Tensor, clean: Tensor) -> Float[Tensor, "n k"]:
        squares = (guesses - clean[:, None]).square()
        if self.radius is None:
            return squares.mean((2, 3, 4))
        counts = disc(clean.shape[-1], self.radius).to(squares)
        return (squares.mean(2) * counts).sum((2, 3)) / counts.sum()


def _noisy(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    return clean + sigma.view(-1, 1, 1, 1) * noise


def disc(side: int, radius: float) -> Float[Tensor, "side side"]:
    """1 within `radius` of the centre of a grid, else 0; radius in the grid's pixels."""
    place = torch.arange(side) - (side - 1) / 2
    return (place[:, None] ** 2 + place**2 <= radius**2).float()


def log_evidence(
    errors: Float[np.ndarray, "n t k"],
    sigmas: Float[np.ndarray, " t"],
    pixels: int,
) -> Float[np.ndarray, "n k"]:
    """log p(x | k) up to a constant, in nats; higher explains the image better.

    `errors` are mean squared errors over `pixels` numbers, at trials spread evenly over
    ln sigma between the lowest and the highest level (`draws.stratified`). Trials at one level are
    averaged.
    """
    levels, place = np.unique(sigmas.astype(np.float64), return_inverse=True)
    mean = np.stack([errors[:, place == i].mean(1) for i in range(len(levels))], axis=1)
    if len(levels) == 1:
        return -pixels * mean[:, 0] / levels[0] ** 2
    slices = np.gradient(np.log(levels))
    return -pixels * np.einsum("nlk,l->nk", mean.astype(np.float64), slices / levels**2)
