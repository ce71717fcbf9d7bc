"""Which noise is added in which trial.

Trial t adds noise of level sigma_t to the image in pose t. The noise comes from (seed, image, t)
alone, or, frozen, from (seed, t) alone: the same noise for every cell. Batches, machines and
restarts change nothing.

Antithetic: trials 2j and 2j + 1 use noise and its negative at one level. Terms of the error that are
odd in the noise cancel in their mean.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cytodiffusion.diffusion.noise import log_spaced

POSES = 8


@dataclass(frozen=True)
class Trial:
    """One measurement: how much noise, which noise, with which sign, in which of eight poses."""

    sigma: float  # image units
    draw: int  # trials with the same draw share their noise
    sign: int = 1
    pose: int = 0


@dataclass(frozen=True)
class Draws:
    """The trials of a measurement, in order."""

    trials: tuple[Trial, ...]
    seed: int = 0
    frozen: bool = False

    def __len__(self) -> int:
        return len(self.trials)

    @property
    def sigmas(self) -> np.ndarray:
        """Noise level of each trial, image units."""
        return np.array([trial.sigma for trial in self.trials], dtype=np.float32)

    def first(self, count: int) -> Draws:
        """The first `count` trials."""
        return Draws(self.trials[:count], self.seed, self.frozen)

    def noise(
        self, trial: int, digests: list[str], shape: tuple[int, ...]
    ) -> Float[Tensor, "n c h w"]:
        """Noise of one trial for the images with these digests; shape is that of one image."""
        plan = self.trials[trial]
        if self.frozen:
            one = standard_normal(shape, self.seed, "", plan.draw)
            return plan.sign * one.expand(len(digests), *shape)
        each = [standard_normal(shape, self.seed, digest, plan.draw) for digest in digests]
        return plan.sign * torch.stack(each)


def standard_normal(shape: tuple[int, ...], seed: int, digest: str, draw: int) -> Tensor:
    """N(0, 1) numbers that depend on (seed, image, draw) and on nothing else."""
    key = hashlib.blake2b(f"{seed}|{digest}|{draw}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
    return torch.randn(shape, generator=generator)


def stratified(
    levels: int,
    low: float,
    high: float,
    *,
    seed: int = 0,
    antithetic: bool = False,
    frozen: bool = False,
    poses: bool = True,
) -> Draws:
    """One trial (or antithetic pair) in each of `levels` equal slices of ln sigma, low to high.

    With `poses`, successive levels see the image in another of its eight exact poses.
    """
    signs = (1, -1) if antithetic else (1,)
    trials = tuple(
        Trial(float(sigma), draw, sign, draw % POSES if poses else 0)
        for draw, sigma in enumerate(log_spaced(levels, low, high).tolist())
        for sign in signs
    )
    return Draws(trials, seed, frozen)
