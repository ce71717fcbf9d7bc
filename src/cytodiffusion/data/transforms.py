"""Changes that leave the class of a cell as it is: poses, small affine moves, stain, blur, noise.

The eight poses are exact and can be undone. The rest imitate another slide or microscope and are
drawn for a whole batch at once from the generator that is handed in. An affine move and the crop
from the canvas to the model's size are one bilinear resampling; an image that is not moved keeps
its pixels exactly.

Images are [-1, 1]; stain is changed in optical density, -ln of the transmitted light, where the
dyes add up (Ruifrok and Johnston 2001, colour deconvolution of haematoxylin, eosin and DAB).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Pose:
    """Mirror left to right, then turn counter-clockwise by quarter turns."""

    mirror: bool
    turns: int

    def __call__(self, image: Tensor) -> Tensor:
        image = image.flip(-1) if self.mirror else image
        return torch.rot90(image, self.turns, (-2, -1))

    def undo(self, image: Tensor) -> Tensor:
        """The image before `self` was applied."""
        image = torch.rot90(image, -self.turns, (-2, -1))
        return image.flip(-1) if self.mirror else image


POSES = tuple(Pose(mirror, turns) for mirror in (False, True) for turns in range(4))


FAR = 3  # a share of the images imitates laboratories that differ this much more


class Augmentation(BaseModel):
    """How far training images are moved and stained. Zero switches a change off."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    poses: bool = Field(True, description="a random one of the eight exact poses")
    affine: float = Field(0.5, ge=0, le=1, description="share of images turned, zoomed and shifted")
    zoom: float = Field(0.15, ge=0, lt=1, description="largest change of ln scale")
    shift: float = Field(0.06, ge=0, le=0.25, description="largest shift / image side")
    brightness: float = Field(0.06, ge=0, description="std of the added light, image units")
    contrast: float = Field(0.10, ge=0, description="std of ln contrast")
    hue: float = Field(0.03, ge=0, description="std of the turn of hue, turns of the colour wheel")
    stain: float = Field(0.10, ge=0, description="std of ln gain of each dye (HED)")
    light: float = Field(0.0, ge=0, description="std of the density added to each colour")
    far: float = Field(0.0, ge=0, le=1, description=f"share with {FAR} times the change of colour")
    blur: float = Field(0.1, ge=0, le=1, description="share of images that are blurred")
    noise: float = Field(0.1, ge=0, le=1, description="share of images with camera noise")

    @property
    def margin(self) -> float:
        """How much wider than the model's crop the canvas must be."""
        return 1.5 if self.affine else 1.0


def augment(
    canvas: Float[Tensor, "n 3 s s"],
    size: int,
    settings: Augmentation,
    generator: torch.Generator,
) -> Float[Tensor, "n 3 size size"]:
    """Draw one change for each image; returns the centre `size` px of the changed canvas."""
    images = resample(canvas, size, _moves(len(canvas), settings, generator))
    images = change_stain(images, settings, generator)
    images = blur(images, settings.blur, generator)
    images = camera_noise(images, settings.noise, generator)
    return random_poses(images, generator) if settings.poses else images


def _uniform(count: int, reach: float, generator: torch.Generator) -> Tensor:
    return (2 * torch.rand(count, generator=generator, device=generator.device) - 1) * reach


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _moves(
    count: int, settings: Augmentation, generator: torch.Generator
) -> Float[Tensor, "n 2 3"]:
    """One affine matrix an image: turn, zoom and shift; the identity for those left alone."""
    moved = (
        torch.rand(count, generator=generator, device=generator.device) < settings.affine
    ).float()
    angle = moved * _uniform(count, math.pi, generator)
    zoom = (moved * _uniform(count, settings.zoom, generator)).exp()
    shift = moved[:, None] * 2 * _uniform(2 * count, settings.shift, generator).view(count, 2)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    turn = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    return torch.cat([turn, shift[:, :, None]], 2)


def resample(
    canvas: Float[Tensor, "n 3 s s"], size: int, moves: Float[Tensor, "n 2 3"]
) -> Float[Tensor, "n 3 size size"]:
    """Sample `size` px from the centre of the canvas after an affine move, bilinearly.

    With the identity this is the centre crop, to rounding, when canvas - size is even.
    """
    grid = functional.affine_grid(moves, [len(canvas), 3, size, size], align_corners=False)
    grid = grid * (size / canvas.shape[-1])
    return functional.grid_sample(canvas, grid, padding_mode="border", align_corners=False)


