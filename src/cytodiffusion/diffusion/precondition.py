"""Turn a network into a `Denoiser`, whatever it was trained to predict.

EDM keeps what the network sees and what it must say at unit variance, at every noise level s:

    D(noisy, s) = c_skip noisy + c_out F(c_in noisy, ln(s)/4)
    c_skip = sd^2 / (s^2 + sd^2)    c_out = s sd / sqrt(s^2 + sd^2)    c_in = 1 / sqrt(s^2 + sd^2)

A variance-preserving network sees noisy / sqrt(1 + s^2) and the time step of that noise level. From
what it says, the clean image is

    eps:  D = noisy - s eps        v:  D = (noisy / sqrt(1 + s^2) - s v) / sqrt(1 + s^2)        x0:  D = x0

Source: Karras et al. 2022, arXiv 2206.00364, table 1; v: Salimans and Ho 2022, arXiv 2202.00512.
"""

from __future__ import annotations

from typing import Any, Literal, cast

from jaxtyping import Float, Int
from torch import Tensor, nn

from cytodiffusion.diffusion.noise import time_of_sigma

Prediction = Literal["x0", "eps", "v"]


def spread(values: Float[Tensor, " n"], dims: int) -> Tensor:
    """Reshape one number per image so that it multiplies tensors with `dims` dimensions."""
    return values.view(-1, *[1] * (dims - 1))


class EDMDenoiser(nn.Module):
    """A `Denoiser` around a network F(scaled image, ln(sigma)/4, labels) -> n k c h w."""

    def __init__(self, network: nn.Module, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.network = network
        self.sigma_data = sigma_data

    def forward(
        self,
        noisy: Float[Tensor, "n c h w"],
        sigma: Float[Tensor, " n"],
        labels: Int[Tensor, "n k"],
    ) -> Float[Tensor, "n k c h w"]:
        return self._guess(noisy, sigma, self.network(*self._inputs(noisy, sigma), labels))

    def look(
        self,
        noisy: Float[Tensor, "n c h w"],
        sigma: Float[Tensor, " n"],
        labels: Int[Tensor, "n k"],
    ) -> tuple[Float[Tensor, "n k c h w"], Float[Tensor, "m f"]]:
        """The guesses, and the features that a network which can `look` makes them from."""
        raw, features = cast(Any, self.network).look(*self._inputs(noisy, sigma), labels)
        return self._guess(noisy, sigma, raw), features

    def _inputs(self, noisy: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        total = (sigma**2 + self.sigma_data**2).sqrt()
        return noisy / spread(total, 4), sigma.log() / 4

    def _guess(self, noisy: Tensor, sigma: Tensor, raw: Tensor) -> Tensor:
        total = (sigma**2 + self.sigma_data**2).sqrt()
        skip = spread(self.sigma_data**2 / total**2, 5)
        out = spread(sigma * self.sigma_data / total, 5)
        return skip * noisy[:, None] + out * raw


class VPDenoiser(nn.Module):
    """A `Denoiser` around a variance-preserving network F(image, time step, labels) -> n k c h w.

    `levels` is the noise level of each time step (`sigma_of_alpha_bar`).
    """

    levels: Tensor

    def __init__(
        self, network: nn.Module, levels: Float[Tensor, " t"], prediction: Prediction = "eps"
    ) -> None:
        super().__init__()
        self.network = network
        self.prediction = prediction
        self.register_buffer("levels", levels, persistent=False)

    def forward(
        self,
        noisy: Float[Tensor, "n c h w"],
        sigma: Float[Tensor, " n"],
        labels: Int[Tensor, "n k"],
    ) -> Float[Tensor, "n k c h w"]:
        scaled = noisy / spread((1 + sigma**2).sqrt(), 4)
        said = self.network(scaled, time_of_sigma(sigma, self.levels), labels)
        return clean_guess(said, noisy[:, None], spread(sigma, 5), self.prediction)


NetworkDenoiser = EDMDenoiser | VPDenoiser


def clean_guess(said: Tensor, noisy: Tensor, sigma: Tensor, prediction: Prediction) -> Tensor:
    """The clean image behind a noisy one, from what a variance-preserving network says of it.

    The shapes need only broadcast.
    """
    if prediction == "x0":
        return said
    if prediction == "eps":
        return noisy - sigma * said
    alpha = (1 + sigma**2).rsqrt()
    return alpha * (alpha * noisy - sigma * said)
