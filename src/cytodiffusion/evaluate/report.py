"""One page for a person to read: what was found, what to look at first, how far to trust it.

The page is a single HTML file. It needs no network and no script, and holds its own pictures. The
strangers come first: the cells that were flagged, all of them, before anything that went well. The
same rows give the same bytes: no date, no random ids.

`rows` are the rows of the predictions table. With a `label` in the rows and `metrics`, the page
also says how good the answers were.
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from cytodiffusion.evaluate.metrics import binomial_interval
from cytodiffusion.files import write_file

GALLERY = 48  # pictures of flagged cells
MISTAKES = 24  # pictures of confident mistakes
LISTED = 2000  # rows of the table of all cells; flagged cells are listed however many they are
DASH = "\N{EN DASH}"
PERCENT = "\N{NO-BREAK SPACE}%"
FLAGS = ("anomalous", "uncertain", "unreadable")

# What a headline number is called, how it is written, and how to read it.
HEADLINES = (
    ("accuracy", "Accuracy", "percent", "cells named correctly"),
    ("balanced_accuracy", "Balanced accuracy", "percent", "mean recall of the classes"),
    ("macro_f1", "Macro F1", "number", "0 to 1, higher is better"),
    ("auroc_correct", "Right from wrong, AUROC", "number", "by confidence; 0.5 is chance"),
    ("ece", "Calibration error", "number", "0 to 1, lower is better"),
    ("nll", "Negative log-likelihood", "number", "nats, lower is better"),
    ("brier", "Brier score", "number", "0 to 2, lower is better"),
    ("coverage", "Conformal coverage", "percent", "sets that hold the right class"),
    ("mean_set_size", "Conformal set size", "short", "classes, lower is better"),
    ("passes_per_cell", "Network passes", "short", "a cell"),
    ("cells_per_second", "Speed", "short", "cells a second"),
)


@dataclass(frozen=True)
class Cell:
    """One row of the predictions, as the page shows it. None where the row says nothing."""

    path: str
    flag: str
    predicted: str
    label: str | None
    confidence: float | None
    anomaly: float | None
    anomaly_p: float | None
    conformal_set: str
    picture: str | None  # a data URI
    problem: str  # why it was not named

    @property
    def alt(self) -> str:
        """What a reader hears who cannot see the picture."""
        truth = f", labelled {self.label}" if self.label else ""
        return f"Cell {self.path}: {self.flag}, named {self.predicted}{truth}"


def write_report(
    path: Path | str,
    *,
    title: str,
    metrics: Mapping[str, Any] | None,
    rows: Sequence[Mapping[str, Any]],
    classes: Iterable[str],
    thumbnails: Mapping[str, bytes] | None,
    facts: Mapping[str, Any],
    notes: Sequence[str],
) -> None:
    """Write the page, all of it or nothing. Raises OutputError where it cannot be written.

    `metrics` comes from `metrics.summarise`, or is None where nothing is known of the truth.
    `thumbnails` are PNG files by the `path` of their row; a row without one is shown by name.
    `facts` are printed as they are, `command` as the line to run again.
    """
    write_page(path, render(title, metrics, rows, tuple(classes), thumbnails or {}, facts, notes))


def write_page(path: Path | str, page: str) -> None:
    """Write a page, all of it or nothing. Raises OutputError where it cannot be written.

    A file name can hold bytes that are no text: they are shown as \\udc80 and the like.
    """
    write_file(Path(path), page.encode("utf-8", errors="backslashreplace"), "the report")


def render(
    title: str,
    metrics: Mapping[str, Any] | None,
    rows: Sequence[Mapping[str, Any]],
    classes: tuple[str, ...],
    thumbnails: Mapping[str, bytes],
    facts: Mapping[str, Any],
    notes: Sequence[str],
) -> str:
    """The page as text."""
    cells = [_cell(row, thumbnails) for row in rows]
    strangers = sorted((c for c in cells if c.flag in FLAGS[:2]), key=_strangest)
    readable = sorted((c for c in cells if c.flag != "unreadable"), key=_strangest)
    mistakes = _mistakes(readable, classes)
    return fill(
        "report.html.j2",
        title=title,
        notes=notes,
        facts=facts,
        classes=classes,
        metrics=metrics,
        headlines=_headlines(metrics) if metrics else [],
        confusion=_confusion(metrics) if metrics else None,
        flags=Counter(c.flag for c in cells),
        differential=_differential(readable, classes),
        strangers=strangers,
        gallery=_first([c for c in strangers if c.picture], GALLERY),
        unreadable=sorted((c for c in cells if c.flag == "unreadable"), key=lambda c: c.path),
        mistakes=mistakes,
        mistake_gallery=_first([c for c in mistakes if c.picture], MISTAKES),
        foreign=Counter(c.label for c in readable if c.label and c.label not in classes),
        plots=_plots(rows, classes),
        readable=readable,
        limit=LISTED,
        labelled=any(c.label for c in cells),
    )


# ------------------------------------------------------------------------------------- the parts


def _cell(row: Mapping[str, Any], thumbnails: Mapping[str, bytes]) -> Cell:
    path = str(row["path"])
    png = thumbnails.get(path)
    return Cell(
        path=path,
        flag=str(row["flag"]),
        predicted=str(row.get("predicted") or ""),
        label=str(row["label"]) if row.get("label") else None,
        confidence=_number(row.get("confidence")),
        anomaly=_number(row.get("anomaly")),
        anomaly_p=_number(row.get("anomaly_p")),
        conformal_set=str(row.get("set") or ""),
        picture=None if png is None else data_uri(png),
        problem=str(row.get("problem") or ""),
    )


def _strangest(cell: Cell) -> tuple[int, float, float, str]:
    """Anomalous before uncertain before the rest; then the strangest, then the least certain."""
    rank = FLAGS.index(cell.flag) if cell.flag in FLAGS else len(FLAGS)
    strange = -(cell.anomaly or 0.0) if cell.flag != "uncertain" else 0.0
    return rank, strange, cell.confidence or 0.0, cell.path


def _mistakes(cells: Iterable[Cell], classes: tuple[str, ...]) -> list[Cell]:
    """Cells of a class that the model knows, named as another, the most confident first."""
    wrong = [c for c in cells if c.label in classes and c.label != c.predicted]
    return sorted(wrong, key=lambda c: (-(c.confidence or 0.0), c.path))


def _differential(cells: Sequence[Cell], classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Count and share of each class with its exact interval; also names outside of `classes`."""
    named = Counter(c.predicted for c in cells)
    flagged = Counter(c.predicted for c in cells if c.flag in FLAGS)
    return [
        {
            "name": name,
            "n": named[name],
            "flagged": flagged[name],
            "share": named[name] / len(cells) if cells else None,
            "interval": binomial_interval(named[name], len(cells)),
        }
        for name in (*classes, *sorted(set(named) - set(classes)))
    ]


