"""`bench authenticity prepare | score`: can people tell drawn cells from real ones?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cytodiffusion.cli.benches import tell_unmarked, write_results
from cytodiffusion.cli.console import (
    NOTICE,
    Console,
    Context,
    Device,
    Json,
    ModelName,
    Out,
    Seed,
    call_of,
    plain,
)

if TYPE_CHECKING:
    from cytodiffusion.bundle import Model
    from cytodiffusion.data.images import Preprocess
    from cytodiffusion.data.sample import Sample
    from cytodiffusion.evaluate.authenticity import Table
    from cytodiffusion.evaluate.blinded import Cell, Gathered
    from cytodiffusion.evaluate.uncertainty import Outcome

app = typer.Typer(
    help="A test for people: are these cells real or drawn?",
    no_args_is_help=True,
    rich_markup_mode=None,
)
PAGE, KEY, CELLS = "test.html", "key.csv", "cells"
DRAWN = "drawn.json"  # which weights drew; for the examiner, like the key


# --- prepare -------------------------------------------------------------------------------------


@app.command()
def prepare(
    source: Annotated[Path, typer.Argument(metavar="REAL_DIR", help="Real labelled images.")],
    drawn: Annotated[Path, typer.Argument(metavar="DRAWN_DIR", help="What `generate` wrote.")],
    out: Out,
    per_class: Annotated[
        int, typer.Option(min=1, help="Real cells of each class; as many drawn ones.")
    ] = 10,
    model: ModelName = "pbc8",
    splits: Annotated[Path | None, typer.Option(help="CSV with path,label,split.")] = None,
    split: Annotated[str | None, typer.Option(help="Which split to take real cells from.")] = None,
    crop: Annotated[
        float | None,
        typer.Option(
            min=0.01, max=4, help="Centre crop of real frames, instead of the model's own."
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=8, help="Height and width of all cells, px, instead of the drawn ones'."),
    ] = None,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Make a blinded test: OUT/test.html for readers, OUT/key.csv for the examiner alone.

    Real frames are cropped as the model crops them; both kinds take one way to one size, without
    metadata, under opaque ids (OUT/cells has the pictures). The page works offline, by keyboard or
    mouse. It holds real cells: mind who gets it. Give --split test or val: cells that the model has
    learned from are no fair test.
    """
    from cytodiffusion.bundle import load
    from cytodiffusion.data.images import Preprocess
    from cytodiffusion.evaluate.blinded import TRUTHS, blind, key_table, page
    from cytodiffusion.files import write_file, write_json

    console = Console(json)
    loaded = load(model, "cpu", engine="torch")
    listed = _listed(source, drawn, splits, split, console)
    size = size or _size_of(listed[1])
    own = {"size": size, "crop": crop or loaded.preprocess.crop}
    ways = (
        loaded.preprocess.model_copy(update=own),
        Preprocess(size=size, crop=1.0),  # drawn cells fill their frame
    )
    console.note(NOTICE)
    real, forged = (
        _gather(kind, samples, way, loaded, per_class, seed, console)
        for kind, samples, way in zip(TRUTHS, listed, ways, strict=True)
    )
    cells = blind(real, forged, loaded.classes.names, per_class, seed)
    _tell_missing(cells, loaded.classes.names, per_class, console)
    key = key_table(cells)
    _refuse_another(out, key)
    write_file(out / KEY, key, "the key")
    write_json(out / DRAWN, _drawn_by(listed[1], cells), "what is known of the drawn cells")
    for cell in cells:
        write_file(out / CELLS / f"{cell.id}.png", cell.png, "a cell")
    write_file(out / PAGE, page([(c.id, c.png) for c in cells], size).encode(), "the test")
    counts = {label: sum(c.label == label for c in cells) for label in loaded.classes.names}
    values = {"cells": len(cells), "classes": {k: n for k, n in counts.items() if n}, "size": size,
              "page": str(out / PAGE), "key": str(out / KEY), "seed": seed}  # fmt: skip
    told = f"{len(cells)} cells, half of them drawn, {size} x {size} px."
    told += (
        f"\nReaders get {out / PAGE} and nothing else. Keep {out / KEY}, which has the truth, and "
    )
    told += f"{DRAWN}, which says who drew."
    console.result(values, told)
    if console.unread:
        raise typer.Exit(1)


