"""Where, and in which direction, would this cell have to change to be of another class?

All classes are shown the same noisy cell. Class k guesses the cell behind the noise, and errs by
e_k = x - D_k. Where the errors of two classes differ, they expect something else of this very cell:

    change  =  e_A - e_B  =  D_B - D_A         above 0: as B, the cell would be lighter there

averaged over noise levels and antithetic pairs of noise. Each pair sees the cell in another view, a pose
and a shift by whole pixels, and what is read in it is put back into the cell's own frame, exactly. The
scatter of the pairs gives every pixel a standard error, and what is no clearer than noise is not shown.

A network on latents is shown latents; views are taken of the image and guesses are decoded, so that maps
are in pixels all the same. Noise levels grow with the standard deviation of the latents.

The cell is also drawn anew as B: noise is added, and taken away by B's guesses alone, down

    x' = D_B + (s'/s) (x - D_B)                for noise levels s > s' > ... > 0

Drawing changes a cell even as what it is. So it is drawn as A too, from the same noise, and what is
B's doing is the difference; the cell with that difference added is the counterfactual.

Source: Deltadahl et al. 2024, arXiv 2408.08982 (maps of the error difference); Song et al. 2021,
arXiv 2010.02502 (DDIM); Benjamini and Hochberg 1995 (what is shown).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict, Field
from scipy.special import stdtr
from scipy.stats import false_discovery_control
from torch import Tensor

from cytodiffusion.classify.draws import Draws, Trial, standard_normal
from cytodiffusion.data.transforms import POSES, Pose
from cytodiffusion.types import PIXELS, Classes, Denoiser, Space

BATCH = 16  # rows a pass
DRAWING = 1000  # the draw that cells are redrawn from
LAST = 0.05  # the last noise level of a drawing, image units
VEIL = 3.2  # the noise level that leaves little of a cell
GRAIN = 0.15  # the level at which what is drawn is guessed once more: the denoiser leaves grain


@dataclass(frozen=True)
class View:
    """Shift by whole pixels, what leaves one side coming in at the other; then take a pose.

    Shifts by less than a patch of the network keep its grid of patches out of the maps.
    """

    pose: Pose
    down: int
    right: int

    def __call__(self, image: Tensor) -> Tensor:
        return self.pose(image.roll((self.down, self.right), (-2, -1)))

    def undo(self, image: Tensor) -> Tensor:
        """The image before `self` was applied."""
        return self.pose.undo(image).roll((-self.down, -self.right), (-2, -1))


STILL = View(POSES[0], 0, 0)
VIEWS = tuple(View(POSES[i % 8], i % 4 - 2, i // 4 - 2) for i in range(16))


class Settings(BaseModel):
    """How a cell is explained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    levels: tuple[float, ...] = Field(
        (0.4, 0.8), description="noise levels of the map, image units"
    )
    pairs: int = Field(8, ge=2, description="antithetic pairs of noise at each level")
    starts: tuple[float, ...] = Field(
        (0.5, 1.0, 2.0, 4.0), description="noise levels from which the cell is drawn anew"
    )
    steps: int = Field(12, ge=1, description="passes of a drawing")
    discovery: float = Field(
        0.05, gt=0, lt=1, description="share of the pixels shown that may be noise"
    )
    seed: int = Field(0, ge=0, description="decides all noise")

    @property
    def draws(self) -> Draws:
        """Trial 2j and 2j + 1 share noise, of opposite sign, and the view; `pose` is one of VIEWS."""
        trials = (
            Trial(level, draw, sign, draw % len(VIEWS))
            for draw, level in enumerate(np.repeat(self.levels, self.pairs).tolist())
            for sign in (1, -1)
        )
        return Draws(tuple(trials), self.seed)


@dataclass(frozen=True)
class Map:
    """Where and how a cell would change to be of another class; [-1, 1] is black to white."""

    change: Float[np.ndarray, "c h w"]  # guess as the other class less guess as its own
    error: Float[np.ndarray, "c h w"]  # its standard error
    light: Float[np.ndarray, "h w"]  # change of brightness, the mean of the colours
    light_error: Float[np.ndarray, "h w"]
    shown: Bool[np.ndarray, "h w"]  # where the change of brightness is more than noise
    support: Float[np.ndarray, "h w"]  # e_B^2 - e_A^2, mean of the colours; above 0: speaks for A

    @property
    def strength(self) -> Float[np.ndarray, "h w"]:
        """How much each pixel would change: root mean square over the colours."""
        return np.sqrt(np.square(self.change).mean(0))


