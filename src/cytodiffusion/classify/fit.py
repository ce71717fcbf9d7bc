"""Fit every budget of a model on held-out cells.

Candidate trials, spread over noise levels, are measured once on the held-out cells. A greedy search
orders them by how much each adds; the first n of that order are the trials of a budget, and get
weights, conformal scores and an anomaly model of their own. The paper's race needs one temperature,
fitted on a part of the cells because it is slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar
from torch import Tensor

from cytodiffusion.classify.anomaly import fit_anomaly
from cytodiffusion.classify.calibrate import choose_trials, fit_prefix, folds, nll, out_of_fold
from cytodiffusion.classify.classifier import Budget, PrefixReader, RaceReader
from cytodiffusion.classify.conformal import lac_scores
from cytodiffusion.classify.draws import Draws, stratified
from cytodiffusion.classify.evidence import Policy, Pose, measure
from cytodiffusion.classify.race import PaperRace
from cytodiffusion.types import Denoiser

TRIALS = {"fast": 2, "balanced": 4, "full": 12}


@dataclass(frozen=True)
class Plan:
    """What is tried when a model is calibrated."""

    levels: int = 24  # candidate trials, frozen noise
    low: float = 0.04  # lowest noise level, image units
    high: float = 6.0  # highest
    search: int = 4  # trials placed by greedy search; the rest follow in an even spread
    race_cells: int = 160  # held-out cells for the paper's race
    race_trials: int = 200  # most trials of the race while it is fitted
    race_most: int = 2000  # most trials of the race in use
    seed: int = 0


def measure_in_parts(
    denoiser: Denoiser,
    images: Float[Tensor, "n c h w"],
    digests: list[str],
    draws: Draws,
    classes: int,
    poses: tuple[Pose, ...],
    together: bool,
    policy: Policy | None = None,
    part: int = 32,
) -> Iterator[Float[np.ndarray, "m t k1"]]:
    """Errors of `part` images at a time."""
    for start in range(0, len(images), part):
        yield measure(
            denoiser, images[start : start + part], digests[start : start + part], draws,
            classes + 1, poses=poses, policy=policy, together=together, anyone=policy is None,
        )  # fmt: skip


def candidates(plan: Plan) -> Draws:
    """The trials that the search chooses from."""
    return stratified(plan.levels, plan.low, plan.high, seed=plan.seed, frozen=True)


def order_trials(
    errors: Float[np.ndarray, "n t k1"], truth: Int[np.ndarray, " n"], plan: Plan
) -> list[int]:
    """Best first: a greedy start, then the trials farthest from all those already taken."""
    order = choose_trials(errors[:, :, :-1], truth, plan.search)
    most = min(max(TRIALS.values()), errors.shape[1])
    while len(order) < most:
        left = [t for t in range(errors.shape[1]) if t not in order]
        order.append(max(left, key=lambda t: min(abs(t - taken) for taken in order)))
    return order


def fit_budgets(
    errors: Float[np.ndarray, "n t k1"], truth: Int[np.ndarray, " n"], plan: Plan
) -> Iterator[tuple[str, Budget, Float[np.ndarray, "n k"]]]:
    """Name, budget and out-of-fold probabilities of `fast`, `balanced` and `full`."""
    order = order_trials(errors, truth, plan)
    every = candidates(plan)
    draws = replace(every, trials=tuple(every.trials[t] for t in order))
    for name, count in TRIALS.items():
        if count <= len(order):
            yield name, *fit_budget(draws.first(count), errors[:, order[:count]], truth)


def fit_budget(
    draws: Draws, errors: Float[np.ndarray, "n t k1"], truth: Int[np.ndarray, " n"]
) -> tuple[Budget, Float[np.ndarray, "n k"]]:
    """One budget, and the probabilities it is judged by: from fits without the cell."""
    probabilities = out_of_fold(errors[:, :, :-1], truth)
    posterior = fit_prefix(errors[:, :, :-1], truth)
    reader = PrefixReader(posterior, fit_anomaly(errors, truth, probabilities))
    return Budget(draws, reader, np.sort(lac_scores(probabilities, truth))), probabilities


def race_part(truth: Int[np.ndarray, " n"], count: int, seed: int = 0) -> Int[np.ndarray, " m"]:
    """About `count` cells, as many of each class as there are."""
    rng = np.random.default_rng(seed)
    each = max(2, count // len(np.unique(truth)))
    return np.concatenate(
        [rng.permutation(np.flatnonzero(truth == k))[:each] for k in np.unique(truth)]
    )


def fit_race(
    errors: Float[np.ndarray, "m t k1"], truth: Int[np.ndarray, " m"], race: PaperRace
) -> tuple[Budget, Float[np.ndarray, "m k"]]:
    """The budget `paper` from races that were run, and the probabilities it is judged by."""

    def reader(log_temperature: float, scores: np.ndarray) -> RaceReader:
        return RaceReader(race.draws.sigmas, float(np.exp(log_temperature)), scores)

    def missed(log_temperature: float, part: np.ndarray) -> float:
        read = reader(log_temperature, np.zeros(0)).probabilities(errors[part])
        return nll(read, truth[part])

    def fitted(part: np.ndarray) -> float:
        return float(minimize_scalar(missed, args=(part,), bounds=(-8, 4), method="bounded").x)

    classes = errors.shape[2] - 1
    judged = np.zeros((len(truth), classes))
    for fit, held in folds(truth, classes):
        judged[held] = reader(fitted(fit), np.zeros(0)).probabilities(errors[held])
    best = fitted(np.arange(len(truth)))
    strange = np.sort(reader(best, np.zeros(0)).anomaly(errors, judged))
    conformal = np.sort(lac_scores(judged, truth))
    return Budget(race.draws, reader(best, strange), conformal, race), judged