def _listed(
    source: Path, drawn: Path, splits: Path | None, split: str | None, console: Console
) -> tuple[list[Sample], list[Sample]]:
    """Real and drawn labelled images. Raises DataError for what cannot be that."""
    from cytodiffusion.data.mark import refuse_marked
    from cytodiffusion.data.readers import read_dataset
    from cytodiffusion.errors import DataError

    found = []
    for where, samples in (
        (source, read_dataset(source, splits=splits, split=split)),
        (drawn, read_dataset(drawn)),
    ):
        found.append([sample for sample in samples if sample.label is not None])
        if not found[-1]:
            raise DataError(f"{where} has no labels. Put each class in a folder of its own.")
    refuse_marked(found[0], "real cells")
    tell_unmarked(found[1], drawn, console)
    return found[0], found[1]


def _drawn_by(samples: Sequence[Sample], cells: Sequence[Cell]) -> dict[str, str]:
    """Models whose cells are in the test, by the cells' marks, and sha256 of their weights."""
    from cytodiffusion.data.mark import read_mark

    taken = {cell.source for cell in cells if cell.truth == "drawn"}
    marks = [read_mark(sample.read()) for sample in samples if sample.name in taken]
    found: dict[str, set[str]] = {}
    for mark in marks:
        if mark is not None:
            found.setdefault(mark.model or "another program", set()).add(mark.weights[:12])
    return {name: ", ".join(sorted(found[name])) for name in sorted(found)}


def _size_of(samples: Sequence[Sample]) -> int:
    """Shorter side of the first drawn cell that can be read, px. Raises DataError where none can."""
    from cytodiffusion.data.images import decode
    from cytodiffusion.errors import DataError, UnreadableImage

    for sample in samples:
        try:
            return min(decode(sample.read()).size)
        except UnreadableImage:
            continue
    raise DataError(f"None of the {len(samples)} drawn cells could be read. Try: data check.")


def _gather(
    kind: str, samples: Sequence[Sample], way: Preprocess, model: Model, per_class: int, seed: int,
    console: Console,
) -> Gathered:  # fmt: skip
    """Pictures of one kind; says what could not be read, and which were enlarged."""
    import numpy as np

    from cytodiffusion.data.pixels import class_index
    from cytodiffusion.evaluate.blinded import TRUTHS, gather

    rng = np.random.default_rng([seed, TRUTHS.index(kind)])
    classes = [class_index(s.label, model.classes.names, model.taxonomy) for s in samples]
    work = gather(samples, classes, way, per_class, rng)
    total = sum(min(per_class, classes.count(k)) for k in set(classes))
    found = console.follow(work, f"reading {kind} cells", total, "cells")
    for problem in found.problems:
        console.note(f"Not read: {problem}")
    console.unread += len(found.problems)
    if found.enlarged:
        console.note(
            f"{found.enlarged} {kind} cells have fewer than {way.size} px across and were enlarged, "
            "which makes them smooth and gives them away: give larger frames, or a smaller --size."
        )
    return found


def _tell_missing(
    cells: Sequence[Cell], names: Sequence[str], per_class: int, console: Console
) -> None:
    for label in names:
        count = sum(cell.label == label for cell in cells) // 2
        if count < per_class:
            console.note(
                f"{label}: {count} of each kind instead of {per_class}; there are no more."
            )


def _refuse_another(out: Path, key: bytes) -> None:
    """Raises OutputError where OUT holds another test, whose answers would be lost."""
    from cytodiffusion.errors import OutputError

    path = out / KEY
    if path.exists() and path.read_bytes() != key:
        raise OutputError(
            f"{path} is the key of another test, and without it that one's answers are worth nothing. "
            "Choose another folder with -o."
        )


# --- score ---------------------------------------------------------------------------------------


