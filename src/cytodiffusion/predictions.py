"""Samples in, a table of predictions out: one row a cell, written as it goes.

Rows are appended to OUT/predictions.part.csv while the work goes on. Run again, a row whose path and
sha256 are already there is not computed anew. At the end the table is put in the order of the input
and written whole, as predictions.csv and predictions.parquet.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import csv as pa_csv
from pyarrow import parquet
from torch import Tensor

from cytodiffusion.bundle import Model
from cytodiffusion.classify.classifier import COVERAGE, Reading
from cytodiffusion.classify.conformal import Sets, check_coverage, check_sets
from cytodiffusion.classify.measure import Done
from cytodiffusion.data.images import Preprocess, to_tensor
from cytodiffusion.data.load import Loaded, load_one
from cytodiffusion.data.sample import Sample
from cytodiffusion.errors import OutputError
from cytodiffusion.files import whole, writing_to
from cytodiffusion.types import Classes

Row = dict[str, Any]
PART = "predictions.part.csv"
REQUEST = "request.json"


@dataclass(frozen=True)
class Request:
    """How cells are to be named; rows made under another request are not mixed in."""

    budget: str = "balanced"
    crop: float | None = None  # overrides the bundle's centre crop
    coverage: float = COVERAGE
    sets: Sets = "all"  # covered over all cells, or class by class
    prior: tuple[float, ...] | None = None  # how often each class comes up; None: as in training
    answers: tuple[str, ...] | None = None  # restricts the classes that may be answered
    light: bool = False  # brings every frame to the light of the frames the model was trained on
    command: str = ""  # that asks
    source: str = ""  # where the cells are; a table is of one place
    decided: dict[str, Any] | None = None  # how light and crop came about; kept beside the rows
    batch: int = 32  # rows written at a time
    workers: int = 2

    def __post_init__(self) -> None:
        check_coverage(self.coverage)
        check_sets(self.sets)
        Classes(self.answers or ())  # none is named twice

    def preprocess(self, model: Model) -> Preprocess:
        """The bundle's, with what is asked for here laid over it."""
        return model.fitted(self.crop, self.light)

    def fingerprint(self, model: Model) -> dict[str, Any]:
        """What decides a row, apart from the image."""
        weights, calibration = model.files_sha256
        return {
            "command": self.command,
            "input": self.source,
            "model": model.name,
            "weights": weights,
            "calibration": calibration,
            "engine": model.engine,
            "budget": self.budget,
            "crop": self.crop or model.preprocess.crop,
            "match": self.preprocess(model).match,
            "coverage": self.coverage,
            "sets": self.sets,
            "prior": list(self.prior) if self.prior else None,
            "classes": list(self.answers or model.classes.names),
        }


def name_cells(model: Model, samples: Sequence[Sample], request: Request) -> Iterator[list[Row]]:
    """Rows for the samples, some at a time, as they are done; an unreadable image gets a row too.

    Each of `workers` threads reads and names cells of its own on one core.
    """
    torch.set_num_threads(1)
    preprocess, classifier = request.preprocess(model), model.classifier
    loaded: dict[int, Loaded] = {}  # of the cells in flight
    unread: Queue[Row] = Queue()

    def prepare(numbered: tuple[int, Sample]) -> tuple[Tensor, str] | None:
        place, sample = numbered
        item = load_one(sample, preprocess)
        if item.pixels is None:
            unread.put(_unreadable(item, model))
            return None
        loaded[place] = replace(item, pixels=None)
        return to_tensor(item.pixels).to(classifier.device), item.sha256

    work = classifier.measurement(request.budget).stream(
        classifier.meter, enumerate(samples), prepare, request.workers
    )
    began = time.perf_counter()
    while done := list(islice(work, request.batch)):
        items = [loaded.pop(cell.place) for cell in done]
        reading = _read(model, request, done, [item.sha256 for item in items])
        spent, began = 1000 * (time.perf_counter() - began) / len(done), time.perf_counter()
        yield [*_rows(items, reading, model, spent), *_taken(unread)]
    if rows := _taken(unread):
        yield rows


def _taken(queue: Queue[Row]) -> list[Row]:
    return [queue.get() for _ in range(queue.qsize())]


def _read(model: Model, request: Request, done: list[Done], digests: list[str]) -> Reading:
    errors, features = (
        np.stack(each) for each in zip(*((c.errors, c.features) for c in done), strict=True)
    )
    table = model.classifier.table(errors, features, digests, request.budget)
    prior = None if request.prior is None else np.array(request.prior)
    return model.classifier.read(
        table, request.budget, request.coverage, sets=request.sets, prior=prior,
        answers=request.answers,
    )  # fmt: skip


def _rows(loaded: list[Loaded], reading: Reading, model: Model, spent: float) -> Iterator[Row]:
    """`spent`: milliseconds a cell that this run took, all workers together; the mean of a batch."""
    for item, answer in zip(loaded, reading.answers(), strict=True):
        chances = zip(reading.classes, answer.probabilities, strict=True)
        yield {
            "path": item.sample.name,
            "sha256": item.sha256,
            "predicted": answer.predicted,
            "confidence": _short(answer.confidence),
            **{f"prob_{name}": _short(p) for name, p in chances},
            "set": "|".join(answer.conformal_set),
            "anomaly": _short(answer.anomaly),
            "anomaly_p": _short(answer.anomaly_p),
            "flag": answer.flag,
            "trials": answer.trials,
            "passes": answer.passes,
            "milliseconds": round(spent, 3),
            "model": model.name,
        }


