"""How unlike anything seen in training is this cell?

The error itself does not tell: a smooth, strange cell is easy to denoise. What tells is the pattern
of the errors in the trials i, of every class relative to "any cell" and of "any cell" itself; and, where
all classes share one trunk, its features h in the first trial, the means over the grid of what the
guesses are made from, which cost nothing:

    g  =  ( ln E_ki - ln E_any,i  for all k, i;   ln E_any,i  for all i;   h )

Known cells lie near the mean pattern of their class. The square of the Mahalanobis distance to a class mean
(one pooled, shrunk covariance) is the sum of two parts, and three scores see different strangers:

    off     distance to the plane through the class means: the same for all classes
    within  distance in that plane to the nearest class mean
    doubt   -ln of the largest class probability

off sees images that are no cells at all, in both tails: too hard to denoise, or too easy; and, by the
features, what is in the frame beside or in place of one whole cell. within sees cells of another class:
it has the few directions in which classes differ, which the many of off would drown. doubt sees cells
between the known classes. With both distances in units of their 95 % quantiles on held-out cells, and
F(doubt) the share of held-out cells with less doubt,

    s = (off / q95)^4 + (within / q95)^2 + F(doubt)            anomaly = s / (1 + s)

so that doubt counts for no more than 1, and what is far off goes before it. anomaly_p
(`HeldOut.p_value`) is the conformal p-value, the share of held-out cells that are at least as strange.
No anomalous image is used.

Source: Lee et al. 2018, A Simple Unified Framework, arXiv 1807.03888; Ren et al. 2021, A Simple Fix to
Mahalanobis Distance, arXiv 2106.09022 (what all classes share drowns what tells near strangers); Ledoit and
Wolf 2004. The form of s was chosen on held-out cells and corrupted copies of them, see docs/log.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import brentq
from sklearn.covariance import LedoitWolf
from sklearn.model_selection import KFold

from cytodiffusion.classify.calibrate import FOLDS, folds
from cytodiffusion.errors import DataError

QUANTILE = 0.95
STEPS = 65  # quantiles of the doubt that are kept
FLAT = 1e-9  # of the plane's largest extent: no direction of it


@dataclass(frozen=True)
class AnomalyModel:
    """What held-out cells of the known classes look like."""

    means: Float[np.ndarray, "k f"]
    precision: Float[np.ndarray, "f f"]
    units: Float[np.ndarray, " u"]  # 95 % quantiles of both distances; then quantiles of the doubt
    limit: float  # 95 % quantile of the anomaly

    def anomaly(
        self, errors: Float[np.ndarray, "m t k1"], probabilities: Float[np.ndarray, "m k"],
        features: Float[np.ndarray, "m f"] | None = None,
    ) -> Float[np.ndarray, " m"]:  # fmt: skip
        """0 to 1, higher is stranger. The last column of `errors` is "any cell"."""
        return squash(self.distances(errors, features), doubt(probabilities), self.units)

    def distances(
        self, errors: Float[np.ndarray, "m t k1"], features: Float[np.ndarray, "m f"] | None = None
    ) -> Float[np.ndarray, "2 m"]:
        """How far off the plane of the class means, and within it from the nearest; zero or more.

        Features are passed over where the model was fitted without. Raises DataError where it was fitted
        with features and there are none.
        """
        return distances(self.pattern(errors, features), self.means, self.precision)

    def beside(self, cells: Cells, usual: float) -> AnomalyModel:
        """The same for cells of another laboratory, which their `probabilities` name.

        Class means are those of these cells, and the units of both distances, whose ratio stays, are such
        that the median of their anomaly is `usual`, where there are such units; the covariance stays. So a
        tenth of them may be strange without much harm. Classes that fewer than two cells are named are not
        known any more.
        """
        g, named = self.pattern(cells.errors, cells.features), cells.probabilities.argmax(1)
        near, doubts = np.zeros((2, len(g))), doubt(cells.probabilities)
        for fit, held in KFold(FOLDS, shuffle=True, random_state=0).split(g):
            near[:, held] = distances(g[held], _means(g[fit], named[fit]), self.precision)
        units = np.append(self.units[:2], _units(near, doubts)[2:])

        def over(times: float) -> float:
            return float(np.median(squash(near / times, doubts, units))) - usual

        if over(1e-3) > 0 > over(1e3):
            units[:2] *= brentq(over, 1e-3, 1e3)
        return replace(self, means=_means(g, named), units=units)

    def pattern(
        self, errors: Float[np.ndarray, "m t k1"], features: Float[np.ndarray, "m f"] | None
    ) -> Float[np.ndarray, "m g"]:
        """The pattern of errors, and of features where the model was fitted with them. Raises DataError."""
        trials, columns = errors.shape[1:]
        g = pattern(errors, None if self.means.shape[1] == trials * columns else features)
        if g.shape[1] != self.means.shape[1]:
            raise DataError(
                "These errors were kept without the network's features, by which this model also judges "
                "how strange a cell is. Measure the cells again."
            )
        return g


def _means(g: Float[np.ndarray, "m f"], named: Int[np.ndarray, " m"]) -> Float[np.ndarray, "k f"]:
    """Mean of each class that two cells or more are named; of all where there is none."""
    found = [g[named == k].mean(0) for k in np.unique(named) if (named == k).sum() > 1]
    return np.stack(found or [g.mean(0)])


def _units(
    near: Float[np.ndarray, "2 m"], doubts: Float[np.ndarray, " m"]
) -> Float[np.ndarray, " u"]:
    units = np.quantile(near, QUANTILE, axis=1).clip(min=1e-9)
    return np.append(units, np.quantile(doubts, np.linspace(0, 1, STEPS)))


def squash(
    near: Float[np.ndarray, "2 m"], doubts: Float[np.ndarray, " m"], units: Float[np.ndarray, " u"]
) -> Float[np.ndarray, " m"]:
    """s / (1 + s) for s, the three scores together."""
    less = np.interp(doubts, units[2:], np.linspace(0, 1, len(units) - 2))
    off, within = near / units[:2, None]
    s = off**4 + within**2 + less
    return s / (1 + s)


def pattern(
    errors: Float[np.ndarray, "m t k1"], features: Float[np.ndarray, "m f"] | None = None
) -> Float[np.ndarray, "m g"]:
    """g: log error of each class relative to "any cell", trial by trial; of "any cell"; features."""
    logs = np.log(errors.astype(np.float64).clip(1e-12))
    relative = (logs[:, :, :-1] - logs[:, :, -1:]).reshape(len(errors), -1)
    told = [relative, logs[:, :, -1], *([] if features is None else [features])]
    return np.concatenate(told, axis=1, dtype=np.float64)


def doubt(probabilities: Float[np.ndarray, "m k"]) -> Float[np.ndarray, " m"]:
    """-ln of the largest probability."""
    return -np.log(probabilities.max(1).clip(1e-12))


def distances(
    g: Float[np.ndarray, "m f"],
    means: Float[np.ndarray, "k f"],
    precision: Float[np.ndarray, "f f"],
) -> Float[np.ndarray, "2 m"]:
    """Mahalanobis distances to the plane of the class means, and within it to the nearest of them."""
    spread, gaps = means - means.mean(0), g - means.mean(0)
    scaled = spread @ precision
    sizes, axes = np.linalg.eigh(scaled @ spread.T)
    wide = sizes > FLAT * sizes.max()
    onto = np.ascontiguousarray((axes[:, wide] / np.sqrt(sizes[wide])).T @ scaled)  # into the plane
    along = np.einsum("rf,mf->mr", onto, gaps)  # no BLAS: its bits depend on m
    whole = np.einsum("mf,fg,mg->m", gaps, precision, gaps)
    within = _squares(along[:, None] - spread @ onto.T).min(1)
    return np.sqrt(np.stack([whole - _squares(along), within]).clip(0))


def _squares(coordinates: Float[np.ndarray, "*n r"]) -> Float[np.ndarray, "*n"]:
    """Their sum, one by one, so that its bits do not depend on how many points there are."""
    start = np.zeros(coordinates.shape[:-1])
    return sum((np.square(each) for each in np.moveaxis(coordinates, -1, 0)), start)


def _gaussian(g: np.ndarray, truth: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    means = np.stack([g[truth == k].mean(0) for k in range(classes)])
    return means, LedoitWolf().fit(g - means[truth]).precision_


class Cells(NamedTuple):
    """What strangeness is told from."""

    errors: Float[np.ndarray, "m t k1"]
    probabilities: Float[np.ndarray, "m k"]
    features: Float[np.ndarray, "m f"] | None = None


def fit_anomaly(
    cells: Cells, truth: Int[np.ndarray, " m"], shown: Cells | None = None
) -> tuple[AnomalyModel, Float[np.ndarray, " m"]]:
    """Fit on held-out cells; also returns their own anomaly, each from fits without it.

    `shown`: another view of the same cells, whose anomaly is returned in place of theirs.
    """
    classes, shown = cells.probabilities.shape[1], shown or cells
    g, asked = (pattern(each.errors, each.features) for each in (cells, shown))
    near, far = np.zeros((2, len(truth))), np.zeros((2, len(truth)))
    for fit, held in folds(truth, classes):
        fitted = _gaussian(g[fit], truth[fit], classes)
        near[:, held], far[:, held] = (distances(each[held], *fitted) for each in (g, asked))
    doubts = doubt(cells.probabilities)
    units = _units(near, doubts)
    limit = float(np.quantile(squash(near, doubts, units), QUANTILE))
    model = AnomalyModel(*_gaussian(g, truth, classes), units, limit)
    return model, squash(far, doubt(shown.probabilities), units)
