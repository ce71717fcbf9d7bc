"""Any image file -> RGB, cropped to the cell, at the model's size.

    decode      bytes of any size and mode -> 8-bit RGB, turned upright
    Preprocess  the centre crop and size that a model was trained with; travels in its bundle
    to_tensor   8-bit -> [-1, 1]

Before the crop a frame can be brought to the light of the frames that the model was trained on (look.py).
The crop is a square with its side a fraction of the image's shorter side. Sampling the box goes
through one antialiased resize, so that the same cell gives the same pixels wherever it comes from.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from cytodiffusion.data.find import Found, find_cell
from cytodiffusion.data.look import Look, Match, matched
from cytodiffusion.errors import UnreadableImage, one_line

MAX_PIXELS = 64_000_000  # a larger image of one cell is a mistake or a decompression bomb


class Preprocess(BaseModel):
    """How an image becomes the network's input."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(64, ge=8, description="height and width given to the network, px")
    crop: float = Field(
        0.55, gt=0, le=4, description="side of the centre crop / shorter side of the image"
    )

    match: Match = Field("nothing", description="bring frames to the model's light, or stain too")
    each: bool = Field(False, description="centre each cell and bring it to the model's size")
    look: Look = Field(Look(), description="of the frames that the model was trained on")

    def describe(self) -> str:
        """What is done with a frame before it is resized, for programs that do it themselves."""
        light = ", ".join(f"{value:g}" for value in self.look.light)
        told = f"the centre square with a side of {self.crop:g} times the image's shorter side"
        if self.each:
            width = self.crop / self.look.cell
            told = f"a square {width:.3g} cells wide around the cell (data/find.py); without one, {told}"
        if self.match == "nothing":
            return told
        stain = " and nuclei the density of training" if self.match == "stain" else ""
        return (
            f"every colour of the frame scaled so that the empty field becomes ({light}){stain} "
            f"(`matched` in data/look.py); then {told}"
        )

    def canvas(self, image: Image.Image, margin: float = 1.0) -> UInt8[np.ndarray, "3 s s"]:
        """Centre crop, `margin` times as wide as the model's, at the model's pixels per cell.

        Where the crop reaches over the edge of the image, the outermost pixels are repeated. With
        `each`, a frame in which no cell is found is cropped as it would be without.
        """
        size = round(self.size * margin)
        found = find_cell(image) if self.each or self.match == "stain" else None
        x, y, side = self._square(image, found if self.each else None)
        image = matched(image, self.match, self.look, found)
        image, left, top = _widen(image, x, y, side * size / self.size)
        box = (left, top, left + side * size / self.size, top + side * size / self.size)
        small = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        return np.array(small).transpose(2, 0, 1)

    def _square(self, image: Image.Image, found: Found | None) -> tuple[float, float, float]:
        """Centre and side of the model's crop, px."""
        if found is None:
            return image.width / 2, image.height / 2, self.crop * min(image.size)
        return found.x, found.y, self.crop * found.cell / self.look.cell


def _widen(image: Image.Image, x: float, y: float, side: float) -> tuple[Image.Image, float, float]:
    """Repeat the outermost pixels until the square around (x, y) fits in.

    Returns the image and where the square's left upper corner lies in it.
    """
    left, top = x - side / 2, y - side / 2
    before = [max(0, int(np.ceil(-start))) for start in (top, left)]
    after = [
        max(0, int(np.ceil(start + side - length)))
        for start, length in ((top, image.height), (left, image.width))
    ]
    if not any(before + after):
        return image, left, top
    pixels = np.pad(np.asarray(image), (*zip(before, after, strict=True), (0, 0)), mode="edge")
    return Image.fromarray(pixels), left + before[1], top + before[0]


def decode(data: bytes) -> Image.Image:
    """Decode an image file to 8-bit RGB, upright.

    16-bit and float greys are brought to 8 bits by their own range of values; of 16-bit colours the upper
    8 bits are taken, which must be in use; transparency is laid on white. Raises UnreadableImage, saying
    why, for anything that is not one whole image.
    """
    if not data:
        raise UnreadableImage("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            _refuse_huge(image)
            _refuse_several(image)
            deep = image.format != "BMP" and any(";16" in str(tile) for tile in image.tile)
            image.load()
            if deep and image.mode.startswith("RGB"):  # as stored, with 16 bits: Pillow keeps 8
                _refuse_shallow(image.convert("RGB"))
            return _to_rgb(ImageOps.exif_transpose(image))
    except (UnreadableImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImage(
            f"more than {MAX_PIXELS:,} pixels ({one_line(error)}); crop single cells first"
        ) from error
    except UnidentifiedImageError as error:
        raise UnreadableImage("not an image in a known format") from error
    except Exception as error:  # a decoder of Pillow may raise anything
        raise UnreadableImage(f"damaged or truncated image ({one_line(error)})") from error


def _refuse_huge(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImage(
            f"{width} x {height} px is more than {MAX_PIXELS:,} pixels; crop single cells first"
        )


def _refuse_several(image: Image.Image) -> None:
    """Pages of one size are images of their own; smaller ones beside the first are of the same."""
    count, size = getattr(image, "n_frames", 1), image.size
    if image.format not in ("TIFF", "GIF") or count == 1:
        return
    image.seek(1)
    again = image.size
    image.seek(0)
    if again == size:
        raise UnreadableImage(f"{count} images in one file; save each in a file of its own")


def _refuse_shallow(rgb: Image.Image) -> None:
    """Of 10 or 12 bits in 16, Pillow leaves next to nothing."""
    brightest = np.asarray(rgb).max(initial=0)
    if brightest < 64:
        raise UnreadableImage(
            f"its 16-bit values reach {(int(brightest) + 1) * 256 - 1:,} of 65,535 at the most; save it "
            "with 8 bits a colour, or scale its values to the full range"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(grey: np.ndarray) -> np.ndarray:
    """Scale by the smallest of 8, 12 or 16 bits that holds the brightest pixel."""
    grey = np.nan_to_num(grey.astype(np.float64)).clip(min=0)
    brightest = grey.max(initial=0)
    full = next((f for f in (1.0, 255.0, 4095.0, 65535.0) if brightest <= f), brightest)
    if full == 1.0 and np.array_equal(grey, np.floor(grey)):
        full = 255.0  # whole numbers 0 and 1 are dark pixels, not black and white
    return np.round(grey / full * 255).astype(np.uint8)


def to_tensor(pixels: np.ndarray | Tensor) -> Float[Tensor, ...]:
    """8-bit values -> [-1, 1]."""
    return torch.as_tensor(pixels).float() / 127.5 - 1


def to_pixels(images: Float[Tensor, ...]) -> UInt8[np.ndarray, ...]:
    """[-1, 1] -> 8-bit values, rounded; what is outside the range is cut off."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
