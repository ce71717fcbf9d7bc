"""A small U-Net on pixels that guesses for every class, trained from scratch.

PixelUnshuffle folds p x p pixels into channels, so that a 64 px cell is worked on as a 16 x 16 grid.
The same trunk comes in two forms:

    heads         one trunk and one guess for "any cell"; a small head for each class says by how
                  much its guess departs from that: all guesses from one pass
    conditional   the class is an input of every block: one pass for each class

The last layer also sees the noisy pixels themselves, through filters that depend on the noise level, so
that the trunk need not carry them. Label K, one past the classes, means "any cell".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

Form = Literal["heads", "conditional"]


class CompactSettings(BaseModel):
    """Shape of a compact network."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    classes: int = Field(ge=1, description="number of classes, without 'any cell'")
    size: int = Field(64, ge=8, description="height and width of the image, px")
    form: Form = Field("heads", description="a head for each class, or the class as an input")
    unshuffle: int = Field(4, ge=1, description="pixels folded into channels, in each direction")
    width: int = Field(48, ge=8, description="channels of the first level")
    multipliers: tuple[int, ...] = Field((1, 2, 4), description="channels of each level / width")
    blocks: int = Field(2, ge=1, description="residual blocks a level, down and up")
    attention: int = Field(8, ge=0, description="largest grid side with self-attention")
    head_width: int = Field(32, ge=1, description="hidden channels of each head")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout inside the residual blocks")

    @property
    def grid(self) -> int:
        """Side of the grid on which the first level works."""
        return self.size // self.unshuffle


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(channels, channels // 16 or 1), channels)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Fourier(nn.Module):
    """cos(2 pi (f x + phase)) for fixed random f: what the network knows of the noise level."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("frequency", torch.randn(channels, generator=generator))
        self.register_buffer("phase", torch.rand(channels, generator=generator))

    frequency: Tensor
    phase: Tensor

    def forward(self, x: Float[Tensor, " n"]) -> Float[Tensor, "n f"]:
        turns = torch.outer(x, self.frequency) + self.phase
        return math.sqrt(2) * torch.cos(2 * math.pi * turns)


class ResidualBlock(nn.Module):
    """Two convolutions; the noise level (and class) scales and shifts between them."""

    def __init__(self, inside: int, outside: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inside), nn.Conv2d(inside, outside, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * outside)
        self.norm2 = _norm(outside)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zero(nn.Conv2d(outside, outside, 3, padding=1))
        self.skip = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(functional.silu(self.norm1(x)))
        h = functional.silu(torch.addcmul(shift, self.norm2(h), 1 + scale))
        return self.skip(x) + self.conv2(self.dropout(h))


class Attention(nn.Module):
    """Self-attention over the grid, with heads of 32 channels where that divides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = channels // 32 if channels % 32 == 0 else 1
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, 3, self.heads, c // self.heads, h * w).unbind(1)
        seen = functional.scaled_dot_product_attention(*(t.transpose(-1, -2) for t in (q, k, v)))
        return x + self.out(seen.transpose(-1, -2).reshape(n, c, h, w))


class Stage(nn.Module):
    """A residual block, followed by attention where the grid is small enough."""

    def __init__(
        self, inside: int, outside: int, embedding: int, dropout: float, attend: bool
    ) -> None:
        super().__init__()
        self.block = ResidualBlock(inside, outside, embedding, dropout)
        self.attention = Attention(outside) if attend else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.attention(self.block(x, embedding))


class Trunk(nn.Module):
    """The U-Net proper: a grid of channels in, the same grid with `width` channels out."""

    def __init__(self, settings: CompactSettings, embedding: int) -> None:
        super().__init__()
        widths = [settings.width * m for m in settings.multipliers]
        sides = [settings.grid // 2**level for level in range(len(widths))]

        def stage(inside: int, outside: int, side: int) -> Stage:
            return Stage(inside, outside, embedding, settings.dropout, side <= settings.attention)

        blocks = range(settings.blocks)
        self.down = nn.ModuleList(
            nn.ModuleList(stage(width, width, side) for _ in blocks)
            for width, side in zip(widths, sides, strict=True)
        )
        self.shrink = nn.ModuleList(
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1) for fine, coarse in pairwise(widths)
        )
        self.middle = stage(widths[-1], widths[-1], sides[-1])
        self.up = nn.ModuleList(
            nn.ModuleList(stage(2 * width, width, side) for _ in blocks)
            for width, side in zip(widths, sides, strict=True)
        )
        self.grow = nn.ModuleList(nn.Conv2d(coarse, fine, 1) for fine, coarse in pairwise(widths))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        kept = []
        for level in range(len(self.down)):
            x = self.shrink[level - 1](x) if level else x
            for stage in cast(nn.ModuleList, self.down[level]):
                x = stage(x, embedding)
                kept.append(x)
        x = self.middle(x, embedding)
        for level in reversed(range(len(self.up))):
            for stage in cast(nn.ModuleList, self.up[level]):
                x = stage(torch.cat([x, kept.pop()], dim=1), embedding)
            if level:
                fine = kept[-1].shape[-2:]
                x = functional.interpolate(self.grow[level - 1](x), size=fine)
        return x


class Filters(nn.Module):
    """Small filters on the noisy pixels, mixed according to the noise level.

    Where there is little noise a guess needs the finest detail, where there is much it needs a blur: no
    fixed filter gives both, and the trunk has too few channels to carry every pixel.
    """

    def __init__(self, pixels: int, embedding: int, copies: int = 2) -> None:
        super().__init__()
        self.copies = copies
        self.gain = nn.Linear(embedding, copies * pixels)
        self.mix = _zero(nn.Conv2d(copies * pixels, pixels, 3, padding=1))

    def forward(self, folded: Float[Tensor, "n p g g"], embedding: Tensor) -> Tensor:
        gains = 1 + self.gain(embedding)[:, :, None, None]
        return self.mix(folded.repeat(1, self.copies, 1, 1) * gains)


class Change(nn.Module):
    """By how much the guess of each class departs from the guess for "any cell"."""

    def __init__(self, settings: CompactSettings, pixels: int) -> None:
        super().__init__()
        self.classes, hidden = settings.classes, settings.classes * settings.head_width
        self.spread = nn.Conv2d(settings.width, hidden, 3, padding=1)
        self.out = _zero(nn.Conv2d(hidden, settings.classes * pixels, 1, groups=settings.classes))

    def forward(self, grid: Float[Tensor, "n f g g"]) -> Float[Tensor, "n k p g g"]:
        return self.out(functional.silu(self.spread(grid))).unflatten(1, (self.classes, -1))


class CompactNetwork(nn.Module):
    """F(scaled image, ln(sigma)/4, labels) -> one raw guess for each label; see precondition.py."""

    def __init__(self, settings: CompactSettings) -> None:
        super().__init__()
        self.settings = settings
        conditional = settings.form == "conditional"
        embedding, pixels = 4 * settings.width, 3 * settings.unshuffle**2
        self.fourier = Fourier(settings.width)
        self.embed = nn.Sequential(
            nn.Linear(settings.width, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.label = nn.Embedding(settings.classes + 1, embedding) if conditional else None
        self.stem = nn.Conv2d(pixels, settings.width, 3, padding=1)
        self.trunk = Trunk(settings, embedding)
        self.norm = _norm(settings.width)
        self.base = _zero(nn.Conv2d(settings.width + pixels, pixels, 3, padding=1))
        self.filters = Filters(pixels, embedding)
        self.change = None if conditional else Change(settings, pixels)

    @property
    def features_told(self) -> int:
        """How many features `look` gives; those of the class-conditional form belong to a class."""
        return self.settings.width if self.change is not None else 0

    def embedding(
        self, log_sigma: Float[Tensor, " n"], label: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n e"]:
        """What every block is told: the noise level, and the class in the class-conditional form."""
        embedding = self.embed(self.fourier(log_sigma))
        if self.label is not None and label is not None:
            embedding = embedding + self.label(label)
        return functional.silu(embedding)

    def features(
        self,
        image: Float[Tensor, "n c h w"],
        log_sigma: Float[Tensor, " n"],
        label: Int[Tensor, " n"] | None = None,
    ) -> Float[Tensor, "n f g g"]:
        """What the trunk makes of a scaled noisy image, before the heads."""
        grid = self.stem(functional.pixel_unshuffle(image, self.settings.unshuffle))
        return functional.silu(self.norm(self.trunk(grid, self.embedding(log_sigma, label))))

    def shared(
        self,
        grid: Float[Tensor, "n f g g"],
        image: Float[Tensor, "n c h w"],
        log_sigma: Float[Tensor, " n"],
        label: Int[Tensor, " n"] | None = None,
    ) -> Float[Tensor, "n p g g"]:
        """The guess that all heads depart from, pixels folded into channels; float32, always."""
        folded = functional.pixel_unshuffle(image, self.settings.unshuffle)
        guess = self.base(torch.cat([grid, folded], dim=1)).float()
        return guess + self.filters(folded, self.embedding(log_sigma, label)).float()

    def forward(
        self,
        image: Float[Tensor, "n c h w"],
        log_sigma: Float[Tensor, " n"],
        labels: Int[Tensor, "n k"],
    ) -> Float[Tensor, "n k c h w"]:
        return self.look(image, log_sigma, labels)[0]

    def look(
        self,
        image: Float[Tensor, "n c h w"],
        log_sigma: Float[Tensor, " n"],
        labels: Int[Tensor, "n k"],
    ) -> tuple[Float[Tensor, "n k c h w"], Float[Tensor, "m f"]]:
        """The guesses, and the features that they are made from: means over the grid."""
        n, k = labels.shape
        label = None
        if self.label is not None:
            image = image.repeat_interleave(k, dim=0)
            log_sigma = log_sigma.repeat_interleave(k)
            label = labels.flatten()
        grid = self.features(image, log_sigma, label)
        guess = self.shared(grid, image, log_sigma, label)
        if self.change is None:
            return self._pixels(guess).view(n, k, *image.shape[1:]), grid.mean((2, 3))
        every = torch.cat([guess[:, None] + self.change(grid), guess[:, None]], dim=1)
        chosen = every[torch.arange(n, device=labels.device)[:, None], labels]
        return self._pixels(chosen), grid.mean((2, 3))

    def _pixels(self, folded: Tensor) -> Tensor:
        return functional.pixel_shuffle(folded, self.settings.unshuffle)


def for_classes(
    weights: Mapping[str, Tensor], known: Sequence[str], wanted: Sequence[str]
) -> dict[str, Tensor]:
    """Weights for other classes, or another order of them, matched by name.

    A class that is not known begins as "any cell", with no change of its own yet. Where none is known,
    what belongs to classes is left out.
    """
    if list(known) == list(wanted):
        return dict(weights)
    rows = [list(known).index(name) if name in known else None for name in wanted]
    found = {}
    for name, value in weights.items():
        heads, labels = ".change." in name, ".label." in name
        if not heads and not labels:
            found[name] = value
        elif any(row is not None for row in rows):
            parts = value.chunk(len(known) if heads else len(known) + 1)
            new = (
                parts[-1] if labels else parts[0]
            )  # of another class, but what comes of it is nothing
            new = torch.zeros_like(new) if "change.out." in name else new
            chosen = [new if row is None else parts[row] for row in rows]
            found[name] = torch.cat([*chosen, parts[-1]] if labels else chosen)
    return found
