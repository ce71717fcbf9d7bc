"""The paper's test-time augmentation: trial i shows every image in a view of its own.

A view is colour jitter (brightness, contrast and saturation by up to a quarter, hue by up to an
eighth of a turn), flips, and a turn by any angle. As its code was shipped, RandAugment followed the
jitter: two random operations of magnitude 9 of 30 (Cubuk et al. 2019, arXiv 1909.13719).

Source: Deltadahl et al. 2025, arXiv 2408.08982, and its published code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from cytodiffusion.data.images import to_pixels, to_tensor
from cytodiffusion.data.transforms import resample, turn_hue

GREY = torch.tensor([0.299, 0.587, 0.114])
Operation = Callable[[Image.Image, float], Image.Image]  # sign of the magnitude: -1 or 1


def _moved(matrix: Callable[[float, int], tuple[float, ...]]) -> Operation:
    return lambda image, sign: image.transform(
        image.size, Image.Transform.AFFINE, matrix(sign, image.width), Image.Resampling.NEAREST
    )


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, sign: kind(image).enhance(1 + 0.27 * sign)


# RandAugment's operations at magnitude 9 of 30.
OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, _: image,
    "shear x": _moved(lambda sign, _: (1, 0.09 * sign, 0, 0, 1, 0)),
    "shear y": _moved(lambda sign, _: (1, 0, 0, 0.09 * sign, 1, 0)),
    "translate x": _moved(lambda sign, width: (1, 0, 0.136 * sign * width, 0, 1, 0)),
    "translate y": _moved(lambda sign, width: (1, 0, 0, 0, 1, 0.136 * sign * width)),
    "rotate": lambda image, sign: image.rotate(9 * sign),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "colour": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "posterize": lambda image, _: ImageOps.posterize(image, 7),
    "solarize": lambda image, _: ImageOps.solarize(image, 178),
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
}


@dataclass(frozen=True)
class PaperView:
    """One draw of the augmentation, the same for every image it is shown."""

    seed: int
    trial: int
    shipped: bool = False  # with RandAugment, as the paper's code ran it

    def __call__(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        rng = np.random.default_rng((self.seed, self.trial))
        brightness, contrast, saturation = rng.uniform(0.75, 1.25, 3)
        light = (images + 1) / 2 * brightness
        light = _blend(light, _grey(light).mean((2, 3), keepdim=True), contrast)
        light = _blend(light, _grey(light), saturation)
        hue = torch.full((len(images),), float(rng.uniform(-0.125, 0.125))).to(images)
        images = turn_hue(2 * light - 1, hue).clamp(-1, 1)
        images = _rand_augment(images, rng) if self.shipped else images
        flips = [axis for axis in (-1, -2) if rng.random() < 0.5]
        angle = rng.uniform(0, 2 * math.pi)
        turn = [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]]
        moves = torch.tensor(turn).to(images).expand(len(images), 2, 3)
        return resample(images.flip(flips), images.shape[-1], moves)


def _grey(light: Tensor) -> Float[Tensor, "n 1 h w"]:
    return (light * GREY.to(light).view(3, 1, 1)).sum(1, keepdim=True)


def _blend(image: Tensor, other: Tensor, share: float) -> Tensor:
    return (other + share * (image - other)).clamp(0, 1)


def _rand_augment(images: Tensor, rng: np.random.Generator) -> Tensor:
    names = rng.choice(list(OPERATIONS), 2)
    signs = rng.choice([-1.0, 1.0], 2)
    changed = []
    for pixels in to_pixels(images.cpu()):
        image = Image.fromarray(pixels.transpose(1, 2, 0))
        for name, sign in zip(names, signs, strict=True):
            image = OPERATIONS[name](image, sign)
        changed.append(np.asarray(image).transpose(2, 0, 1))
    return to_tensor(np.stack(changed)).to(images)
