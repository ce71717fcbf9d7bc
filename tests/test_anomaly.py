"""`bench anomaly`: measures by hand and by scikit-learn, corruptions, and a class of discs held out."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CLASSES, TINY, cli, contents, disc, write_discs
from sklearn.metrics import average_precision_score, roc_auc_score

from cytodiffusion.bundle import ZOO, Model, load
from cytodiffusion.classify.fit import Plan
from cytodiffusion.cli.console import Console
from cytodiffusion.cli.strangers import Bench, run_folder
from cytodiffusion.data.images import to_tensor
from cytodiffusion.data.readers import read_dataset
from cytodiffusion.data.taxonomy import Taxonomy
from cytodiffusion.errors import DataError, SettingsError
from cytodiffusion.evaluate.anomaly import (
    Cells,
    Ranking,
    as_told,
    flag_row,
    measure,
    p_values,
    row,
    scores,
)
from cytodiffusion.evaluate.baselines import SHAPES
from cytodiffusion.evaluate.corruptions import CORRUPTIONS, corrupt, corrupted
from cytodiffusion.train.settings import make_settings

# --- how good a score is -------------------------------------------------------------------------


def every(ranking: Ranking) -> np.ndarray:
    """The one sample that is the set itself."""
    return np.arange(len(ranking.place))[None]


def test_measures_are_those_of_scikit_learn() -> None:
    """With ties between the two kinds, and on a resample as well."""
    rng = np.random.default_rng(0)
    normal, strange = rng.integers(0, 12, 90).astype(float), rng.integers(4, 16, 40).astype(float)
    ranking = Ranking(normal, strange)
    truth, values = np.repeat([0, 1], [90, 40]), np.concatenate([normal, strange])
    for sample in (every(ranking), rng.integers(0, 130, (3, 130))):
        for i, rows in enumerate(sample):
            auroc, precision = ranking.auroc(sample)[i], ranking.average_precision(sample)[i]
            assert auroc == pytest.approx(roc_auc_score(truth[rows], values[rows]))
            assert precision == pytest.approx(average_precision_score(truth[rows], values[rows]))


def test_thresholds_by_hand() -> None:
    """Normal cells score 0 to 99. Five lie above 94.5, one above 98.5, fifty at 50 or above."""
    ranking = Ranking(np.arange(100.0), np.array([98.5, 94.5, 49.5]))
    sample = every(ranking)
    assert ranking.sensitivity(sample, 0.95) == pytest.approx(2 / 3)
    assert ranking.sensitivity(sample, 0.99) == pytest.approx(1 / 3)
    assert ranking.sensitivity(sample, 1.0) == 0
    assert ranking.specificity(sample, 0.95) == pytest.approx(0.5)
    assert ranking.specificity(sample, 0.5) == pytest.approx(0.95)


def test_a_row_has_intervals() -> None:
    rng = np.random.default_rng(0)
    told = row(rng.normal(size=300), rng.normal(1.5, size=80))
    assert (told["normal"], told["strange"]) == (300, 80)
    for name in ("auroc", "average_precision", "sensitivity_at_95", "specificity_at_95"):
        low, high = told[f"{name}_ci95"]
        assert low < told[name] < high, name
    assert told["auroc"] == pytest.approx(0.856, abs=0.05)  # Phi(1.5 / sqrt 2)
    apart = row(np.zeros(5), np.ones(5))
    assert (apart["auroc"], apart["auroc_ci95"]) == (1, None)


def test_flags_by_hand() -> None:
    told = flag_row(np.linspace(0.01, 1, 100), np.array([0.001, 0.01, 0.02, 0.5]))
    assert (told["normal_flagged"], told["strange_flagged"]) == (0.01, 0.5)
    assert told["strange_flagged_ci95"] == pytest.approx([0.0676, 0.9324], abs=1e-4)


@pytest.mark.parametrize("normal", [[], [np.nan]], ids=str)
def test_what_cannot_be_ranked(normal: list[float]) -> None:
    with pytest.raises(DataError, match="cannot be ranked"):
        Ranking(np.array(normal, dtype=float), np.ones(2))


# --- corruptions ---------------------------------------------------------------------------------


def cell() -> torch.Tensor:
    return to_tensor(disc("lymphocyte", 0, 64).transpose(2, 0, 1))


def density(image: torch.Tensor) -> torch.Tensor:
    field = image.flatten(1).quantile(0.9, dim=1)[:, None, None]
    return ((field + 1) / (image.clamp(min=-0.99) + 1)).log()


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_corruption_hangs_on_image_and_seed_alone(kind: str) -> None:
    image = cell()
    before = image.clone()
    found = corrupt(kind, image, 3)
    assert found.equal(corrupt(kind, image, 3))
    assert not found.equal(corrupt(kind, image, 4))
    assert image.equal(before)
    assert found.shape == image.shape
    assert found.abs().max() <= 1
    canvases = np.stack([disc(name, 0, 64).transpose(2, 0, 1) for name in CLASSES])
    digests = [f"{i:0<64x}" for i in (5, 6, 7)]
    copies = corrupted(kind, canvases, digests, 32, seed=0)
    assert copies.shape == (3, 3, 32, 32)
    np.testing.assert_array_equal(corrupted(kind, canvases[1:], digests[1:], 32, 0), copies[1:])
    other = corrupted(kind, canvases[:1], digests[1:2], 32, 0)
    assert (other != copies[:1]).any()


def test_blur_keeps_the_light_and_loses_the_grain() -> None:
    image = cell()
    found = corrupt("blur", image, 0)
    assert float(found.mean()) == pytest.approx(float(image.mean()), abs=0.02)
    assert found.diff(dim=-1).std() < 0.3 * image.diff(dim=-1).std()


def test_an_empty_field_has_no_cell() -> None:
    found = corrupt("empty", cell(), 0)
    assert (found.flatten(1).std(1) < 0.06).all()
    assert float(found.mean()) == pytest.approx(float(cell()[:, :8, :8].mean()), abs=0.12)


def test_a_torn_cell_is_half_there() -> None:
    image = cell()
    found = corrupt("torn", image, 0)
    kept = (found == image).all(0)
    assert 0.3 < kept.float().mean() < 0.7
    assert found[:, ~kept].std(1).max() < 1e-6


def test_two_cells_absorb_as_two() -> None:
    """But for what leaves the frame."""
    image = cell()
    ratio = density(corrupt("two cells", image, 0)).sum() / density(image).sum()
    assert 1.5 < ratio < 2.1


def test_another_stain_turns_blue_to_brown() -> None:
    """The disc is blue, its field nearly white and left so."""
    image, found = cell(), corrupt("other stain", cell(), 0)
    assert image[2, 32, 32] > image[0, 32, 32]
    assert found[2, 32, 32] < found[0, 32, 32]
    torch.testing.assert_close(found[:, :8, :8].mean(), image[:, :8, :8].mean(), atol=0.08, rtol=0)


def test_a_corruption_that_there_is_not() -> None:
    with pytest.raises(SettingsError, match="blur, empty, torn, two cells, other stain"):
        corrupt("rust", cell(), 0)


# --- a class of discs held out -------------------------------------------------------------------


@dataclass(frozen=True)
class Short(Plan):
    """A quick calibration: few trials, short races."""

    levels: int = 3
    trials: int = 2
    race_cells: int = 4
    race_trials: int = 22
    paper_most: int = 22


@pytest.fixture(scope="module")
def small() -> Iterator[None]:
    """A ResNet that is trained in a moment, and a model that is calibrated so."""
    with pytest.MonkeyPatch.context() as patch:
        import_module("cytodiffusion.calibration")  # which takes the Plan that is there
        patch.setattr("cytodiffusion.classify.fit.Plan", Short)
        sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
        patch.setitem(SHAPES, "resnet", SHAPES["resnet"] | sizes)
        yield


WITHOUT = (
    "--hold-out",
    "lymphocytes",
    "--baselines",
    "resnet",
    "--minutes",
    0.02,
    "--corrupted",
    4,
)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Discs with a split of their own: 12 of each class to train on, 6 for the rest."""
    root = tmp_path_factory.mktemp("anomaly") / "cells"
    for split, each, first in (("train", 12, 0), ("val", 6, 30), ("test", 6, 60)):
        write_discs(root / split, each, first)
    return root


