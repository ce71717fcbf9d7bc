"""`bench report`: every kind of results is recognised and read, and what is comparable is said."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import CLASSES, cli

from cytodiffusion.bundle import ZOO
from cytodiffusion.errors import DataError
from cytodiffusion.evaluate import (
    anomaly,
    augment,
    authenticity,
    explained,
    fidelity,
    low_data,
    shift,
)
from cytodiffusion.evaluate.answers import Answers, Judged
from cytodiffusion.evaluate.blinded import Answer, Truth
from cytodiffusion.evaluate.findings import READERS, Line, take
from cytodiffusion.evaluate.joined import SIGNS, TITLES, experiment, in_order, kind_of, render, said
from cytodiffusion.evaluate.metrics import summarise
from cytodiffusion.evaluate.published import ANOMALY, PUBLISHED, SURE, Figure
from cytodiffusion.evaluate.report import DASH, PERCENT
from cytodiffusion.evaluate.uncertainty import Outcome

BENCH = "cytodiffusion bench"


# --- results, by the functions that the benches write them with ----------------------------------


def evaluate_results() -> dict[str, Any]:
    """Nine of ten cells are named rightly."""
    truth = np.arange(20) % 2
    told = np.eye(2)[np.where(np.arange(20) < 2, 1 - truth, truth)] * 0.8 + 0.1
    metrics = summarise(truth, told, CLASSES[:2], np.ones((20, 2), bool), seed=0)
    how = {"model": "m", "budget": "balanced", "weights_sha256": "a" * 64, "seed": 0}
    command = "cytodiffusion evaluate x/cells -m pbc8"
    return {**metrics, **how, "passes_per_cell": 1.5, "command": command}


def cost_results() -> dict[str, Any]:
    rows = [
        {"model": "m", "name": name, "cells": 40, "balanced_accuracy": right,
         "balanced_accuracy_ci95": [0.8, 1.0], "passes_per_cell": passes, "cells_per_second": speed}
        for name, right, passes, speed in
        (("paper", 0.9, 300.0, 0.5), ("fast", 0.8, 1.0, 200.0), ("balanced", 0.95, 1.5, 100.0))
    ]  # fmt: skip
    return {"procedures": rows, "across": [], "command": f"{BENCH} cost x/pbc", "seed": 0,
            "weights": {"m": "a" * 12}, "commit": "c" * 12}  # fmt: skip


def anomaly_results(stranger: str = "blast", source: str = "bodzas") -> dict[str, Any]:
    """Ours ranks all strangers first, a ResNet three of four pairs, a ViT one, zeta half of them."""
    normal = np.array([0.0, 1.0])
    strange = {("ours", "balanced"): [2.0, 3.0], ("ours", "zeta"): [0.0, 1.0],
               ("ours", "error"): [9.0, 9.0], ("resnet", "energy"): [0.5, 2.0],
               ("vit", "energy"): [-1.0, 0.5]}  # fmt: skip
    scored = {key: {"normal": normal, stranger: np.array(one), "blur": np.array(one)}
              for key, one in strange.items()}  # fmt: skip
    rows = [{"model": "m", **row} for row in anomaly.compare(scored, {}, seed=0)]
    return {"rows": rows, "model": "m", "command": f"{BENCH} anomaly x/{source} -o out/bodzas"}


def shift_results(train: str = "raabin", foreign: str = "lisc") -> dict[str, Any]:
    def rows(method: str, named: list[int]) -> list[dict[str, Any]]:
        told = shift.Told(np.array([0, 1, 0, 1]), np.eye(2)[named], 8.0, 1.0)
        head = {"method": method, "repeat": 0}
        return [
            {**head, "set": foreign, **shift.row(told, CLASSES[:2])},
            {**head, "set": shift.MEAN, **shift.mean_row([told])},
        ]

    every = rows("m, as trained", [0, 0, 0, 1]) + rows("m, abroad", [0, 1, 0, 1])
    every += rows("vit, as trained", [1, 1, 1, 1]) + rows("resnet, as trained", [0, 1, 1, 1])
    every += rows("m, self-trained", [0, 1, 0, 1]) + rows("resnet, self-trained", [0, 0, 0, 1])
    every += rows("ours, all sets but this, abroad", [0, 0, 0, 1])
    every += rows("vit, all sets but this, light + scale", [1, 0, 0, 1])
    command = f"{BENCH} shift --train x/{train} -o out --foreign x/{foreign}/"
    return {"rows": every, "model": "m", "command": command}


def low_data_results(source: str = "pbc") -> dict[str, Any]:
    truth, rows = np.array([0, 1, 0, 1]), []
    for kind, rest, named in (("ours", False, [0, 0, 0, 1]), ("ours", True, [0, 1, 0, 1]),
                              ("vit", False, [0, 1, 0, 1]), ("vit", True, [0, 0, 0, 0])):  # fmt: skip
        method = low_data.Method(kind, rest)
        rows += [low_data.row(10, r, method, truth, np.eye(2)[named], {"seconds": 6.0})
                 for r in (0, 1)]  # fmt: skip
    return {"rows": rows, "summary": low_data.summary(rows), "gains": low_data.gains(rows),
            "command": f"{BENCH} low-data x/{source} -o out"}  # fmt: skip


def augment_results() -> dict[str, Any]:
    """Two of two rare cells are found with copies, one alone, and none with drawn ones."""
    truth, rows = np.array([0, 0, 1, 1]), []
    for arm, named in (("real", [0, 1, 1, 1]), ("drawn", [1, 1, 1, 1]), ("copies", [0, 0, 1, 1])):
        rows += [augment.row(10, r, "resnet", arm, truth, np.eye(2)[named], 0, {"steps": 1, "seconds": 6.0})
                 for r in (0, 1)]  # fmt: skip
    return {"rows": rows, "summary": augment.summary(rows), "gains": augment.gains(rows),
            "rare_class": "basophil", "command": f"{BENCH} augment x/pbc drawn"}  # fmt: skip


def uncertainty_results() -> dict[str, Any]:
    """Every right answer is surer than every wrong one. Too few for a curve."""
    judged = Judged.of(np.array([0.5, 0.9, 0.9, 0.95]), np.array([False, True, True, True]))
    outcome = Outcome(Answers("m", source="x", judged=judged, classes=2), None, "too few", {})
    return {"curves": [outcome.as_dict(0)], "command": f"{BENCH} uncertainty x", "draws": 40}


def authenticity_results() -> dict[str, Any]:
    """Two readers: one is right on all four cells, the other on two."""
    key = {f"c{i}": Truth(i < 2, "x") for i in range(4)}
    said = {"a": [1, 1, 0, 0], "b": [1, 0, 1, 0]}
    answers = {name: {f"c{i}": Answer(bool(one), 0.75, 1.0) for i, one in enumerate(row)}
               for name, row in said.items()}  # fmt: skip
    table = authenticity.Table.of(key, answers)
    readers = [authenticity.summarise(table.rows([i]), n) for i, n in enumerate(table.readers)]
    return {"readers": readers, "pooled": authenticity.summarise(table, authenticity.ALL),
            "command": f"{BENCH} authenticity score x"}  # fmt: skip


def fidelity_results() -> dict[str, Any]:
    """Three of four drawn cells are named as asked, all real ones are."""
    asked, named = np.array([0, 1, 0, 1]), np.array([0, 1, 0, 0])
    row = {"judge": "independent", "drawn": fidelity.agreement(asked, named, CLASSES[:2]),
           "real": fidelity.agreement(asked, asked, CLASSES[:2])}  # fmt: skip
    near = fidelity.Nearest(np.ones(4), np.ones(4), np.zeros(4, np.int64))
    features = np.random.default_rng(0).normal(size=(12, 3))
    alike = fidelity.compare(features, features[::-1])
    told = {**fidelity.share("accuracy", asked == named), "classifier": "resnet"}
    copied = {"pixels": fidelity.copies(near, near)}
    return {"agreement": [row], "real_or_drawn": told, "alike": {"drawn": alike, "real": alike},
            "copies": copied, "command": f"{BENCH} fidelity x"}  # fmt: skip


def explain_results() -> dict[str, Any]:
    """Edges come nearer to our maps than random pixels do."""
    curves = {"support": [[1.0, -1.0], [-1.0, 1.0]], "change": [[1.0, -1.0], [-1.0, 1.0]],
              "random": [[1.0, 5.0], [-1.0, -5.0]], "edges": [[1.0, 0.0], [-1.0, 0.0]]}  # fmt: skip
    cell = {"label": 0, "curves": {"any cell": curves}, "shown": 0.5, "attributes": None,
            "flips": {"drawn": True, "difference": True, "turned": False, "change": False},
            "stability": {"correlation": 0.9, "expected": 0.9, "z_square": 1.0}}  # fmt: skip
    return {**explained.summarise([cell, cell], 0), "command": f"{BENCH} explain x", "seed": 0}


RESULTS = {
    "evaluate": evaluate_results, "cost": cost_results, "anomaly": anomaly_results,
    "shift": shift_results, "augment": augment_results, "low-data": low_data_results,
    "uncertainty": uncertainty_results, "authenticity": authenticity_results, "fidelity": fidelity_results,
    "explain": explain_results,
}  # fmt: skip


def lines(values: dict[str, Any]) -> list[Line]:
    return experiment(values, "x", None).findings.lines


# --- what is read --------------------------------------------------------------------------------


def test_every_kind_is_known_everywhere() -> None:
    assert list(READERS) == list(TITLES) == list(SIGNS) == list(PUBLISHED) == list(RESULTS)


@pytest.mark.parametrize("kind", RESULTS)
def test_results_are_recognised_by_what_they_hold(kind: str) -> None:
    values = RESULTS[kind]()
    assert kind_of(values) == kind
    found = experiment(values, "x", None)
    assert found.findings.lines
    assert {len(row) for row in found.findings.rows} == {len(found.findings.heading)}
    assert found.facts["command"] == values["command"]
    assert found.title in render([found], [], {"command": "c"})


def test_ours_and_the_best_baseline() -> None:
    """As (question's number of its kind, ours, best baseline, whose it is)."""
    found = [
        (lines(evaluate_results())[0], 0.9, None, ""),
        (lines(cost_results())[0], 1.5, 300.0, "the paper's procedure, same network"),
        (lines(cost_results())[1], 0.01, 2.0, "the paper's procedure, same network"),
        (lines(cost_results())[2], 0.95, 0.9, "the paper's procedure, same network"),
        (lines(anomaly_results())[0], 1.0, 0.75, "resnet, energy"),
        (lines(shift_results())[0], 1.0, 0.75, "resnet, as trained"),
        (lines(shift_results())[1], 1.0, 0.75, "resnet, self-trained"),
        (lines(shift_results())[2], 0.75, 0.5, "vit, all sets but this, light + scale"),
        (lines(low_data_results())[0], 1.0, 0.5, "vit + unlabelled"),
        (lines(augment_results())[0], 0.0, 0.5, "resnet, real cells alone"),
        (lines(uncertainty_results())[0], 1.0, None, ""),
        (lines(authenticity_results())[0], 0.75, None, ""),
        (lines(fidelity_results())[0], 0.75, 1.0, "real cells, the same classifier"),
        (lines(explain_results())[0], 0.0, 0.5, "edges"),
        (lines(explain_results())[1], 1.0, 0.0, "the same difference, turned by half a circle"),
    ]
    for line, ours, baseline, whose in found:
        assert line.ours is not None, line.question
        assert line.ours.value == pytest.approx(ours), line.question
        assert (line.baseline.value if line.baseline else None) == baseline, line.question
        assert (line.baseline.of if line.baseline else "") == whose


def test_corrupted_cells_and_scores_that_are_not_told_stay_below() -> None:
    """The question is asked of strangers that are images of their own; no score is chosen by its AUROC."""
    found = experiment(anomaly_results(), "x", None).findings
    assert [line.question for line in found.lines] == ["Are strangers noticed: blast? (AUROC)"]
    assert "blur (2)" in {row[0] for row in found.rows}
    assert "error" not in {row[1] for row in found.rows}


def test_a_procedure_that_was_not_run_has_no_figure() -> None:
    values = cost_results()
    values["procedures"] = values["procedures"][1:2]
    assert [line.baseline for line in lines(values)] == [None] * 3
    assert lines(values)[0].ours == Figure(1.0, "short", of="m, fast")


# --- what can be compared ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        (anomaly_results(), "in part"),
        (anomaly_results(stranger="erythroblast"), "no"),
        (anomaly_results(source="pbc"), "no"),  # OUT is called bodzas, which means nothing
        (shift_results(), "in part"),
        (shift_results(train="pbc"), "no"),
        (low_data_results(), "in part"),
        (low_data_results(source="mine"), "no"),
        (evaluate_results(), "no"),  # the model is called pbc8, the set is not
        (cost_results(), "in part"),
        (uncertainty_results(), "no figure"),
        (authenticity_results(), "no"),
    ],
)  # fmt: skip
def test_only_the_same_cells_can_be_compared(values: dict[str, Any], verdict: str) -> None:
    line = lines(values)[0]
    assert line.comparable == verdict
    assert line.why


