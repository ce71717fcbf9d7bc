"""What frames need, to look as those do that a model was trained on: their light undone, another crop.

No label is used. A glance at some of the frames tells whether they differ at all (docs/log.md 32).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cytodiffusion.data.images import Preprocess
from cytodiffusion.data.load import look_of
from cytodiffusion.data.look import Look, crop_for, larger_cells, other_light
from cytodiffusion.data.sample import Sample
from cytodiffusion.errors import DataError, SettingsError

GLANCE = 32  # images that are looked at
CLEAR = 8  # white cells that must be found in them


class Fit(NamedTuple):
    """What is done to the frames."""

    light: bool  # brought to that of training
    crop: float | None  # in place of the model's own
    told: str = ""  # what was found, for the reader
    look: Look | None = None  # of the frames, where something is done to them
    abroad: bool = False  # seen to be of another laboratory, by a light that is to be undone
    sure: bool = True  # False: too few white cells were seen to tell

    def settled(self, preprocess: Preprocess) -> Preprocess:
        """Preprocessing that does this to every frame, and takes their scale for that of training."""
        seen = self.look or preprocess.look
        own = {"nucleus": seen.nucleus, "cell": seen.cell} if self.crop else {}
        change: dict[str, object] = {"match": "light"} if self.light else {}
        change |= {"crop": self.crop} if self.crop else {}
        return preprocess.model_copy(
            update={**change, "look": preprocess.look.model_copy(update=own)}
        )


def fit_frames(
    samples: Sequence[Sample],
    preprocess: Preprocess,
    match: str = "auto",
    crop: float | None = None,
) -> Fit:
    """What these frames of white cells need, for a model with this preprocessing.

    `match` is light, scale (one crop for all, from the size of their nuclei), light,scale or nothing;
    auto: what a glance shows to be needed. `crop` is one that was asked for. Raises SettingsError, and
    DataError where a scale is asked for and no white cell is found.
    """
    if match == "auto":
        return _glance(samples, preprocess, crop)
    words = {word.strip() for word in match.split(",")} - {"nothing"}
    if words - {"light", "scale"}:
        raise SettingsError(
            f"match {match} is not one of: auto, nothing, light, scale, light,scale."
        )
    if "scale" not in words:
        return Fit("light" in words, crop)
    if crop is not None:
        raise SettingsError("A crop and match scale both set the scale; give one of them.")
    look, seen = look_of(samples)
    crop = crop_for(preprocess.crop, look, preprocess.look)
    return Fit(
        "light" in words, crop, f"match scale: crop {crop}, from the nuclei in {seen} images."
    )


def _glance(samples: Sequence[Sample], preprocess: Preprocess, crop: float | None) -> Fit:
    """What the frames clearly need. What the model does to every frame anyway is not done twice."""
    there = preprocess.look
    try:
        look, seen = look_of(samples, GLANCE)
    except DataError:
        return Fit(False, crop, sure=False)  # no white cell in them
    told, light = [], preprocess.match == "nothing" and other_light(look, there)
    if light:
        told.append("light brought to that of training")
    fit = crop
    if crop is None and not preprocess.each and larger_cells(look, there):
        fit = crop_for(preprocess.crop, look, there)
        told.append(f"nuclei {look.nucleus / there.nucleus:.1f} times as large: crop {fit}")
        if fit > 1:
            told.append("they are tighter than what it sees, and what lies beyond them is made up")
    if not told:
        return Fit(False, crop, sure=seen >= CLEAR)
    if seen < CLEAR:
        words = ",".join(["light"] * light + ["scale"] * (fit != crop))
        words += ", and the budget (--budget) to one that ends in -abroad," * light
        return Fit(False, crop, (
            "These frames may differ from those that the model was trained on, but white cells were found "
            f"in {seen} only of those looked at, and it takes {CLEAR} to tell: they are taken as they are. "
            f"Set match (--match) to {words} to bring them to the look of training."
        ), sure=False)  # fmt: skip
    return Fit(light, fit, (
        f"These frames differ from those that the model was trained on: {'; '.join(told)}. "
        "Set match (--match) to nothing to take them as they are."
    ), look, abroad=light)  # fmt: skip
