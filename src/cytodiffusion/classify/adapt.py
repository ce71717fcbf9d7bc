"""Read cells of another laboratory: weights that were fitted at home are not to be trusted there.

Home weights lean on what separates the classes best at home, fine texture above all, and that is what
another camera changes most. At middle noise levels the differences between classes hold best, and
equal weights, each trial in units of its own spread over the batch, cannot lean on any one of them:

    logit_k  =  -(1 / T)  sum_i (E_ki - mean_k E_ki) / c_i,      c_i  the spread of E_ki - mean_k E_ki

T is fitted on labelled cells at home. Two more steps use the batch as a whole, and no labels:

    em_prior   how often each class comes up, from the batch itself (Saerens et al. 2002)
    centred    every class the same mean logit over the batch

Both assume something of the batch that cannot be checked without labels: the first that the likelihoods
still hold, the second that all classes are about as frequent. Where a model errs much, and for one class
more than for others, the second brings more than it costs even where they are not; where it errs little,
it costs (docs/log.md has both).

Source: METHOD 6 (noise levels); Saerens, Latinne and Decaestecker 2002, Neural Computation 14, 21-41.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar
from scipy.special import softmax

from cytodiffusion.classify.calibrate import change_prior, nll
from cytodiffusion.classify.draws import Draws, stratified

LEVELS, LOW, HIGH = 8, 0.3, 1.6  # chosen on raabin and PBC val (docs/log.md)
ROUNDS = 1000  # of EM, at most


def middle_draws(seed: int = 0, scale: float = 1.0) -> Draws:
    """Trials at noise levels where another laboratory changes least; `scale` is that of the space."""
    return stratified(LEVELS, LOW * scale, HIGH * scale, seed=seed, frozen=True)


def equal_logits(errors: Float[np.ndarray, "n t k"]) -> Float[np.ndarray, "n k"]:
    """Logits at T = 1, in units of spread, from the errors of the classes that can come up."""
    centred = errors.astype(np.float64) - errors.mean(2, keepdims=True)
    return -(centred / centred.std((0, 2), keepdims=True).clip(min=1e-12)).sum(1)


def fit_temperature(logits: Float[np.ndarray, "n k"], truth: Int[np.ndarray, " n"]) -> float:
    """T > 0 with the lowest negative log-likelihood on labelled cells."""
    found = minimize_scalar(
        lambda log_t: nll(softmax(logits / np.exp(log_t), axis=1), truth),
        bounds=(-5.0, 5.0),
        method="bounded",
    )
    return float(np.exp(found.x))


def em_prior(
    probabilities: Float[np.ndarray, "n k"], prior: Float[np.ndarray, " k"]
) -> Float[np.ndarray, " k"]:
    """Share of each class in an unlabelled batch; `prior` is the one that the probabilities carry."""
    share = prior.copy()
    for _ in range(ROUNDS):
        before, share = share, change_prior(probabilities, share / prior).mean(0)
        if np.abs(share - before).max() < 1e-9:
            break
    return share


def centred(logits: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
    """Logits with one mean for all classes over the batch: right where classes are equally frequent."""
    return logits - logits.mean(0)