def test_the_same_in_everything_can_be_compared() -> None:
    assert Line("?", Figure(1.0), None, ANOMALY, same=True).comparable == "yes"
    assert Line("?", Figure(1.0), None, SURE, same=True).comparable == "no figure"


def test_figures_in_words() -> None:
    row = {"a": 0.5, "a_ci95": [0.25, 0.75], "b": float("nan"), "c": None}
    figure = take(row, "a")
    assert figure is not None
    assert said(figure) == f"50.0{PERCENT} (25.0 {DASH} 75.0{PERCENT})"
    assert said(Figure(-0.004, "points")) == "-0.4"
    assert said(Figure(1.8, "short", unit="s")) == "1.8 s"
    assert [take(row, name) for name in "bcd"] == [None] * 3


def test_published_figures_are_shares_where_they_say_so() -> None:
    for one in (one for found in PUBLISHED.values() for one in found if one.figure):
        for figure in filter(None, (one.figure, one.rival)):
            assert figure.style == "short" or 0 < figure.value < 1


# --- the command ---------------------------------------------------------------------------------


def write(folder: Path, values: Any, name: str = "results.json") -> Path:
    folder.mkdir(parents=True)
    (folder / name).write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


def test_all_kinds_on_one_page(tmp_path: Path) -> None:
    """Linked to where a report lies below; told in the order of TITLES; the same bytes again."""
    folders = [
        write(tmp_path / kind, made(), "metrics.json" if kind == "evaluate" else "results.json")
        for kind, made in reversed(RESULTS.items())
    ]
    (tmp_path / "cost" / "report.html").write_text("its own")
    call = ["bench", "report", *folders, "-o", tmp_path]
    told = cli(*call, "--json")
    assert told.code == 0, told.err
    assert json.loads((tmp_path / "results.json").read_text()) == told.json
    assert [each["bench"] for each in told.json["experiments"]] == list(TITLES)
    cost = told.json["summary"][1]
    assert (cost["ours"]["value"], cost["baseline"]["value"]) == (1.5, 300.0)
    assert (cost["published"]["figure"]["value"], cost["comparable"]) == (168, "in part")
    page = (tmp_path / "report.html").read_text()
    assert page.count('href="cost/report.html"') == page.count(">its own report<") == 1
    assert f"{BENCH} cost x/pbc" in page
    assert cli(*call).code == 0
    assert (tmp_path / "report.html").read_text() == page


