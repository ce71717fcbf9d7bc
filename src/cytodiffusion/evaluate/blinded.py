"""A blinded set: real and drawn cells that differ in nothing but what they show.

Both kinds take one way: decode, crop, one resize to the same size, 8-bit RGB, PNG. What would tell
them apart without looking is taken away:

    names      ids drawn at random, in an order that is shuffled; both come from the seed and the
               pictures alone, not from which of them are real
    files      no metadata, so no mark of a synthetic image; stored without compression, so that all
               are equally long (noise and blur would show in the length otherwise)
    the page   is made of ids and pictures alone: it cannot hold what it was not given

What is left is in the pixels, and is what a reader is asked about. A frame with fewer pixels than the
size is enlarged and gets smooth: `Gathered.enlarged` counts those. A real frame that is hardly shrunk
keeps the traces of its JPEG.

The key (id,truth,class,source) is for the examiner. Answers come back as reader,id,answer,confidence,
seconds: real or drawn, 1 to 5, seconds on the screen.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cytodiffusion.data.images import Preprocess, decode
from cytodiffusion.data.sample import Sample
from cytodiffusion.data.split import divider
from cytodiffusion.errors import DataError, UnreadableImage
from cytodiffusion.evaluate.report import data_uri, fill

TRUTHS = ("real", "drawn")
SURE = {1: 0.55, 2: 0.65, 3: 0.75, 4: 0.85, 5: 0.95}  # key -> middle of 50-60 %, ..., 90-100 %
KEY = ("id", "truth", "class", "source")
COLUMNS = ("reader", "id", "answer", "confidence", "seconds")
SHOWN = 384  # px: largest height and width of a cell on the page
NAMED = 5  # lines of a bad table that are named one by one


# --- the set -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gathered:
    """Pictures of one kind, in the order of their classes."""

    pngs: list[bytes]
    classes: list[int]
    names: list[str]
    problems: list[str]  # of images that could not be read
    enlarged: int  # pictures that had fewer pixels than they have now


def gather(
    samples: Sequence[Sample], classes: Sequence[int], preprocess: Preprocess, per_class: int,
    rng: np.random.Generator,
) -> Generator[int, None, Gathered]:  # fmt: skip
    """Up to `per_class` pictures of each class, chosen at random; no picture twice.

    Where one cannot be read another is taken. Yields how many there are so far.
    """
    pngs: list[bytes] = []
    kept, names, problems, enlarged = [], [], [], 0
    for k in np.unique(np.array(classes, int)).tolist():
        wanted = len(pngs) + per_class
        for row in rng.permutation(np.flatnonzero(np.array(classes) == k)).tolist():
            if len(pngs) == wanted:
                break
            sample = samples[row]
            try:
                image = decode(sample.read())
            except UnreadableImage as error:
                problems.append(f"{sample.name}: {error}")
                continue
            png = plain_png(preprocess.canvas(image))
            if png in pngs:
                continue
            pngs.append(png)
            kept.append(k)
            names.append(sample.name)
            enlarged += round(preprocess.crop * min(image.size)) < preprocess.size
            yield len(pngs)
    return Gathered(pngs, kept, names, problems, enlarged)


def plain_png(pixels: UInt8[np.ndarray, "3 s s"]) -> bytes:
    """A PNG without metadata or compression: its length depends on the size of the picture alone."""
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    image.save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


class Cell(NamedTuple):
    """One cell of a blinded set."""

    id: str
    truth: str  # one of TRUTHS
    label: str
    source: str  # the name of the image in its own set
    png: bytes


def blind(
    real: Gathered, drawn: Gathered, classes: Sequence[str], per_class: int, seed: int
) -> list[Cell]:
    """As many real as drawn cells of each class, in an order and under ids that say nothing.

    Raises DataError where no class has cells of both kinds.
    """
    named = []
    for k, label in enumerate(classes):
        rows = [[i for i, c in enumerate(each.classes) if c == k] for each in (real, drawn)]
        count = min(per_class, *map(len, rows))
        for truth, each, of_class in zip(TRUTHS, (real, drawn), rows, strict=True):
            named += [(each.pngs[i], truth, label, each.names[i]) for i in of_class[:count]]
    if not named:
        raise DataError(
            "No class has both real and drawn cells. Draw cells of the classes that the real ones "
            "have: generate --classes."
        )
    named.sort(key=lambda cell: hashlib.sha256(cell[0]).digest())
    about = hashlib.sha256(b"".join(cell[0] for cell in named)).digest()
    rng = np.random.default_rng([seed, *about])
    ids = rng.choice(16**6, len(named), replace=False).tolist()
    order = rng.permutation(len(named)).tolist()
    return [
        Cell(
            f"c{number:06x}", truth, label, source, png
        )  # a number alone is spoilt by spreadsheets
        for number, (png, truth, label, source) in zip(ids, (named[i] for i in order), strict=True)
    ]


def page(pictures: Sequence[tuple[str, bytes]], size: int) -> str:
    """The test as one HTML page; `pictures` are id and PNG file, in order."""
    ids = ",".join(name for name, _ in pictures)
    return fill(
        "blinded.html.j2",
        cells=[[name, data_uri(png)] for name, png in pictures],
        test=hashlib.sha256(ids.encode()).hexdigest()[:12],
        size=size,
        side=size * max(1, SHOWN // size),
        sure={key: f"{100 * x - 5:.0f}\N{EN DASH}{100 * x + 5:.0f}" for key, x in SURE.items()},
        columns=COLUMNS,
    )


def key_table(cells: Iterable[Cell]) -> bytes:
    """The key as CSV."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(KEY)
    writer.writerows(cell[:-1] for cell in cells)
    return text.getvalue().encode("utf-8", errors="backslashreplace")


