"""What each bench has found: the questions it answers, ours beside the best baseline, its main rows.

A function for each kind of results. Ours is what a user gets who changes nothing: the budget and the
score of `predict`, the step that `bench shift` calls abroad. The best baseline is the best on the very
cells of the test, a choice in its favour. Nothing is chosen in favour of ours.

Whether a published figure can be compared is decided here too, by what the results say: not on other
cells; in part where the cells are the same and something else differs. Networks here are trained from
nothing, those of the paper were not.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cytodiffusion.evaluate.anomaly import OURS, TOLD
from cytodiffusion.evaluate.augment import WORDS
from cytodiffusion.evaluate.corruptions import CORRUPTIONS
from cytodiffusion.evaluate.explained import said
from cytodiffusion.evaluate.published import (
    ANOMALY,
    AS_ASKED,
    BLOODCAPS,
    EXPERTS,
    FEWEST,
    LOW_DATA,
    MAPS,
    SECONDS,
    SHIFT,
    SURE,
    Figure,
    Published,
    Style,
)
from cytodiffusion.evaluate.shift import MEAN, TRAINED

Values = Mapping[str, Any]
Cell = str | Figure | None

BUDGETS = ("balanced", "full", "fast", "race")  # the first that was run is what is called ours
LEFT_OUT = "all sets but this"  # in the names of methods that were trained on several sets
SETS = ("evaluate", "anomaly", "low-data", "--train", "--foreign")  # words before a set of images
PRETRAINED = "the paper's network had seen billions of images before, ours none but these"


@dataclass(frozen=True)
class Line:
    """One question and its answers. `same`: the published figure is of the same cells and measure."""

    question: str
    ours: Figure | None
    baseline: Figure | None = None
    published: Published | None = None
    same: bool = False
    why: Sequence[str] = ()

    @property
    def comparable(self) -> str:
        """yes, in part or no; `no figure` where none is published."""
        if self.published is None or self.published.figure is None:
            return "no figure"
        if not self.same:
            return "no"
        return "in part" if self.why else "yes"


@dataclass(frozen=True)
class Findings:
    """Of one bench: its lines, and a table of its main rows."""

    lines: list[Line]
    heading: Sequence[str]
    rows: list[list[Cell]]


def take(
    row: Values | None, key: str, style: Style = "percent", of: str = "", unit: str = ""
) -> Figure | None:
    """The number `key` of a row with its interval; None where it is not there or not known."""
    value = None if row is None else row.get(key)
    if row is None or value is None or not math.isfinite(value):
        return None
    bounds = row.get(f"{key}_ci95")
    return Figure(value, style, tuple(bounds) if bounds else None, unit, of)


def mean(row: Values, of: str = "", style: Style = "percent", unit: str = "") -> Figure | None:
    """The same of a number that is written as {mean, ci95}."""
    return take({"mean": row["mean"], "mean_ci95": row["ci95"]}, "mean", style, of, unit)


def sets_of(values: Values) -> list[str]:
    """Names of the sets of images that a run was called with, in small letters."""
    words = shlex.split(values.get("command", ""))
    return [word.rstrip("/").split("/")[-1].lower() for key, word in pairwise(words) if key in SETS]


def _has(sets: Sequence[str], *names: str) -> bool:
    return all(any(name in one for one in sets) for name in names)


def _best(rows: Sequence[Values], key: str) -> Values | None:
    return max(rows, key=lambda row: row[key], default=None)


# --- a function for each kind --------------------------------------------------------------------


def evaluate(values: Values) -> Findings:
    """Of metrics.json; what others have published for PBC stands in the paper's place."""
    sets, mine = sets_of(values), f"{values['model']}, {values['budget']}"
    where = f"measured on {', '.join(sets)}" if sets else "which cells these are is not recorded"
    told = ["the paper's own figure is not public", "others' cells and measure are not said"]
    line = Line(
        "How often are cells named rightly?", take(values, "balanced_accuracy", of=mine), None,
        BLOODCAPS, _has(sets, "pbc"), [where, *told],
    )  # fmt: skip
    shown: list[tuple[str, str, Style]] = [
        ("balanced accuracy", "balanced_accuracy", "percent"), ("accuracy", "accuracy", "percent"),
        ("macro F1", "macro_f1", "number"), ("right from wrong, AUROC", "auroc_correct", "number"),
        ("expected calibration error", "ece", "number"), ("conformal coverage", "coverage", "percent"),
        ("conformal set size, classes", "mean_set_size", "number"),
        ("network passes a cell", "passes_per_cell", "short"),
    ]  # fmt: skip
    rows: list[list[Cell]] = [[name, take(values, key, style)] for name, key, style in shown]
    return Findings([line], ("Measure", f"{values['n']:,} cells"), rows)