def test_what_cannot_be_read_is_named_and_the_rest_is_done(tmp_path: Path) -> None:
    good = write(tmp_path / "good", cost_results())
    broken = cost_results()
    del broken["procedures"][0]["cells"]
    bad = [
        write(tmp_path / "torn", '{"procedures": ['),
        write(tmp_path / "other", {"rows": []}),
        write(tmp_path / "list", [1]),
        write(tmp_path / "<old>", broken),
        tmp_path / "nowhere",
    ]
    told = cli("bench", "report", *bad, good, "-o", tmp_path / "out")
    assert told.code == 1
    named = [line for line in told.err.splitlines() if line.startswith("Not read: ")]
    assert [str(folder) in line for folder, line in zip(bad, named, strict=True)] == [True] * 5
    assert "'cells'" in named[3]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;old&gt;" in page
    assert "<old>" not in page
    assert "its own report" not in page  # there is none, and it would not lie below


def test_a_wrong_call_writes_nothing(tmp_path: Path) -> None:
    told = cli("bench", "report", tmp_path, "-o", tmp_path / "out")
    assert told.code == 2
    assert str(tmp_path) in told.complaint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["results.json", "metrics.json"])
def test_results_of_a_bench_are_not_lost(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "one", cost_results(), name)
    before = (folder / name).read_bytes()
    told = cli("bench", "report", folder, "-o", folder)
    assert told.code == 2
    assert "would be lost" in told.complaint
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [(name, before)]


