"""Stop as soon as more trials would not change the answer.

After n of at most N trials the answer is read with weights fitted for n (calibrate.py). The chance
that it is also the answer of all N depends on the gap between the two highest logits,

    P(same | gap)  =  1 / (1 + exp(-(a_n + b_n gap))),        b_n >= 0

fitted for every depth n on held-out cells. A cell is done when that chance reaches a threshold: not
when it is confident, because an ambiguous cell never becomes confident. Where every class costs a
pass of its own, a class leaves as soon as its own gap to the leader reaches the threshold; a cell is
done when one class is left. What has left keeps the probability that it had, and the others share the
rest. A cell that looks strange at its depth (beyond 95 % of held-out cells) is never done early under
a cautious rule, so that its anomaly rests on all trials.

The threshold comes from learn-then-test: from strict to lax it is lowered while the exact binomial
upper limit of the share of held-out cells whose answer differs from the full one stays within what
is allowed. The gates and the weights come from the same cells, each cell judged by fits without it, so
that the disagreement on new cells is within what is allowed with a chance of about 95 %, not exactly.

Source: Angelopoulos et al. 2021, Learn then Test, arXiv 2110.01052 (fixed sequence).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import betaincinv, expit, softmax
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
class Rule:
    """When classes leave, and with them the cell."""

    threshold: float = NEVER  # chance that the leader stays ahead, at which a class may leave
    apart: bool = False  # each class leaves by itself: it costs a pass of its own
    cautious: bool = True  # a strange cell runs every trial


@dataclass(frozen=True)
class Sequence:
    """Reads cells that have run any number of trials; as a policy, says which classes are still in."""

    depths: tuple[Depth, ...]
    rule: Rule = Rule()

    def __call__(
        self, errors: Float[np.ndarray, "n t k1"], features: Float[np.ndarray, "n f"] | None = None
    ) -> Bool[np.ndarray, "n k"]:
        """Which classes stay in, given the errors of the trials so far (NaN: has left)."""
        depth = self.depths[errors.shape[1] - 1]
        logits = depth.posterior.logits(errors[:, :, :-1])
        strange = np.zeros(len(errors), dtype=bool)
        whole = ~np.isnan(errors).any((1, 2))
        if self.rule.cautious and self.rule.threshold < NEVER and whole.any():
            seen = None if features is None else features[whole]
            strange[whole] = _anomaly(depth, errors[whole], seen) > depth.anomalies.limit
        return staying(logits, strange, depth.gate, self.rule)

    def probabilities(self, errors: Float[np.ndarray, "n t k1"]) -> Float[np.ndarray, "n k"]:
        """p_n(k | x) at the depth n that each cell has run."""
        ran = (~np.isnan(errors[:, :, :-1])).any(2).sum(1)
        found = np.zeros((len(errors), errors.shape[2] - 1))
        for count, depth in enumerate(self.depths[: errors.shape[1]], start=1):
            rows = np.flatnonzero(ran >= count)
            logits = depth.posterior.logits(errors[rows, :count, :-1])
            found[rows] = absorb(found[rows], logits)
        return found

    def anomaly(
        self, errors: Float[np.ndarray, "n t k1"], features: Float[np.ndarray, "n f"] | None = None
    ) -> Float[np.ndarray, " n"]:
        """0 to 1, higher is stranger, at the last depth at which every class was in.

        Raises DataError where the model was fitted with features and there are none.
        """
        whole = (~np.isnan(errors)).all(2).sum(1)
        found = np.zeros(len(errors))
        for count in np.unique(whole):
            rows = np.flatnonzero(whole == count)
            seen = None if features is None else features[rows]
            found[rows] = _anomaly(self.depths[count - 1], errors[rows, :count], seen)
        return found


def _anomaly(
    depth: Depth, errors: Float[np.ndarray, "n t k1"], features: Float[np.ndarray, "n f"] | None
) -> Float[np.ndarray, " n"]:
    told = depth.posterior.probabilities(errors[:, :, :-1])
    return depth.anomalies.anomaly(errors, told, features)


def staying(
    logits: Float[np.ndarray, "n k"], strange: Bool[np.ndarray, " n"], gate: tuple[float, float],
    rule: Rule,
) -> Bool[np.ndarray, "n k"]:  # fmt: skip
    """Which classes stay in after a trial (logit NaN: left before). The leader always does."""
    here = ~np.isnan(logits)
    standing = np.where(here, logits, -np.inf)
    leads = np.arange(logits.shape[1]) == standing.argmax(1)[:, None]
    behind = standing.max(1, keepdims=True) - np.where(here, logits, 0.0)
    leaves = here & ~leads & (expit(gate[0] + gate[1] * behind) >= rule.threshold)
    if rule.cautious:
        leaves[strange] = False
    stays = here & ~leaves
    if not rule.apart:
        stays[stays.sum(1) > 1] = True  # all, or the leader alone
    return stays


def absorb(
    before: Float[np.ndarray, "n k"], logits: Float[np.ndarray, "n k"]
) -> Float[np.ndarray, "n k"]:
    """Probabilities after a trial: a class that has left (NaN) keeps its own, the others share the rest."""
    left = np.isnan(logits)
    kept = np.where(left, before, 0.0)
    shares = softmax(np.where(left, -np.inf, logits), axis=1)
    return kept + (1 - kept.sum(1, keepdims=True)) * shares


@dataclass(frozen=True)
class Replay:
    """What a rule makes of cells of which every trial was measured."""

    probabilities: Float[np.ndarray, "n k"]
    depth: Int[np.ndarray, " n"]  # trials run
    whole: Int[np.ndarray, " n"]  # of these, with every class in
    passes: Int[np.ndarray, " n"]


def replay(
    logits: Float[np.ndarray, "n t k"], strange: Bool[np.ndarray, "n t"],
    gates: tuple[tuple[float, float], ...], rule: Rule,
) -> Replay:  # fmt: skip
    """Run the rule over the logits of every depth; column n - 1 is depth n."""
    n, _, classes = logits.shape
    here, running = np.ones((n, classes), dtype=bool), np.ones(n, dtype=bool)
    probabilities = np.zeros((n, classes))
    depth, whole, passes = np.zeros((3, n), dtype=int)
    for trial, gate in enumerate(gates):
        complete = here.all(1)
        depth += running
        whole += running & complete
        passes += running * (here.sum(1) + complete if rule.apart else 1)  # and "any cell"
        seen = np.where(here, logits[:, trial], np.nan)
        probabilities[running] = absorb(probabilities[running], seen[running])
        stays = staying(seen, strange[:, trial] & complete, gate, rule)
        here[running] &= stays[running]
        running &= here.sum(1) > 1
    return Replay(probabilities, depth, whole, passes)


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
    passes: float  # mean a cell


def upper_limit(events: int, n: int) -> float:
    """Exact (Clopper-Pearson) one-sided upper limit of a share."""
    return 1.0 if events >= n else float(betaincinv(events + 1, n - events, CONFIDENCE))


def learn_threshold(
    logits: Float[np.ndarray, "n t k"], strange: Bool[np.ndarray, "n t"],
    gates: tuple[tuple[float, float], ...], rule: Rule, allowed: float,
) -> tuple[Rule, Agreement]:  # fmt: skip
    """The rule with the laxest threshold whose bound, like those of all stricter ones, is allowed."""
    best = replace(rule, threshold=NEVER)
    said = agreement(logits, replay(logits, strange, gates, best), allowed)
    for threshold in LADDER.tolist():
        tried = replace(rule, threshold=threshold)
        found = agreement(logits, replay(logits, strange, gates, tried), allowed)
        if found.bound > allowed:
            break
        best, said = tried, found
    return best, said


def agreement(logits: Float[np.ndarray, "n t k"], told: Replay, allowed: float) -> Agreement:
    """Count the cells whose answer is not that of all trials."""
    full, n = logits[:, -1].argmax(1), len(logits)
    disagreed = int((told.probabilities.argmax(1) != full).sum())
    means = float(told.depth.mean()), float(told.passes.mean())
    return Agreement(allowed, n, disagreed, upper_limit(disagreed, n), *means)
