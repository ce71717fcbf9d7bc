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
    source: str = ""  # where the cells are


class Taken(NamedTuple):
    """What reads the frames, and what is done to them."""

    model: Model
    budget: str
    fit: Fit
    kept: dict[str, Any]  # beside the rows: what was asked for, and what a glance then showed


def take(
    asked: Asked, model: Model, samples: Sequence[Sample], console: Console, out: Path | None = None,
    open_answers: bool = False, adapting: bool = False,
) -> Taken:  # fmt: skip
    """Decide, and say so. `model` is the one asked for, or the default.

    `out`: where cells of the same place were named before with the same asked for, what was clearly seen
    then stays, though there may be more cells now. `open_answers`: all classes may come up, and --classes
    could restrict them. `adapting`: the frames are to be learned from, not named.
    Raises SettingsError, DataError, ModelError.
    """
    from cytodiffusion.bundle import load
    from cytodiffusion.cli.adapt import LEAST, why_not
    from cytodiffusion.data.match import fit_frames

    named = model.name
    if kept := _kept(asked, out):
        fit, name = kept
        if asked.model is None and name != named:
            model = load(name, model.classifier.device, model.engine)
    else:
        fit = fit_frames(samples, model.preprocess, asked.match, asked.crop)
        if fit.abroad and asked.model is None:
            model, fit = _of_abroad(asked, model, fit, samples)
    twin = model.classifier.abroad(asked.budget)
    _say(asked, fit, named, model.name, twin, open_answers, console, adapting)
    if fit.abroad and not adapting and len(samples) >= LEAST and not why_not(model):
        console.note("Without labels these cells can teach it their look: cytodiffusion adapt.")
    seen = {name: getattr(fit, name) for name in ("light", "crop", "told", "abroad", "sure")}
    decided = {"asked": asked._asdict(), "seen": seen}
    return Taken(model, twin if fit.abroad else asked.budget, fit, decided)


def _of_abroad(
    asked: Asked, model: Model, fit: Fit, samples: Sequence[Sample]
) -> tuple[Model, Fit]:
    """The model that was trained for such frames, where it is shipped and they are foreign to it too."""
    from cytodiffusion.bundle import ABROAD_MODEL, load, shipped
    from cytodiffusion.data.match import fit_frames

    if ABROAD_MODEL not in shipped():
        return model, fit
    other = load(ABROAD_MODEL, model.classifier.device, model.engine)
    again = fit_frames(samples, other.preprocess, asked.match, asked.crop)
    return (other, again) if again.abroad else (model, fit)


def _say(
    asked: Asked, fit: Fit, named: str, model: str, twin: str, open_answers: bool, console: Console,
    adapting: bool,
) -> None:  # fmt: skip
    """What was seen, and what is taken in place of what."""
    from cytodiffusion.bundle import ABROAD_MODEL

    if fit.told:
        other = asked.model is None and not fit.sure and "-abroad" in fit.told
        console.note(fit.told + f" The model for such frames is {ABROAD_MODEL} (-m)." * other)
    if not fit.abroad:
        if fit.light and twin != asked.budget and not adapting:
            console.note(
                f"Budget {asked.budget} has weights from home; {twin} has some for other laboratories."
            )
        return
    instead = []
    if model != named:
        instead.append(f"Model {model} in place of {named} (-m {named} keeps it).")
    if twin != asked.budget and not adapting:
        instead.append(
            f"Budget {twin} in place of {asked.budget}: its weights were fitted for such frames. What it "
            "flags as anomalous is not calibrated here: expect more false alarms than one in a hundred."
        )
    if instead and open_answers:
        instead.append(
            "If you know which classes come up, say so with --classes: it then errs far less."
        )
    if instead:
        console.note(" ".join(instead))


def _kept(asked: Asked, out: Path | None) -> tuple[Fit, str] | None:
    """What was seen when the same was asked for, and the model that was taken.

    None where something else was asked for, or too few cells were seen.
    """
    from cytodiffusion.data.match import Fit
    from cytodiffusion.predictions import read_request

    before = read_request(out) if out is not None else {}
    decided = before.get("decided")
    if not isinstance(decided, dict) or decided.get("asked") != asked._asdict():
        return None
    try:
        fit = Fit(**decided["seen"])
    except (KeyError, TypeError):  # not as this program writes it
        return None
    return (fit, str(before.get("model"))) if fit.sure else None
