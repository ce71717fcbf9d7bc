"""How does the share of right answers grow with confidence?

Someone (a model, a person) answers and says how sure they are, x in [0, 1]. The psychometric
function gives the chance that an answer is right:

    P(right | x)  =  guess + (1 - guess - lapse) F(x)

It starts at `guess`, the luck of who knows nothing, and ends short of 1 by `lapse`, the mistakes
that are made however sure one is. F rises from 0: the distribution function of Weibull, 1 -
exp(-(x / scale)^shape), or of beta, the regularised incomplete beta function I_x(a, b).

The numbers are those of greatest likelihood. Their intervals, the band and the judgement of the fit
come from one parametric bootstrap: right and wrong are drawn again from the fitted curve at the same
confidences, and fitted again. The intervals are percentiles; they hold if the curve fits, so read
`fit_p` first. They are a little short: with 300 answers simulated from a known Weibull curve, those
meant for 95 % held the truth in 86 (threshold) to 98 % (scale) of 80 sets.

Source: Wichmann and Hill 2001, The psychometric function I and II, Perception & Psychophysics 63.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq, minimize
from scipy.special import betainc, betaincinv, chdtri, xlog1py, xlogy

from cytodiffusion.errors import DataError, SettingsError
from cytodiffusion.evaluate.answers import SMALLEST, Judged
from cytodiffusion.evaluate.intervals import LEVEL, percentiles

FEWEST = 20  # answers: fewer say nothing of three numbers
LAPSE = (0.0, 0.5)
GUESS = (0.0, 0.5)  # where it is fitted; with LAPSE it keeps the curve from falling
STEP = 1e-6  # of the differences that stand for a derivative, in the logarithm of a number of F
GRID = np.linspace(0, 1, 101)  # confidences at which the band is given


@dataclass(frozen=True)
class Family:
    """A distribution function on [0, 1] or more, with two positive numbers p and q."""

    names: tuple[str, str]
    below: Callable[[np.ndarray, float, float], np.ndarray]  # F(x; p, q)
    inverse: Callable[[float, float, float], float]
    bounds: tuple[tuple[float, float], tuple[float, float]]
    starts: tuple[tuple[float, float], ...]  # of the search for the greatest likelihood


FAMILIES = {
    "weibull": Family(
        names=("scale", "shape"),
        below=lambda x, p, q: -np.expm1(-((x / p) ** q)),
        inverse=lambda share, p, q: float(p * (-np.log1p(-share)) ** (1 / q)),
        bounds=((0.01, 10), (0.1, 100)),
        starts=tuple(product((0.3, 0.7), (1, 4, 12))),
    ),
    "beta": Family(
        names=("a", "b"),
        below=lambda x, p, q: betainc(p, q, x),
        inverse=lambda share, p, q: float(betaincinv(p, q, share)),
        bounds=((0.01, 1000), (0.01, 1000)),
        starts=((1, 1), (1, 4), (4, 1), (4, 4), (20, 20), (40, 10)),
    ),
}


@dataclass(frozen=True)
class Curve:
    """A psychometric function; called with confidences, it gives the chance of being right."""

    family: str
    numbers: tuple[float, float]  # of F, named FAMILIES[family].names
    guess: float
    lapse: float

    def __call__(self, x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        share = FAMILIES[self.family].below(x, *self.numbers)
        return self.guess + (1 - self.guess - self.lapse) * share

    def threshold(self, level: float) -> float:
        """Lowest confidence at which the accuracy is `level`: 0 if it always is, infinite if the
        curve does not reach it in [0, 1]."""
        if level <= self.guess:
            return 0.0
        if level >= 1 - self.lapse:
            return np.inf
        share = (level - self.guess) / (1 - self.guess - self.lapse)
        x = FAMILIES[self.family].inverse(share, *self.numbers)
        return x if x <= 1 else np.inf

    def parameters(self) -> dict[str, float]:
        """The four numbers by name."""
        first, second = FAMILIES[self.family].names
        return {first: self.numbers[0], second: self.numbers[1]} | {
            "guess": self.guess,
            "lapse": self.lapse,
        }


# -------------------------------------------------------------------------------------- the fit


@dataclass(frozen=True)
class Fit:
    """The curve of greatest likelihood."""

    answers: Judged
    curve: Curve
    guess: float | None  # as asked: None where it was fitted
    log_likelihood: float  # nats

    @property
    def free(self) -> int:
        """Numbers that were fitted."""
        return 3 + (self.guess is None)

    @property
    def aic(self) -> float:
        """Akaike's criterion, 2 free - 2 log-likelihood; lower is better."""
        return 2 * self.free - 2 * self.log_likelihood

    @property
    def at_bounds(self) -> list[str]:
        """Numbers that stopped at an end of the range searched: the answers do not decide them."""
        family, found = FAMILIES[self.curve.family], self.curve.parameters()
        ends = [(name, *ends) for name, ends in zip(family.names, family.bounds, strict=True)]
        ends += [("lapse", -1.0, LAPSE[1])] + [("guess", -1.0, GUESS[1])] * (self.guess is None)
        return [n for n, low, high in ends if found[n] < low * 1.001 or found[n] > high * 0.999]


