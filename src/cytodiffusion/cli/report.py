"""`bench report`: the results of several benches on one page, beside the paper's figures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cytodiffusion.cli.benches import write_results
from cytodiffusion.cli.console import NOTICE, Console, Context, Device, Json, Out, Seed, call_of

if TYPE_CHECKING:
    from cytodiffusion.evaluate.joined import Experiment
    from cytodiffusion.evaluate.published import Figure

RESULTS = ("results.json", "metrics.json")  # of a bench, of evaluate


def report(
    context: Context,
    folders: Annotated[
        list[Path], typer.Argument(metavar="OUT...", help="Folders of benches and of evaluate.")
    ],
    out: Out,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Lay the results of several benches beside the paper's figures: OUT/report.html, results.json.

    Says of each figure whether it can be compared with the paper's, and why not. Measures nothing.
    """
    from cytodiffusion.errors import DataError
    from cytodiffusion.evaluate.joined import as_dict, in_order, render
    from cytodiffusion.evaluate.report import write_page

    console = Console(json)
    folders = list(dict.fromkeys(folders))
    _refuse_results(out)
    found, problems = _read(folders, out)
    if not found:
        raise DataError(" ".join(problems))
    console.note(NOTICE)
    for problem in problems:
        console.note(problem)
    facts = {"command": call_of(context)}
    experiments = in_order(found)
    values = {**as_dict(experiments), "problems": problems, **facts}
    write_results(out, values)
    write_page(out / "report.html", render(experiments, problems, facts))
    console.result(values, "\n".join([*_lines(experiments), f"See {out}."]))
    if problems:
        raise typer.Exit(1)


def _refuse_results(out: Path) -> None:
    """Raises SettingsError where the results of a bench would be lost."""
    for name in RESULTS:
        values = _load(out / name) if (out / name).exists() else {"summary": [], "experiments": []}
        if not isinstance(values, dict) or not {"summary", "experiments"} <= values.keys():
            from cytodiffusion.errors import SettingsError

            raise SettingsError(
                f"{out} holds results of another kind, which would be lost. Choose another folder "
                "with -o."
            )


def _load(path: Path) -> Any:
    """What a JSON file holds; None where it cannot be read."""
    import json

    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _read(folders: Sequence[Path], out: Path) -> tuple[list[Experiment], list[str]]:
    """What the folders hold, and a line for each that holds nothing."""
    from cytodiffusion.errors import DataError
    from cytodiffusion.evaluate.joined import experiment

    found, problems = [], []
    for folder in folders:
        path = next((folder / name for name in RESULTS if (folder / name).is_file()), None)
        if path is None:
            problems.append(f"Not read: {folder}: it has no {' or '.join(RESULTS)}.")
            continue
        values = _load(path)
        try:
            if values is None:
                raise DataError(f"{path.name} is not whole")
            found.append(experiment(values, str(folder), _link(folder, out)))
        except DataError as error:
            problems.append(f"Not read: {folder}: {error}.")
    return found, problems


def _link(folder: Path, out: Path) -> str | None:
    """The folder's own report as seen from OUT, if it lies below."""
    from urllib.parse import quote

    page = (folder / "report.html").resolve()
    if not page.is_file() or not page.is_relative_to(out.resolve()):
        return None
    return quote(os.fspath(page.relative_to(out.resolve()).as_posix()))


def _lines(experiments: Sequence[Experiment]) -> list[str]:
    """A line for each question, for a terminal."""
    lines = []
    for each in experiments:
        lines.append(f"{each.title}, {each.folder}")
        for line in each.findings.lines:
            published = line.published.figure if line.published else None
            told = f"ours {_said(line.ours)}, baseline {_said(line.baseline)}"
            told += f", published {_said(published)}; comparable: {line.comparable}"
            lines += [f"  {line.question}", f"    {told}"]
    return lines


def _said(figure: Figure | None) -> str:
    from cytodiffusion.evaluate.joined import said

    return "-" if figure is None else said(figure)
