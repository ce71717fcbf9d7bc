"""A split is a file: path, label, split, one line an image.

Images that belong together (one patient, one slide, copies of one picture) form a unit, and a unit
goes to one side as a whole. Units are dealt one by one, largest first, each to the split s that
keeps every class c nearest to its share, by the chi-square distance

    sum over s, c of (a_sc - d_sc)^2 / d_sc,     d_sc = fraction_s * images of class c,

a_sc counting the images of class c that s has got. For units of one image this is the Sainte-Lague
rule of proportional seats. The order among equals comes from (seed, name) alone, so the listing may
come in any order.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from cytodiffusion.data.sample import Sample
from cytodiffusion.errors import DataError, SettingsError
from cytodiffusion.files import write_file

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
FRACTIONS: Mapping[str, float] = {"train": 0.8, "val": 0.1, "test": 0.1}

Group = Literal["auto", "patient", "slide"]


class Row(NamedTuple):
    """One line of a split file."""

    name: str
    label: str
    split: str


@dataclass(frozen=True)
class Split:
    """The rows, sorted by name; what kept images together; what a person should know."""

    rows: list[Row]
    grouped_by: str | None  # 'patient', 'slide', 'patient and slide' or None
    notes: list[str]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def split(
    samples: Sequence[Sample],
    fractions: Mapping[str, float] = FRACTIONS,
    seed: int = 0,
    group: Group | None = "auto",
    duplicates: Iterable[Iterable[str]] = (),
    synthetic: Collection[str] = (),
) -> Split:
    """Deal the samples to splits: by class, and never one patient or picture on two sides.

    `group` 'auto' keeps images of one patient together and, where none is named, those of one slide, which
    may be numbered anew for each patient. `duplicates` are
    groups of names to be kept together, such as `Report.duplicate_groups()`; names that are not
    among the samples are passed over. A class too small to reach every split is a note, no error.
    `synthetic` names images that may be trained on and nothing else: they go to `train`, after the
    real ones were dealt.

    Raises DataError for no real samples, synthetic ones without a split `train`, a name given twice,
    an image without a label, or a column that is asked for and empty; SettingsError for fractions
    that are not positive or do not add up to 1.
    """
    check_fractions(fractions)
    samples = sorted(samples, key=lambda sample: sample.name)
    every = _labels(samples)
    drawn = {name: "train" for name in every if name in synthetic}
    if drawn and ("train" not in fractions or len(drawn) == len(samples)):
        raise DataError(
            f"{len(drawn)} of {len(samples)} images are marked as synthetic, first "
            f"'{next(iter(drawn))}'; they may only be trained on, beside real ones. Leave them out, or "
            "give real images and a split `train`."
        )
    real = [sample for sample in samples if sample.name not in drawn]
    labels = _labels(real)
    columns = _columns(real, group)
    units = _units(real, columns, duplicates)
    side = drawn | _deal(units, labels, fractions, seed)
    rows = [Row(name, label, side[name]) for name, label in every.items()]
    dealt = [row for row in rows if row.name not in drawn]
    notes = [*_column_notes(real, columns), *_class_notes(dealt, fractions, units)]
    if drawn:
        notes.append(f"{len(drawn)} images are marked as synthetic: all of them are in train.")
    return Split(rows, " and ".join(columns) or None, notes)


def check_fractions(fractions: Mapping[str, float]) -> None:
    """Raises SettingsError for fractions that are not positive or do not add up to 1."""
    total = sum(fractions.values())
    if not fractions or min(fractions.values()) <= 0 or abs(total - 1) > 1e-6:
        given = ", ".join(f"{name} {value:g}" for name, value in fractions.items()) or "none"
        raise SettingsError(
            f"The fractions of a split must be above 0 and add up to 1; given: {given}. Try "
            "train 0.8, val 0.1, test 0.1."
        )


def _labels(samples: Sequence[Sample]) -> dict[str, str]:
    if not samples:
        raise DataError("There are no images to split. Give a folder with a subfolder per class.")
    bare = [sample.name for sample in samples if sample.label is None]
    if bare:
        raise DataError(
            f"{len(bare)} images have no label, first: '{bare[0]}'. A split needs labels: put each "
            "class in its own folder, or give a manifest with a column `label`."
        )
    labels = {sample.name: str(sample.label) for sample in samples}
    if len(labels) < len(samples):
        name, count = Counter(sample.name for sample in samples).most_common(1)[0]
        raise DataError(f"'{name}' is listed {count} times. List each image once.")
    return labels


def _columns(samples: Sequence[Sample], group: Group | None) -> list[str]:
    """What keeps images together, of what is named of any of them."""
    if group is None:
        return []
    wanted = ("patient", "slide") if group == "auto" else (group,)
    found, rest = [], list(samples)
    for column in wanted:
        if any(getattr(sample, column) for sample in rest):
            found.append(column)
        rest = [sample for sample in rest if not getattr(sample, column)]
    if found or group == "auto":
        return found
    raise DataError(
        f"The split is to keep each {group} on one side, but no image names its {group}. Add a "
        f"column `{group}` to the manifest, or split without groups."
    )


def _units(
    samples: Sequence[Sample], columns: Sequence[str], duplicates: Iterable[Iterable[str]]
) -> list[list[str]]:
    """Names that must stay together, directly or through others."""
    ties = [list(names) for names in duplicates]
    members: dict[tuple[str, str], list[str]] = {}
    for sample in samples:
        if named := next((c for c in columns if getattr(sample, c)), None):
            members.setdefault((named, getattr(sample, named)), []).append(sample.name)
    return connected([sample.name for sample in samples], [*ties, *members.values()])


def connected(names: Sequence[str], ties: Iterable[Sequence[str]]) -> list[list[str]]:
    """Join names that share a tie, however long the chain; each group in the order of `names`."""
    root = {name: name for name in names}

    def find(name: str) -> str:
        while root[name] != name:
            root[name] = root[root[name]]
            name = root[name]
        return name

    for tie in ties:
        known = [name for name in tie if name in root]
        for name in known[1:]:
            root[find(name)] = find(known[0])
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(find(name), []).append(name)
    return list(groups.values())


def _deal(
    units: list[list[str]], labels: dict[str, str], fractions: Mapping[str, float], seed: int
) -> dict[str, str]:
    """name -> split, by the rule of the module's first paragraph."""
    classes = {label: i for i, label in enumerate(sorted(set(labels.values())))}
    counts = np.zeros((len(units), len(classes)))
    for i, unit in enumerate(units):
        for name in unit:
            counts[i, classes[labels[name]]] += 1
    wanted = np.outer(list(fractions.values()), counts.sum(0))
    given = np.zeros_like(wanted)
    splits, side = list(fractions), {}
    for i in sorted(range(len(units)), key=lambda i: (-len(units[i]), _lot(seed, units[i][0]))):
        growth = (counts[i] * (counts[i] + 2 * given) / wanted).sum(1)
        chosen = int(growth.argmin())
        given[chosen] += counts[i]
        side.update(dict.fromkeys(units[i], splits[chosen]))
    return side


