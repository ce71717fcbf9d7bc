"""How unlike anything seen in training is this cell?

The error itself does not tell: a smooth, strange cell is easy to denoise. What tells is the pattern
of the classes' errors relative to "any cell", over noise levels,

    g_ki = ln E_ki - ln E_any,i

Known cells lie near the mean pattern of their class. Two scores, each zero or more, are added in
units of their 95 % quantile on held-out cells:

    a1 = smallest Mahalanobis distance of g to a class mean (one pooled, shrunk covariance)
    a2 = -ln of the largest class probability

anomaly = s / (1 + s) with s = a1 / q95 + a2 / q95; anomaly_p (`HeldOut.p_value`) is the conformal
p-value, the share of held-out cells that are at least as strange. No anomalous image is used.

Source: METHOD 4; Lee et al. 2018, A Simple Unified Framework, arXiv 1807.03888; Ledoit and Wolf 2004.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from sklearn.covariance import LedoitWolf

from cytodiffusion.classify.calibrate import folds

QUANTILE = 0.95


@dataclass(frozen=True)
class AnomalyModel:
    """What held-out cells of the known classes look like."""

    means: Float[np.ndarray, "k f"]
    precision: Float[np.ndarray, "f f"]
    units: Float[np.ndarray, " 2"]  # 95 % quantiles of a1 and a2
    limit: float  # 95 % quantile of the anomaly

    def anomaly(
        self, errors: Float[np.ndarray, "m t k1"], probabilities: Float[np.ndarray, "m k"]
    ) -> Float[np.ndarray, " m"]:
        """0 to 1, higher is stranger. The last column of `errors` is "any cell"."""
        a1 = distance(pattern(errors), self.means, self.precision)
        return squash(a1, doubt(probabilities), self.units)


def squash(
    a1: Float[np.ndarray, " m"], a2: Float[np.ndarray, " m"], units: Float[np.ndarray, " 2"]
) -> Float[np.ndarray, " m"]:
    """s / (1 + s) for the sum s of the two scores in their units."""
    s = a1 / units[0] + a2 / units[1]
    return s / (1 + s)


def pattern(errors: Float[np.ndarray, "m t k1"]) -> Float[np.ndarray, "m f"]:
    """g: log error of each class relative to "any cell", trial by trial."""
    logs = np.log(errors.astype(np.float64).clip(1e-12))
    return (logs[:, :, :-1] - logs[:, :, -1:]).reshape(len(errors), -1)


def doubt(probabilities: Float[np.ndarray, "m k"]) -> Float[np.ndarray, " m"]:
    """a2: -ln of the largest probability."""
    return -np.log(probabilities.max(1).clip(1e-12))


def distance(
    g: Float[np.ndarray, "m f"],
    means: Float[np.ndarray, "k f"],
    precision: Float[np.ndarray, "f f"],
) -> Float[np.ndarray, " m"]:
    """a1: Mahalanobis distance to the nearest class mean."""
    gaps = g[:, None] - means[None]
    squared = np.einsum("mkf,fg,mkg->mk", gaps, precision, gaps)  # no BLAS: its bits depend on m
    return np.sqrt(squared.min(1).clip(0))


def _gaussian(g: np.ndarray, truth: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    means = np.stack([g[truth == k].mean(0) for k in range(classes)])
    return means, LedoitWolf().fit(g - means[truth]).precision_


def fit_anomaly(
    errors: Float[np.ndarray, "m t k1"],
    truth: Int[np.ndarray, " m"],
    probabilities: Float[np.ndarray, "m k"],
) -> tuple[AnomalyModel, Float[np.ndarray, " m"]]:
    """Fit on held-out cells; also returns their own anomaly, each from fits without it."""
    g, classes = pattern(errors), probabilities.shape[1]
    a1 = np.zeros(len(truth))
    for fit, held in folds(truth, classes):
        a1[held] = distance(g[held], *_gaussian(g[fit], truth[fit], classes))
    a2 = doubt(probabilities)
    units = np.quantile(np.stack([a1, a2]), QUANTILE, axis=1).clip(min=1e-9)
    anomaly = squash(a1, a2, units)
    limit = float(np.quantile(anomaly, QUANTILE))
    return AnomalyModel(*_gaussian(g, truth, classes), units, limit), anomaly
