"""One slide in the colours of another.

A dye takes away a share of the light, so what adds up is optical density (Beer and Lambert):

    d  =  -ln(light / background)              background: the light of the empty field
    d' =  d * (nucleus of there / nucleus of here)        colour by colour
    light' = background of there * exp(-d')

Background and nucleus are the two things in every frame that are meant to look alike on all slides.
`restain` from here to there and back gives the same image, but for what is cut off at 0 and 255. With
equal nuclei it only brings the empty field to one light: a white balance. The nuclei of different classes
differ in density, so that frame by frame the second step also takes away something of the class: measure
it before you use it.

Source: Ruifrok and Johnston 2001, Anal. Quant. Cytol. Histol. 23, 291-299 (optical density); one gain for
each colour, from the nucleus, instead of their matrix of dyes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Num

BRIGHT = 90  # percentile of brightness from which on a pixel is the empty field
DARKEST = 1.0  # of 255; darker light counts as this much
GAINS = (0.25, 4.0)  # of density; a frame that asks for more shows no nucleus like the others


@dataclass(frozen=True)
class Stain:
    """How a slide looks: light of the empty field, 0 to 255, and density of nuclei, red green blue."""

    background: tuple[float, float, float]
    nucleus: tuple[float, float, float]


def background(pixels: Num[np.ndarray, "h w 3"]) -> Float[np.ndarray, " 3"]:
    """Light of the empty field: the median colour of the brightest tenth of the pixels, 0 to 255."""
    brightness = pixels.mean(2)
    bright = pixels[brightness >= np.percentile(brightness, BRIGHT)]
    return np.median(bright, axis=0).clip(min=DARKEST).astype(np.float64)


def optical_density(
    pixels: Num[np.ndarray, "h w 3"], light: Float[np.ndarray, " 3"]
) -> Float[np.ndarray, "h w 3"]:
    """-ln(light / background), 0 and up; light above the background counts as background."""
    return -np.log((np.maximum(pixels, DARKEST) / light).clip(max=1))


def measure_stain(pixels: Num[np.ndarray, "h w 3"], nucleus: Bool[np.ndarray, "h w"]) -> Stain:
    """Stain of one frame, given which pixels are nucleus (find.py)."""
    light = background(pixels)
    density = np.median(optical_density(pixels, light)[nucleus], axis=0)
    return Stain(_triple(light), _triple(density))


def restain(
    pixels: Num[np.ndarray, "h w 3"], here: Stain, there: Stain
) -> Float[np.ndarray, "h w 3"]:
    """Pixels of a slide that looks like `here`, 0 to 255, in the colours of `there`.

    The gain of each colour is kept within `GAINS`.
    """
    density = -np.log(np.maximum(pixels, DARKEST) / np.array(here.background))
    own, wanted = np.array(here.nucleus), np.array(there.nucleus)
    gain = np.where(own == wanted, 1.0, (wanted / own.clip(min=1e-6)).clip(*GAINS))
    return (np.array(there.background) * np.exp(-density * gain)).clip(0, 255)


def _triple(values: np.ndarray) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
