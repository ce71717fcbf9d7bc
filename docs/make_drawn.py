"""Write docs/drawn.png and docs/drawn.md: drawn cells, and their figures beside those of real ones.

    cytodiffusion generate -o out/drawn --per-class 40
    python docs/make_drawn.py out/drawn DATA/pbc --splits DATA/pbc/splits.csv --split val

The picture holds drawn cells alone, the first seeds of each class, pixel for pixel. Of real cells nothing
but figures of a whole class is written. Their frames are cropped and resized as the model does it; drawn
cells have its crop and size already. Then `measure` takes both alike.

The usual range of n real cells leaves out the j - 1 smallest and largest values, j = 2.5 % of n + 1,
rounded down: one more cell like them would lie below it with a chance of 2.5 % at most, and above it too.
"""

from __future__ import annotations

import argparse
import colorsys
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from cytodiffusion.bundle import Model, load
from cytodiffusion.cli.console import Console, cores
from cytodiffusion.data.find import find_cell
from cytodiffusion.data.images import Preprocess
from cytodiffusion.data.mark import Mark, marked_png, read_mark, refuse_marked
from cytodiffusion.data.pixels import Pixels, load_pixels
from cytodiffusion.data.readers import read_dataset
from cytodiffusion.data.sample import Sample
from cytodiffusion.errors import DataError
from cytodiffusion.evaluate.intervals import binomial_interval
from cytodiffusion.files import write_file
from cytodiffusion.release import commit
from cytodiffusion.synthesis import REQUEST, Drawing

TAIL = 0.025  # chance of a real cell to lie below its usual range, and above it
WINDOW = 7  # px: width of the neighbourhood in which grain is measured
QUIET = 2  # percentile of these over the crop: the empty field, of which some crops show little
FINE = 0.25  # cycles / px, from which on detail is fine
GAP, HEAD, FOOT = 2, 28, 18  # px between cells, for the names above, for the line below


class Figure(NamedTuple):
    """What is measured of a cell."""

    name: str
    unit: str
    digits: int
    more: str  # what a cell is with a larger value
    less: str
    meaning: str


FIGURES = (
    Figure("nucleus", "% of the crop", 1, "larger", "smaller", "its area"),
    Figure("cell", "% of the crop", 1, "larger", "smaller",
           "its area, nucleus included; its outline is found less surely than the nucleus's"),
    Figure("density", "nats", 2, "darker", "paler",
           "optical density of the nucleus, mean of red, green and blue"),
    Figure("hue", "degrees", 0, "redder", "bluer",
           "colour of the nucleus: 240 is blue, 300 magenta"),
    Figure("grain", "of 255", 1, "grainier", "smoother",
           f"standard deviation of light in {WINDOW} x {WINDOW} px, in the quietest {QUIET} % of the crop"),
    Figure("fine detail", "% of the power", 2, "crisper", "softer",
           f"share of the power above {FINE} cycles a pixel"),
)  # fmt: skip


# --- one cell ------------------------------------------------------------------------------------


def measure(pixels: np.ndarray) -> list[float] | None:
    """The `FIGURES` of one cell, uint8 (3, s, s); None where no nucleus is found."""
    found = find_cell(Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))))
    if found is None:
        return None
    areas = [100 * np.pi / 4 * (d / pixels.shape[1]) ** 2 for d in (found.nucleus, found.cell)]
    density = np.array(found.stain.nucleus)
    light = np.array(found.stain.background) * np.exp(-density)
    return [*areas, float(density.mean()), hue(light), grain(pixels), fine_detail(pixels)]


def hue(light: np.ndarray) -> float:
    """Of red, green and blue light, as in HSV, degrees; counted from yellow, far from any nucleus."""
    return (360 * colorsys.rgb_to_hsv(*light.tolist())[0] - 60) % 360 + 60


