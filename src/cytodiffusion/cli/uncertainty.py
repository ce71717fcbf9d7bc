"""`bench uncertainty`: does accuracy follow confidence, for a model and for people?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cytodiffusion.cli.benches import write_results
from cytodiffusion.cli.console import NOTICE, Console, Context, Device, Json, Out, Seed, call_of

if TYPE_CHECKING:
    from cytodiffusion.evaluate.answers import Answers
    from cytodiffusion.evaluate.psychometric import Fit
    from cytodiffusion.evaluate.uncertainty import Outcome


def uncertainty(
    context: Context,
    out: Out,
    predictions: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="PREDICTIONS",
            help="OUT folders of evaluate, or CSV with confidence,correct[,reader].",
        ),
    ] = None,
    family: Annotated[
        str, typer.Option(help="weibull, beta, or best: the lower AIC over all curves.")
    ] = "best",
    guess: Annotated[
        str,
        typer.Option(
            help="Share right by luck: a number, fit, or auto: 1/classes, fitted if not known."
        ),
    ] = "auto",
    level: Annotated[float, typer.Option(help="Accuracy at which the threshold is taken.")] = 0.9,
    draws: Annotated[int, typer.Option(min=40, help="Resamples behind the intervals.")] = 500,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Fit accuracy as a function of confidence, a curve for each model and reader.

    OUT/results.json and report.html: parameters, thresholds, bands and goodness of fit.
    """
    from cytodiffusion.errors import SettingsError
    from cytodiffusion.evaluate.answers import FORMS, read_all
    from cytodiffusion.evaluate.report import write_page
    from cytodiffusion.evaluate.uncertainty import render

    console = Console(json)
    if not predictions:
        raise SettingsError(f"There is nothing to fit. {FORMS}")
    if (out / "predictions.csv").exists():
        raise SettingsError(
            f"{out} is a folder of predictions, and its report would be lost. Choose another with -o."
        )
    answers = read_all(predictions)
    origin, rates = _origin(answers), _rates(guess, answers, console)
    console.note(NOTICE)
    outcomes = _outcomes(answers, rates, family, level, seed, draws, console)
    rows = [outcome.as_dict(seed) for outcome in outcomes]
    facts = {"command": call_of(context), "draws": draws, "seed": seed, **origin}
    values = {"curves": rows, **facts}
    write_results(out, values)
    write_page(out / "report.html", render("Accuracy by confidence", outcomes, rows, facts))
    console.result(values, "\n".join([*map(_line, rows), f"See {out}."]))
    if any(outcome.problem for outcome in outcomes):
        raise typer.Exit(1)


def _origin(answers: Sequence[Answers]) -> dict[str, Any]:
    """The weights behind each OUT folder of `evaluate`, where its metrics.json tells, and the commit."""
    import json

    from cytodiffusion.errors import DataError
    from cytodiffusion.release import commit

    weights = {}
    for each in answers:
        path = Path(each.source) / "metrics.json"
        if path.is_file():
            try:
                weights[each.name] = json.loads(path.read_text())["weights_sha256"][:12]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path} does not say which weights answered. Run `evaluate` again."
                ) from error
    return {"weights": weights, "commit": commit()} if weights else {"commit": commit()}


def _rates(guess: str, answers: Sequence[Answers], console: Console) -> list[float | None]:
    """The guess rate of each set of answers; None: it is fitted."""
    from cytodiffusion.errors import SettingsError

    if guess == "fit":
        return [None] * len(answers)
    if guess != "auto":
        try:
            return [float(guess)] * len(answers)
        except ValueError:
            raise SettingsError(f"--guess takes a number, fit or auto, not '{guess}'.") from None
    told = {a.classes for a in answers if a.classes}
    common = told.pop() if len(told) == 1 else None
    for each in answers:
        if not each.classes:
            how = f"1/{common}, as for the others" if common else "fitted; or give --guess"
            console.note(
                f"{each.name}: the table does not tell the number of classes: guess {how}."
            )
    classes = [each.classes or common for each in answers]
    return [None if k is None else 1 / k for k in classes]


def _outcomes(
    answers: Sequence[Answers], rates: Sequence[float | None], family: str, level: float,
    seed: int, draws: int, console: Console,
) -> list[Outcome]:  # fmt: skip
    """Fit each; where none can be fitted, raise DataError."""
    from cytodiffusion.errors import DataError
    from cytodiffusion.evaluate.psychometric import FAMILIES, analyse
    from cytodiffusion.evaluate.uncertainty import Outcome

    tried = list(FAMILIES) if family == "best" else [family]
    fits = [_fits(each, rate, tried) for each, rate in zip(answers, rates, strict=True)]
    fitted = [found for found in fits if isinstance(found, dict)]
    if not fitted:
        told = " ".join(f"{a.name}: {why}" for a, why in zip(answers, fits, strict=True))
        raise DataError(told)
    best = min(tried, key=lambda name: sum(found[name].aic for found in fitted))
    outcomes = []
    for each, found in zip(answers, fits, strict=True):
        if isinstance(found, str):
            console.note(f"Not fitted: {each.name}: {found}")
            outcomes.append(Outcome(each, None, found, {}))
            continue
        work = analyse(found[best], level=level, seed=seed, draws=draws)
        analysis = console.follow(work, f"resampling {each.name}", draws, "draws")
        aic = {name: fit.aic for name, fit in found.items()}
        outcomes.append(Outcome(each, analysis, None, aic))
    return outcomes


def _fits(answers: Answers, rate: float | None, tried: Sequence[str]) -> dict[str, Fit] | str:
    """The fit of each family, or why there is none."""
    from cytodiffusion.errors import DataError
    from cytodiffusion.evaluate.psychometric import fit

    try:
        return {name: fit(answers.judged, family=name, guess=rate) for name in tried}
    except DataError as error:
        return str(error)


def _line(row: dict[str, Any]) -> str:
    """One curve for a terminal."""
    fit = row["fit"]
    if fit is None:
        return f"{row['name']}: no curve. {row['problem']}"
    low, high = ("-" if end is None else f"{end:.3f}" for end in fit["threshold_ci95"])
    place = "not reached" if fit["threshold"] is None else f"{fit['threshold']:.3f}"
    judged = "" if fit["fit_p"] is None else f", p of the fit {fit['fit_p']:.3f}"
    return (
        f"{row['name']}: {fit['family']}, accuracy {100 * fit['threshold_level']:g} % at confidence "
        f"{place}  [{low}, {high}], lapse {fit['lapse']:.4f}{judged}"
    )
