"""`data check | split`: what is wrong with a data set, and who trains on what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cytodiffusion.cli.console import Console, Device, Json, Labels, Seed, plain

if TYPE_CHECKING:
    from cytodiffusion.data.split import Row

app = typer.Typer(help="Check and split data sets.", no_args_is_help=True, rich_markup_mode=None)
Source = Annotated[Path, typer.Argument(metavar="DIR", help="Images, in any form it reads.")]


@app.command()
def check(
    source: Source,
    splits: Annotated[
        Path | None, typer.Option(help="CSV with path,label,split: are copies on two sides of it?")
    ] = None,
    tiny: Annotated[int, typer.Option(help="A class with fewer images is reported.")] = 10,
    taxonomy: Labels = None,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Find unreadable images, duplicates, one image under two labels, and tiny classes."""
    from cytodiffusion.data.check import check as check_samples
    from cytodiffusion.data.readers import read_dataset
    from cytodiffusion.data.taxonomy import Taxonomy

    console = Console(json)
    labels = Taxonomy.load(taxonomy)
    samples = labels.respell(read_dataset(source, splits=splits))
    found = check_samples(
        samples,
        tiny=tiny,
        progress=lambda done: console.progress("checking", done, len(samples), "images"),
    )
    if unknown := [label for label in found.classes if labels.canonical(label) is None]:
        console.note(f"No class that the taxonomy knows: {', '.join(unknown)}. Spelled as meant?")
    console.result(found.as_dict(), "\n".join(map(plain, found.lines())))
    if found.unreadable:
        raise typer.Exit(1)


@app.command()
def split(
    source: Source,
    out: Annotated[Path, typer.Option("--out", "-o", help="CSV to write.")] = Path("splits.csv"),
    train: Annotated[float, typer.Option(min=0, max=1)] = 0.8,
    val: Annotated[float, typer.Option(min=0, max=1)] = 0.1,
    test: Annotated[float, typer.Option(min=0, max=1)] = 0.1,
    group: Annotated[str, typer.Option(help="auto, patient, slide or none.")] = "auto",
    taxonomy: Labels = None,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Write a split: stratified, disjoint by patient or slide, duplicates on one side."""
    from cytodiffusion.data.check import check as check_samples
    from cytodiffusion.data.readers import read_dataset
    from cytodiffusion.data.split import check_fractions, write_split
    from cytodiffusion.data.split import split as deal
    from cytodiffusion.data.taxonomy import Taxonomy
    from cytodiffusion.errors import SettingsError

    if group not in ("auto", "patient", "slide", "none"):
        raise SettingsError(f"--group takes auto, patient, slide or none, not '{group}'.")
    fractions = {
        name: share for name, share in (("train", train), ("val", val), ("test", test)) if share
    }
    check_fractions(fractions)
    console = Console(json)
    samples = Taxonomy.load(taxonomy).respell(read_dataset(source))
    found = check_samples(
        samples,
        progress=lambda done: console.progress("comparing", done, len(samples), "images"),
    )
    bad = {name for name, _ in found.unreadable}
    dealt = deal(
        [sample for sample in samples if sample.name not in bad],
        fractions,
        seed,
        None if group == "none" else group,  # type: ignore[arg-type]
        found.duplicate_groups(),
        found.synthetic,
    )
    if out.exists():
        _refuse_another(out, dealt.rows)
    write_split(dealt.rows, out)
    counts = Counter(row.split for row in dealt)
    for name in sorted(bad):
        console.note(f"Not read, so in no split: {name}")
    for note in dealt.notes:
        console.note(note)
    told = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    values = {"out": str(out), "counts": dict(counts), "grouped_by": dealt.grouped_by}
    console.result(values, f"{out}: {told}.")
    if bad:
        raise typer.Exit(1)


def _refuse_another(path: Path, rows: Sequence[Row]) -> None:
    """Raises OutputError for a file that is not this split."""
    from cytodiffusion.data.split import read_split
    from cytodiffusion.errors import DataError, OutputError

    try:
        same = read_split(path, {row.name for row in rows}) == rows
    except DataError:
        same = False
    if not same:
        raise OutputError(
            f"{path} is there and says otherwise, and results may hang on it. Name another file with -o, "
            "or delete it."
        )