def cost(values: Values) -> Findings:
    """The first model beside the paper's procedure, on the same network and cells."""
    first = values["procedures"][0]["model"]
    named = {row["name"]: row for row in values["procedures"] if row["model"] == first}
    name = next((each for each in BUDGETS if each in named), "")
    ours, paper = named.get(name), named.get("paper")
    mine, theirs = f"{first}, {name}", "the paper's procedure, same network"
    accuracy = "balanced_accuracy"
    lines = [
        Line(
            "How many network passes does a name take?",
            take(ours, "passes_per_cell", "short", mine),
            take(paper, "passes_per_cell", "short", theirs), FEWEST, True,
            ["passes are counted alike; a pass of the paper's network is a larger one",
             "its mean number of passes is not public, only the least"],
        ),
        Line(
            "How long does a name take?", _seconds(ours, mine), _seconds(paper, theirs), SECONDS,
            False, ["another machine and another network"],
        ),
        Line(
            "Are quick names as often right?", take(ours, accuracy, of=mine),
            take(paper, accuracy, of=theirs),
        ),
    ]  # fmt: skip
    rows: list[list[Cell]] = [
        [row["model"], row["name"], f"{row['cells']:,}", take(row, accuracy),
         take(row, "balanced_accuracy_gain", "points"), take(row, "passes_per_cell", "short"),
         take(row, "passes_of_paper", "short", unit="times"), take(row, "cells_per_second", "short")]
        for row in values["procedures"]
    ]  # fmt: skip
    heading = ("Network", "Procedure", "Cells", "Balanced accuracy", "Less the paper's, points",
               "Passes a cell", "The paper's are", "Cells a second")  # fmt: skip
    return Findings(lines, heading, rows)


def _seconds(row: Values | None, of: str) -> Figure | None:
    return None if row is None else Figure(1 / row["cells_per_second"], "short", unit="s", of=of)


def anomaly(values: Values) -> Findings:
    """A line for each set of strangers that are images of their own, not corrupted normal cells."""
    rows, sets = values["rows"], sets_of(values)
    strangers = dict.fromkeys(row["set"] for row in rows)
    lines = []
    for name in [each for each in strangers if each not in CORRUPTIONS] or list(strangers):
        here = [row for row in rows if row["set"] == name]
        ours = next((row for row in here if (row["method"], row["score"]) == (OURS, TOLD)), None)
        rival = _best([row for row in here if row["method"] != OURS or row["score"] == "zeta"],
                      "auroc")  # fmt: skip
        blasts = name.lower().rstrip("s") == "blast"
        lines.append(Line(
            f"Are strangers noticed: {name}? (AUROC)",
            take(ours, "auroc", "number", f"{ours['model']}, {TOLD}" if ours else ""),
            take(rival, "auroc", "number", _scored(rival) if rival else ""),
            ANOMALY, blasts and _has(sets, "bodzas"),
            [*([] if blasts else [f"other strangers: {name}, not blasts"]),
             *([] if _has(sets, "bodzas") else [f"another set: {', '.join(sets)}"]), PRETRAINED],
        ))  # fmt: skip
    shown = [row for row in rows if row["method"] != OURS or row["score"] in (TOLD, "zeta")]
    return Findings(
        lines,
        ("Strangers", "Score", "AUROC", "Caught at 95 % specificity", "Flagged strangers",
         "Flagged normal cells"),
        [[f"{row['set']} ({row['strange']:,})", _scored(row), take(row, "auroc", "number"),
          take(row, "sensitivity_at_95"), take(row, "strange_flagged"), take(row, "normal_flagged")]
         for row in shown],
    )  # fmt: skip


def _scored(row: Values) -> str:
    if row["method"] == OURS:
        return "zeta, the paper's score, our network" if row["score"] == "zeta" else row["score"]
    return f"{row['method']}, {row['score']}"


