"""Which model and budget read the frames, and what is done to the frames first.

A glance at some of them (data/match.py) tells whether they are clearly of another laboratory. Then their
light and scale are brought to those of training, and they are read with the budget's twin, by the model
that was trained for such frames where none was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cytodiffusion.cli.console import Console

if TYPE_CHECKING:
    from cytodiffusion.bundle import Model
    from cytodiffusion.data.match import Fit
    from cytodiffusion.data.sample import Sample


class Asked(NamedTuple):
    """What the call says of the frames."""

    match: str
    crop: float | None
    budget: str
    model: str | None = None  # None: pbc8, or pbc8-far for frames of another laboratory


class Taken(NamedTuple):
    """What reads the frames, and what is done to them."""

    model: Model
    budget: str
    light: bool
    crop: float | None
    kept: dict[str, Any]  # beside the rows: what was asked for, and what a glance then showed


def take(
    asked: Asked, model: Model, samples: Sequence[Sample], console: Console, out: Path | None = None,
    open_answers: bool = False,
) -> Taken:  # fmt: skip
    """Decide, and say so. `model` is the one asked for, or the default.

    `out`: where cells were named before with the same asked for, what was clearly seen then stays, though
    there may be more cells now. `open_answers`: all classes may come up, and --classes could restrict
    them. Raises SettingsError, DataError.
    """
    from cytodiffusion.bundle import ABROAD_MODEL, load, shipped

    fit, named = _fit(asked, model, samples, out), model.name
    if fit.abroad and asked.model is None and ABROAD_MODEL in shipped():
        model = load(ABROAD_MODEL, model.classifier.device, model.engine)
        fit = _fit(asked, model, samples, out)
    twin = model.classifier.abroad(asked.budget)
    if fit.told:
        console.note(fit.told)
    if fit.abroad:
        _say(named, model.name, asked.budget, twin, open_answers, console)
    elif fit.light and twin != asked.budget:
        console.note(
            f"Budget {asked.budget} has weights from home; {twin} has some for other laboratories."
        )
    seen = {name: getattr(fit, name) for name in ("light", "crop", "told", "abroad", "sure")}
    kept = {"asked": asked._asdict(), "seen": seen}
    return Taken(model, twin if fit.abroad else asked.budget, fit.light, fit.crop, kept)


def _say(
    before: str, model: str, budget: str, twin: str, open_answers: bool, console: Console
) -> None:
    """What is taken in place of what, for frames of another laboratory."""
    other = []
    if model != before:
        other.append(f"Model {model} in place of {before} (-m {before} keeps it).")
    if twin != budget:
        other.append(
            f"Budget {twin} in place of {budget}: its weights were fitted for such frames."
        )
    if other and open_answers:
        other.append(
            "If you know which classes come up, say so with --classes: it then errs far less."
        )
    if other:
        console.note(" ".join(other))


def _fit(asked: Asked, model: Model, samples: Sequence[Sample], out: Path | None) -> Fit:
    from cytodiffusion.data.match import fit_frames

    return _kept(asked, out) or fit_frames(samples, model.preprocess, asked.match, asked.crop)


def _kept(asked: Asked, out: Path | None) -> Fit | None:
    """What was seen when the same was asked for; None where it was not, or too few cells were seen."""
    from cytodiffusion.data.match import Fit
    from cytodiffusion.predictions import read_request

    before = read_request(out).get("decided") if out is not None else None
    if not isinstance(before, dict) or before.get("asked") != asked._asdict():
        return None
    try:
        fit = Fit(**before["seen"])
    except (KeyError, TypeError):  # not as this program writes it
        return None
    return fit if fit.sure else None
