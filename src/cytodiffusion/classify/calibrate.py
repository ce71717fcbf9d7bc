"""From errors to probabilities: weights for the trials, fitted on cells kept out of training.

For the first n trials, with errors E_ki of class k in trial i,

    p_n(k | x)  =  softmax_k( b_k  -  sum_{i <= n} v_i E_ki / c_i ),      v_i >= 0

c_i is the spread of E_ki between classes over cells, b_k a prior. v and b minimise the negative
log-likelihood plus a small ridge: a convex problem with n + K unknowns, one for every prefix n. The
weights say at which noise levels this network tells classes apart; the evidence's own weights
(evidence.py) do not, and are far too sure of themselves.

Source: weights learned on labelled cells, after Clark and Jaini 2023, arXiv 2303.15233.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.model_selection import StratifiedKFold

from cytodiffusion.errors import DataError

RIDGE = 1e-4
FOLDS = 5


@dataclass(frozen=True)
class HeldOut:
    """What the calibration cells were told, each by fits without it."""

    truth: Int[np.ndarray, " n"]
    probabilities: Float[np.ndarray, "n k"]
    anomaly: Float[np.ndarray, " n"]

    @property
    def prior(self) -> Float[np.ndarray, " k"]:
        """Share of each class among them: the prior that the fitted probabilities carry."""
        counts = np.bincount(self.truth, minlength=self.probabilities.shape[1])
        return counts / counts.sum()

    def p_value(self, anomaly: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
        """(1 + calibration cells at least as strange) / (1 + calibration cells)."""
        scores = np.sort(self.anomaly)
        at_least = len(scores) - np.searchsorted(scores, anomaly * (1 - 1e-9))
        return (1 + at_least) / (1 + len(scores))


def change_prior(
    probabilities: Float[np.ndarray, "n k"], ratio: Float[np.ndarray, " k"]
) -> Float[np.ndarray, "n k"]:
    """Probabilities where class k is `ratio[k]` times as frequent as in the fit (Bayes' rule).

    A class with ratio 0 cannot come up.
    """
    moved = probabilities.clip(1e-300) * ratio
    return moved / moved.sum(1, keepdims=True)


@dataclass(frozen=True)
class PrefixPosterior:
    """p_n(k | x) for one prefix n of the trials."""

    scale: Float[np.ndarray, " n"]  # c_i
    weight: Float[np.ndarray, " n"]  # v_i
    bias: Float[np.ndarray, " k"]  # b_k

    def logits(self, errors: Float[np.ndarray, "m t k"]) -> Float[np.ndarray, "m k"]:
        """Unnormalised log-probabilities, in nats, from the first n trials of `errors`."""
        used = errors[:, : len(self.weight)].astype(np.float64)
        return self.bias - np.einsum("mtk,t->mk", used, self.weight / self.scale)

    def probabilities(self, errors: Float[np.ndarray, "m t k"]) -> Float[np.ndarray, "m k"]:
        """Rows sum to 1."""
        return softmax(self.logits(errors), axis=1)


def fit_prefix(
    errors: Float[np.ndarray, "m t k"], truth: Int[np.ndarray, " m"], ridge: float = RIDGE
) -> PrefixPosterior:
    """Fit the posterior of all the trials given. `errors` has one column for each class."""
    classes = errors.shape[2]
    if np.isnan(errors).any():
        raise DataError("Trials with missing errors cannot be fitted; measure all classes.")
    centred = errors.astype(np.float64) - errors.mean(2, keepdims=True)
    scale = centred.std((0, 2)).clip(min=1e-12)
    features = centred / scale[:, None]
    onehot = np.eye(classes)[truth]

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = x[:-classes], x[-classes:]
        logs = log_softmax(bias - np.einsum("mtk,t->mk", features, weight), axis=1)
        miss = (np.exp(logs) - onehot) / len(truth)
        slope = -np.einsum("mk,mtk->t", miss, features) + 2 * ridge * weight
        value = -(logs * onehot).sum() / len(truth) + ridge * (weight @ weight + bias @ bias)
        return value, np.concatenate([slope, miss.sum(0) + 2 * ridge * bias])

    trials = errors.shape[1]
    start = np.concatenate([np.full(trials, 1.0 / trials), np.zeros(classes)])
    bounds = [(0.0, None)] * trials + [(None, None)] * classes
    found = minimize(objective, start, jac=True, bounds=bounds, method="L-BFGS-B")
    return PrefixPosterior(scale, found.x[:trials], found.x[trials:])


def out_of_fold(
    errors: Float[np.ndarray, "m t k"], truth: Int[np.ndarray, " m"], seed: int = 0
) -> Float[np.ndarray, "m k"]:
    """Probabilities of each cell from weights fitted without it."""
    return softmax(out_of_fold_logits(errors, truth, seed=seed), axis=1)


def out_of_fold_logits(
    errors: Float[np.ndarray, "m t k"], truth: Int[np.ndarray, " m"],
    shown: Float[np.ndarray, "m t k"] | None = None, seed: int = 0,
) -> Float[np.ndarray, "m k"]:  # fmt: skip
    """Logits of each cell, in nats, from weights fitted without it.

    `shown`: other errors of the same cells, which are read in their place.
    """
    logits, read = np.zeros((len(truth), errors.shape[2])), errors if shown is None else shown
    for fit, held in folds(truth, errors.shape[2], seed):
        logits[held] = fit_prefix(errors[fit], truth[fit]).logits(read[held])
    return logits


def folds(
    truth: Int[np.ndarray, " m"], classes: int, seed: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Stratified folds. Raises DataError where one of the classes has fewer than two cells."""
    smallest = int(np.bincount(truth, minlength=classes).min())
    if smallest < 2:
        raise DataError(
            "Calibration needs at least two held-out cells of every class; one class has "
            f"{smallest}. Give more cells in the split 'val'."
        )
    splitter = StratifiedKFold(min(FOLDS, smallest), shuffle=True, random_state=seed)
    yield from splitter.split(truth, truth)


def nll(probabilities: Float[np.ndarray, "m k"], truth: Int[np.ndarray, " m"]) -> float:
    """Mean negative log-likelihood of the truth, nats; lower is better."""
    return float(-np.log(probabilities[np.arange(len(truth)), truth].clip(1e-12)).mean())


def scores(
    probabilities: Float[np.ndarray, "n k"], truth: Int[np.ndarray, " n"]
) -> dict[str, float]:
    """NLL, accuracy and balanced accuracy."""
    right = probabilities.argmax(1) == truth
    balanced = np.mean([right[truth == k].mean() for k in np.unique(truth)])
    return {
        "nll": nll(probabilities, truth),
        "accuracy": float(right.mean()),
        "balanced_accuracy": float(balanced),
    }


def choose_trials(
    errors: Float[np.ndarray, "m t k"], truth: Int[np.ndarray, " m"], count: int
) -> list[int]:
    """Greedy order: each next trial is the one that lowers the out-of-fold NLL most."""
    chosen: list[int] = []
    while len(chosen) < min(count, errors.shape[1]):
        left = [t for t in range(errors.shape[1]) if t not in chosen]
        scores = [nll(out_of_fold(errors[:, [*chosen, t]], truth), truth) for t in left]
        chosen.append(left[int(np.argmin(scores))])
    return chosen
