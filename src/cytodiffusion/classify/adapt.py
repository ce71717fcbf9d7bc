"""Read the cells of another laboratory as a batch. No label of theirs is used.

    em_prior     how often each class comes up, from the batch itself (Saerens et al. 2002)
    centred      every class the same mean logit over the batch
    sure_names   the surer of the names, class by class, to be trained on (Zou et al. 2018)
    beside       strangeness beside the cells of the batch

The first two assume something of the batch that cannot be checked without labels: that the likelihoods
still hold, and that all classes are about as frequent. Where a model errs much, and for one class
more than for others, the second brings more than it costs even where they are not; where it errs little,
it costs (docs/log.md has both). So neither is done unasked. `cytodiffusion adapt` does the other two.

Source: Saerens, Latinne and Decaestecker 2002, Neural Computation 14, 21-41; Zou, Yu, Kumar and Wang 2018,
class-balanced self-training, arXiv 1810.07911.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int

from cytodiffusion.classify.anomaly import Cells
from cytodiffusion.classify.calibrate import change_prior
from cytodiffusion.classify.classifier import Budget
from cytodiffusion.classify.sequential import Sequence
from cytodiffusion.types import UNLABELLED

ROUNDS = 1000  # of EM, at most


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


def sure_names(probabilities: Float[np.ndarray, "n k"], share: float) -> Int[np.ndarray, " n"]:
    """Class of the surer `share` of the cells that have each name, UNLABELLED (-1) for the others.

    How sure: the probability of the name less that of the second. Of a name that any cell has, one cell
    at least keeps it.
    """
    named = probabilities.argmax(1)
    second, first = np.sort(probabilities, axis=1)[:, -2:].T
    labels = np.full(len(named), UNLABELLED)
    for k in np.unique(named):
        rows = np.flatnonzero(named == k)
        rows = rows[np.argsort((second - first)[rows], kind="stable")]
        labels[rows[: math.ceil(share * len(rows))]] = k
    return labels


def beside(
    budget: Budget, errors: Float[np.ndarray, "n t k1"], features: Float[np.ndarray, "n f"] | None
) -> Budget:
    """A sequential budget whose strangeness is told beside these cells, of which all trials were measured.

    p-values stay those of the calibration cells: how many of those were as strange among their own.
    """
    reader, usual = budget.reader, float(np.median(budget.held.anomaly))
    assert isinstance(reader, Sequence)
    depths = []
    for count, depth in enumerate(reader.depths, start=1):
        seen = errors[:, :count]
        cells = Cells(seen, depth.posterior.probabilities(seen[:, :, :-1]), features)
        depths.append(replace(depth, anomalies=depth.anomalies.beside(cells, usual)))
    sequence = replace(reader, depths=tuple(depths))
    return replace(budget, reader=sequence, policy=sequence)