def shift(values: Values) -> Findings:
    """What `predict` does, on the mean of foreign sets; self-trained; trained on all sets but one."""
    rows, sets = values["rows"], sets_of(values)
    table: dict[str, dict[str, Values]] = {}
    for row in rows:
        table.setdefault(row["method"], {})[row["set"]] = row
    mine = [name for name in table if name.startswith(f"{values['model']}, ")]
    matched = f"{values['model']}, abroad"
    others = [name for name in table if name not in mine and LEFT_OUT not in name]
    rivals = [name for name in others if not name.endswith(TRAINED)]
    left = [name for name in table if LEFT_OUT in name]
    same = _has(sets, "raabin", "lisc")
    why = [*([] if same else [f"other sets: {', '.join(sets)}"]), PRETRAINED]
    asked = [
        (
            "Does it work in other laboratories?",
            matched if matched in mine else mine[0],
            rivals,
            why,
        )
    ]
    if (own := f"{values['model']}, {TRAINED}") in mine:
        learned = [*why, "it learns from the foreign cells, without their labels"]
        same_kind = [name for name in others if name not in rivals]
        asked.append(("And if it learns from their unlabelled cells?", own, same_kind, learned))
    if left:
        own = f"{OURS}, {LEFT_OUT}, abroad"
        asked.append(("And trained on all sets but one?", own, [n for n in left if n != own], why))
    lines = []
    for question, name, against, reasons in asked:
        best = _best([table[other][MEAN] for other in against], "accuracy")
        lines.append(Line(
            f"{question} (accuracy, {MEAN})", take(table[name][MEAN], "accuracy", of=name),
            take(best, "accuracy", of=best["method"] if best else ""), SHIFT,
            same and reasons is why, reasons,
        ))  # fmt: skip
    names = list(dict.fromkeys(row["set"] for row in rows))
    return Findings(
        lines,
        ("Accuracy", *names),
        [[name, *(take(found.get(each), "accuracy") for each in names)]
         for name, found in table.items()],
    )  # fmt: skip


def augment(values: Values) -> Findings:
    """A line for each number of real cells and each classifier: topped up by drawn cells, or not."""
    lines = []
    for row in values["summary"]:
        if row["trained_on"] == "drawn":
            plain = next(
                each for each in values["summary"]
                if each["trained_on"] == "real"
                and (each["labels"], each["classifier"]) == (row["labels"], row["classifier"])
            )  # fmt: skip
            lines.append(Line(
                f"Do drawn cells help where there are {row['labels']} of {values['rare_class']}? (recall)",
                take(row, "recall", of=f"{row['classifier']}, topped up"),
                take(plain, "recall", of=f"{row['classifier']}, real cells alone"),
            ))  # fmt: skip
    return Findings(
        lines,
        ("Real cells", "Classifier", "Trained on", "Repeats", "Recall", "Precision", "Balanced accuracy"),
        [[str(row["labels"]), row["classifier"], WORDS[row["trained_on"]], str(row["repeats"]),
          take(row, "recall"), take(row, "precision"), take(row, "balanced_accuracy")]
         for row in values["summary"]],
    )  # fmt: skip


def low_data(values: Values) -> Findings:
    """A line for each number of labels, with the unlabelled rest where it was used."""
    sets, lines = sets_of(values), []
    same = _has(sets, "pbc")
    why = [*([] if same else [f"another set: {', '.join(sets)}"]), PRETRAINED,
           "the paper's number of labels is not public, and other cells are tested on"]  # fmt: skip
    for count in dict.fromkeys(row["labels"] for row in values["summary"]):
        here = [row for row in values["summary"] if row["labels"] == count]
        ours = [row for row in here if row["kind"] == OURS][-1]  # the last sees most
        rivals = [row for row in here
                  if row["kind"] != OURS and row["unlabelled"] == ours["unlabelled"]]  # fmt: skip
        best = _best(rivals, "balanced_accuracy")
        lines.append(Line(
            f"Are {count} labels a class enough? (balanced accuracy)",
            take(ours, "balanced_accuracy", of=ours["method"]),
            take(best, "balanced_accuracy", of=best["method"] if best else ""),
            LOW_DATA, same, why,
        ))  # fmt: skip
    return Findings(
        lines,
        ("Labels a class", "Method", "Repeats", "Balanced accuracy", "Seconds of training"),
        [[str(row["labels"]), row["method"], str(row["repeats"]), take(row, "balanced_accuracy"),
          take(row, "seconds", "short")] for row in values["summary"]],
    )  # fmt: skip


def uncertainty(values: Values) -> Findings:
    """A line for each curve: of models and of people, whoever answered."""
    lines = [
        Line(f"Does confidence tell right from wrong: {row['name']}? (AUROC)",
             take(row, "auroc_correct", "number", row["name"]), None, SURE,
             why=["the paper says so in words; its figures are not public"])
        for row in values["curves"]
    ]  # fmt: skip
    rows: list[list[Cell]] = [
        [row["name"], f"{row['n']:,}", take(row, "accuracy"), take(row, "auroc_correct", "number"),
         take(row["fit"], "threshold", "number"), take(row["fit"], "lapse", "number"),
         take(row["fit"], "fit_p", "number")]
        for row in values["curves"]
    ]  # fmt: skip
    heading = ("Answers of", "Answers", "Accuracy", "Right from wrong, AUROC",
               "Confidence at the threshold", "Lapse rate", "p of the fit")  # fmt: skip
    return Findings(lines, heading, rows)


