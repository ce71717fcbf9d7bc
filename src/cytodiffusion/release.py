"""From labelled images to a bundle: how a run is judged while it trains, and the card of what comes out.

The command `train` and the recipes both go through here.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from cytodiffusion import __version__
from cytodiffusion.calibration import Calibrated, cautions
from cytodiffusion.classify.calibrate import out_of_fold, scores
from cytodiffusion.classify.classifier import ABROAD, Budget, RaceReader
from cytodiffusion.classify.draws import stratified
from cytodiffusion.classify.evidence import DenoiserMeter
from cytodiffusion.classify.fit import balanced_subset
from cytodiffusion.classify.measure import Measurement
from cytodiffusion.data.images import Preprocess, to_tensor
from cytodiffusion.data.pixels import Pixels
from cytodiffusion.data.transforms import POSES
from cytodiffusion.diffusion.precondition import NetworkDenoiser
from cytodiffusion.train.loop import Validate
from cytodiffusion.types import PIXELS, Classes, Space

FEW = 320  # held-out cells that score a class-conditional network while it trains


def validator(
    pixels: Pixels, classes: int, together: bool, space: Space = PIXELS, radius: float | None = None
) -> Validate:
    """Scores a denoiser on held-out cells: out-of-fold NLL and accuracies, four frozen trials.

    On `FEW` of them where every class costs a pass. `radius`: of the disc within which errors count.
    """
    pixels = pixels if together else pixels.part(balanced_subset(pixels.labels, FEW))
    draws = stratified(4, 0.05 * space.scale, 4.0 * space.scale, frozen=True)
    images = to_tensor(pixels.images)

    def validate(denoiser: NetworkDenoiser) -> dict[str, float]:
        device = next(denoiser.parameters()).device
        measurement = Measurement(
            draws, classes + 1, POSES, together=together, space=space, shared=space is not PIXELS
        )
        errors = measurement.measure(
            DenoiserMeter(denoiser, radius), images.to(device), pixels.digests
        )
        return scores(out_of_fold(errors[:, :, :-1], pixels.labels), pixels.labels)

    return validate


CARD = """# {name}

Names single blood cells: {classes}.

**Research use only. Not a medical device; not for diagnosis.**

| | |
|---|---|
| network | {form}, {parameters:.1f} M parameters |
| input | centre {crop:.0%} of the shorter side, at {size} px |
| data | {data} ({train_images:,} training images) |
| made by | {recipe}, commit {commit}, seed {seed}, {steps:,} steps{begun} |
{extra}
## On the held-out cells it was calibrated on

Five-fold: weights are fitted without the cell that they name. Validation, not test. {twins}

| budget | passes | balanced accuracy | accuracy | NLL, nats |
|---|---|---|---|---|
{rows}
{cautions}"""


TWINS = """\
Budgets that end in
`-abroad` are for frames of another laboratory: they are fitted and judged on cells of the same split whose
colour, size and sharpness were changed, colours {reach:.1f} times as far as usual in training. What is
strange there is told from the same cells with colours changed as usual."""
POSED = """\
| turning latents | differs from encoding the turned cell by {pose_error} of their standard deviation |
"""
ANEW = """\
| calibrated anew | on {calibrated_on}, commit {calibrated_at} |
"""


def make_card(
    name: str, classes: Classes, preprocess: Preprocess, form: str, parameters: int,
    calibrated: Calibrated, origin: dict[str, Any],
) -> str:  # fmt: skip
    """The model card: what it is, where it came from, how it did on validation."""
    rows = "\n".join(
        f"| {budget} | {_passes(budget, calibrated.budgets[budget])} "
        f"| {s['balanced_accuracy']:.4f} | {s['accuracy']:.4f} | {s['nll']:.4f} |"
        for budget, s in calibrated.scores.items()
    )
    twins = TWINS.format(reach=calibrated.reach) if calibrated.reach else ""
    words = {
        "twins": twins,
        "name": name,
        "classes": ", ".join(classes),
        "form": form,
        "rows": rows,
        "cautions": "".join(f"\n* {caution}" for caution in cautions(calibrated.budgets)),
    }
    shape = {"parameters": parameters / 1e6, "crop": preprocess.crop, "size": preprocess.size}
    start = origin.get("start") or origin.get("pretrained")
    begun = f", begun with the weights of {start}" if start else ""
    extra = POSED.format(**origin) if "pose_error" in origin else ""
    extra += ANEW.format(**origin) if "calibrated_on" in origin else ""
    return CARD.format(**words, **shape, **origin, begun=begun, extra=extra)


def _passes(name: str, budget: Budget) -> str:
    """How many passes a cell takes, for the card."""
    if isinstance(budget.reader, RaceReader):
        return f"race, on {len(budget.held.truth)} cells, as many of each class"
    said = budget.agreement
    assert said is not None
    if not said.allowed:
        return f"{said.passes:g}"
    full = "full" + ABROAD * name.endswith(ABROAD)
    return f"{said.passes:.2f} in the mean; {said.allowed:.1%} may differ from `{full}`"


def commit() -> str:
    """The commit this code is at, with a + where files differ from it; else the version."""
    package = Path(__file__).resolve().parent
    top = _git(package, "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() / "src" / package.name != package:
        return f"v{__version__}"  # no checkout of this project
    changed = _git(package, "status", "--porcelain", "--untracked-files=no")
    return _git(package, "rev-parse", "--short=12", "HEAD") + "+" * bool(changed)


def _git(folder: Path, *words: str) -> str:
    """What git says; nothing where it is not there, or has nothing to say."""
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=False
        ).stdout.strip()
    except OSError:
        return ""