@dataclass(frozen=True)
class Explanation:
    """What a cell named `own` would be as `other`. Images are [-1, 1]."""

    own: str
    other: str
    image: Float[np.ndarray, "c h w"]
    map: Map
    starts: Float[np.ndarray, " s"]
    as_own: Float[np.ndarray, "s c h w"]  # drawn anew as what it is, from each starting level
    as_other: Float[np.ndarray, "s c h w"]

    @property
    def difference(self) -> Float[np.ndarray, "s c h w"]:
        """What drawing the cell as the other class does that drawing it as its own does not."""
        return self.as_other - self.as_own

    @property
    def counterfactual(self) -> Float[np.ndarray, "s c h w"]:
        """The cell itself with that difference, in [-1, 1]."""
        return (self.image + self.difference).clip(-1, 1)

    def save(self, path: Path) -> None:
        """Write one NPZ file: arrays and two names, no pickle."""
        arrays = {name: value for name, value in vars(self).items() if name != "map"}
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays, **vars(self.map))

    @classmethod
    def load(cls, path: Path) -> Explanation:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            found = Map(**{field.name: file[field.name] for field in fields(Map)})
            names = (field.name for field in fields(cls) if field.name != "map")
            arrays = {name: file[name] for name in names}
        words = {name: str(arrays[name]) for name in ("own", "other")}
        return cls(map=found, **arrays | words)


def explain(
    denoiser: Denoiser, classes: Classes, image: Float[Tensor, "c h w"], digest: str, own: str,
    others: Sequence[str], settings: Settings, space: Space = PIXELS,
) -> list[Explanation]:  # fmt: skip
    """What a cell named `own` would be as each of `others`; `digest` decides its noise.

    `image` is in [-1, 1] whatever the space; noise levels are those of pixels, multiplied by its scale.

    Raises LabelError for a class that the model does not know.
    """
    labels = [classes.index(name) for name in (own, *others)]
    maps = measure(denoiser, image, digest, labels, settings, space)
    drawn = redraw(denoiser, image, digest, labels, settings, space).cpu().numpy()
    clean, starts = image.cpu().numpy(), np.array(settings.starts, dtype=np.float32)
    return [
        Explanation(own, other, clean, found, starts, drawn[:, 0], drawn[:, place])
        for place, (other, found) in enumerate(zip(others, maps, strict=True), start=1)
    ]


def measure(
    denoiser: Denoiser, image: Float[Tensor, "c h w"], digest: str, labels: Sequence[int],
    settings: Settings, space: Space = PIXELS,
) -> list[Map]:  # fmt: skip
    """A map for each label after the first, which is the cell's own class."""
    guessed = guesses(denoiser, image, digest, labels, settings.draws, space).double()
    errors = (guessed - image).cpu().numpy()
    return [_map(errors[:, 0], errors[:, place], settings) for place in range(1, len(labels))]


def _map(
    own: Float[np.ndarray, "t c h w"], other: Float[np.ndarray, "t c h w"], settings: Settings
) -> Map:
    """From the errors of two classes in every trial, guess less image."""
    pairs = (other - own).reshape(len(settings.levels), settings.pairs, 2, *own.shape[1:]).mean(2)
    change, error = mean_and_error(pairs)
    light, light_error = mean_and_error(pairs.mean(2))
    freedom = len(settings.levels) * (settings.pairs - 1)
    shown = beyond_noise(light, light_error, freedom, settings.discovery)
    support = (np.square(other) - np.square(own)).mean((0, 1))
    return Map(
        change.astype(np.float32),
        error.astype(np.float32),
        light.astype(np.float32),
        light_error.astype(np.float32),
        shown,
        support.astype(np.float32),
    )


