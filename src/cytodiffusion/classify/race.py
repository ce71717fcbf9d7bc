"""Which classes are still in: two races.

**The paper's.** In trial i the error of class c is weighted by its noise level and freed of what the
living classes share:

    l = ||eps - eps_c||^2      e = l / p(tau)      r = e - min over living classes of e

with tau = (1000 - t)/1000 and p a quartic fitted to the spread of l across classes. After the least
number of trials, every few trials, each class is compared with the leader by a two-sided paired
t-test over trials and leaves if p < alpha. The race ends with one class, or at the most trials. The
tests are repeated and uncorrected: how often they drop the best class is not bounded.

**The betting race.** Trials come in sweeps over a few noise levels, with fresh noise. In sweep i a
gambler bets against every class k: that it does worse than the class j that leads by the sweeps before,

    d_i = sum over the sweep of w (e_k - e_j), clipped to [-1, 1],    W_k = product of (1 + l_i d_i)

with l_i in [0, 0.9] from the sweeps before i. If no class has a lower mean than k, by gaps clipped so,
no bet has a gain in the mean and W_k is a supermartingale: the chance that it ever reaches 1/alpha is at
most alpha (Ville). So classes may be looked at after every sweep, and the best one is dropped with a
chance of at most alpha, whatever the noise levels.

Source: Deltadahl et al. 2025, Deep Generative Classification of Blood Cell Morphology,
arXiv 2408.08982; Waudby-Smith and Ramdas 2020, Estimating means of bounded random variables by
betting, arXiv 2010.09686 (aGRAPA).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.special import stdtr

from cytodiffusion.classify.draws import POSES, Draws, Trial
from cytodiffusion.diffusion.noise import scaled_linear_alpha_bar, sigma_of_alpha_bar, time_of_sigma

STEPS = 1000  # time steps of the paper's noise schedule
QUARTIC = (0.92706, 9.83654, -4.68406, 6.01854, -9.33979)  # p(tau), constant term first


@dataclass(frozen=True)
class PaperRace:
    """The paper's procedure as a policy of `measure.Measurement`."""

    draws: Draws
    least: int = 20
    every: int = 5
    alpha: float = 2e-3

    @property
    def weights(self) -> Float[np.ndarray, " t"]:
        """What an error counts in each trial."""
        return paper_weight(self.draws.sigmas)

    def __call__(
        self, errors: Float[np.ndarray, "n t k1"], features: np.ndarray | None = None
    ) -> Bool[np.ndarray, "n k"]:
        """Which classes stay in, given the errors of the trials so far (NaN: has left).

        The last column, "any cell", takes no part, and neither do the features.
        """
        trials, errors = errors.shape[1], errors[:, :, :-1]
        alive = ~np.isnan(errors[:, -1])
        if trials <= self.least or (trials - self.least - 1) % self.every:
            return alive
        weighted = errors * self.weights[:trials, None]
        return alive & keep(weighted, alive, self.alpha)


