"""How much noise is there, when a denoiser says so much?

A small network sees less noise than there is: its guess D keeps grain, and a sampler that follows it
adds the grain up. Where the noise it sees, x - D, is on average too small or too large by a factor that
depends on the noise level and on how fine a detail is, that factor can be measured on real cells and
undone,

    D'(x, s)  =  x + F^-1[ u(s, f) F[D(x, s) - x] ],
    u(s, f)   =  mean Re (clean - x)_f (D - x)_f* / mean |(D - x)_f|^2

with F the Fourier transform and f the frequency in cycles a pixel: u is the least-squares answer. For a
perfect denoiser u is 1, since its error is orthogonal to whatever can be computed from x. u is averaged
over rings of f and given at some s; in between it is linear in f and in ln s.

Source: a denoiser's Wiener filter; one factor for each step is the epsilon scaling of Ning et al. 2024,
Elucidating the Exposure Bias in Diffusion Models, arXiv 2308.15321.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cytodiffusion.diffusion.sample import Guess
from cytodiffusion.types import Denoiser

RINGS = (0.0, 0.03, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.71)  # edges, cycles a pixel
LEVELS = tuple(float(s) for s in np.geomspace(0.02, 20, 16).round(4))  # noise levels, image units
BATCH = 32


@dataclass(frozen=True)
class Gain:
    """u for noise levels (rows) and frequencies (columns)."""

    sigmas: Float[np.ndarray, " s"]  # rising
    frequencies: Float[np.ndarray, " f"]  # rising, cycles a pixel
    values: Float[np.ndarray, "s f"]

    def at(self, sigma: float, size: int) -> Float[Tensor, "size {size}//2+1"]:
        """u for every entry of the real Fourier transform of a square image."""
        row = [np.interp(np.log(sigma), np.log(self.sigmas), column) for column in self.values.T]
        return torch.from_numpy(np.interp(_frequency(size), self.frequencies, row)).float()

    def __call__(self, guess: Guess) -> Guess:
        """D' of a guess. All images of a batch must be at one noise level."""

        def undone(noisy: Tensor, sigma: Tensor) -> Tensor:
            seen = torch.fft.rfft2(guess(noisy, sigma) - noisy)
            factor = self.at(float(sigma[0]), noisy.shape[-1]).to(noisy.device)
            return noisy + torch.fft.irfft2(factor * seen, s=noisy.shape[-2:])

        return undone

    def to_json(self) -> str:
        """Four significant digits."""
        told = {name: _short(value) for name, value in vars(self).items()}
        return json.dumps(told, separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Gain:
        """What `to_json` wrote."""
        return cls(**{name: np.array(value) for name, value in json.loads(text).items()})


@torch.inference_mode()
def fit_gain(
    denoiser: Denoiser,
    images: Float[Tensor, "n c size size"],
    labels: Int[Tensor, " n"],
    generator: torch.Generator,
    levels: tuple[float, ...] = LEVELS,
) -> Generator[int, None, Gain]:
    """Measure u on real cells with their own classes. Yields how many levels are done."""
    size = images.shape[-1]
    frequency = _frequency(size)
    ring = torch.from_numpy(np.digitize(frequency, RINGS[1:-1]))
    twice = torch.full((size, size // 2 + 1), 2.0)  # entries that stand for two
    twice[:, 0] = 1
    twice[:, size // 2] = 2 if size % 2 else 1
    rows = []
    for done, sigma in enumerate(levels, start=1):
        sums = torch.zeros(2, len(RINGS) - 1, dtype=torch.float64)
        for clean, label in zip(images.split(BATCH), labels.split(BATCH), strict=True):
            fresh = torch.randn(clean.shape, generator=generator).to(clean)
            noisy = clean + sigma * fresh
            level = torch.full((len(clean),), sigma).to(clean)
            seen = torch.fft.rfft2(denoiser(noisy, level, label[:, None])[:, 0] - noisy)
            true = torch.fft.rfft2(clean - noisy)
            for place, power in enumerate(((true * seen.conj()).real, seen.abs() ** 2)):
                each = (power.sum((0, 1)).cpu() * twice).double()
                sums[place] += torch.zeros_like(sums[0]).index_add(
                    0, ring.flatten(), each.flatten()
                )
        rows.append((sums[0] / sums[1]).numpy())
        yield done
    middles = (np.array(RINGS[1:]) + np.array(RINGS[:-1])) / 2
    there = np.unique(ring)  # a small image has no entry in some rings
    return Gain(np.array(levels), middles[there], np.stack(rows)[:, there])


def _frequency(size: int) -> Float[np.ndarray, "size {size}//2+1"]:
    """Cycles a pixel of every entry of a real Fourier transform."""
    return np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])


def _short(values: np.ndarray) -> list[float] | list[list[float]]:
    return np.vectorize(lambda value: float(f"{value:.4g}"))(values).tolist()
