"""How like real cells are drawn ones, and is one of them a copy?

Of features f (of any extractor) of real and of drawn cells:

    FID        |m_r - m_d|^2 + tr(C_r + C_d - 2 (C_r C_d)^(1/2))       m means, C covariances
    KID        the squared distance of the mean embeddings under (f.g / dim + 1)^3, without bias
    precision  share of drawn cells that lie in a ball around a real cell; recall the other way round
    density    balls of real cells that a drawn cell lies in, over k; coverage: share of real cells with
               a drawn one in their ball. A ball reaches to the k-th nearest cell of its own kind

FID and KID are 0 for the same distribution, and FID grows as cells get fewer; the others are 1 at best
(density 1 on average). Read all of them beside the same measure between two sets of real cells.

A copy is nearer to its training cell than chance: `Nearest` has the distance of every cell to the
nearest training cell, and the ratio of it to the distance of the tenth nearest. Real cells that took
no part in training say what is usual.

Source: Heusel et al. 2017, arXiv 1706.08500 (FID); Binkowski et al. 2018, arXiv 1801.01401 (KID);
Kynkäänniemi et al. 2019, arXiv 1904.06991 (precision, recall); Naeem et al. 2020, arXiv 2002.09797
(density, coverage).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from scipy.special import stdtrit
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from cytodiffusion.data.images import Preprocess, to_tensor
from cytodiffusion.data.transforms import POSES, Augmentation
from cytodiffusion.errors import DataError
from cytodiffusion.evaluate.baselines import BaselineSettings, Progress, train_baseline
from cytodiffusion.evaluate.intervals import share
from cytodiffusion.evaluate.report import fill

Features: TypeAlias = Float[np.ndarray, "_ f"]
Pixels: TypeAlias = UInt8[np.ndarray, "_ 3 s s"]

BALL = 5  # k of precision, recall, density and coverage (Naeem et al.)
BLOCKS = 10  # of cells, for the interval of KID
BEYOND = 10  # the nearest training cell is compared with the tenth nearest
SIDES = ("real", "drawn")
USUAL = 0.01  # share of held-out real cells that are nearer than "closer than usual"
AT_ONCE = 500  # cells whose distances are computed at a time


def frechet_distance(real: Features, drawn: Features) -> float:
    """FID, 0 or more; lower is better."""
    first, second = np.cov(real.T), np.cov(drawn.T)
    values, vectors = np.linalg.eigh(np.atleast_2d(first))
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    mixed = np.linalg.eigvalsh(root @ np.atleast_2d(second) @ root)
    gap = real.mean(0) - drawn.mean(0)
    return float(
        gap @ gap + np.trace(np.atleast_2d(first + second)) - 2 * np.sqrt(mixed.clip(0)).sum()
    )


def kernel_distance(real: Features, drawn: Features) -> float:
    """KID; lower is better. Without bias, so that it can fall below 0."""

    def among(one: Features) -> float:
        kernel = polynomial_kernel(one, degree=3)
        return float((kernel.sum() - kernel.trace()) / (len(one) * (len(one) - 1)))

    return among(real) + among(drawn) - 2 * float(polynomial_kernel(real, drawn, degree=3).mean())


def kernel_interval(real: Features, drawn: Features, seed: int = 0) -> list[float] | None:
    """95 % interval of KID from how it varies over blocks of cells (t); None for too few cells."""
    if min(len(real), len(drawn)) < 2 * BLOCKS:
        return None
    rng = np.random.default_rng(seed)
    parts = [np.array_split(rng.permutation(each), BLOCKS) for each in (real, drawn)]
    found = [kernel_distance(*pair) for pair in zip(*parts, strict=True)]
    half = float(stdtrit(BLOCKS - 1, 0.975) * np.std(found, ddof=1)) / BLOCKS**0.5
    middle = kernel_distance(real, drawn)
    return [middle - half, middle + half]


def check_counts(real: int, drawn: int, k: int = BALL) -> None:
    """Raises DataError for k cells or fewer of a kind."""
    if min(real, drawn) <= k:
        raise DataError(
            f"{real} real and {drawn} drawn cells of the same classes are too few: more than {k} of each "
            "are needed to compare them."
        )


def manifold(real: Features, drawn: Features, k: int = BALL) -> dict[str, float]:
    """Precision, recall, density and coverage. Raises DataError for k cells or fewer of a kind."""
    check_counts(len(real), len(drawn), k)
    apart = np.concatenate([_distances(part, drawn) for part in _parts(real)])
    around_real, around_drawn = _reach(real, k), _reach(drawn, k)
    inside = apart <= around_real[:, None]
    return {
        "precision": float(inside.any(0).mean()),
        "recall": float((apart <= around_drawn[None]).any(1).mean()),
        "density": float(inside.sum(0).mean() / k),
        "coverage": float((apart.min(1) <= around_real).mean()),
    }


def compare(real: Features, drawn: Features, seed: int = 0) -> dict[str, Any]:
    """All of these measures."""
    return {
        "fid": frechet_distance(real, drawn),
        "kid": kernel_distance(real, drawn),
        "kid_ci95": kernel_interval(real, drawn, seed),
        **manifold(real, drawn),
    }


def _parts(cells: np.ndarray) -> list[np.ndarray]:
    return [cells[i : i + AT_ONCE] for i in range(0, len(cells), AT_ONCE)]


def _distances(left: Features, right: Features) -> Float[np.ndarray, "_ _"]:
    """Euclidean, from scalar products."""
    squared = (left**2).sum(1)[:, None] + (right**2).sum(1)[None] - 2 * left @ right.T
    return np.sqrt(squared.clip(0))


def _reach(cells: Features, k: int) -> Float[np.ndarray, " _"]:
    """Distance to the k-th nearest other cell."""
    return NearestNeighbors(n_neighbors=k).fit(cells).kneighbors()[0][:, -1]


# --- copies --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nearest:
    """For each cell, how far the training cells are that lie nearest to it."""

    distance: Float[np.ndarray, " n"]  # of the nearest
    ratio: Float[
        np.ndarray, " n"
    ]  # of that to the distance of the tenth nearest: 0 for a copy, to 1
    which: Int[np.ndarray, " n"]  # row of the nearest


def nearest_features(cells: Features, training: Features) -> Nearest:
    """Among the features of training cells."""
    far, which = (
        NearestNeighbors(n_neighbors=min(BEYOND, len(training))).fit(training).kneighbors(cells)
    )
    return Nearest(far[:, 0], far[:, 0] / np.maximum(far[:, -1], 1e-12), which[:, 0])


def nearest_pixels(cells: Pixels, training: Pixels) -> Generator[int, None, Nearest]:
    """In pixels (rms, image units), at half the resolution, in the best of the eight poses.

    Half the resolution, so that grain does not hide a copy; eight poses, because training turned its
    images. Yields how many training cells were looked at.
    """
    small, rows, best = _small(cells), np.arange(len(cells))[:, None], min(BEYOND, len(training))
    turned = [pose(torch.from_numpy(small)).flatten(1).numpy() for pose in POSES]
    far = np.zeros((len(cells), 0), dtype=np.float32)
    which = np.zeros((len(cells), 0), dtype=np.int64)
    for start in range(0, len(training), AT_ONCE):
        part = _small(training[start : start + AT_ONCE]).reshape(-1, small[0].size)
        found = np.minimum.reduce([_distances(pose, part) for pose in turned])
        far = np.concatenate([far, found], axis=1)
        index = np.arange(start, start + len(part))
        which = np.concatenate([which, np.broadcast_to(index, found.shape)], axis=1)
        order = np.argsort(far, axis=1, kind="stable")[:, :best]
        far, which = far[rows, order], which[rows, order]
        yield start + len(part)
    rms = far / small[0].size ** 0.5
    return Nearest(rms[:, 0], rms[:, 0] / np.maximum(rms[:, -1], 1e-12), which[:, 0])


def _small(cells: Pixels) -> Float[np.ndarray, "_ 3 h w"]:
    """Half the resolution, [-1, 1]."""
    n, c, h, w = cells.shape
    even = cells[:, :, : h // 2 * 2, : w // 2 * 2].reshape(n, c, h // 2, 2, w // 2, 2)
    return (even.mean((3, 5), dtype=np.float32) / 127.5 - 1).astype(np.float32)


def copies(drawn: Nearest, real: Nearest) -> dict[str, Any]:
    """Do drawn cells lie nearer to training cells than real cells do that took no part in training?

    `nearer` is the share of drawn cells that are nearer than the k-th nearest of m real ones, k / (m + 1)
    about 0.01; `expected` is this share, what to expect without copies. `nearer_by_ratio` is the same for
    the ratio, which grain and blur change less. Intervals take that k-th cell for given.
    """
    m = len(real.distance)
    k = max(1, int(USUAL * (m + 1)))
    told: dict[str, Any] = {
        "median_distance": float(np.median(drawn.distance)),
        "median_distance_real": float(np.median(real.distance)),
        "distance_to_real": float(np.median(drawn.distance) / np.median(real.distance)),
        "smallest_ratio": float(drawn.ratio.min()),
        "smallest_ratio_real": float(real.ratio.min()),
        "median_ratio": float(np.median(drawn.ratio)),
        "median_ratio_real": float(np.median(real.ratio)),
        "expected": k / (m + 1),
    }
    for name, ours, theirs in (
        ("nearer", drawn.distance, real.distance),
        ("nearer_by_ratio", drawn.ratio, real.ratio),
    ):
        told |= share(name, ours < np.partition(theirs, k - 1)[k - 1])
    return told


# --- names ---------------------------------------------------------------------------------------


def agreement(
    asked: Int[np.ndarray, " n"], named: Int[np.ndarray, " n"], classes: Sequence[str]
) -> dict[str, Any]:
    """How often cells are named as the class that was asked for, in all and for each class."""
    right = asked == named
    each = [
        {"class": name, **share("agreement", right[asked == k])}
        for k, name in enumerate(classes)
        if (asked == k).any()
    ]
    return {**share("agreement", right), "classes": each}


def matched(
    first: Int[np.ndarray, " n"], second: Int[np.ndarray, " m"], seed: int = 0
) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
    """Rows of as many cells of each class out of both, as many as there are, in the same order."""
    rng = np.random.default_rng(seed)
    rows: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for k in np.union1d(first, second):
        found = [np.flatnonzero(labels == k) for labels in (first, second)]
        count = min(map(len, found))
        for chosen, of_class in zip(rows, found, strict=True):
            chosen.append(rng.permutation(of_class)[:count])
    return np.concatenate(rows[0]), np.concatenate(rows[1])


# --- real or drawn -------------------------------------------------------------------------------


def real_or_drawn(
    real: Pixels, drawn: Pixels, labels: Int[np.ndarray, " n"], settings: BaselineSettings,
    device: str = "cpu",
) -> Generator[Progress, None, dict[str, Any]]:  # fmt: skip
    """Train a classifier to tell real from drawn cells on one half, and test it on the other.

    Cell i of both kinds is of class `labels[i]`. It sees the cells in all poses and is shown their
    pixels as they are otherwise: grain or blur may give them away. An accuracy of 0.5 is the best a
    forger can do. Raises DataError where there is no cell for one of the halves.
    """
    learn = np.zeros(len(labels), dtype=bool)
    for k in np.unique(labels):
        learn[np.flatnonzero(labels == k)[::2]] = True
    if learn.all():
        raise DataError(
            "Telling real from drawn takes two cells of a class at the least; draw more."
        )
    both = np.concatenate([real[learn], drawn[learn]])
    truth = np.repeat([0, 1], learn.sum())
    still = Augmentation(affine=0, brightness=0, contrast=0, hue=0, stain=0, blur=0, noise=0)
    preprocess = Preprocess(size=real.shape[-1], crop=1.0)
    judge = yield from train_baseline(
        both, truth, SIDES, preprocess, still, settings, device=device
    )
    chance = judge.predict_proba(to_tensor(np.concatenate([real[~learn], drawn[~learn]])))[:, 1]
    told = np.repeat([0, 1], (~learn).sum())
    return {
        **share("accuracy", (chance > 0.5) == told),
        "auroc": float(roc_auc_score(told, chance)),
        "trained_on": len(both),
        "classifier": settings.kind,
        **judge.trained,
    }


def render(
    title: str, results: dict[str, Any], pairs: Sequence[dict[str, Any]], facts: dict[str, Any]
) -> str:
    """The page as text. `pairs`: drawn cells beside the training cell that is nearest, as data URIs."""
    return fill("fidelity.html.j2", title=title, results=results, pairs=pairs, facts=facts)