def keep(
    weighted: Float[np.ndarray, "n t k"], alive: Bool[np.ndarray, "n k"], alpha: float
) -> Bool[np.ndarray, "n k"]:
    """Classes that a paired t-test against the leader does not tell to be worse."""
    mean = np.where(alive, weighted.mean(1), np.inf)
    leader = mean.argmin(1)
    gap = weighted - np.take_along_axis(weighted, leader[:, None, None], 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        t = gap.mean(1) / (gap.std(1, ddof=1) / np.sqrt(gap.shape[1]))
    p = 2 * stdtr(gap.shape[1] - 1, -np.abs(t))
    leads = np.arange(weighted.shape[2]) == leader[:, None]
    return leads | ~(p < alpha)


def paper_draws(most: int, seed: int = 0) -> Draws:
    """The paper's noise levels: linspace(1, 999, most) shuffled once, fresh noise for every image."""
    rng = np.random.default_rng(seed)
    levels = sigma_of_alpha_bar(scaled_linear_alpha_bar())
    times = rng.permutation(np.linspace(1, STEPS - 1, most)).round().astype(int)
    poses = rng.integers(POSES, size=most)
    trials = (Trial(float(levels[t]), i, 1, int(poses[i])) for i, t in enumerate(times))
    return Draws(tuple(trials), seed)


def paper_weight(sigmas: Float[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
    """What an error of the clean image counts: 1/p(tau), over sigma^2 to make it one of the noise."""
    levels = sigma_of_alpha_bar(scaled_linear_alpha_bar())
    time = time_of_sigma(torch.from_numpy(np.asarray(sigmas, dtype=np.float32)), levels).numpy()
    quartic = np.polynomial.polynomial.polyval((STEPS - time) / STEPS, QUARTIC)
    return 1 / (quartic * np.asarray(sigmas, dtype=np.float64) ** 2)


@dataclass(frozen=True)
class BettingRace:
    """A race that may be looked at after every sweep, as a policy of `measure.Measurement`."""

    draws: Draws
    weights: Float[np.ndarray, " t"]  # such that most gaps of a sweep lie within [-1, 1]
    sweep: int  # trials in a sweep
    alpha: float = 0.05  # largest chance of dropping the class that does best

    def __call__(
        self, errors: Float[np.ndarray, "n t k1"], features: np.ndarray | None = None
    ) -> Bool[np.ndarray, "n k"]:
        """Which classes stay in. The last column, "any cell", and the features take no part."""
        trials, errors = errors.shape[1], errors[:, :, :-1]
        alive = ~np.isnan(errors[:, -1])
        if trials % self.sweep:
            return alive
        weighted = errors * self.weights[:trials, None]
        sweeps = weighted.reshape(len(errors), -1, self.sweep, errors.shape[2]).sum(2)
        return alive & (wealth(sweeps) < 1 / self.alpha)


def wealth(weighted: Float[np.ndarray, "n s k"], cap: float = 0.9) -> Float[np.ndarray, "n k"]:
    """W_k after all these sweeps, from weighted errors; NaN where a class has left.

    Bets begin as if one gap of 1/2 had been seen.
    """
    n, sweeps, _ = weighted.shape
    total = np.zeros_like(weighted[:, 0], dtype=np.float64)
    sums, squares, wealths = total + 0.5, total + 0.25, total.copy()
    for i in range(sweeps):
        now = weighted[:, i]
        leader = np.where(np.isnan(now), np.inf, total).argmin(1)
        gaps = (now - now[np.arange(n), leader][:, None]).clip(-1, 1) if i else 0 * now
        seen = max(i, 1)  # the first sweep has no leader, and so no gap
        mean = sums / seen
        spread = (0.25 + squares - seen * mean**2) / (seen + 1)
        bet = (mean / (spread + mean**2)).clip(0, cap)
        wealths += np.log1p(bet * gaps)
        total = total + now
        if i:
            sums, squares = sums + gaps, squares + gaps**2
    return np.exp(wealths)


def sweeps(levels: Float[np.ndarray, " l"], count: int, seed: int = 0) -> Draws:
    """`count` sweeps over these noise levels: fresh noise for every image, poses in turn."""
    trials = tuple(
        Trial(float(sigma), i * len(levels) + j, 1, i % POSES)
        for i in range(count)
        for j, sigma in enumerate(levels)
    )
    return Draws(trials, seed)


def standing(errors: Float[np.ndarray, "n t k"], weights: np.ndarray) -> Float[np.ndarray, "n k"]:
    """E_c of the paper: mean over the trials a class ran, relative to the mean class (low is best)."""
    weighted = errors * weights[:, None]
    relative = weighted - np.nanmin(
        np.where(np.isnan(weighted), np.inf, weighted), 2, keepdims=True
    )
    ran = ~np.isnan(errors)
    mean = np.where(ran, relative, 0).sum(1) / np.maximum(ran.sum(1), 1)
    return mean / np.maximum(mean.mean(1, keepdims=True), 1e-12)


def last_standing(
    errors: Float[np.ndarray, "n t k"], weights: np.ndarray
) -> Float[np.ndarray, "n k"]:
    """`standing`, with every class that left the race behind every class that did not."""
    scores = standing(errors, weights)
    ran = (~np.isnan(errors)).sum(1)
    left = ran < ran.max(1, keepdims=True)
    return np.where(left, scores + scores.max(1, keepdims=True) + 1, scores)


def zeta(
    errors: Float[np.ndarray, "n t k"], weights: np.ndarray, nearest: int = 10
) -> Float[np.ndarray, " n"]:
    """The paper's score of normality; high is normal. With E ascending and k = min(K - 1, 10):

    (1/k) sum_{j=1..k-1} (e_j - e_0)  -  1/(k(k-1)) sum_{j,l=1..k-1} |e_j - e_l|
    """
    ordered = np.sort(standing(errors, weights), axis=1)
    k = min(errors.shape[2] - 1, nearest)
    if k < 2:
        return ordered[:, -1] - ordered[:, 0]
    rest = ordered[:, 1:k]
    spread = np.abs(rest[:, :, None] - rest[:, None]).sum((1, 2)) / (k * (k - 1))
    return (rest - ordered[:, :1]).sum(1) / k - spread
