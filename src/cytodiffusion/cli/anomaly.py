"""`bench anomaly`: does a model notice what it has never seen, and do baselines?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cytodiffusion.cli.benches import find_kinds, write_results
from cytodiffusion.cli.console import (
    NOTICE,
    Console,
    Context,
    Crop,
    Device,
    Engine,
    Json,
    Out,
    Seed,
    call_of,
    cores,
    pick_device,
)

if TYPE_CHECKING:
    from cytodiffusion.bundle import Model
    from cytodiffusion.data.taxonomy import Taxonomy
    from cytodiffusion.evaluate.anomaly import Cells, Scored
    from cytodiffusion.evaluate.baselines import Baseline

SHOWN = 8  # pictures of each kind of stranger


def anomaly(
    context: Context,
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Labelled images.")],
    out: Out,
    hold_out: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS", help="Train without this class; its cells are the strangers."
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="A finished run, trained without the class elsewhere."),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Where no class is held out: the model to measure.")
    ] = "pbc8",
    foreign: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR", help="Images all of which are strangers; give it again for more."
        ),
    ] = None,
    splits: Annotated[Path | None, typer.Option(help="CSV with path,label,split.")] = None,
    split: Annotated[str, typer.Option(help="Which split to measure on.")] = "test",
    limit: Annotated[
        int | None,
        typer.Option(min=2, help="About this many cells of each set, as many of each class."),
    ] = None,
    corrupted: Annotated[
        int, typer.Option(min=0, help="Normal cells that are also shown corrupted, in each way.")
    ] = 200,
    baselines: Annotated[
        str, typer.Option(help="Some of resnet, convnext, vit; or none.")
    ] = "resnet,convnext,vit",
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="Processor time for each baseline, instead of what ours took."
        ),
    ] = None,
    preset: Annotated[str, typer.Option(help="Of the training without the class.")] = "cpu",
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=V", help="Change one setting of it.")
    ] = None,
    crop: Crop = None,
    foreign_crop: Annotated[
        float | None, typer.Option(min=0.01, max=4, help="The same for the foreign images.")
    ] = None,
    engine: Engine = "auto",
    json: Json = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Tell strangers from normal cells by every score of the model, beside baselines.

    OUT/results.json and report.html. Run again, what was trained and measured is not done anew.
    """
    from cytodiffusion.cli.strangers import (
        Bench,
        find_model,
        list_foreign,
        list_parts,
        make_baseline,
        read_canvases,
        read_sets,
        run_folder,
        score_sets,
    )
    from cytodiffusion.data.taxonomy import Taxonomy
    from cytodiffusion.evaluate.anomaly import KNOWN, compare, render
    from cytodiffusion.evaluate.baselines import BaselineSettings
    from cytodiffusion.evaluate.report import write_page
    from cytodiffusion.train.settings import make_settings

    console, where, labels = Console(json), pick_device(device), Taxonomy.load()
    kinds = find_kinds(baselines)
    splits = splits or _split_file(source, run)
    held = _held_out(source, splits, hold_out, run, labels)
    if held is None or run:  # what can be wrong is said before anything is written
        _minutes(run, minutes, kinds, where)
    unseen = list_foreign(foreign or [])
    settings = make_settings(preset, [*(change or []), f"seed={seed}"])
    bench = Bench(
        source, out, held, settings, crop, foreign_crop, labels, seed, where, engine, console
    )
    console.note(NOTICE)
    parts = list_parts(bench, splits, split)
    folder = None if held is None else run or run_folder(bench, parts)
    bench, ours = find_model(bench, model, folder, parts, trained=run is not None)
    sets = read_sets(bench, ours, parts, unseen, limit, corrupted)
    rivals = []
    if kinds:
        canvases = read_canvases(bench, ours, parts["train"])
        spent, balance = _minutes(folder, minutes, kinds, where), bench.settings.balance
        for kind in kinds:
            wanted = BaselineSettings(kind=kind, minutes=spent, balance=balance, seed=seed)
            rivals.append(make_baseline(bench, ours, canvases, sets[KNOWN], wanted))
    scored, told = score_sets(bench, ours, rivals, sets)
    rows = [{"model": ours.name, **row} for row in compare(scored, told, seed)]

    facts = {"command": call_of(context), "seed": seed, **_origin(ours, rivals)}
    values = {"rows": rows, **facts}
    write_results(out, values)
    page = render(
        f"Strangers among {source.name}", rows, scored, _pictures(sets, scored, told), facts
    )
    write_page(out / "report.html", page)
    console.result(values, "\n".join([*_table(rows), f"See {out}."]))
    if console.unread:
        raise typer.Exit(1)