def _short(value: float) -> float:
    """Six significant digits: a probability of 4e-7 is not 0, and has a logarithm."""
    return float(f"{value:.6g}")


def _unreadable(item: Loaded, model: Model) -> Row:
    row: Row = {"path": item.sample.name, "sha256": item.sha256, "flag": "unreadable"}
    return row | {"model": model.name, "problem": item.problem}


def columns(classes: Sequence[str]) -> list[str]:
    """Columns of the table, in order."""
    chances = [f"prob_{name}" for name in classes]
    first = ["path", "sha256", "predicted", "confidence", *chances, "set", "anomaly", "anomaly_p"]
    return [*first, "flag", "trials", "passes", "milliseconds", "model", "problem"]


def schema(names: Sequence[str]) -> pa.Schema:
    """Column types: text, whole numbers, or float64."""
    text = {"path", "sha256", "label", "predicted", "set", "flag", "model", "problem"}
    types = {name: pa.string() if name in text else pa.float64() for name in names}
    return pa.schema({**types, "trials": pa.int64()})


class Table:
    """The growing table of one output folder."""

    def __init__(self, folder: Path, request: Request, model: Model) -> None:
        self.folder, self.names = folder, columns(request.answers or model.classes.names)
        self.part = folder / PART
        self.stamp, self.decided = request.fingerprint(model), request.decided

    def begin(self) -> dict[tuple[str, str], Row]:
        """Rows that are already there, by path and sha256. Raises OutputError for another request."""
        stamp, known = self.folder / REQUEST, (self.folder / REQUEST).exists()
        if known:
            before = read_request(self.folder)
            before.pop("decided", None)
            self._refuse_another(before)
        with writing_to(self.folder):
            _cut_torn_line(self.part)
        found = [*_read_rows(self.folder / "predictions.csv"), *_read_rows(self.part)]
        if found and not known:
            self._refuse_another({})
        with writing_to(self.folder), whole(stamp) as part:
            part.write_text(json.dumps(self.stamp | {"decided": self.decided}, indent=1) + "\n")
        return {(row["path"], row["sha256"]): row for row in found if row["flag"] != "unreadable"}

    def _refuse_another(self, before: dict[str, Any]) -> None:
        if before != self.stamp:
            raise OutputError(
                f"{self.folder} holds predictions made with another {_apart(before, self.stamp)} (see "
                "request.json there). Ask for the same, choose another folder with -o, or delete "
                f"{self.folder}."
            )

    def append(self, rows: list[Row]) -> None:
        """Add rows to the part file; a program killed after this loses none of them."""
        with writing_to(self.folder):
            fresh = not self.part.exists()
            with self.part.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.names, extrasaction="ignore")
                if fresh:
                    writer.writeheader()
                writer.writerows(rows)

    def finish(self, rows: list[Row], extra: Sequence[str] = ()) -> None:
        """Write predictions.csv and .parquet whole, and drop the part file."""
        names = [self.names[0], *extra, *self.names[1:]]
        data = [{name: _or_none(row.get(name)) for name in names} for row in rows]
        table = pa.Table.from_pylist(data, schema=schema(names))
        with writing_to(self.folder):
            for suffix, write in (("csv", pa_csv.write_csv), ("parquet", parquet.write_table)):
                with whole(self.folder / f"predictions.{suffix}") as part:
                    write(table, part)
            self.part.unlink(missing_ok=True)


def _or_none(value: Any) -> Any:
    return None if value == "" else value


def read_request(folder: Path) -> dict[str, Any]:
    """What the predictions in a folder were asked with; empty where it is not known."""
    try:
        found = json.loads((folder / REQUEST).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _apart(before: Any, now: dict[str, Any]) -> str:
    """What differs between two requests, with both values where they are short."""
    if not before:
        return "request, or by another version of this program"
    told = []
    for name in dict.fromkeys([*now, *before]):
        old, new = (each.get(name, "not said") for each in (before, now))
        if old != new:
            long = isinstance(old, list) or isinstance(new, list) or len(f"{old}{new}") > 40
            long = long and name != "input"
            told.append(name if long else f"{name} ({old}; now {new})")
    return ", ".join(told)


def _cut_torn_line(path: Path) -> None:
    """Drop what follows the last newline: a run was killed, or the disk was full, half-way."""
    if path.exists():
        data = path.read_bytes()
        if not data.endswith(b"\n"):
            path.write_bytes(data[: data.rfind(b"\n") + 1])
        if not path.stat().st_size:
            path.unlink()  # the next rows bring the heading


def _read_rows(path: Path) -> list[Row]:
    """Rows of a predictions CSV, with numbers as numbers. Raises OutputError for another table."""
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            names = list(reader.fieldnames or [])
            whole = [row for row in reader if None not in row and None not in row.values()]
        if missing := {"path", "sha256", "flag"} - set(names):
            raise ValueError(f"it lacks the columns {', '.join(sorted(missing))}")
        kinds = {field.name: field.type for field in schema(names)}
        return [{name: _parsed(value, kinds[name]) for name, value in row.items()} for row in whole]
    except (ValueError, csv.Error) as error:
        raise OutputError(
            f"{path} is not a table that this program wrote ({error}). Move it away, or choose "
            "another folder with -o."
        ) from error


def _parsed(value: str, kind: pa.DataType) -> Any:
    if value == "" or kind == pa.string():
        return value
    return int(float(value)) if kind == pa.int64() else float(value)