def test_in_order_keeps_runs_of_one_kind_as_they_came() -> None:
    found = [experiment(cost_results(), name, None) for name in ("b", "a")]
    found.insert(1, experiment(evaluate_results(), "c", None))
    assert [each.folder for each in in_order(found)] == ["c", "b", "a"]


def test_results_of_no_kind() -> None:
    with pytest.raises(DataError, match="no kind that is known"):
        experiment({"rows": [{"x": 1}]}, "x", None)


@pytest.mark.real
@pytest.mark.skipif(not (ZOO / "pbc8" / "config.json").exists(), reason="pbc8 is not in the zoo")
def test_real_cells(data_root: Path, tmp_path: Path) -> None:
    """`evaluate` with the released model says what the report has to say of it."""
    pbc = data_root / "pbc"
    if not (pbc / "splits.csv").is_file():
        pytest.skip(f"no pbc/splits.csv in {data_root}")
    with (pbc / "splits.csv").open(newline="") as file:
        val = [row for row in csv.DictReader(file) if row["split"] == "val"]
    few = [row for name in ("eosinophil", "lymphocyte") for row in
           [row for row in val if row["label"] == name][:3]]  # fmt: skip
    with (tmp_path / "few.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(few[0]))
        writer.writeheader()
        writer.writerows(few)
    told = cli("evaluate", pbc, "-o", tmp_path / "named", "--splits", tmp_path / "few.csv",
               "--device", "cpu")  # fmt: skip
    assert told.code == 0, told.err
    told = cli("bench", "report", tmp_path / "named", "-o", tmp_path, "--json")
    assert told.code == 0, told.err
    (run,), (line,) = told.json["experiments"], told.json["summary"]
    assert (run["model"], len(run["weights"]), run["seed"]) == ("pbc8", 12, 0)
    assert run["commit"] != "not recorded"
    assert run["command"].startswith(f"cytodiffusion evaluate {pbc} ")
    assert line["ours"]["value"] > 0.5
    assert line["comparable"] == "in part"