# --- what was asked for --------------------------------------------------------------------------


def _split_file(source: Path, run: Path | None) -> Path | None:
    """The split that a run made of its own, if any. Raises SettingsError where it is not known."""
    from cytodiffusion.data.readers import read_dataset
    from cytodiffusion.errors import SettingsError

    if run is None or (run / "splits.csv").is_file():
        return run and run / "splits.csv"
    if all(sample.split is None for sample in read_dataset(source)):
        raise SettingsError(
            f"{run} was trained on a split that it did not make. Give it with --splits: what a run was "
            "trained on is no test of it."
        )
    return None


def _held_out(
    source: Path, splits: Path | None, hold_out: str | None, run: Path | None, labels: Taxonomy
) -> str | None:
    """The class to hold out, as the data set spells it. Raises SettingsError, DataError."""
    from cytodiffusion.data.pixels import class_names
    from cytodiffusion.data.readers import read_dataset
    from cytodiffusion.errors import SettingsError

    if hold_out is None:
        if run is not None:
            raise SettingsError("--run takes --hold-out CLASS: the class RUN was trained without.")
        return None
    classes = class_names(read_dataset(source, splits=splits), labels)
    name = labels.resolve(hold_out, classes)
    if name is None:
        raise SettingsError(
            f"{source} has no class '{hold_out}' to hold out. It has: {', '.join(classes)}."
        )
    if len(classes) < 3:
        raise SettingsError(f"Without '{name}' {source} has fewer than two classes to train on.")
    return name


def _minutes(folder: Path | None, given: float | None, kinds: Sequence[str], device: str) -> float:
    """Minutes of training for a baseline. Raises SettingsError where it must be said.

    As long as ours took: the time of its steps, on a processor by as many cores as there are.
    """
    from cytodiffusion.errors import SettingsError
    from cytodiffusion.train.record import read_metrics

    lines = read_metrics(folder / "metrics.jsonl") if folder else []
    if given is None and kinds and not lines:
        raise SettingsError(
            "How long this model was trained for is not known, so --minutes must say how long the "
            "baselines may train; or give --baselines none."
        )
    share = cores() if device == "cpu" else 1
    return given or sum(line["seconds"] for line in lines) * share / 60


# --- what is shown -------------------------------------------------------------------------------


def _pictures(
    sets: dict[str, Cells], scored: Scored, told: Scored
) -> dict[str, list[tuple[str, str]]]:
    """Of each kind, the strangers that look the least strange: a data URI and what was told."""
    import numpy as np

    from cytodiffusion.data.sample import png
    from cytodiffusion.evaluate.anomaly import NORMAL, OURS, TOLD
    from cytodiffusion.evaluate.report import data_uri

    shown = {}
    for name, values in scored[OURS, TOLD].items():
        if name != NORMAL:
            shown[name] = [
                (
                    data_uri(png(sets[name].pixels[i].transpose(1, 2, 0).copy())),
                    f"anomaly {values[i]:.3f}, p {told[OURS, TOLD][name][i]:.4f}",
                )
                for i in np.argsort(values, kind="stable")[:SHOWN]
            ]
    return shown


def _origin(ours: Model, rivals: Sequence[Baseline]) -> dict[str, Any]:
    from cytodiffusion.release import commit

    trained = {rival.settings.kind: rival.trained for rival in rivals}
    return {
        "model": ours.name, "weights": ours.weights_sha256[:12], "trained_by": ours.config["origin"],
        "baselines": trained, "engine": ours.engine, "cores": cores(), "commit": commit(),
    }  # fmt: skip


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Every score on every set, for a terminal."""
    columns = {"auroc": "AUROC", "average_precision": "precision", "sensitivity_at_95": "sens. at 95",
               "strange_flagged": "flagged", "normal_flagged": "false alarms"}  # fmt: skip
    wide = max(map(len, ("strangers", *(row["set"] for row in rows)))) + 2
    first = "".join(f"{name:>13}" for name in columns.values())
    lines = [f"{'strangers':<{wide}}{'method':<10}{'score':<13}{first}"]
    for row in rows:
        numbers = "".join(f"{row[name]:>13.4f}" if name in row else f"{'':>13}" for name in columns)
        lines.append(f"{row['set']:<{wide}}{row['method']:<10}{row['score']:<13}{numbers}")
    return [line.rstrip() for line in lines]