def _lot(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def _column_notes(samples: Sequence[Sample], columns: Sequence[str]) -> list[str]:
    if not columns:
        return ["No patient or slide is named: images of one patient may be on both sides."]
    notes, rest = [], list(samples)
    for column in columns:
        if values := {getattr(sample, column) for sample in rest} - {None, ""}:
            notes.append(f"Each {column} is on one side only ({len(values)} in all).")
        rest = [sample for sample in rest if not getattr(sample, column)]
    if rest:
        notes.append(f"{len(rest)} images name no {' or '.join(columns)} and are dealt one by one.")
    return notes


def _class_notes(
    rows: list[Row], fractions: Mapping[str, float], units: list[list[str]]
) -> list[str]:
    """Which classes do not reach every split."""
    found = Counter((row.label, row.split) for row in rows)
    images = Counter(row.label for row in rows)
    label_of = {row.name: row.label for row in rows}
    groups = Counter(label for unit in units for label in {label_of[name] for name in unit})
    notes = []
    for label in sorted(images):
        missing = [name for name in fractions if not found[label, name]]
        if missing:
            notes.append(
                f"The class '{label}' has {images[label]} images in {groups[label]} independent "
                f"groups, too few for every split: none in {', '.join(missing)}."
            )
    return notes


def write_split(rows: Iterable[Row], path: Path | str) -> None:
    """Write path,label,split; the file appears whole or not at all. Raises OutputError."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "label", "split"))
    writer.writerows(rows)
    write_file(Path(path), text.getvalue().encode(), "the split")


def read_split(path: Path | str, known: Collection[str] = ()) -> list[Row]:
    """Read a file with the columns path, label, split; others are passed over. Raises DataError.

    A backslash divides folders, unless the name is one of the `known` as it stands.
    """
    path = Path(path)
    try:
        lines = csv_lines(path.read_bytes().decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"The split file {path} cannot be read ({error}). Give a CSV file with the columns "
            "path,label,split."
        ) from error
    if not lines:
        raise DataError(f"The split file {path} lists no images. Make one with `data split`.")
    if missing := {"path", "label", "split"} - lines[0][1].keys():
        raise DataError(
            f"The split file {path} lacks the columns {', '.join(sorted(missing))}. Its first line "
            "must name path,label,split."
        )
    return _rows(lines, path, known)


def divider(text: str) -> str:
    """What divides the columns of a CSV file: a comma, semicolon or tab, as its first line says."""
    return max(",;\t", key=text.split("\n", 1)[0].count)


def csv_lines(text: str) -> list[tuple[int, dict[str, str]]]:
    """Numbers and fields of the lines of a CSV file, the first of which names the columns.

    Commas, semicolons or tabs divide it; headings are in lower case, without spaces around them.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=divider(text), restval="")
    return [
        (number, {str(k).strip().lower(): v for k, v in line.items() if isinstance(v, str)})
        for number, line in enumerate(reader, start=2)
    ]


def split_word(split: str | None) -> str | None:
    """Our word for a split that others call valid or Test; other words stay."""
    return split and SPLITS.get(split.lower(), split)


def _rows(lines: list[tuple[int, dict[str, str]]], path: Path, known: Collection[str]) -> list[Row]:
    rows: dict[str, Row] = {}
    for number, line in lines:
        name, label, split = (line.get(column, "") for column in ("path", "label", "split"))
        label, split = label.strip(), split.strip()
        if name not in known:
            name = name.strip().replace("\\", "/").removeprefix("./")
        if not name or not split:
            raise DataError(f"Line {number} of {path} has no path or no split. Fill it or drop it.")
        if name in rows:
            raise DataError(f"{path} lists '{name}' twice, again in line {number}. Keep one line.")
        rows[name] = Row(name, label, str(split_word(split)))
    return list(rows.values())