def grain(pixels: np.ndarray) -> float:
    """Unevenness of light where there is least of it: 0 for an even field, near sigma under noise."""
    light, size = pixels.astype(np.float64), (0, WINDOW, WINDOW)
    square, mean = (ndimage.uniform_filter(power, size) for power in (light**2, light))
    return float(np.percentile(np.sqrt((square - mean**2).clip(0).mean(0)), QUIET))


def fine_detail(pixels: np.ndarray) -> float:
    """Power above `FINE` / all power, %, of all colours, under a Hann window; 80 for white noise."""
    light, size = pixels.astype(np.float64), pixels.shape[1]
    window = np.hanning(size + 2)[1:-1]
    seen = (light - light.mean((1, 2), keepdims=True)) * np.outer(window, window)
    power = (np.abs(np.fft.fft2(seen)) ** 2).sum(0)
    frequency = np.fft.fftfreq(size)
    high = np.hypot(frequency[:, None], frequency) > FINE
    return float(100 * power[high].sum() / power.sum())


# --- a class -------------------------------------------------------------------------------------


class Compared(NamedTuple):
    """One figure of the drawn and of the real cells of a class."""

    drawn: np.ndarray
    real: np.ndarray

    @property
    def gap(self) -> float:
        """Mean of drawn less mean of real cells, in standard deviations of the real ones."""
        return float((self.drawn.mean() - self.real.mean()) / self.real.std(ddof=1))

    def outside(self) -> tuple[int, int]:
        """How many drawn cells lie below and above the usual range of real ones."""
        low, high = usual_range(self.real)
        return int((self.drawn < low).sum()), int((self.drawn > high).sum())


def usual_range(real: np.ndarray) -> tuple[float, float]:
    """See above. Raises DataError for too few cells."""
    j = int(TAIL * (len(real) + 1))
    if j == 0:
        raise DataError(
            f"{len(real)} real cells of a class are too few to say what is usual; give "
            f"{round(1 / TAIL) - 1} at the least."
        )
    ordered = np.sort(real)
    return float(ordered[j - 1]), float(ordered[-j])


def compare(
    drawn: dict[str, np.ndarray], real: dict[str, np.ndarray]
) -> dict[str, dict[str, Compared]]:
    """By figure and class, from tables (cells, figures) by class."""
    return {
        figure.name: {name: Compared(drawn[name][:, i], real[name][:, i]) for name in drawn}
        for i, figure in enumerate(FIGURES)
    }


def tables(cells: Pixels, classes: Sequence[str]) -> dict[str, np.ndarray]:
    """(cells, figures) by class, of cells with a nucleus. Raises DataError for a class without."""
    rows: dict[str, list[list[float]]] = {name: [] for name in classes}
    for image, label in zip(cells.images, cells.labels, strict=True):
        if (row := measure(image)) is not None:
            rows[classes[label]].append(row)
    if empty := [name for name, found in rows.items() if len(found) < 2]:
        raise DataError(f"Fewer than two cells with a nucleus are {empty[0]}. Give more.")
    return {name: np.array(found) for name, found in rows.items()}


# --- the page ------------------------------------------------------------------------------------


def page(compared: dict[str, dict[str, Compared]], facts: dict[str, str]) -> str:
    """docs/drawn.md as text."""
    parts = [HEADING, _facts(facts), SUMMARY, *(_total(f, compared[f.name]) for f in FIGURES)]
    parts.append("\n" + _sentences(compared))
    parts += [_table(figure, compared[figure.name]) for figure in FIGURES]
    return "\n".join(parts)


HEADING = """# Drawn cells

Made by `docs/make_drawn.py`; do not edit.

![Drawn cells of every class, all of them synthetic](drawn.png)

Every cell above is synthetic, and the file says so to machines as well. They are the first seeds of each
class, not a choice. Real cells are measured, and not shown. A platelet has no nucleus: the whole of it is
measured as one.
"""

SUMMARY = f"""
## In one table

Outside: not in the usual range of real cells of the same class. One more real cell would lie below it
with a chance of {100 * TAIL:g} % at most, and above it too. In brackets the 95 % interval of the share;
bold where it begins above {200 * TAIL:g} %. After ± stands the standard deviation over cells.

| figure | what it is | drawn below | drawn above | outside | drawn cells are, in the mean |
|---|---|---|---|---|---|"""


