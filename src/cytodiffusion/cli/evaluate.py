"""`evaluate`: how often a model is right on labelled cells, and how well it knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from cytodiffusion.cli.console import (
    NOTICE,
    Answers,
    Budget,
    Console,
    Context,
    Coverage,
    Crop,
    Device,
    Engine,
    Json,
    Labels,
    Match,
    ModelOrAuto,
    Out,
    Prior,
    Seed,
    Sets,
    call_of,
    cores,
    pick_device,
    read_answers,
    read_prior,
)

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float

    from cytodiffusion.bundle import Model
    from cytodiffusion.data.sample import Sample
    from cytodiffusion.data.taxonomy import Taxonomy
    from cytodiffusion.predictions import Request


def evaluate(
    context: Context,
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Labelled images.")],
    out: Out,
    model: ModelOrAuto = None,
    splits: Annotated[Path | None, typer.Option(help="CSV with path,label,split.")] = None,
    split: Annotated[str | None, typer.Option(help="Which split to evaluate on.")] = None,
    classes: Answers = None,
    budget: Budget = "balanced",
    crop: Crop = None,
    match: Match = "auto",
    coverage: Coverage = 0.95,
    sets: Sets = "all",
    prior: Prior = "training",
    engine: Engine = "auto",
    taxonomy: Labels = None,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Measure MODEL on the labelled cells of DIR: metrics.json, predictions and report.html."""
    from cytodiffusion.bundle import DEFAULT_MODEL, load
    from cytodiffusion.cli.frames import Asked, take
    from cytodiffusion.cli.predict import finish, name_all, report
    from cytodiffusion.data.mark import refuse_marked
    from cytodiffusion.data.readers import read_dataset
    from cytodiffusion.data.taxonomy import Taxonomy
    from cytodiffusion.files import write_json
    from cytodiffusion.predictions import Request
    from cytodiffusion.release import commit

    console = Console(json)
    loaded = load(model or DEFAULT_MODEL, pick_device(device), engine)
    loaded.classifier.budget(budget)
    labels = Taxonomy.load(taxonomy) if taxonomy else loaded.taxonomy
    answers = read_answers(classes, loaded, labels)
    names = list(answers or loaded.classes)
    found = read_dataset(source, splits=splits, split=split)
    samples = _labelled(found, labels, names, source)
    refuse_marked(samples)
    console.note(NOTICE)
    shares = read_prior(prior, loaded.classes.names)
    place = [str(each.resolve()) for each in (source, splits) if each]
    asked = Asked(match, crop, budget, model, ", ".join([*place, *([split] if split else [])]))
    taken = take(asked, loaded, samples, console, out, open_answers=answers is None)
    loaded, call = taken.model, call_of(context, model=model or taken.model.name)
    request = Request(
        taken.budget, taken.fit.crop, coverage, cast("Any", sets), shares, answers, light=taken.fit.light,
        command="evaluate", source=asked.source, decided=taken.kept, workers=cores(),
    )  # fmt: skip
    rows = name_all(loaded, samples, request, out, console, labelled=True)
    metrics = None
    if any(row["flag"] != "unreadable" for row in rows):
        metrics = _metrics(rows, names, seed, _limits(loaded, request, names)) | {
            "flags": dict(Counter(row["flag"] for row in rows)),
            "budget": taken.budget,
            "crop": request.preprocess(loaded).crop,
            "match": request.preprocess(loaded).match,
            "cells_per_second": _speed(rows),
            "model": loaded.name,
            "weights_sha256": request.fingerprint(loaded)["weights"],
            "seed": seed,
            "command": call,
            "commit": commit(),
        }
        write_json(out / "metrics.json", metrics, "the metrics")
    else:
        console.note("None of the images could be read, so there is nothing to measure.")
        (out / "metrics.json").unlink(missing_ok=True)  # of images that were there before
    title = f"{loaded.name} on {source.name}{f', split {split}' if split else ''}"
    report(loaded, samples, rows, request, out, call, title, metrics)
    finish(rows, out, console, metrics, _lines(metrics) if metrics else ())


