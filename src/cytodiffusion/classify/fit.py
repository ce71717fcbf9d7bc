"""Fit every budget of a model on held-out cells.

Candidate trials, spread over noise levels, are measured once on the held-out cells. A greedy search
orders those that name cells best; the rest of a cell's trials lie where no noise level is near, so
that a strange cell, which runs them all, is seen at every noise level. Every depth n of that order
gets weights, a gate and an anomaly model of its own; a budget is how much disagreement with the
answer of all trials it allows. A race needs one temperature, fitted on a part of the cells because
it is slow.

Trials, weights and what rests on them are fitted twice: on the cells as they are, and on cells whose
colour, size and sharpness were changed, until the model names many of them wrongly (calibration.py). What
tells classes apart at home is not what does so abroad, and no cell of the other laboratory is needed to
see it. What is strange is told there from cells whose colours were changed no further than usual: what
another laboratory shows is nearer to those, and next to the others nothing looks strange (docs/log.md 50).
The budgets of the second fit have names that end in `-abroad`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar
from scipy.special import softmax

from cytodiffusion.classify.anomaly import Cells, fit_anomaly
from cytodiffusion.classify.calibrate import (
    HeldOut,
    choose_trials,
    fit_prefix,
    folds,
    nll,
    out_of_fold_logits,
)
from cytodiffusion.classify.classifier import Budget, RaceReader
from cytodiffusion.classify.draws import Draws, stratified
from cytodiffusion.classify.race import BettingRace, PaperRace, sweeps
from cytodiffusion.classify.sequential import (
    Depth,
    Rule,
    Sequence,
    fit_gate,
    learn_threshold,
    replay,
)

CLIP = 8.0  # nats: the largest gap that a bet is on


@dataclass(frozen=True)
class Haste:
    """What a budget may give up for fewer passes."""

    allowed: float = 0.0  # share of cells whose answer may differ; 0: all trials are run
    cautious: bool = True  # a strange cell runs them all


BUDGETS = {"fast": Haste(0.02, cautious=False), "balanced": Haste(0.005), "full": Haste()}


@dataclass(frozen=True)
class Plan:
    """What is tried when a model is calibrated."""

    levels: int = 24  # candidate trials, frozen noise
    low: float = 0.04  # lowest noise level, image units
    high: float = 6.0  # highest
    trials: int = 8  # of a cell, at most
    naming: int = 4  # of them, placed by greedy search; the others are spread
    sweep: int = 2  # noise levels of the betting race
    race_cells: int = 160  # held-out cells for the races
    abroad_cells: int = 640  # held-out cells that are changed as another laboratory might
    probes: int = 5  # bisections, to find how far their colours are changed
    race_trials: int = 200  # most trials of a race while it is fitted, and of the betting race
    paper_most: int = 2000  # most trials of the paper's race in use
    seed: int = 0


def candidates(plan: Plan) -> Draws:
    """The trials that the search chooses from."""
    return stratified(plan.levels, plan.low, plan.high, seed=plan.seed, frozen=True)


def choose_draws(
    errors: Float[np.ndarray, "n t k1"], truth: Int[np.ndarray, " n"], plan: Plan
) -> tuple[Draws, list[int]]:
    """The trials of a cell, in their order, and their places among the candidates."""
    every = candidates(plan)
    order = spread(choose_trials(errors[:, :, :-1], truth, plan.naming), every.sigmas, plan.trials)
    return replace(every, trials=tuple(every.trials[t] for t in order)), order


def spread(chosen: list[int], sigmas: Float[np.ndarray, " t"], count: int) -> list[int]:
    """Up to `count` trials: after the chosen ones, always that whose noise level is furthest (log)."""
    order, levels = list(chosen), np.log(sigmas)
    while len(order) < min(count, len(sigmas)):
        gaps = np.abs(levels[:, None] - levels[order]).min(1)
        gaps[order] = -1
        order.append(int(gaps.argmax()))
    return order


class Seen(NamedTuple):
    """Errors of held-out cells in the trials of a sequence, and the features of the first."""

    errors: Float[np.ndarray, "n t k1"]
    features: Float[np.ndarray, "n f"] | None = None


class Judged(NamedTuple):
    """What held-out cells are told after 1, 2, ... trials, by fits without them."""

    logits: Float[np.ndarray, "n t k"]
    anomaly: Float[np.ndarray, "n t"]


def fit_sequence(
    draws: Draws, seen: Seen, truth: Int[np.ndarray, " n"], apart: bool = False, ending: str = "",
    reference: Seen | None = None,
) -> dict[str, Budget]:  # fmt: skip
    """`fast`, `balanced` and `full`, each with this `ending`, which run these trials in this order.

    `apart`: every class costs a pass of its own, so that classes leave one by one. `reference`: the same
    cells, changed less, beside which others are strange. Held-out cells are judged by fits without them.
    """
    depths, judged = _fit_depths([seen] if reference is None else [seen, reference], truth)
    gates, limits = zip(*((depth.gate, depth.anomalies.limit) for depth in depths), strict=True)
    strange = [each.anomaly > np.array(limits) for each in judged]
    budgets = {}
    for name, haste in BUDGETS.items():
        rule = Rule(apart=apart, cautious=haste.cautious)
        rule, agreed = learn_threshold(judged[0].logits, strange[0], gates, rule, haste.allowed)
        told = replay(judged[0].logits, strange[0], gates, rule)
        ended = replay(judged[-1].logits, strange[-1], gates, rule).whole
        anomaly = judged[-1].anomaly[np.arange(len(truth)), ended - 1]
        held, reader = HeldOut(truth, told.probabilities, anomaly), Sequence(depths, rule)
        budgets[name + ending] = Budget(draws, reader, held, policy=reader, agreement=agreed)
    return budgets


def _fit_depths(
    views: list[Seen], truth: Int[np.ndarray, " n"]
) -> tuple[tuple[Depth, ...], list[Judged]]:
    """How the first 1, 2, ... trials are read, and what the cells are told, view by view.

    Names are fitted on the first view of the cells, strangeness on the last.
    """
    posteriors, anomalies, told, strangeness = [], [], [], []
    for count in range(1, views[0].errors.shape[1] + 1):
        parts = [view.errors[:, :count] for view in views]
        named = parts[0][:, :, :-1]
        logits = [out_of_fold_logits(named, truth, part[:, :, :-1]) for part in parts]
        cells = [
            Cells(part, softmax(each, axis=1), view.features)
            for part, each, view in zip(parts, logits, views, strict=True)
        ]
        fits = [fit_anomaly(cells[-1], truth, shown) for shown in cells]
        posteriors.append(fit_prefix(named, truth))
        anomalies.append(fits[-1][0])
        told.append(logits)
        strangeness.append([scores for _, scores in fits])
    full = told[-1][0].argmax(1)
    gates = [fit_gate(logits, logits.argmax(1) == full) for logits, *_ in told]
    judged = [
        Judged(np.stack(logits, axis=1), np.stack(scores, axis=1))
        for logits, scores in zip(
            zip(*told, strict=True), zip(*strangeness, strict=True), strict=True
        )
    ]
    return tuple(map(Depth, posteriors, gates, anomalies)), judged


def balanced_subset(
    truth: Int[np.ndarray, " n"], count: int, seed: int = 0
) -> Int[np.ndarray, " m"]:
    """About `count` cells, as many of each class as there are."""
    rng = np.random.default_rng(seed)
    each = max(2, count // len(np.unique(truth)))
    return np.concatenate(
        [rng.permutation(np.flatnonzero(truth == k))[:each] for k in np.unique(truth)]
    )


def betting_race(sequence: Budget, plan: Plan) -> BettingRace:
    """A race over the first noise levels of a fitted sequence, with the weights learned for them.

    A sweep's gap is then a difference of log-probabilities; bets are clipped at `CLIP` nats.
    """
    assert isinstance(sequence.reader, Sequence)
    count = min(plan.sweep, len(sequence.draws))
    learned = sequence.reader.depths[count - 1].posterior
    draws = sweeps(sequence.draws.sigmas[:count], plan.race_trials // count, plan.seed)
    weights = np.tile(learned.weight / learned.scale / CLIP, plan.race_trials // count)
    return BettingRace(draws, weights, count)


def fit_race(
    errors: Float[np.ndarray, "m t k1"], truth: Int[np.ndarray, " m"], race: PaperRace | BettingRace
) -> Budget:
    """The budget of a race from races that were run.

    Cells are judged by temperatures fitted without them; the weights of `race` saw them.
    """

    def reader(log_temperature: float) -> RaceReader:
        return RaceReader(race.weights, float(np.exp(log_temperature)))

    def fitted(part: np.ndarray) -> RaceReader:
        def missed(log_temperature: float) -> float:
            return nll(reader(log_temperature).probabilities(errors[part]), truth[part])

        return reader(float(minimize_scalar(missed, bounds=(-8, 4), method="bounded").x))

    judged = np.zeros((len(truth), errors.shape[2] - 1))
    for fit, held in folds(truth, judged.shape[1]):
        judged[held] = fitted(fit).probabilities(errors[held])
    best = fitted(np.arange(len(truth)))
    return Budget(race.draws, best, HeldOut(truth, judged, best.anomaly(errors)), policy=race)