@pytest.fixture(scope="module")
def out(cells: Path, small: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("anomaly") / "out"
    foreign = write_discs(tmp_path_factory.mktemp("foreign") / "far", each=1, first=90)
    told = cli("bench", "anomaly", cells, "-o", folder, *WITHOUT, "--foreign", foreign, *TINY)
    assert told.code == 0, told.err
    return folder


def read(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


# --- what is measured ----------------------------------------------------------------------------


def run_of(out: Path) -> Path:
    """The run that was trained without lymphocytes."""
    (run,) = (out / "lymphocyte").glob("run-*")
    return run


@pytest.fixture(scope="module")
def model(out: Path) -> Model:
    return load(run_of(out) / "bundle")


def discs(each: int, first: int) -> Cells:
    """Of the two classes that the model knows."""
    names = ("eosinophil", "neutrophil")
    images = [disc(name, i, 16) for name in names for i in range(first, first + each)]
    pixels = np.stack(images).transpose(0, 3, 1, 2)
    return Cells(pixels, np.repeat([0, 1], each), [f"{i:064x}" for i in range(len(pixels))])


def end(work: Iterator) -> object:
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value


def test_scores_are_what_the_classifier_tells(model: Model) -> None:
    """One measurement of all trials gives what `full` and `balanced` would have measured."""
    known, cells = discs(8, 0), discs(4, 40)
    found = end(measure(model.classifier, cells))
    told = scores(model.classifier, end(measure(model.classifier, known)), known.labels, found)
    for budget, name in (("full", "combined"), ("balanced", "balanced"), ("fast", None)):
        table = model.classifier.measure(to_tensor(cells.pixels), cells.digests, budget)
        reading = model.classifier.read(table, budget)
        again = as_told(model.classifier.budget(budget), found)
        np.testing.assert_allclose(again, reading.anomaly, rtol=1e-5)
        if name:
            np.testing.assert_array_equal(told[name], again)
            np.testing.assert_allclose(p_values(model.classifier, found)[name], reading.anomaly_p)
    assert all(values.shape == (8,) and np.isfinite(values).all() for values in told.values())


def test_strange_features_are_far_from_known_ones(model: Model) -> None:
    """Grey fields among coloured discs."""
    grey = discs(2, 60)
    grey = Cells(np.full_like(grey.pixels, 20), grey.labels, grey.digests)
    known, normal = discs(8, 0), discs(4, 40)
    measured = [end(measure(model.classifier, cells)) for cells in (known, normal, grey)]
    assert measured[0].features.shape == (16, model.classifier.meter.features)
    told = [scores(model.classifier, measured[0], known.labels, each) for each in measured[1:]]
    for name in ("features", "neighbours"):
        assert told[1][name].min() > told[0][name].max(), name


# --- the command ---------------------------------------------------------------------------------


def test_a_class_held_out(out: Path) -> None:
    found = read(out)
    rows = {(row["set"], row["method"], row["score"]): row for row in found["rows"]}
    assert len(rows) == len(found["rows"])
    assert {key[0] for key in rows} == {"lymphocyte", "far", *CORRUPTIONS}
    assert {key[2] for key in rows if key[1] == "resnet"} == {"softmax", "energy", "mahalanobis"}
    ours = rows["lymphocyte", "ours", "balanced"]
    assert (ours["normal"], ours["strange"], ours["repeat"]) == (12, 6, 0)
    assert (rows["far", "ours", "zeta"]["strange"], rows["blur", "ours", "zeta"]["strange"]) == (
        3,
        4,
    )
    assert {"normal_flagged", "strange_flagged", "alarm"} <= set(ours)
    assert "normal_flagged" not in rows["lymphocyte", "ours", "zeta"]
    assert load(run_of(out) / "bundle").classes.names == ("eosinophil", "neutrophil")
    assert found["baselines"]["resnet"]["train_images"] == 24
    page = (out / "report.html").read_text()
    assert "bench anomaly" in page
    assert page.count("<svg") == 7


def test_run_again_nothing_is_done_anew(cells: Path, out: Path, small: None) -> None:
    before, files = read(out), contents(out / "lymphocyte")
    foreign = json.loads(json.dumps(before["command"])).split("--foreign ")[1].split()[0]
    told = cli("bench", "anomaly", cells, "-o", out, *WITHOUT, "--foreign", foreign, *TINY)
    assert told.code == 0, told.err
    assert told.err.count("measured before") == 9
    assert "resnet: trained before" in told.err
    assert read(out) == before
    assert contents(out / "lymphocyte") == files


def test_a_run_of_ones_own(cells: Path, out: Path, tmp_path: Path) -> None:
    """The same bundle from elsewhere gives the same rows; without --minutes its time is ours."""
    told = cli("bench", "anomaly", cells, "-o", tmp_path, "--hold-out", "lymphocyte", "--corrupted", 0,
               "--run", run_of(out), "--baselines", "none", "--device", "cpu",
               "--json")  # fmt: skip
    assert told.code == 0, told.err
    wanted = [r for r in read(out)["rows"] if r["set"] == "lymphocyte" and r["method"] == "ours"]
    assert told.json["rows"] == wanted
    assert not (tmp_path / "lymphocyte").exists()


def test_a_run_whose_split_is_not_known_is_no_test(cells: Path, out: Path, tmp_path: Path) -> None:
    told = cli("bench", "anomaly", cells / "train", "-o", tmp_path / "out", "--hold-out", "lymphocyte",
               "--run", run_of(out), "--baselines", "none", "--device", "cpu")  # fmt: skip
    assert told.code == 2
    assert "Give it with --splits" in told.complaint
    assert not (tmp_path / "out").exists()


def test_other_settings_are_another_run(cells: Path, tmp_path: Path) -> None:
    bench = Bench(cells, tmp_path, "lymphocyte", make_settings("tiny"), None, None, Taxonomy.load(), 0,
                  "cpu", "auto", Console(False))  # fmt: skip
    parts = {name: read_dataset(cells, split=name) for name in ("train", "val")}
    other = replace(bench, settings=make_settings("tiny", ["seed=1"]))
    fewer = [parts | {name: found[1:]} for name, found in parts.items()]
    places = [run_folder(bench, parts), run_folder(other, parts)]
    places += [run_folder(bench, some) for some in fewer]
    assert len(set(places)) == 4
    assert run_folder(bench, parts) == places[0]


def test_a_class_the_model_does_not_know_is_strange(cells: Path, out: Path, tmp_path: Path) -> None:
    """Without --hold-out, by the labels alone."""
    bundle = run_of(out) / "bundle"
    told = cli("bench", "anomaly", cells, "-o", tmp_path, "-m", bundle, "--baselines", "none",
               "--corrupted", 0, "--limit", 4, "--json", "--device", "cpu")  # fmt: skip
    assert told.code == 0, told.err
    assert {row["set"] for row in told.json["rows"]} == {"lymphocyte"}
    assert (told.json["rows"][0]["normal"], told.json["rows"][0]["strange"]) == (4, 4)


def test_an_unreadable_image_is_named(cells: Path, out: Path, tmp_path: Path) -> None:
    write_discs(tmp_path / "far", each=1)
    (tmp_path / "far" / CLASSES[0] / "00.png").write_bytes(b"no image")
    told = cli("bench", "anomaly", cells, "-o", tmp_path / "out", "-m",
               run_of(out) / "bundle", "--baselines", "none", "--corrupted", 0,
               "--foreign", tmp_path / "far", "--device", "cpu")  # fmt: skip
    assert told.code == 1
    assert "Not read: eosinophil/00.png" in told.err
    assert {row["strange"] for row in read(tmp_path / "out")["rows"] if row["set"] == "far"} == {2}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hold-out", "blast"], "no class 'blast' to hold out"),
        (["--run", "runs/x"], "--hold-out"),
        (["--baselines", "vgg"], "no baseline 'vgg'"),
        (["-m", "{bundle}"], "--minutes"),
        (["-m", "nonsense", "--baselines", "none"], "no model 'nonsense'"),
        (["--hold-out", "neutrophil", "--run", "{run}", "--baselines", "none"], "knows the class"),
        (["--hold-out", "lymphocyte", "--run", "{cells}", "--baselines", "none"], "has no bundle"),
        (["-m", "{bundle}", "--foreign", "nowhere", "--baselines", "none"], "nothing at nowhere"),
    ],
    ids=str,
)
def test_a_wrong_call_writes_nothing(
    cells: Path, model: Model, tmp_path: Path, words: list[str], said: str
) -> None:
    places = {"run": model.folder.parent, "bundle": model.folder, "cells": cells}
    words = [word.format(**places) for word in words]
    told = cli("bench", "anomaly", cells, "-o", tmp_path / "out", *words)
    assert told.code == 2
    assert said in told.complaint
    assert not (tmp_path / "out").exists()


