"""How much noise: the levels used for training, for sampling, and their relation to time steps.

A noisy image is  noisy = clean + sigma * noise,  noise ~ N(0, I).

In training ln sigma is normal (EDM). In sampling the levels fall from sigma_max to sigma_min along
    sigma_i = (max^(1/rho) + i/(n-1) (min^(1/rho) - max^(1/rho)))^rho,   then 0.
A variance-preserving network (DDPM, Stable Diffusion) sees alpha * clean + sqrt(1 - alpha^2) * noise;
divided by alpha this is the same noisy image, with sigma = sqrt(1 - alpha^2) / alpha.

Source: Karras et al. 2022, Elucidating the Design Space, arXiv 2206.00364, table 1.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def stratified_normal(
    count: int, mean: float, std: float, generator: torch.Generator
) -> Float[Tensor, " n"]:
    """`count` normal numbers, one from each of `count` equal slices of probability, in random order.

    The mean over a batch varies far less than with independent draws.
    """
    device = generator.device
    slices = torch.randperm(count, generator=generator, device=device)
    uniform = (slices + torch.rand(count, generator=generator, device=device)) / count
    return mean + std * torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))


def training_sigmas(
    count: int, mean: float, std: float, generator: torch.Generator
) -> Float[Tensor, " n"]:
    """Noise levels for a training batch: ln sigma ~ N(mean, std^2), stratified over the batch."""
    return stratified_normal(count, mean, std, generator).exp()


def karras_sigmas(
    count: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Float[Tensor, " {count}+1"]:
    """Levels for a sampler with `count` steps, falling, with a final 0."""
    ramp = torch.linspace(0, 1, count, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    levels = (high + ramp * (low - high)) ** rho
    return torch.cat([levels, levels.new_zeros(1)]).float()


def log_spaced(count: int, sigma_min: float, sigma_max: float) -> Float[Tensor, " n"]:
    """`count` levels at the middles of equal slices of ln sigma, rising: a stratified measurement."""
    middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    low, high = torch.tensor([sigma_min, sigma_max], dtype=torch.float64).log()
    return (low + middles * (high - low)).exp().float()


def sigma_of_alpha_bar(alpha_bar: Float[Tensor, " t"]) -> Float[Tensor, " t"]:
    """Noise level of each time step of a variance-preserving schedule (alpha_bar = alpha^2)."""
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def scaled_linear_alpha_bar(
    steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> Float[Tensor, " t"]:
    """The schedule of Stable Diffusion 1.5: betas linear in their square roots (Rombach et al. 2022)."""
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64)
    return torch.cumprod(1 - roots**2, dim=0).float()


def time_of_sigma(sigma: Float[Tensor, " n"], levels: Float[Tensor, " t"]) -> Float[Tensor, " n"]:
    """Fractional time step whose noise level is sigma, linear in ln sigma between steps.

    `levels` rises with the step; a sigma beyond its ends gets the first or the last step.
    """
    log, grid = sigma.log(), levels.to(sigma).log()
    right = torch.searchsorted(grid, log).clamp(1, len(grid) - 1)
    left = right - 1
    fraction = (log - grid[left]) / (grid[right] - grid[left])
    return left + fraction.clamp(0, 1)
