"""Do maps show what the classifier goes by?

A map ranks the pixels of a cell. Replace them, the highest first, with what is there in a reference image,
and follow the log-odds of the cell's class against another,  ln p_A - ln p_B  in nats:

    deletion    from the cell to the reference; the area below the curve should be small
    insertion   from the reference to the cell; the area should be large

over the share of pixels replaced, 0 to 1. A map has to beat those that know nothing of the classifier:
random pixels, edges, and the distance from the centre, which is where cells are.

Source: Petsiuk et al. 2018, RISE, arXiv 1806.07421 (the curves, there of a probability); Selvaraju et al.
2017, arXiv 1610.02391 (Grad-CAM).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.ndimage import gaussian_filter, sobel
from torch.nn import functional

from cytodiffusion.classify.classifier import Classifier
from cytodiffusion.errors import ModelError
from cytodiffusion.evaluate.baselines import Baseline
from cytodiffusion.evaluate.intervals import bootstrap, percentiles

Image = Float[np.ndarray, "c h w"]
Ranking = Float[np.ndarray, "h w"]
Curves = Float[np.ndarray, "2 s"]  # log-odds in nats, deletion and insertion

SHARES = (0.0, 0.05, 0.1, 0.2, 0.35, 0.6, 1.0)  # of the pixels replaced
TRIALS = 2  # of the budget `full` that judge an image: as good as eight (docs/log.md, 9)
SOFT = 2 / 64  # std of the blur of `soft edges` / image side
BLUR = 6 / 64  # std of the blurred reference / image side
DRAWS = 3  # random maps of a cell
GRID = 8  # cells of a Grad-CAM map, in each direction, at the least


@dataclass(frozen=True)
class Judge:
    """The classifier whose reasons are asked for: its first trials, which see no map."""

    classifier: Classifier
    budget: str = "full"  # or its twin, where that named the cell

    def probabilities(self, images: Sequence[Image]) -> Float[np.ndarray, "n k"]:
        """Of each class; all images see the same noise."""
        budget = self.classifier.budget(self.budget)
        measurement = replace(
            self.classifier.measurement(self.budget), draws=budget.draws.first(TRIALS), policy=None
        )
        tensor = torch.from_numpy(np.stack(images).astype(np.float32)).to(self.classifier.device)
        errors = measurement.measure(self.classifier.meter, tensor, ["judged"] * len(images))
        return budget.reader.probabilities(errors)

    def log_odds(self, images: Sequence[Image], own: int, other: int) -> Float[np.ndarray, " n"]:
        """ln p_own - ln p_other of each image, in nats."""
        logs = np.log(self.probabilities(images).clip(1e-300))
        return logs[:, own] - logs[:, other]


# --- the curves ----------------------------------------------------------------------------------


def curves(
    image: Image,
    reference: Image,
    rankings: Mapping[str, Ranking],
    log_odds: Callable[[Sequence[Image]], Float[np.ndarray, " n"]],
) -> dict[str, Curves]:
    """Log-odds at each of SHARES, for every ranking (higher comes first; ties in reading order)."""
    shown, inner = [image, reference], len(SHARES) - 2
    for ranking in rankings.values():
        gone = [_first(ranking, share) for share in SHARES[1:-1]]
        shown += [np.where(pixels, reference, image) for pixels in gone]
        shown += [np.where(pixels, image, reference) for pixels in gone]
    found = log_odds(shown)
    whole, nothing = found[:2]
    middle = found[2:].reshape(len(rankings), 2, inner)
    return {
        name: np.stack([[whole, *deleted, nothing], [nothing, *inserted, whole]])
        for name, (deleted, inserted) in zip(rankings, middle, strict=True)
    }


def _first(ranking: Ranking, share: float) -> np.ndarray:
    """The pixels that a ranking puts first."""
    place = np.empty(ranking.size, dtype=int)
    place[np.argsort(-ranking, axis=None, kind="stable")] = np.arange(ranking.size)
    return (place < share * ranking.size).reshape(ranking.shape)


def areas(found: Curves) -> Float[np.ndarray, 2]:
    """Mean log-odds over the share replaced, in nats: of deletion and of insertion."""
    return np.trapezoid(found, SHARES, axis=1)


# --- what to compare with ------------------------------------------------------------------------


def rivals(image: Image, rng: np.random.Generator) -> dict[str, Ranking]:
    """Maps that know nothing of the classifier."""
    light = image.mean(0)
    edges = np.hypot(sobel(light, 0), sobel(light, 1))
    y, x = np.mgrid[: light.shape[0], : light.shape[1]]
    middle = (np.array(light.shape) - 1) / 2
    return {
        **{f"random {i}": rng.random(light.shape) for i in range(DRAWS)},
        "edges": edges,
        "soft edges": gaussian_filter(edges, SOFT * len(light)),
        "centre": -np.hypot(y - middle[0], x - middle[1]),
    }


def joined(found: Mapping[str, Curves]) -> dict[str, Curves]:
    """The random maps as one, their mean curves."""
    lots = [curve for name, curve in found.items() if name.startswith("random ")]
    others = {name: curve for name, curve in found.items() if not name.startswith("random ")}
    return others | {"random": np.mean(lots, axis=0)}


def blurred(image: Image) -> Image:
    """The usual reference: the image without detail."""
    return np.stack([gaussian_filter(channel, BLUR * image.shape[1]) for channel in image])


def grad_cam(baseline: Baseline, image: Image, own: int, other: int) -> Ranking:
    """Where a convolutional baseline sees more of `own` than of `other`, at the image's size.

    Of the last feature map with at least GRID cells a side. Raises ModelError for one without any.
    """
    trunk: Any = baseline.network.trunk
    scaled = torch.from_numpy(image[None].astype(np.float32)).to(baseline.network.mean.device)
    scaled = ((scaled - baseline.network.mean) / baseline.network.std).requires_grad_()
    with torch.enable_grad():
        told = trunk(scaled, output_hidden_states=True)
        maps = [m for m in told.hidden_states if m.ndim == 4 and m.shape[-1] >= GRID]
        if not maps:
            raise ModelError("Grad-CAM needs feature maps: give a convolutional baseline.")
        logits = baseline.network.head(told.pooler_output.flatten(1))[0]
        (slope,) = torch.autograd.grad(logits[own] - logits[other], maps[-1])
    weighed = (slope.mean((2, 3), keepdim=True) * maps[-1]).sum(1, keepdim=True).relu().detach()
    size = image.shape[1:]
    found = functional.interpolate(weighed, size=size, mode="bilinear", align_corners=False)
    return found[0, 0].double().cpu().numpy()


# --- many cells ----------------------------------------------------------------------------------


def gains(
    ours: Float[np.ndarray, "n 2"], theirs: Float[np.ndarray, "n 2"],
    classes: Int[np.ndarray, " n"], seed: int,
) -> dict[str, Any]:  # fmt: skip
    """By how much our areas are better, in nats, with 95 % intervals over cells within classes."""
    better = (ours - theirs) * np.array([-1.0, 1.0])
    return {
        name: interval(better[:, i], classes, seed)
        for i, name in enumerate(("deletion", "insertion"))
    }


def interval(
    values: Float[np.ndarray, " n"], classes: Int[np.ndarray, " n"], seed: int
) -> dict[str, Any]:
    """Mean, and its 95 % interval over cells within classes; None of no values."""
    if not len(values):
        return {"mean": None, "ci95": None}
    drawn = bootstrap(classes, {"mean": lambda rows: values[rows].mean(1)}, seed=seed)["mean"]
    return {"mean": float(values.mean()), "ci95": percentiles(drawn)}
