"""What is the same in every frame of one laboratory: light, stain, and how large cells are.

    light     of the empty field, red green blue                    (stain.py)
    density   of nuclei, red green blue
    nucleus   diameter / shorter side of the frame                  (find.py)
    cell      the same of the whole cell

A model is trained on frames of one look, or of a few. Frames of another can be brought to it without
any labels: the light frame by frame, the scale for a whole batch, because a small cell must stay small.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from cytodiffusion.data.find import Found, find_cell, small_pixels
from cytodiffusion.data.stain import Stain, background, restain
from cytodiffusion.errors import DataError

Colour = tuple[float, float, float]
Match = Literal["nothing", "light", "stain"]

LIGHT = 0.05  # optical density; single frames of PBC lie within 0.01 of each other
LARGER_ABROAD = (
    1.1  # other light is that of another laboratory, and its frames have their own scale
)
LARGER_AT_HOME = 1.7  # promyelocytes of PBC have 1.48; a crop to the model's own 55 % makes 1.8


class Look(BaseModel):
    """Medians over frames. The defaults are those of the white cells of PBC's train split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    light: Colour = Field((254, 228, 203), description="of the empty field, 0 to 255")
    density: Colour = Field((0.95, 1.49, 0.38), description="optical density of nuclei")
    nucleus: float = Field(0.271, gt=0, description="diameter / shorter side of the frame")
    cell: float = Field(0.422, gt=0, description="diameter / shorter side of the frame")


def measure_look(images: Iterable[Image.Image]) -> tuple[Look, int]:
    """Look of RGB frames of white cells, and in how many of them one was found: the others do not count.

    Raises DataError where there is none in any.
    """
    found = [(cell, min(image.size)) for image in images if (cell := find_cell(image)) is not None]
    if not found:
        raise DataError(
            "No white cell was found in these images, so their light and scale are not known. Are they "
            "stained smears in colour? Give the scale with --crop instead."
        )
    look = Look(
        light=_median(cell.stain.background for cell, _ in found),
        density=_median(cell.stain.nucleus for cell, _ in found),
        nucleus=float(np.median([cell.nucleus / side for cell, side in found])),
        cell=float(np.median([cell.cell / side for cell, side in found])),
    )
    return look, len(found)


def crop_for(crop: float, here: Look, there: Look) -> float:
    """The crop that shows cells of the look `here` as large as `crop` does those of `there`.

    By the nuclei, whose size is measured more steadily than the cells', and varies less with class.
    """
    return round(crop * here.nucleus / there.nucleus, 3)


def other_light(here: Look, there: Look) -> bool:
    """Whether the empty field clearly has another colour: by more than `LIGHT` in optical density."""
    apart = np.log(np.array(here.light) / np.array(there.light))
    return bool(np.abs(apart).max() > LIGHT)


def larger_cells(here: Look, there: Look) -> bool:
    """Whether cells are larger in the frame than their class would make them.

    In the light of training they may be of the class with the largest nuclei, taken as in training.
    Smaller ones are left alone: they may be platelets.
    """
    least = LARGER_ABROAD if other_light(here, there) else LARGER_AT_HOME
    return here.nucleus > least * there.nucleus


def _median(colours: Iterable[Colour]) -> Colour:
    red, green, blue = np.median(list(colours), axis=0).tolist()
    return red, green, blue


def matched(image: Image.Image, match: Match, look: Look, found: Found | None) -> Image.Image:
    """The frame in the light, or the light and stain, of `look`. Without a cell, in its light."""
    if match == "nothing":
        return image
    light = tuple(background(small_pixels(image)).tolist())
    nucleus = found.stain.nucleus if found is not None and match == "stain" else look.density
    there = Stain(look.light, look.density)
    pixels = restain(np.asarray(image), Stain(light, nucleus), there)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))
