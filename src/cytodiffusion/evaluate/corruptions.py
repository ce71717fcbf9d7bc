"""Images that no one should name, made from images of cells.

Each is a function of an image and a seed alone:

    blur          out of focus: a Gaussian of 4 to 6 % of the side
    empty         no cell: the field's own light, a little uneven, with camera noise
    torn          a jagged line through the cell, and nothing but field beyond it
    two cells     the cell and its turned mirror image, touching: their optical densities add up
    other stain   brown where haematoxylin was blue, as of a peroxidase stain, with faint eosin

An image is [-1, 1], and light is (image + 1) / 2; optical density is -ln of light. The field is taken
to be what the brightest tenth of the pixels shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from cytodiffusion.data.images import to_pixels, to_tensor
from cytodiffusion.data.transforms import HED
from cytodiffusion.errors import SettingsError

Image = Float[Tensor, "3 s s"]
DARKEST = 1 / 255  # least light


def corrupt(kind: str, image: Image, seed: int) -> Image:
    """One of CORRUPTIONS. Raises SettingsError for another."""
    if kind not in CORRUPTIONS:
        raise SettingsError(
            f"There is no corruption '{kind}'. There are: {', '.join(CORRUPTIONS)}."
        )
    rng = np.random.default_rng((seed, list(CORRUPTIONS).index(kind)))
    return CORRUPTIONS[kind](image, rng).clamp(-1, 1)


def corrupted(
    kind: str, canvases: UInt8[np.ndarray, "n 3 s s"], digests: Sequence[str], size: int, seed: int
) -> UInt8[np.ndarray, "n 3 size size"]:
    """Corrupted copies, the centre of the canvases. What happens to an image hangs on its digest."""
    start = (canvases.shape[-1] - size) // 2
    found = []
    for canvas, digest in zip(canvases, digests, strict=True):
        image = corrupt(kind, to_tensor(canvas), seed + int(digest[:12], 16))
        found.append(to_pixels(image[:, start : start + size, start : start + size]))
    return np.stack(found)


def _field(image: Image) -> Float[Tensor, "3 1 1"]:
    """What the field looks like between the cells."""
    return image.flatten(1).quantile(0.9, dim=1)[:, None, None]


def _blur(image: Image, rng: np.random.Generator) -> Image:
    width = rng.uniform(0.04, 0.06) * image.shape[-1]
    reach = math.ceil(3 * width)
    weights = (-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * width**2)).exp().to(image)
    weights = (weights / weights.sum()).expand(3, 1, 1, -1)
    for _ in range(2):  # along rows, then along columns
        padded = functional.pad(image[None], (reach, reach, 0, 0), mode="replicate")
        image = functional.conv2d(padded, weights, groups=3)[0].transpose(1, 2)
    return image


def _empty(image: Image, rng: np.random.Generator) -> Image:
    y, x = _grid(image)
    slope = rng.normal(0, 0.03, 2)
    noise = torch.from_numpy(rng.normal(0, 0.02, image.shape)).to(image)
    return _field(image) + slope[0] * y + slope[1] * x + noise


def _torn(image: Image, rng: np.random.Generator) -> Image:
    y, x = _grid(image)
    angle, phases = rng.uniform(0, 2 * math.pi), rng.uniform(0, 2 * math.pi, 3)
    along, across = (
        x * math.cos(angle) + y * math.sin(angle),
        y * math.cos(angle) - x * math.sin(angle),
    )
    jags = sum(
        0.04 * (waves * along + phase).sin()
        for waves, phase in zip((7.0, 13.0, 29.0), phases, strict=True)
    )
    return torch.where(across > jags + rng.uniform(-0.1, 0.1), _field(image), image)


def _two_cells(image: Image, rng: np.random.Generator) -> Image:
    field = _field(image)
    far = round(rng.uniform(0.18, 0.24) * image.shape[-1])
    other = torch.rot90(image.flip(-1), int(rng.integers(4)), (-2, -1))
    light = _light(_moved(image, -far, field)) * _light(_moved(other, far, field))
    return torch.rot90(2 * light / _light(field) - 1, int(rng.integers(2)), (-2, -1))


def _other_stain(image: Image, rng: np.random.Generator) -> Image:
    dyes = HED.to(image)
    density = (_light(_field(image)).log() - _light(image).log()).clamp(min=0)
    blue, pink, brown = torch.einsum("chw,cd->dhw", density, torch.linalg.inv(dyes))
    turned = rng.uniform(0.7, 0.9)
    amounts = torch.stack([(1 - turned) * blue, 0.5 * pink, brown + turned * blue])
    stained = torch.einsum("dhw,dc->chw", amounts, dyes)
    return 2 * _light(_field(image)) * (-stained).exp() - 1


def _grid(image: Image) -> tuple[Tensor, Tensor]:
    """Rows and columns of the pixels, -1 to 1 from edge to edge."""
    line = torch.linspace(-1, 1, image.shape[-1]).to(image)
    return line[:, None], line[None]


def _light(image: Tensor) -> Tensor:
    return ((image + 1) / 2).clamp(min=DARKEST)


def _moved(image: Image, columns: int, field: Tensor) -> Image:
    """The image moved to the right by some columns, the field where it has left."""
    moved = torch.roll(image, columns, -1)
    if columns > 0:
        moved[..., :columns] = field
    else:
        moved[..., columns:] = field
    return moved


CORRUPTIONS: dict[str, Callable[[Tensor, np.random.Generator], Tensor]] = {
    "blur": _blur,
    "empty": _empty,
    "torn": _torn,
    "two cells": _two_cells,
    "other stain": _other_stain,
}