# --- real cells ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split file of real cells of `val`: 3 of each class to know, 3 to measure."""
    path = data_root / "pbc" / "splits.csv"
    if not path.is_file() or not (ZOO / "pbc8" / "config.json").is_file():
        pytest.skip(f"no pbc8 in the zoo, or no {path}")
    with path.open(newline="") as file:
        listed = [each for each in csv.DictReader(file) if each["split"] == "val"]
    lines = ["path,label,split"]
    for name in sorted({each["label"] for each in listed}):
        chosen = [each["path"] for each in listed if each["label"] == name][:7]
        parts = ["train", *["val"] * 3, *["test"] * 3]
        lines += [f"{each},{name},{part}" for each, part in zip(chosen, parts, strict=True)]
    chosen_path = tmp_path_factory.mktemp("few") / "splits.csv"
    chosen_path.write_text("\n".join(lines) + "\n")
    return chosen_path


@pytest.mark.real
def test_an_empty_field_is_stranger_than_real_cells(
    data_root: Path, few: Path, tmp_path: Path
) -> None:
    """Though it is the easiest of all to denoise: the error itself takes it for normal."""
    told = cli("bench", "anomaly", data_root / "pbc", "-o", tmp_path, "--splits", few, "--device", "cpu",
               "--baselines", "none", "--corrupted", 16, "--json")  # fmt: skip
    assert told.code == 0, told.err
    rows = {(each["set"], each["score"]): each["auroc"] for each in told.json["rows"]}
    assert rows["empty", "pattern"] > 0.95
    assert rows["empty", "balanced"] > 0.8
    assert rows["empty", "error"] < 0.2
    assert rows["other stain", "balanced"] > 0.7
