"""How well does each class explain this cell?

Add noise to the image, ask the denoiser to take it away once for every class, and see which class
leaves the smallest error. All classes are shown the *same* noisy image, so whatever they find
equally hard cancels when two of them are compared.

Divided by sigma^3 and integrated over noise levels, that error is the log-likelihood of the image
under the class, up to a constant that does not depend on the class:

    log p(x | k)  =  constant  -  integral of E||D_k(x + sigma eps, sigma) - x||^2 sigma^-3 d sigma

For Gaussian classes both sides are known exactly; tests/test_evidence.py checks that they agree.

Source: Kong, Brekelmans and Ver Steeg 2023, Information-Theoretic Diffusion, arXiv 2302.03792.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cytodiffusion.classify.draws import Draws
from cytodiffusion.types import Denoiser

Pose = Callable[[Tensor], Tensor]
Policy = Callable[[Float[np.ndarray, "n t k"]], Bool[np.ndarray, "n k"]]


def squared_errors(
    denoiser: Denoiser, clean: Float[Tensor, "n c h w"], noise: Float[Tensor, "n c h w"],
    sigma: float, labels: Tensor,
) -> Float[Tensor, "n k"]:  # fmt: skip
    """Mean squared error of the guess for each label, in squared image units."""
    levels = torch.full((len(clean),), sigma, device=clean.device)
    guesses = denoiser(clean + sigma * noise, levels, labels)
    return (guesses - clean[:, None]).square().mean((2, 3, 4))


@torch.inference_mode()
def measure(
    denoiser: Denoiser,
    images: Float[Tensor, "n c h w"],
    digests: list[str],
    draws: Draws,
    columns: int,
    *,
    poses: tuple[Pose, ...],
    policy: Policy | None = None,
    together: bool = True,
    anyone: bool = True,
    batch: int = 64,
) -> Float[np.ndarray, "n t k"]:
    """Errors of every image in every trial, for `columns` labels: the classes, then "any cell".

    After each trial `policy` is shown the errors so far (the classes only) and says which classes
    are still in; what has left stays NaN from then on. An image with one class left is done.
    `together` says that all labels come from one pass, so that an image is either computed whole or
    not at all; otherwise every living (image, label) pair is a pass of its own. Both give the same.
    """
    errors = np.full((len(images), len(draws), columns), np.nan, dtype=np.float32)
    alive = np.ones((len(images), columns), dtype=bool)
    alive[:, -1] = anyone
    shape = tuple(images.shape[1:])
    for t, trial in enumerate(draws.trials):
        rows, labels = _passes(alive, together)
        for start in range(0, len(rows), batch):
            some, asked = rows[start : start + batch], labels[start : start + batch]
            clean = poses[trial.pose](images[some])
            noise = draws.noise(t, [digests[i] for i in some], shape).to(clean)
            wanted = torch.from_numpy(asked).to(clean.device)
            found = squared_errors(denoiser, clean, noise, trial.sigma, wanted)
            errors[some[:, None], t, asked] = found.float().cpu().numpy()
        errors[:, t][~alive] = np.nan
        if policy is not None:
            running = alive.any(1)
            alive[running, :-1] &= policy(errors[running, : t + 1, :-1])
            alive[alive[:, :-1].sum(1) <= 1] = False
            if not alive.any():
                break
    return errors


def _passes(
    alive: Bool[np.ndarray, "n k"], together: bool
) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, "p j"]]:
    """The passes of a trial: which image each is for, and the labels it computes."""
    if not together:
        image, label = np.nonzero(alive)
        return image, label[:, None]
    running = np.flatnonzero(alive.any(1))
    return running, np.tile(np.arange(alive.shape[1]), (len(running), 1))


def log_evidence(
    errors: Float[np.ndarray, "n t k"],
    sigmas: Float[np.ndarray, " t"],
    pixels: int,
) -> Float[np.ndarray, "n k"]:
    """log p(x | k) up to a constant, in nats; higher explains the image better.

    `errors` are mean squared errors over `pixels` numbers, at trials spread evenly over
    ln sigma between the lowest and the highest level (`draws.stratified`). Trials at one level are
    averaged.
    """
    levels, place = np.unique(sigmas.astype(np.float64), return_inverse=True)
    mean = np.stack([errors[:, place == i].mean(1) for i in range(len(levels))], axis=1)
    if len(levels) == 1:
        return -pixels * mean[:, 0] / levels[0] ** 2
    slices = np.gradient(np.log(levels))
    return -pixels * np.einsum("nlk,l->nk", mean.astype(np.float64), slices / levels**2)