def _headlines(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "value": FORMATS[style](metrics[key]),
            "interval": _interval(metrics.get(f"{key}_ci95"), style),
            "meaning": meaning,
        }
        for key, name, style, meaning in HEADLINES
        if metrics.get(key) is not None
    ]


def _confusion(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """Counts and, for the shading, shares of each row."""
    table = metrics.get("confusion")
    if table is None:
        return None
    counts = np.asarray(table["counts"])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return {"classes": table["classes"], "counts": counts.tolist(), "shares": shares.tolist()}


def _plots(rows: Sequence[Mapping[str, Any]], classes: tuple[str, ...]) -> dict[str, Markup]:
    """Reliability and risk-coverage of the rows whose class the model knows, if there are any."""
    known = [r for r in rows if r.get("label") in classes and r["flag"] != "unreadable"]
    if not known:
        return {}
    from cytodiffusion.evaluate import plots  # matplotlib takes a while

    truth = np.array([classes.index(r["label"]) for r in known])
    table = np.array([[float(r[f"prob_{name}"]) for name in classes] for r in known])
    return {
        "reliability": Markup(plots.reliability_diagram(truth, table)),
        "risk": Markup(plots.risk_coverage_curve(truth, table)),
    }


# ----------------------------------------------------------------------------------- the writing


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.1f}{PERCENT}"


def _plain(value: float | None) -> str:
    if value is None:
        return DASH
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def _interval(bounds: Sequence[float] | None, style: str = "percent") -> str:
    if bounds is None:
        return ""
    low, high = (FORMATS[style](bound) for bound in bounds)
    return f"{low.removesuffix(PERCENT)} {DASH} {high}"


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


FORMATS = {"percent": _percent, "number": _plain, "short": _short}


def _number(value: Any) -> float | None:
    """A float, or None for what a table has in an empty place (None, "", NaN)."""
    if value is None or value == "" or math.isnan(float(value)):
        return None
    return float(value)


def data_uri(png: bytes) -> str:
    """A picture that lies in the page itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _first(cells: Sequence[Cell], limit: int) -> dict[str, Any]:
    return {"cells": cells[:limit], "left_out": max(0, len(cells) - limit)}


def fill(template: str, **values: Any) -> str:
    """A page made of one of the templates beside this file; all values are escaped."""
    world = Environment(
        loader=FunctionLoader(_source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,  # of what is included
    )
    world.filters |= {"percent": _percent, "plain": _plain, "interval": _interval}
    return world.get_template(template).render(**values).strip()


def _source(name: str) -> str:
    return files("cytodiffusion.evaluate").joinpath(name).read_text("utf-8")