def authenticity(values: Values) -> Findings:
    """All readers together; with several, the interval is over cells with all their answers."""
    pooled, several = values["pooled"], len(values["readers"]) > 1
    key = "accuracy_cells" if several else "accuracy"
    people = f"{len(values['readers'])} reader{'s' * several}"
    line = Line(
        "Can people tell drawn cells from real ones? (accuracy, 50 % is chance)",
        take(pooled, key, of=people), None, EXPERTS, False,
        ["other cells, drawn by another network", f"{people}, not the paper's ten experts"],
    )  # fmt: skip
    rows: list[list[Cell]] = [
        [row["name"], f"{row['n']:,}", take(row, "accuracy"), take(row, "sensitivity"),
         take(row, "specificity"), take(row, "d_prime", "number")]
        for row in [*values["readers"], *([pooled] if several else [])]
    ]  # fmt: skip
    heading = ("Reader", "Answers", "Accuracy", "Drawn called drawn", "Real called real", "d prime")
    return Findings([line], heading, rows)


def fidelity(values: Values) -> Findings:
    """As asked for, told from real ones, copied."""
    judge, told = values["agreement"][0], values["real_or_drawn"]
    near = values["copies"]["pixels"]
    lines = [
        Line(
            "Are drawn cells what was asked for?",
            take(judge["drawn"], "agreement", of="drawn cells, named by a classifier"),
            take(judge["real"], "agreement", of="real cells, the same classifier"), AS_ASKED, False,
            ["a classifier judges, not experts", "other cells, drawn by another network"],
        ),
        Line(
            "Can a classifier tell them from real ones? (accuracy, 50 % is chance)",
            take(told, "accuracy", of=f"{told['classifier']}, trained to"), None, EXPERTS, False,
            ["a classifier that was trained to tell them apart, not experts",
             "other cells, drawn by another network"],
        ),
        Line("Are they copies? (nearer to a training cell than 99 % of real cells, 1 % is chance)",
             take(near, "nearer", of="in pixels")),
    ]  # fmt: skip
    rows: list[list[Cell]] = [
        [f"named as asked, by {row['judge']}", take(row["drawn"], "agreement"),
         take(row["real"], "agreement")]
        for row in values["agreement"]
    ]  # fmt: skip
    alike, measures = values["alike"], dict[str, Style](
        FID="short", KID="short", Precision="percent", Recall="percent", Coverage="percent"
    )  # fmt: skip
    rows += [
        [name, *(take(alike[kind], name.lower(), style) for kind in ("drawn", "real"))]
        for name, style in measures.items()
    ]  # fmt: skip
    rows += [[f"nearer than usual, in {name}", take(row, "nearer"), None]
             for name, row in values["copies"].items()]  # fmt: skip
    return Findings(lines, ("Measure", "Drawn cells", "Real cells, for comparison"), rows)


def explain(values: Values) -> Findings:
    """Whether the maps beat every other order of the pixels, and whether their changes change names."""
    flips, lines = values["flips"], []
    why = ["the paper shows its maps; no figure of theirs is public"]
    for reference, gains in values["gains"].items():
        gain = {name: row["deletion"] for name, row in gains["support"].items()}
        hardest = min(gain, key=lambda name: gain[name]["mean"])
        areas = values["areas"][reference]
        lines.append(Line(
            f"Do maps show what the classifier goes by? (deletion to “{reference}”, nats, lower is better)",
            Figure(areas["support"]["deletion"], "number", of=f"support, better by {said(gain[hardest])}"),
            Figure(areas[hardest]["deletion"], "number", of=hardest), MAPS, False, why,
        ))  # fmt: skip
    lines.append(Line(
        "Does the change that is shown change the name?",
        mean(flips["difference"], "the difference of two drawings added"),
        mean(flips["turned"], "the same difference, turned by half a circle"), MAPS, False, why,
    ))  # fmt: skip
    rows: list[list[Cell]] = [
        [reference, name, mean(row["deletion"], style="number"), mean(row["insertion"], style="number")]
        for reference, gains in values["gains"].items()
        for name, row in gains["support"].items()
    ]  # fmt: skip
    heading = ("Pixels replaced by", "Order of", "“support” is better by, deletion", "insertion")
    return Findings(lines, heading, rows)


READERS: dict[str, Callable[[Values], Findings]] = {
    "evaluate": evaluate,
    "cost": cost,
    "anomaly": anomaly,
    "shift": shift,
    "augment": augment,
    "low-data": low_data,
    "uncertainty": uncertainty,
    "authenticity": authenticity,
    "fidelity": fidelity,
    "explain": explain,
}
