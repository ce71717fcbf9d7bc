"""Who answered, how sure they were, and whether it was right: a model or people.

A table is CSV, one line an answer. Either somebody has judged it already, columns `confidence`,
`correct` (0 or 1, true or false, yes or no) and, where several people answered, `reader`; or it is
the predictions.csv of `evaluate`, where an answer is right if `predicted` is the `label`.

`Judged` gathers answers by their confidence, for whatever is made of them.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, Real
from scipy.special import xlog1py, xlogy

from cytodiffusion.data.split import divider
from cytodiffusion.errors import DataError
from cytodiffusion.evaluate.metrics import ReliabilityBin, bin_edges, observed

BINS, IN_BIN = 10, 5  # equally many answers in each of at most BINS, and at least IN_BIN
SMALLEST = 1e-12  # a chance below this counts as this much, so that the likelihood stays finite
WORDS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
NAMED = 5  # lines of a bad table that an error names
FORMS = (
    "Give the OUT folder of `cytodiffusion evaluate`, or a CSV file with the columns "
    "confidence,correct and perhaps reader."
)


Chance = Callable[[np.ndarray], np.ndarray]  # of being right, by confidence


@dataclass(frozen=True)
class Judged:
    """Answers, gathered by their confidence: the order in which they came changes nothing."""

    confidence: Float[np.ndarray, " u"]  # ascending, each once
    n: Int[np.ndarray, " u"]
    right: Int[np.ndarray, " u"]

    @classmethod
    def of(cls, confidence: Real[np.ndarray, " n"], correct: Bool[np.ndarray, " n"]) -> Judged:
        """Gather answers. Raises DataError for a confidence that is not a number in [0, 1]."""
        outside = ~((confidence >= 0) & (confidence <= 1))
        if outside.any():
            raise DataError(
                f"Confidences must be numbers from 0 to 1; {int(outside.sum())} are not, the first "
                f"is {confidence[outside][0]}. Divide percentages by 100 and leave out empty ones."
            )
        x, where, n = np.unique(confidence.astype(float), return_inverse=True, return_counts=True)
        return cls(x, n, np.bincount(where, correct, minlength=len(x)).astype(int))

    def again(self, chance: Float[np.ndarray, " u"], rng: np.random.Generator) -> Judged:
        """As many answers of the same confidences, right with the given chance."""
        return Judged(self.confidence, self.n, rng.binomial(self.n, chance))

    def log_likelihood(self, curve: Chance) -> float:
        """log P(answers | curve) in nats, 0 and below; higher is better."""
        p = np.clip(curve(self.confidence), SMALLEST, 1 - SMALLEST)
        return float((xlogy(self.right, p) + xlog1py(self.n - self.right, -p)).sum())

    def bins(self) -> list[ReliabilityBin]:
        """Share right in at most ten bins of about equally many answers, with exact intervals."""
        x, correct = self.one_by_one()
        return observed(correct, x, bins=self._how_many(), equal_mass=True)

    def deviance(self, curve: Chance) -> float:
        """2 x (log-likelihood of the bins' own shares - that of the curve), 0 and up; lower is
        better."""
        edges = bin_edges(self.one_by_one()[0], self._how_many(), equal_mass=True)
        which = np.searchsorted(edges, self.confidence)
        n, k, mean = (
            np.bincount(which, weights)
            for weights in (self.n, self.right, self.n * curve(self.confidence))
        )
        n, k, mean = n[n > 0], k[n > 0], np.clip(mean, SMALLEST, n - SMALLEST * n)[n > 0]
        return float(2 * (xlogy(k, k / mean) + xlogy(n - k, (n - k) / (n - mean))).sum())

    def _how_many(self) -> int:
        return int(np.clip(self.n.sum() // IN_BIN, 1, BINS))

    def one_by_one(self) -> tuple[np.ndarray, np.ndarray]:
        rank = np.arange(self.n.sum()) - np.repeat(np.cumsum(self.n) - self.n, self.n)
        return np.repeat(self.confidence, self.n), rank < np.repeat(self.right, self.n)


# ------------------------------------------------------------------------------------ the tables


@dataclass(frozen=True)
class Answers:
    """The answers of one model, or of one person."""

    name: str
    source: str
    judged: Judged
    classes: int | None  # how many answers there were to choose from, where the table tells
    left_out: int = 0  # rows of images that could not be read


def read_all(paths: Iterable[Path]) -> list[Answers]:
    """The answers in each table, under names that differ. Raises DataError; see `read_answers`."""
    found = [answers for path in paths for answers in read_answers(path)]
    count = Counter(answers.name for answers in found)
    named = [a if count[a.name] == 1 else replace(a, name=f"{a.name} ({a.source})") for a in found]
    for name, times in Counter(answers.name for answers in named).items():
        if times > 1:
            raise DataError(f"The answers of {name} are given twice. Give each table once.")
    return named


def read_answers(path: Path) -> list[Answers]:
    """The answers in one table or OUT folder of `evaluate`, one entry for each reader.

    Raises DataError for a table that cannot be read, lacks columns, or has lines that are no
    answers; these are named by their number.
    """
    table = path / "predictions.csv" if path.is_dir() else path
    columns, lines = _lines(table)
    judge = _judge_of(columns, table)
    rows = [(number, line) for number, line in lines if line.get("flag") != "unreadable"]
    by_reader: dict[str, list[tuple[float, bool]]] = {}
    problems = []
    for number, line in rows:
        try:
            answer = _confidence(line), judge(line)
            by_reader.setdefault(_reader(line, columns), []).append(answer)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if problems or not rows:
        more = f" and {len(problems) - NAMED} more lines" * (len(problems) > NAMED)
        told = "; ".join(problems[:NAMED]) + more or "no line holds an answer"
        raise DataError(f"The table {table} cannot be used: {told}. Mend or drop these lines.")
    name = path.name or str(path) if path.is_dir() else path.stem
    classes = sum(column.startswith("prob_") for column in columns) or None
    return [
        Answers(
            name=f"{name}, {reader}" if reader else name,
            source=str(path),
            judged=Judged.of(*map(np.array, zip(*answers, strict=True))),
            classes=classes,
            left_out=len(lines) - len(rows),
        )
        for reader, answers in by_reader.items()
    ]


Line = dict[str, str]


def _lines(table: Path) -> tuple[list[str], list[tuple[int, Line]]]:
    """(columns, lines with their numbers)."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            text = file.read()
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=divider(text))
        columns = [name.strip() for name in next(reader, [])]
        found = [(reader.line_num, fields) for fields in reader if fields]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        told = getattr(error, "strerror", None) or error
        raise DataError(f"The table {table} cannot be read ({told}). {FORMS}") from error
    for number, fields in found:
        if len(fields) != len(columns):
            raise DataError(
                f"Line {number} of {table} has {len(fields)} fields, its first line has "
                f"{len(columns)}. Put commas between fields, and quotes around text with commas."
            )
    return columns, [(number, dict(zip(columns, fields, strict=True))) for number, fields in found]