@app.command()
def score(
    context: Context,
    answers: Annotated[
        list[Path], typer.Argument(metavar="ANSWERS", help="CSV files that readers saved.")
    ],
    key: Annotated[Path, typer.Option(help="The key.csv of the test.")],
    out: Out,
    draws: Annotated[int, typer.Option(min=40, help="Resamples behind the curves' bands.")] = 200,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Read what readers answered: OUT/results.json and report.html.

    Accuracy with exact intervals, d' and bias, per class, accuracy as a function of confidence, and
    agreement between readers. Of a cell that a reader answered twice the last answer counts.
    """
    from cytodiffusion.errors import SettingsError
    from cytodiffusion.evaluate.authenticity import ALL, Table, agreement, render, summarise
    from cytodiffusion.evaluate.blinded import read_answers, read_key
    from cytodiffusion.evaluate.report import write_page

    console = Console(json)
    if (out / PAGE).exists():
        raise SettingsError(f"{out} holds a test. Choose another folder with -o for its results.")
    truths, origin = read_key(key), _origin(key)
    found, problems = read_answers(answers, truths)
    console.note(NOTICE)
    for problem in problems:
        console.note(problem)
    everyone = Table.of(truths, found)
    parts = [(name, everyone.rows([i])) for i, name in enumerate(everyone.readers)]
    parts += [(ALL, everyone)] * (len(parts) > 1)
    outcomes = [_curve(table, name, seed, draws, console) for name, table in parts]
    rows = [
        summarise(table, name, seed) | {"psychometric": outcome.as_dict(seed)}
        for (name, table), outcome in zip(parts, outcomes, strict=True)
    ]
    agreed = agreement(everyone, seed)
    facts = {"command": call_of(context), "cells": len(truths), "seed": seed}
    facts |= origin
    readers = rows[: len(everyone.readers)]
    values = {
        "readers": readers,
        "pooled": rows[-1],
        "agreement": agreed,
        "problems": problems,
        **facts,
    }
    write_results(out, values)
    write_page(
        out / "report.html", render("Real or drawn?", rows, agreed, outcomes, problems, facts)
    )
    console.result(
        values, "\n".join([_heading(), *map(_line, rows), *_kappas(agreed), f"See {out}."])
    )
    if problems:
        raise typer.Exit(1)


def _origin(key: Path) -> dict[str, Any]:
    """The weights that drew, as `prepare` wrote them beside the key, and the commit."""
    import json

    from cytodiffusion.errors import DataError
    from cytodiffusion.release import commit

    path = key.with_name(DRAWN)
    try:
        weights = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise DataError(f"{path} is no JSON. Run `prepare` again, or take it away.") from error
    return {"weights": weights, "commit": commit()} if weights else {"commit": commit()}


def _curve(table: Table, name: str, seed: int, draws: int, console: Console) -> Outcome:
    """Accuracy as a function of confidence, or why there is no curve."""
    from cytodiffusion.errors import DataError
    from cytodiffusion.evaluate.authenticity import GUESS, THRESHOLD, answers_of
    from cytodiffusion.evaluate.psychometric import analyse, fit
    from cytodiffusion.evaluate.uncertainty import Outcome

    answers = answers_of(table, name)
    try:
        found = fit(answers.judged, family="weibull", guess=GUESS)
    except DataError as error:
        return Outcome(answers, None, str(error), {})
    work = analyse(found, level=THRESHOLD, seed=seed, draws=draws)
    analysis = console.follow(work, f"resampling {plain(name)}", draws, "draws")
    return Outcome(answers, analysis, None, {"weibull": found.aic})


def _heading() -> str:
    names = ("answers", "accuracy", "drawn", "real", "d'", "bias c", "median s")
    return f"{'reader':<20}{names[0]:>8}{names[1]:>24}" + "".join(f"{n:>9}" for n in names[2:])


def _line(row: dict[str, Any]) -> str:
    """One reader for a terminal."""
    low, high = row["accuracy_ci95"]
    names = ("sensitivity", "specificity", "d_prime", "criterion", "median_seconds")
    numbers = ["-" if row[name] is None else f"{row[name]:.2f}" for name in names]
    accuracy = f"{row['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
    return f"{plain(row['name']):<20}{row['n']:>8}{accuracy:>24}" + "".join(
        f"{n:>9}" for n in numbers
    )


def _kappas(agreed: dict[str, Any]) -> list[str]:
    """Agreement, for a terminal."""
    every = [*agreed["pairs"], *([agreed["all"]] if agreed["all"] else [])]
    return [
        f"kappa of {plain(', '.join(row['readers']))}: "
        + ("not known" if row["kappa"] is None else f"{row['kappa']:.3f}")
        + f" over {row['n']} cells"
        for row in every
    ]