def fit(answers: Judged, *, family: str, guess: float | None) -> Fit:
    """The curve under which these answers are most likely; `guess` None: fitted too, in [0, 0.5].

    The best of several bounded searches. Raises DataError where no curve can be told: fewer than 20
    answers, all right, all wrong, or fewer different confidences than numbers to fit. Raises
    SettingsError for another family, or a guess rate outside of [0, 1).
    """
    if family not in FAMILIES:
        raise SettingsError(f"There is no family '{family}'. Choose {' or '.join(FAMILIES)}.")
    if guess is not None and not 0 <= guess < 1:
        raise SettingsError(f"A guess rate lies in [0, 1), not {guess}. Try 1/number of classes.")
    _check(answers, 3 + (guess is None))
    bounds = _bounds(family, guess)
    (_, _, lapses, guesses), starts = bounds, FAMILIES[family].starts
    middle = (min(0.02, lapses[1]), min(max(0.1, guesses[0]), guesses[1]))
    curve = _search(answers, family, bounds, [(*np.log(start), *middle) for start in starts])
    return Fit(answers, curve, guess, answers.log_likelihood(curve))


def _check(answers: Judged, free: int) -> None:
    n, right, values = int(answers.n.sum()), int(answers.right.sum()), len(answers.n)
    wrong = None
    if n < FEWEST:
        wrong = f"{n} answers are too few; give at least {FEWEST}"
    elif right in (0, n):
        wrong = (
            f"All {n} answers are {'right' if right else 'wrong'}, so nothing tells where accuracy "
            "rises; give answers of both kinds, for example harder cells"
        )
    elif values < free:
        wrong = (
            f"The {n} answers have {values} different confidence{'s' * (values > 1)}, too few for "
            f"{free} numbers; give answers that were more and less sure"
        )
    if wrong:
        raise DataError(f"{wrong}. No curve was fitted.")


Theta = tuple[float, float, float, float]  # log p, log q, lapse, guess


def _bounds(family: str, guess: float | None) -> list[tuple[float, float]]:
    low, high = GUESS if guess is None else (guess, guess)
    logs = [(np.log(least), np.log(most)) for least, most in FAMILIES[family].bounds]
    return [*logs, (LAPSE[0], min(LAPSE[1], 1 - high)), (low, high)]


def _search(
    answers: Judged, family: str, bounds: list[tuple[float, float]], starts: list[Theta]
) -> Curve:
    below, x, n, right = FAMILIES[family].below, answers.confidence, answers.n, answers.right
    wrong = n - right

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        """-log-likelihood and its gradient."""
        (p, q), (lapse, guess) = np.exp(theta[:2]), theta[2:]
        share, span = below(x, p, q), 1 - guess - lapse
        chance = np.clip(guess + span * share, SMALLEST, 1 - SMALLEST)
        slope = wrong / (1 - chance) - right / chance
        by_p = (below(x, p * np.exp(STEP), q) - share) * span / STEP
        by_q = (below(x, p, q * np.exp(STEP)) - share) * span / STEP
        value = -(xlogy(right, chance) + xlog1py(wrong, -chance)).sum()
        return value, np.array([slope @ by_p, slope @ by_q, -slope @ share, slope @ (1 - share)])

    runs = [minimize(loss, s, jac=True, bounds=bounds, method="L-BFGS-B") for s in starts]
    best = min(runs, key=lambda run: run.fun).x
    p, q = np.exp(best[:2])
    return Curve(family, (float(p), float(q)), guess=float(best[3]), lapse=float(best[2]))


def _theta(curve: Curve) -> Theta:
    p, q = np.log(curve.numbers)
    return float(p), float(q), curve.lapse, curve.guess


# ------------------------------------------------------------------------- how far to trust it