def _facts(facts: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {facts[name]} |" for name in facts)])


def _total(figure: Figure, classes: dict[str, Compared]) -> str:
    """One figure over all classes, a line of the first table."""
    below, above = np.sum([one.outside() for one in classes.values()], axis=0).tolist()
    n = sum(len(one.drawn) for one in classes.values())
    more = sum(one.gap > 0 for one in classes.values())
    less = sum(one.gap < 0 for one in classes.values())
    told = f"{figure.more} in {more}, {figure.less} in {less} of {len(classes)} classes"
    return (
        f"| {figure.name} | {figure.meaning} | {100 * below / n:.1f} % | {100 * above / n:.1f} % "
        f"| {_share(below + above, n)} | {told} |"
    )


def _share(events: int, n: int) -> str:
    """A share with its interval, bold where chance does not explain it."""
    low, high = binomial_interval(events, n)
    told = f"{100 * events / n:.1f} %"
    told = f"**{told}**" if low > 2 * TAIL else told
    return f"{told} [{100 * low:.1f}, {100 * high:.1f}]"


def _sentences(compared: dict[str, dict[str, Compared]]) -> str:
    """Which figures give drawn cells away, in words."""
    found: dict[str, list[str]] = {"most": [], "some": [], "none": []}
    for name, classes in compared.items():
        outside = sum(sum(one.outside()) for one in classes.values())
        n = sum(len(one.drawn) for one in classes.values())
        low, _ = binomial_interval(outside, n)
        found["most" if 2 * outside > n else "some" if low > 2 * TAIL else "none"].append(name)
    words = {
        "most": "Most drawn cells fall outside in: ",
        "some": "More of them than of real cells, but not most, fall outside in: ",
        "none": "Not shown to fall outside more often than real cells in: ",
    }
    return " ".join(words[key] + ", ".join(names) + "." for key, names in found.items() if names)


def _table(figure: Figure, classes: dict[str, Compared]) -> str:
    """One figure class by class."""
    lines = [
        f"\n## {figure.name.capitalize()}, {figure.unit}\n\n{figure.meaning.capitalize()}.\n",
        "| class | drawn | real | gap / SD of real | drawn cells outside |",
        "|---|---|---|---|---|",
    ]
    for name, one in classes.items():
        spread = [
            f"{x.mean():.{figure.digits}f} ± {x.std(ddof=1):.{figure.digits}f}"
            for x in (one.drawn, one.real)
        ]
        outside = _share(sum(one.outside()), len(one.drawn))
        lines.append(
            f"| {name.replace('_', ' ')} | {spread[0]} | {spread[1]} | {one.gap:+.1f} | {outside} |"
        )
    return "\n".join(lines) + "\n" * (figure is FIGURES[-1])


# --- the picture ---------------------------------------------------------------------------------


def grid(columns: dict[str, np.ndarray], line: str) -> np.ndarray:
    """uint8 (3, h, w): a column for each class of its cells (n, 3, s, s), with names and a line below."""
    rows, side = next(iter(columns.values())).shape[:3:2]
    width, below = len(columns) * (side + GAP) + GAP, HEAD + rows * (side + GAP)
    canvas = Image.new("RGB", (width, below + FOOT), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(10)
    for i, (name, cells) in enumerate(columns.items()):
        left = GAP + i * (side + GAP)
        place = (left + side / 2, HEAD / 2)
        draw.multiline_text(place, name.replace("_", "\n"), "black", font, "mm", 1, "center")
        for row, cell in enumerate(cells):
            canvas.paste(
                Image.fromarray(np.ascontiguousarray(cell.transpose(1, 2, 0))),
                (left, HEAD + row * (side + GAP)),
            )
    draw.text((width / 2, below + FOOT / 2), line, "black", font, "mm")
    return np.array(canvas).transpose(2, 0, 1)


# --- all of it -----------------------------------------------------------------------------------


def by_seed(samples: Sequence[Sample], model: Model) -> dict[Sample, Mark]:
    """Drawn cells and their marks, smallest seeds first.

    Raises DataError for an image that does not say that this model drew it.
    """
    marks = {}
    for sample in samples:
        mark = read_mark(sample.read())
        if mark is None or mark.weights != model.weights_sha256:
            raise DataError(
                f"'{sample.name}' does not say that {model.name} ({model.weights_sha256[:12]}) drew it. "
                "Give a folder that `generate` wrote, and its model with -m."
            )
        marks[sample] = mark
    return dict(sorted(marks.items(), key=lambda pair: pair[1].seed))


def read_cells(
    samples: Sequence[Sample], model: Model, preprocess: Preprocess, console: Console
) -> Pixels:
    """All of them at the model's size. Raises DataError where one cannot be read."""
    work = load_pixels(samples, model.classes.names, preprocess, workers=cores())
    found = console.follow(work, "reading", len(samples), "images")
    if found.problems:
        raise DataError(f"Not read: {found.problems[0]}. Leave it out.")
    return found


def _command(args: argparse.Namespace) -> str:
    """How it is made again; where the folders lay is nobody's business."""
    words = f"python docs/make_drawn.py DRAWN DATA/{args.data.name} -m {Path(args.model).name}"
    words += f" --splits {args.splits.name}" if args.splits else ""
    return words + (f" --split {args.split}" if args.split else "") + f" --shown {args.shown}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("drawn", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("-m", "--model", default="pbc8")
    parser.add_argument("--splits", type=Path)
    parser.add_argument("--split")
    parser.add_argument("--shown", type=int, default=4, help="cells of each class in the picture")
    parser.add_argument("-o", "--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    console, model = Console(as_json=False), load(args.model, "cpu", engine="torch")
    names = model.classes.names
    marks = by_seed(read_dataset(args.drawn), model)
    samples = [s for s in read_dataset(args.data, splits=args.splits, split=args.split) if s.label]
    refuse_marked(samples, "real cells")
    filled = model.preprocess.model_copy(update={"crop": 1.0})  # drawn cells fill their frame
    drawn = read_cells(list(marks), model, filled, console)
    real = read_cells(samples, model, model.preprocess, console)
    found = [tables(cells, names) for cells in (drawn, real)]

    seeds = [mark.seed for mark in marks.values()]
    request = json.loads((args.drawn / REQUEST).read_text())
    counts = [
        f"{len(cells.labels):,}; a nucleus was found in {sum(map(len, table.values())):,}, the others "
        "are left out below"
        for cells, table in zip((drawn, real), found, strict=True)
    ]
    facts = {
        "model": f"{model.name}, sha256 of its weights {model.weights_sha256}",
        "drawn cells": f"{counts[0]}; seeds {min(seeds)} to {max(seeds)} of each class",
        "drawn with": ", ".join(f"{name} {request[name]}" for name in Drawing.__annotations__),
        "real cells": f"{counts[1]}; {args.data.name}, split {args.split or 'all'}, sha256 "
        f"{real.sha256[:12]}",
        "both": f"{model.preprocess.size} x {model.preprocess.size} px, the model's crop "
        f"({model.preprocess.crop:g} of a real frame, all of a drawn one)",
        "commit": commit(),
        "made by": f"`{_command(args)}`, DRAWN as `cytodiffusion generate` wrote it",
    }
    line = f"Synthetic: drawn by {model.name} ({model.weights_sha256[:12]}), first seeds. No real cell."
    shown = {name: drawn.images[drawn.labels == k][: args.shown] for k, name in enumerate(names)}
    mark = Mark(model.name, model.weights_sha256, seeds[0], ", ".join(names))
    write_file(args.out / "drawn.png", marked_png(grid(shown, line), mark), "the picture")
    write_file(args.out / "drawn.md", page(compare(*found), facts).encode(), "the page")


if __name__ == "__main__":
    main()