def unmoved(canvas: Float[Tensor, "n 3 s s"], size: int) -> Float[Tensor, "n 3 size size"]:
    """The centre `size` px of the canvas, as they are."""
    still = torch.eye(2, 3, device=canvas.device).expand(len(canvas), 2, 3)
    return resample(canvas, size, still)


def random_poses(images: Tensor, generator: torch.Generator) -> Tensor:
    """Give every image one of the eight poses."""
    which = torch.randint(len(POSES), (len(images),), generator=generator, device=generator.device)
    mirror, turns = (part[:, None, None, None] for part in (which // 4, which % 4))  # as in POSES
    images = torch.where(mirror == 1, images.flip(-1), images)
    images = torch.where(turns % 2 == 1, torch.rot90(images, 1, (-2, -1)), images)
    return torch.where(turns >= 2, torch.rot90(images, 2, (-2, -1)), images)


# Absorbance of haematoxylin, eosin and DAB in red, green, blue; rows of unit length.
HED = functional.normalize(
    torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]]), dim=1
)


def change_stain(
    images: Tensor, settings: Augmentation, generator: torch.Generator
) -> Float[Tensor, "n 3 h w"]:
    """Random gain of each dye, colour of the light, turn of hue, contrast and brightness."""
    n = len(images)
    reach = _reach(n, settings.far, generator)
    if settings.stain or settings.light:
        density = -((images + 1) / 2).clamp(min=1 / 255).log()
        gain = (settings.stain * reach * _normal(generator, n, 3)).exp()
        dyes = HED.to(images)
        mix = torch.linalg.inv(dyes) @ (gain[:, :, None] * dyes)
        density = torch.einsum("nchw,ncd->ndhw", density, mix)
        if settings.light:
            added = settings.light * reach * _normal(generator, n, 3)
            density = density + added[:, :, None, None]
        images = 2 * (-density).exp() - 1
    if settings.hue:
        images = turn_hue(images, settings.hue * reach[:, 0] * _normal(generator, n))
    each = reach[:, :, None, None]
    contrast = (settings.contrast * each * _normal(generator, n, 1, 1, 1)).exp()
    brighter = settings.brightness * each * _normal(generator, n, 1, 1, 1)
    mean = images.mean((2, 3), keepdim=True)
    return ((images - mean) * contrast + mean + brighter).clamp(-1, 1)


def _reach(count: int, far: float, generator: torch.Generator) -> Float[Tensor, "n 1"]:
    """How many times the usual change of colour each image gets: 1, or FAR for a share of them."""
    if not far:
        return torch.ones(count, 1, device=generator.device)
    chosen = torch.rand(count, 1, generator=generator, device=generator.device) < far
    return torch.where(chosen, float(FAR), 1.0)


def turn_hue(images: Tensor, turns: Float[Tensor, " n"]) -> Float[Tensor, "n 3 h w"]:
    """Turn colours about the grey axis by `turns` of a full circle; grey stays as it is."""
    angle = 2 * math.pi * turns
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    eye = torch.eye(3).to(images)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]).to(images) / math.sqrt(3)
    matrix = cos * eye + (1 - cos) / 3 + sin * cross
    return torch.einsum("nchw,ndc->ndhw", images, matrix)


def blur(images: Tensor, share: float, generator: torch.Generator) -> Float[Tensor, "n 3 h w"]:
    """Gaussian blur of 0.4 to 1 px for a share of the images."""
    chosen = torch.rand(len(images), generator=generator, device=generator.device) < share
    widths = 0.4 + 0.6 * torch.rand(len(images), generator=generator, device=generator.device)
    if not share:
        return images
    offsets = torch.arange(-2.0, 3.0, device=images.device)
    kernel = (-(offsets**2) / (2 * widths[:, None] ** 2)).exp()
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)
    flat = functional.pad(images, (2, 2, 2, 2), mode="replicate").flatten(0, 1)[None]
    flat = functional.conv2d(flat, kernel[:, None, :, None], groups=len(kernel))
    flat = functional.conv2d(flat, kernel[:, None, None, :], groups=len(kernel))
    blurred = flat[0].unflatten(0, (-1, 3))
    return torch.where(chosen[:, None, None, None], blurred, images)  # no waiting for a count


def camera_noise(
    images: Tensor, share: float, generator: torch.Generator
) -> Float[Tensor, "n 3 h w"]:
    """Independent noise of std up to 0.04 on every pixel of a share of the images."""
    n = len(images)
    chosen = (torch.rand(n, generator=generator, device=generator.device) < share).float()
    level = 0.04 * chosen * torch.rand(n, generator=generator, device=generator.device)
    return images + level[:, None, None, None] * _normal(generator, *images.shape)