@torch.inference_mode()
def guesses(
    denoiser: Denoiser, image: Float[Tensor, "c h w"], digest: str, labels: Sequence[int],
    draws: Draws, space: Space = PIXELS,
) -> Float[Tensor, "t k c h w"]:  # fmt: skip
    """The guess of each class in each trial, decoded, in the frame of the image."""
    views = [VIEWS[trial.pose] for trial in draws.trials]
    shape = space.shape(image.shape[-1])
    noise = [draws.noise(i, [digest], shape)[0] for i in range(len(draws))]
    sigma = torch.from_numpy(draws.sigmas).to(image) * space.scale
    shown = torch.stack([view(image) for view in views]).split(BATCH)
    noisy = torch.cat([space.encode(part) for part in shown])
    noisy = noisy + sigma[:, None, None, None] * torch.stack(noise).to(image)
    asked = torch.tensor(labels, device=image.device).expand(len(draws), -1)
    parts = zip(noisy.split(BATCH), sigma.split(BATCH), asked.split(BATCH), strict=True)
    guessed = torch.cat([denoiser(*part).flatten(0, 1) for part in parts])
    found = _decoded(space, guessed).unflatten(0, (-1, len(labels)))
    return torch.stack([view.undo(guess) for view, guess in zip(views, found, strict=True)])


def neutral(
    denoiser: Denoiser,
    classes: Classes,
    image: Float[Tensor, "c h w"],
    digest: str,
    seed: int,
    space: Space = PIXELS,
) -> Float[Tensor, "c h w"]:
    """What "any cell" has in place of this one, guessed through so much noise that little is left."""
    settings = Settings(levels=(VEIL,), pairs=4, seed=seed)
    found = guesses(denoiser, image, digest, [classes.any], settings.draws, space)
    return found.mean((0, 1))


def mean_and_error(
    values: Float[np.ndarray, "l p *rest"],
) -> tuple[Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"]]:
    """Mean over levels and draws, and its standard error from the scatter within the levels."""
    levels, draws = values.shape[:2]
    variance = values.var(1, ddof=1).sum(0) / draws / levels**2
    return values.mean((0, 1)), np.sqrt(variance)


def beyond_noise(
    mean: Float[np.ndarray, "h w"], error: Float[np.ndarray, "h w"], freedom: int, rate: float
) -> Bool[np.ndarray, "h w"]:
    """Pixels whose mean is not 0, of which a share of at most `rate` is expected to be noise."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.nan_to_num(np.abs(mean) / error, nan=0.0, posinf=np.inf)
    chance = 2 * stdtr(freedom, -ratio)
    return false_discovery_control(chance.ravel()).reshape(mean.shape) <= rate


@torch.inference_mode()
def redraw(
    denoiser: Denoiser, image: Float[Tensor, "c h w"], digest: str, labels: Sequence[int],
    settings: Settings, space: Space = PIXELS,
) -> Float[Tensor, "s k c h w"]:  # fmt: skip
    """The cell drawn anew as each class from each starting level, all from the same noise.

    On pixels every pass sees what is drawn in another view, so that the network's grid of patches averages
    out.
    """
    starts, classes = len(settings.starts), len(labels)
    clean = space.encode(image[None])[0]
    noise = standard_normal(tuple(clean.shape), settings.seed, digest, DRAWING).to(clean)
    levels = np.geomspace(settings.starts, LAST, settings.steps).repeat(classes, axis=1)
    sigmas = torch.from_numpy(np.vstack([levels, 0 * levels[:1]])).to(clean) * space.scale
    asked = torch.tensor(labels, device=clean.device).repeat(starts)[:, None]
    views = VIEWS if space is PIXELS else (STILL,)
    drawn = clean + sigmas[0].view(-1, 1, 1, 1) * noise
    for step, (here, there) in enumerate(pairwise(sigmas)):
        guess = _seen(denoiser, drawn, here, asked, views[5 * step % len(views)])
        drawn = guess + (there / here).view(-1, 1, 1, 1) * (drawn - guess)
    grain = torch.full_like(sigmas[0], GRAIN * space.scale)
    last = [_seen(denoiser, drawn, grain, asked, view) for view in views[::5]]
    return _decoded(space, torch.stack(last).mean(0)).view(starts, classes, *image.shape)


def _decoded(space: Space, latents: Tensor) -> Tensor:
    """Images, a batch at a time."""
    return torch.cat([space.decode(part) for part in latents.split(BATCH)])


def _seen(
    denoiser: Denoiser, images: Tensor, sigma: Tensor, labels: Tensor, view: View
) -> Float[Tensor, "n c h w"]:
    """One guess for each image, made in a view and put back."""
    return view.undo(denoiser(view(images), sigma, labels)[:, 0])
