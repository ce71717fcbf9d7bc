"""Stop as soon as more trials would not change the answer.

After n of at most N trials the answer is read with weights fitted for n (calibrate.py). The chance
that it is also the answer of all N depends on the gap between the two highest logits,

    P(same | gap)  =  1 / (1 + exp(-(a_n + b_n gap))),        b_n >= 0

fitted for every depth n on held-out cells. A cell is done when that chance reaches a threshold: not
when it is confident, because an ambiguous cell never becomes confident. A cell that looks strange at
its depth (beyond 95 % of held-out cells) is never done early, so that its anomaly rests on all trials.

The threshold comes from learn-then-test: from strict to lax it is lowered while the exact binomial
upper limit of the share of held-out cells whose answer differs from the full one stays within what
is allowed. The gates and the weights come from the same cells, each cell judged by fits without it, so
that the disagreement on new cells is within what is allowed with a chance of about 95 %, not exactly.

Source: METHOD 1; Angelopoulos et al. 2021, Learn then Test, arXiv 2110.01052 (fixed sequence).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import betaincinv, expit
from sklearn.linear_model import LogisticRegression

from cytodiffusion.classify.anomaly import AnomalyModel
from cytodiffusion.classify.calibrate import PrefixPosterior

NEVER = 2.0  # a threshold that no chance reaches
LARGE = 20.0  # nats
CONFIDENCE = 0.95  # of the bound on the disagreement
LADDER = expit(np.linspace(9, -2, 111))  # thresholds, strict to lax


@dataclass(frozen=True)
class Depth:
    """How the first n trials are read."""

    posterior: PrefixPosterior
    gate: tuple[float, float]  # a_n, b_n
    anomalies: AnomalyModel


@dataclass(frozen=True)
class Sequence:
    """Reads cells that have run any number of trials; as a policy, says which are done."""

    depths: tuple[Depth, ...]
    threshold: float = NEVER

    def __call__(self, errors: Float[np.ndarray, "n t k1"]) -> Bool[np.ndarray, "n k"]:
        """All classes in, or none: the cell is done."""
        depth = self.depths[errors.shape[1] - 1]
        logits = depth.posterior.logits(errors[:, :, :-1])
        same = chance_of_same(logits, depth.gate)
        done = same >= self.threshold
        if done.any():
            probabilities = depth.posterior.probabilities(errors[:, :, :-1])
            done &= depth.anomalies.anomaly(errors, probabilities) <= depth.anomalies.limit
        return np.repeat(~done[:, None], logits.shape[1], axis=1)

    def probabilities(self, errors: Float[np.ndarray, "n t k1"]) -> Float[np.ndarray, "n k"]:
        """p_n(k | x) at the depth n that each cell has run."""
        found = np.zeros((len(errors), errors.shape[2] - 1))
        for rows, depth, used in self._by_depth(errors):
            found[rows] = depth.posterior.probabilities(used[:, :, :-1])
        return found

    def anomaly(
        self, errors: Float[np.ndarray, "n t k1"], probabilities: Float[np.ndarray, "n k"]
    ) -> Float[np.ndarray, " n"]:
        """0 to 1, higher is stranger, at the depth that each cell has run."""
        found = np.zeros(len(errors))
        for rows, depth, used in self._by_depth(errors):
            found[rows] = depth.anomalies.anomaly(used, probabilities[rows])
        return found

    def _by_depth(self, errors: np.ndarray):  # type: ignore[no-untyped-def]
        ran = (~np.isnan(errors[:, :, 0])).sum(1)
        for count in np.unique(ran):
            rows = np.flatnonzero(ran == count)
            yield rows, self.depths[count - 1], errors[rows, :count]


def chance_of_same(
    logits: Float[np.ndarray, "n k"], gate: tuple[float, float]
) -> Float[np.ndarray, " n"]:
    """P(same | gap) of each cell."""
    return expit(gate[0] + gate[1] * gap(logits))


def gap(logits: Float[np.ndarray, "n k"]) -> Float[np.ndarray, " n"]:
    """Highest logit less the second, in nats."""
    top = np.partition(logits, -2, axis=1)
    return top[:, -1] - top[:, -2]


def fit_gate(logits: Float[np.ndarray, "n k"], same: Bool[np.ndarray, " n"]) -> tuple[float, float]:
    """a and b from held-out cells.

    Two made-up cells see to it that there is always a fit: one without a gap disagrees, one with a
    very large gap agrees.
    """
    x = np.append(gap(logits), [0.0, LARGE])[:, None]
    found = LogisticRegression(C=100.0).fit(x, np.append(same, [False, True]))
    return float(found.intercept_[0]), max(0.0, float(found.coef_[0, 0]))


@dataclass(frozen=True)
class Agreement:
    """How often stopping early changes the answer, on held-out cells."""

    allowed: float  # share of cells
    cells: int
    disagreed: int
    bound: float  # exact upper limit of the share, 95 %
    trials: float  # mean a cell


def upper_limit(events: int, n: int) -> float:
    """Exact (Clopper-Pearson) one-sided upper limit of a share."""
    return 1.0 if events >= n else float(betaincinv(events + 1, n - events, CONFIDENCE))


def depths_reached(
    chance: Float[np.ndarray, "n t"], strange: Bool[np.ndarray, "n t"], threshold: float
) -> Int[np.ndarray, " n"]:
    """Trials that each cell runs: the first depth at which it is done, or all."""
    done = (chance >= threshold) & ~strange
    done[:, -1] = True
    return done.argmax(1) + 1


def learn_threshold(
    chance: Float[np.ndarray, "n t"],
    strange: Bool[np.ndarray, "n t"],
    same: Bool[np.ndarray, "n t"],
    allowed: float,
) -> tuple[float, Agreement]:
    """The laxest threshold on the ladder whose bound, like those of all stricter ones, is allowed.

    Column n - 1 is depth n; `same`: the answer there is that of the last column.
    """
    n = len(chance)
    best, said = NEVER, Agreement(allowed, n, 0, 0.0, float(chance.shape[1]))
    for threshold in LADDER:
        reached = depths_reached(chance, strange, threshold)
        disagreed = int((~same[np.arange(n), reached - 1]).sum())
        bound = upper_limit(disagreed, n)
        if bound > allowed:
            break
        best = float(threshold)
        said = Agreement(allowed, n, disagreed, bound, float(reached.mean()))
    return best, said