# --- what comes back -----------------------------------------------------------------------------


class Truth(NamedTuple):
    """What the key says of a cell."""

    drawn: bool
    label: str


class Answer(NamedTuple):
    """What one reader said of one cell."""

    drawn: bool
    confidence: float  # one of SURE
    seconds: float


def read_key(path: Path) -> dict[str, Truth]:
    """The key by id. Raises DataError for a file that is none."""
    found = {}
    for number, line in _lines(path, KEY[:3], "key"):
        if line["truth"] not in TRUTHS:
            raise DataError(
                f"Line {number} of the key {path}: '{line['truth']}' is not real or drawn."
            )
        if line["id"] in found:
            raise DataError(f"Line {number} of the key {path}: {line['id']} is there twice.")
        found[line["id"]] = Truth(line["truth"] == "drawn", line["class"])
    if len({truth.drawn for truth in found.values()}) < 2:
        raise DataError(
            f"The key {path} must list both real and drawn cells, as `prepare` wrote it."
        )
    return found


def read_answers(
    paths: Iterable[Path], key: dict[str, Truth]
) -> tuple[dict[str, dict[str, Answer]], list[str]]:
    """(answers by reader and id, what could not be used and why, a line each).

    Where a reader answered a cell twice, the last answer counts. Raises DataError where no line can be
    used.
    """
    found: dict[str, dict[str, Answer]] = {}
    problems: list[str] = []
    again: dict[str, list[str]] = {}
    for path in paths:
        try:
            lines = _lines(path, COLUMNS, "table of answers")
        except DataError as error:
            problems.append(str(error))
            continue
        if lines and not any(line["id"] in key for _, line in lines):
            problems.append(
                f"{path} answers another test: the key has none of its {len(lines)} ids. Give the key.csv "
                "that lay beside its test.html."
            )
            continue
        bad = []
        for number, line in lines:
            try:
                reader, answer = _answer(line, key)
            except ValueError as error:
                bad.append(f"{path}, line {number}: {error}")
                continue
            answers = found.setdefault(reader, {})
            if line["id"] in answers:
                again.setdefault(reader, []).append(line["id"])
            answers[line["id"]] = answer
        problems += bad[:NAMED]
        if bad[NAMED:]:
            problems.append(f"{path}: and {len(bad) - NAMED} more lines that cannot be used.")
    for reader, ids in again.items():
        problems.append(
            f"{reader} answered {len(ids)} cell{'s' * (len(ids) > 1)} more than once, first {ids[0]}: the "
            "last answer counts."
        )
    if not found:
        raise DataError(" ".join(["No answer can be used.", *problems]))
    return found, problems


def _answer(line: dict[str, str], key: dict[str, Truth]) -> tuple[str, Answer]:
    """Raises ValueError, saying why, for a line that is no answer."""
    if not line["reader"]:
        raise ValueError("the reader is missing")
    if line["id"] not in key:
        raise ValueError(f"the key has no cell '{line['id']}'")
    if line["answer"] not in TRUTHS:
        raise ValueError(f"the answer '{line['answer']}' is not real or drawn")
    if line["confidence"] not in map(str, SURE):
        raise ValueError(f"the confidence '{line['confidence']}' is none of 1, 2, 3, 4, 5")
    try:
        seconds = float(line["seconds"])
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < np.inf:
        raise ValueError(f"the seconds '{line['seconds']}' are no number of 0 or more")
    answer = Answer(line["answer"] == "drawn", SURE[int(line["confidence"])], seconds)
    return line["reader"], answer


def _lines(path: Path, columns: Sequence[str], what: str) -> list[tuple[int, dict[str, str]]]:
    """Lines with their numbers. Raises DataError for what is no table, or lacks columns."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            text = file.read()
        rows = io.StringIO(text, newline="")
        reader = csv.DictReader(rows, delimiter=divider(text), restval="", restkey="")
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        lines = [
            (reader.line_num, {name: line[name].strip() for name in columns})
            for line in (() if missing else reader)
        ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        told = getattr(error, "strerror", None) or error
        raise DataError(f"The {what} {path} cannot be read ({told}).") from error
    if missing:
        raise DataError(
            f"The {what} {path} has no column {', '.join(missing)}; it needs {','.join(columns)}."
        )
    return lines