@dataclass(frozen=True)
class Analysis:
    """A fit and what the resamples say of it."""

    fit: Fit
    level: float  # accuracy at which the threshold is taken
    draws: int
    intervals: dict[
        str, list[float] | None
    ]  # 95 %, of every number; None: not fitted, or all alike
    threshold_ci95: list[float]  # may be infinite
    fit_p: float | None  # share of resamples that fit no better; below .05 doubt the curve
    band: Float[np.ndarray, "2 101"]  # 95 % of the curves at GRID, pointwise

    @property
    def threshold(self) -> float:
        """See `Curve.threshold`."""
        return self.fit.curve.threshold(self.level)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON. A threshold, or an end of its interval, that is not reached is None."""
        fit, curve = self.fit, self.fit.curve
        found: dict[str, Any] = {"family": curve.family}
        for name, value in curve.parameters().items():
            found |= {name: value, f"{name}_ci95": self.intervals[name]}
        return found | {
            "guess_fitted": fit.guess is None,
            "threshold_level": self.level,
            "threshold": _finite(self.threshold),
            "threshold_ci95": [_finite(end) for end in self.threshold_ci95],
            "at_bounds": fit.at_bounds,
            "log_likelihood": fit.log_likelihood,
            "aic": fit.aic,
            "deviance": fit.answers.deviance(curve),
            "fit_p": self.fit_p,
            "draws": self.draws,
            "curve": {
                "confidence": [round(float(x), 2) for x in GRID],
                "accuracy": curve(GRID).tolist(),
                "low": self.band[0].tolist(),
                "high": self.band[1].tolist(),
            },
        }


def analyse(fit: Fit, *, level: float, seed: int, draws: int) -> Generator[int, None, Analysis]:
    """Fit `draws` sets of answers drawn from the curve; yields how many are done.

    Each search starts at the curve itself. Draw i comes from (seed, i) alone. A rate of 0 is never
    drawn into another, so the upper end of its interval is where the log-likelihood has fallen by
    1.92 instead (the band cannot tell either: there it is too narrow).
    """
    if not 0 < level < 1:
        raise SettingsError(f"The threshold is taken at an accuracy in (0, 1), not {level}.")
    answers, bounds = fit.answers, _bounds(fit.curve.family, fit.guess)
    chance = fit.curve(answers.confidence).clip(0, 1)
    curves, deviances = [], []
    for i in range(draws):
        drawn = answers.again(chance, np.random.default_rng([seed, i]))
        curves.append(_search(drawn, fit.curve.family, bounds, [_theta(fit.curve)]))
        deviances.append(drawn.deviance(curves[-1]))
        yield i + 1
    worse = np.sum(np.array(deviances) >= answers.deviance(fit.curve) - 1e-9)
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    crossed = np.array([curve.threshold(level) for curve in curves])
    return Analysis(
        fit=fit,
        level=level,
        draws=draws,
        intervals=_intervals(fit, curves),
        threshold_ci95=np.quantile(crossed, ends, method="inverted_cdf").tolist(),
        fit_p=float((1 + worse) / (1 + draws)) if len(answers.bins()) > fit.free else None,
        band=np.quantile([curve(GRID) for curve in curves], ends, axis=0),
    )


def _intervals(fit: Fit, curves: list[Curve]) -> dict[str, list[float] | None]:
    found = fit.curve.parameters()
    drawn = {name: np.array([curve.parameters()[name] for curve in curves]) for name in found}
    intervals = {name: percentiles(values) for name, values in drawn.items()}
    for name in ["lapse", *["guess"] * (fit.guess is None)]:
        if found[name] < 1e-6:
            intervals[name] = [0.0, _upper_end(fit, name)]
    return intervals


def _upper_end(fit: Fit, name: str) -> float:
    """The rate at which the log-likelihood, the other numbers fitted anew, is lower by 1.92."""
    bounds = _bounds(fit.curve.family, fit.guess)
    which = ("lapse", "guess").index(name) + 2
    allowed = chdtri(1, 1 - LEVEL) / 2

    def excess(rate: float) -> float:
        held = [*bounds[:which], (rate, rate), *bounds[which + 1 :]]
        curve = _search(fit.answers, fit.curve.family, held, [_theta(fit.curve)])
        return fit.log_likelihood - fit.answers.log_likelihood(curve) - allowed

    top = bounds[which][1]
    return float(brentq(excess, 0, top, xtol=1e-5)) if excess(top) > 0 else float(top)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
