"""Read the cells of another laboratory as a batch. No label of theirs is used.

    em_prior   how often each class comes up, from the batch itself (Saerens et al. 2002)
    centred    every class the same mean logit over the batch

Both assume something of the batch that cannot be checked without labels: the first that the likelihoods
still hold, the second that all classes are about as frequent. Where a model errs much, and for one class
more than for others, the second brings more than it costs even where they are not; where it errs little,
it costs (docs/log.md has both). So neither is done unasked.

Source: Saerens, Latinne and Decaestecker 2002, Neural Computation 14, 21-41.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from cytodiffusion.classify.calibrate import change_prior

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