def _labelled(
    found: Sequence[Sample], labels: Taxonomy, names: Sequence[str], source: Path
) -> list[Sample]:
    """The images under the names of their classes. Raises DataError where one has none of `names`."""
    from cytodiffusion.errors import DataError

    named = [sample for sample in found if sample.label is not None]
    if not named:
        raise DataError(
            f"The images of {source} have no labels to measure against. Put each class in a folder of its "
            "own, or name the cells with predict."
        )
    resolved = [labels.resolve(str(sample.label), names) for sample in named]
    strange = {str(s.label) for s, name in zip(named, resolved, strict=True) if name is None}
    wrong = list[str]()
    if missing := len(found) - len(named):
        wrong.append(f"{missing} of {len(found)} images have no label.")
    if strange:
        wrong.append(f"No answer ({', '.join(names)}) is meant by: {', '.join(sorted(strange))}.")
    if wrong:
        raise DataError(
            f"{' '.join(wrong)} Leave them out, restrict the images with --splits and --split, or say with "
            "--taxonomy which class a label belongs to."
        )
    return [replace(s, label=name) for s, name in zip(named, resolved, strict=True)]


def _limits(
    model: Model, request: Request, names: list[str]
) -> dict[tuple[str, float], Float[np.ndarray, " k"]]:
    """Limits of the conformal sets of each kind at 90, 95 and 99 %, for the classes of `names`."""
    from typing import get_args

    import numpy as np

    from cytodiffusion.classify.conformal import Sets as Kinds

    prior = None if request.prior is None else np.array(request.prior)
    return {
        (kind, asked): model.classifier.limits(
            request.budget, asked, sets=kind, prior=prior, answers=names
        )
        for kind in get_args(Kinds)
        for asked in (0.9, 0.95, 0.99)
    }


def _metrics(
    rows: list[dict[str, Any]], names: list[str], seed: int,
    limits: dict[tuple[str, float], Float[np.ndarray, " k"]],
) -> dict[str, Any]:  # fmt: skip
    """The keys of metrics.json that can be read off the predictions."""
    import hashlib

    import numpy as np

    from cytodiffusion.evaluate.metrics import coverage_table, summarise

    read = [row for row in rows if row["flag"] != "unreadable"]
    truth = np.array([names.index(row["label"]) for row in read])
    probabilities = np.array([[float(row[f"prob_{name}"]) for name in names] for row in read])
    probabilities /= probabilities.sum(1, keepdims=True)
    sets = np.array([[name in (row["set"] or "").split("|") for name in names] for row in read])
    together = "".join(sorted(row["sha256"] for row in read)).encode()
    return summarise(truth, probabilities, names, sets, seed=seed) | {
        "conformal": coverage_table(truth, probabilities, limits, names),
        "passes_per_cell": round(float(np.mean([row["passes"] for row in read])), 3),
        "data_sha256": hashlib.sha256(together).hexdigest(),
    }


def _speed(rows: list[dict[str, Any]]) -> float:
    """Cells a second, from the rows' own times: a run that was cut and went on says the same."""
    spent = [row["milliseconds"] for row in rows if row["flag"] != "unreadable"]
    return round(1000 * len(spent) / max(sum(spent), 1e-9), 2)


def _lines(metrics: dict[str, Any]) -> list[str]:
    """The main measures, with their intervals, for a terminal."""
    shown = ["balanced_accuracy", "accuracy", "macro_f1", "ece", "nll", "auroc_correct", "coverage"]
    lines = []
    for name in shown:
        value, interval = metrics.get(name), metrics.get(f"{name}_ci95")
        if value is not None:
            between = f"  [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
            lines.append(f"{name:<18} {value:.4f}{between}")
    lines.append(f"{'passes a cell':<18} {metrics['passes_per_cell']:.1f}")
    lines.append(f"{'cells a second':<18} {metrics['cells_per_second']:.1f}")
    return lines