def _judge_of(columns: list[str], table: Path) -> Callable[[Line], bool]:
    if {"confidence", "correct"} <= set(columns):
        return _correct
    if {"confidence", "label", "predicted"} <= set(columns):
        return _as_labelled
    unlabelled = " It names cells without labels: run `evaluate` on labelled ones."
    raise DataError(
        f"The table {table} has the columns {', '.join(columns) or '-'}."
        f"{unlabelled * ('predicted' in columns)} {FORMS}"
    )


def _confidence(line: Line) -> float:
    try:
        value = float(line["confidence"])
    except ValueError:
        value = np.nan
    if not 0 <= value <= 1:
        raise ValueError(f"the confidence '{line['confidence']}' is not a number from 0 to 1")
    return value


def _correct(line: Line) -> bool:
    word = line["correct"].strip().lower()
    if word not in WORDS:
        raise ValueError(f"'{line['correct']}' is none of {', '.join(WORDS)}")
    return WORDS[word]


def _as_labelled(line: Line) -> bool:
    if not line["label"] or not line["predicted"]:
        raise ValueError("the label or the predicted class is missing")
    return line["label"] == line["predicted"]


def _reader(line: Line, columns: list[str]) -> str:
    if "reader" not in columns:
        return ""
    if not line["reader"].strip():
        raise ValueError("the reader is missing")
    return line["reader"].strip()
