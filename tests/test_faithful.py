"""Deletion and insertion by hand, maps against rivals, and the words of WBCAtt."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from helpers import CLASSES, cli, tiny_model, write_discs

from cytodiffusion.bundle import ZOO, load
from cytodiffusion.cli.benches import digest_of
from cytodiffusion.cli.faithful import Work
from cytodiffusion.data.readers import read_dataset
from cytodiffusion.data.taxonomy import Taxonomy
from cytodiffusion.errors import DataError, ModelError
from cytodiffusion.evaluate.attributes import DIRECTIONS, Words, look, rank_agreement, regions
from cytodiffusion.evaluate.explained import said, stability
from cytodiffusion.evaluate.faithful import (
    SHARES,
    Judge,
    areas,
    blurred,
    curves,
    gains,
    grad_cam,
    interval,
    joined,
    rivals,
)
from cytodiffusion.explain.counterfactual import Settings
from cytodiffusion.files import write_json

SIZE = 20
RNG = np.random.default_rng(0)
WEIGHTS = RNG.random((SIZE, SIZE))
IMAGE, REFERENCE = np.ones((3, SIZE, SIZE)), np.zeros((3, SIZE, SIZE))


def evidence(images) -> np.ndarray:
    """Log-odds that are a weighted sum of the pixels: the best map is known."""
    return np.array([(WEIGHTS * image.mean(0)).sum() for image in images])


# --- curves --------------------------------------------------------------------------------------


def test_curves_by_hand():
    """The highest weights first: what is left is the sum of the lowest, and the other way round."""
    found = curves(IMAGE, REFERENCE, {"best": WEIGHTS}, evidence)["best"]
    falling = np.sort(WEIGHTS, axis=None)[::-1]
    first = [falling[: round(share * SIZE**2)].sum() for share in SHARES]
    np.testing.assert_allclose(found[1], first)
    np.testing.assert_allclose(found[0], WEIGHTS.sum() - np.array(first), atol=1e-9)


def test_areas_of_straight_lines():
    assert areas(np.array([[7.0] * len(SHARES), list(SHARES)])).tolist() == pytest.approx([7, 0.5])


def test_the_best_map_beats_all_and_its_opposite_loses():
    rankings = {"best": WEIGHTS, "worst": -WEIGHTS, **rivals(IMAGE, RNG)}
    found = {name: areas(c) for name, c in curves(IMAGE, REFERENCE, rankings, evidence).items()}
    for name, area in found.items():
        assert found["best"][0] <= area[0] <= found["worst"][0], name
        assert found["worst"][1] <= area[1] <= found["best"][1], name


def test_random_maps_are_joined():
    found = curves(IMAGE, REFERENCE, rivals(IMAGE, RNG), evidence)
    lots = [curve for name, curve in found.items() if name.startswith("random")]
    told = joined(found)
    assert len(lots) == 3
    assert list(told) == ["edges", "soft edges", "centre", "random"]
    np.testing.assert_allclose(told["random"], np.mean(lots, axis=0))


def test_rivals_look_where_they_should():
    step = np.zeros((3, SIZE, SIZE))
    step[:, :, 10:] = 1
    found = rivals(step, RNG)
    assert set(found["edges"].argmax(1)) <= {9, 10}
    assert np.unravel_index(found["centre"].argmax(), (SIZE, SIZE)) in {(9, 9)}
    assert found["soft edges"].std() < found["edges"].std()
    np.testing.assert_allclose(blurred(np.full((3, 8, 8), 0.3)), 0.3)


def test_gains_are_better_when_positive():
    ours, theirs = np.tile([1.0, 5.0], (40, 1)), np.tile([3.0, 4.0], (40, 1))
    theirs = theirs + RNG.normal(0, 0.1, theirs.shape)
    told = gains(ours, theirs, np.arange(40) % 2, seed=0)
    assert told["deletion"]["mean"] == pytest.approx(2, abs=0.1)
    assert told["insertion"]["mean"] == pytest.approx(1, abs=0.1)
    low, high = told["deletion"]["ci95"]
    assert low < told["deletion"]["mean"] < high < low + 0.2


# --- two seeds -----------------------------------------------------------------------------------


def test_two_maps_agree_as_their_errors_say():
    """A signal of variance 1 under noise of variance .25: correlation 1 / 1.25, z of mean square 1."""
    truth = RNG.normal(size=(200, 200))
    first, second = (truth + RNG.normal(0, 0.5, truth.shape) for _ in range(2))
    error = np.full(truth.shape, 0.5)
    found = stability(first, error, second, error)
    assert found["correlation"] == pytest.approx(0.8, abs=0.01)
    assert found["expected"] == pytest.approx(0.8, abs=0.01)
    assert found["z_square"] == pytest.approx(1, abs=0.03)


def test_what_is_said():
    assert said({"mean": 0.5, "ci95": [0.25, 0.75]}) == "0.50 [0.25, 0.75]"
    assert said({"mean": 1.0, "ci95": None}) == "1.00"
    assert said({"mean": None, "ci95": None}) == "none"


# --- words ---------------------------------------------------------------------------------------

COLUMNS = ("img_name", "label", "nucleus_shape", "granule_type", "granule_colour", "granularity",
           "cytoplasm_colour", "chromatin_density", "nuclear_cytoplasmic_ratio")  # fmt: skip
EOSINOPHIL = ("bilobed", "round", "red", "yes", "light blue", "densely", "low")
LYMPHOCYTE = ("round", "nil", "nil", "no", "blue", "densely", "high")
NEUTROPHIL = ("bilobed", "small", "pink", "yes", "light blue", "densely", "low")


@pytest.fixture
def words(tmp_path: Path) -> Words:
    path = tmp_path / "words.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        rows = {"Eosinophil": EOSINOPHIL, "Lymphocyte": LYMPHOCYTE, "Neutrophil": NEUTROPHIL}
        for label, said_of in rows.items():
            writer.writerows([f"{label}_{i}.jpg", label, *said_of] for i in range(2))
    return Words.read(path, CLASSES, Taxonomy.load())


def test_words_are_shares_and_surprises(words: Words):
    cell = words.cells["Eosinophil_0"]
    assert words.shares["eosinophil"]["granule_colour", "red"] == 1
    assert words.surprise(cell, "eosinophil", ("nucleus_shape",)) == 0
    assert words.surprise(cell, "neutrophil", ("nucleus_shape",)) == 0
    assert words.surprise(cell, "lymphocyte", ("nucleus_shape", "chromatin_density")) == 0.5


def painted() -> np.ndarray:
    """A pale ground, a reddish cell of radius 8 with a dark nucleus of radius 4, in 32 px."""
    y, x = np.mgrid[:32, :32] - 15.5
    far = np.hypot(y, x)
    image = np.full((3, 32, 32), 0.8)
    image[:, far < 8] = np.array([0.3, -0.2, 0.0])[:, None]
    image[:, far < 4] = np.array([-0.7, -0.8, -0.3])[:, None]
    return image


def test_regions_of_a_painted_cell():
    found = regions(painted())
    y, x = np.mgrid[:32, :32] - 15.5
    far = np.hypot(y, x)
    assert np.array_equal(found["nucleus"], far < 4)
    assert np.array_equal(found["cytoplasm"], (far >= 4) & (far < 8))
    assert np.array_equal(found["cell"], far < 8)


def test_maps_are_judged_by_the_words(words: Words):
    """Of an eosinophil: to be a neutrophil it loses colour, to be a lymphocyte it becomes darker."""
    image, masks = painted(), regions(painted())
    paler, darker = np.zeros_like(image), np.zeros_like(image)
    paler[0, masks["cytoplasm"]] = -0.2
    darker[:, masks["cell"]] = -0.2
    changes = {"neutrophil": paler, "lymphocyte": darker}
    found = look(image, changes, words.cells["Eosinophil_0"], words)
    assert [m["in_cell"] for m in found] == [True, True]
    assert all(m["enrichment"] > 2 for m in found)
    assert found[1]["brightness"] == pytest.approx(1)
    assert found[0]["brightness"] == pytest.approx(1 / 3)
    assert found[0]["directions"] == {"red granules": True}
    assert found[1]["directions"]["large nucleus"] is True
    assert found[0]["expected"] == pytest.approx(-2 / 3)
    assert found[1]["expected"] == 0
    assert rank_agreement(found) == pytest.approx(1)
    assert rank_agreement(found[:1]) is None


def test_a_table_without_words_is_refused(tmp_path: Path):
    (tmp_path / "x.csv").write_text("img_name,label\na.jpg,Eosinophil\n")
    with pytest.raises(DataError, match="granule_colour"):
        Words.read(tmp_path / "x.csv", CLASSES, Taxonomy.load())
    with pytest.raises(DataError, match="cannot be read"):
        Words.read(tmp_path / "none.csv", CLASSES, Taxonomy.load())


# --- Grad-CAM ------------------------------------------------------------------------------------


class Trunk(torch.nn.Module):
    """One feature map, the red of the image, 8 x 8; pooled it is the only feature."""

    def forward(self, images, output_hidden_states=False):
        red = torch.nn.functional.avg_pool2d(images[:, :1], 4)
        told = type("Told", (), {})()
        told.hidden_states, told.pooler_output = (images, red), red.mean((2, 3))
        return told


def baseline(trunk: torch.nn.Module):
    from cytodiffusion.evaluate.baselines import Baseline, BaselineSettings, Network

    network = Network.__new__(Network)
    torch.nn.Module.__init__(network)
    network.kind, network.trunk, network.head = "resnet", trunk, torch.nn.Linear(1, 2)
    with torch.no_grad():
        network.head.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    network.register_buffer("mean", torch.zeros(3, 1, 1))
    network.register_buffer("std", torch.ones(3, 1, 1))
    found = object.__new__(Baseline)
    object.__setattr__(found, "network", network.requires_grad_(False))
    object.__setattr__(found, "settings", BaselineSettings(steps=1))
    return found


def test_grad_cam_lies_where_the_feature_is():
    """Class 0 is named for its red, which is in one corner alone."""
    image = np.zeros((3, 32, 32))
    image[0, :8, :8] = 1
    found = grad_cam(baseline(Trunk()), image, 0, 1)
    assert found.shape == (32, 32)
    assert found[:6, :6].min() > 0
    assert found[16:, 16:].max() == 0
    assert grad_cam(baseline(Trunk()), image, 1, 0).max() == 0  # nothing speaks for class 1


def test_grad_cam_needs_feature_maps():
    class Tokens(Trunk):
        def forward(self, images, output_hidden_states=False):
            told = super().forward(images)
            told.hidden_states = (images.flatten(2),)
            return told

    with pytest.raises(ModelError, match="convolutional"):
        grad_cam(baseline(Tokens()), np.zeros((3, 32, 32)), 0, 1)


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.getbasetemp()).bundle


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_discs(tmp_path_factory.mktemp("faithful") / "cells", each=2, first=60)


def test_the_judge_is_the_classifier(bundle: Path):
    """Its log-odds are those of the budget `full` after two trials, for any number of images."""
    model = load(bundle)
    images = list(np.random.default_rng(0).uniform(-1, 1, (3, 3, 16, 16)).astype(np.float32))
    budget = model.classifier.budget("full")
    table = model.classifier.measure(torch.from_numpy(np.stack(images)), ["judged"] * 3, "full")
    logits = np.log(budget.reader.probabilities(table.errors[:, :2]))
    found = Judge(model.classifier).log_odds(images, 0, 2)
    np.testing.assert_allclose(found, logits[:, 0] - logits[:, 2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(Judge(model.classifier).log_odds(images[1:2], 0, 2), found[1:2])


def test_the_bench_and_once_more(bundle: Path, cells: Path, words: Words, tmp_path: Path) -> None:
    call = ["bench", "explain", cells, "-m", bundle, "-o", tmp_path / "out", "--device", "cpu",
            "--json"]  # fmt: skip
    told = cli(*call)
    assert told.code == 0, told.err
    assert told.json["cells"] == 6
    assert told.json["attributes"] is None
    for reference in ("any cell", "blurred"):
        means, better = told.json["areas"][reference], told.json["gains"][reference]["support"]
        for rival in ("random", "edges", "soft edges", "centre"):
            gap = means[rival]["deletion"] - means["support"]["deletion"]
            assert better[rival]["deletion"]["mean"] == pytest.approx(gap)
    assert set(told.json["flips"]) == {"drawn", "difference", "turned", "change"}
    assert told.json["stability"]["correlation"]["mean"] > 0.5
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == told.json
    assert "bench explain" in (tmp_path / "out" / "report.html").read_text()
    again = cli(*call)
    assert again.code == 0
    assert "6 cells were measured before" in again.err
    assert again.json == told.json


def test_a_limit_and_an_unreadable_image(bundle: Path, tmp_path: Path) -> None:
    write_discs(tmp_path / "in", each=2)
    for path in (tmp_path / "in" / CLASSES[0]).iterdir():
        path.write_bytes(b"no image")
    told = cli("bench", "explain", tmp_path / "in", "-m", bundle, "-o", tmp_path / "out", "--json",
               "--device", "cpu", "--limit", 3)  # fmt: skip
    assert told.code == 1
    assert told.json["cells"] == 4  # two of each class at the least


def test_nothing_can_be_read(bundle: Path, tmp_path: Path) -> None:
    for path in write_discs(tmp_path / "in", each=1).glob("*/*"):
        path.write_bytes(b"no image")
    told = cli("bench", "explain", tmp_path / "in", "-m", bundle, "-o", tmp_path / "out")
    assert told.code == 2
    assert "None of the images can be read" in told.complaint


def test_what_was_measured_is_kept_by_image_and_words(
    bundle: Path, cells: Path, words: Words, tmp_path: Path
) -> None:
    """A label that was corrected since is the one that counts; other words are another measurement."""
    work = Work(load(bundle), Settings(), None, None, None)
    sample = read_dataset(cells)[0]
    path, told = work.cell(sample, 0, tmp_path)
    assert path is not None
    write_json(path, told, "what was measured")
    kept, again = work.cell(sample, 1, tmp_path)
    assert kept is None
    assert again == told | {"label": 1}
    stem = PurePosixPath(sample.name).stem
    said = [Words({stem: {"granules": word}}, words.shares) for word in ("few", "many")]
    keys = {digest_of((replace(work, words=w).key, replace(work, words=w).words_of(sample.name)))
            for w in (None, *said)}  # fmt: skip
    assert len(keys) == 3


def test_no_value_has_no_interval() -> None:
    assert interval(np.array([]), np.array([], int), 0) == {"mean": None, "ci95": None}


@pytest.mark.parametrize(
    "words",
    [["-m", "nonsense"], ["--baseline", "nothing"], ["--attributes", "nowhere.csv"]],
    ids=str,
)
def test_a_wrong_call_writes_nothing(bundle: Path, cells: Path, tmp_path: Path, words) -> None:
    told = cli("bench", "explain", cells, "-m", bundle, "-o", tmp_path / "out", *words)
    assert told.code == 2
    assert words[1] in told.complaint
    assert not (tmp_path / "out").exists()


@pytest.mark.real
@pytest.mark.skipif(
    not (ZOO / "pbc8" / "config.json").exists(), reason="pbc8 is not in the zoo yet"
)
def test_real_maps_beat_random_ones(data_root: Path, tmp_path: Path) -> None:
    """On three cells of val of three classes: against random pixels and edges, with both references."""
    pbc = data_root / "pbc"
    if not (pbc / "splits.csv").is_file():
        pytest.skip(f"no pbc/splits.csv in {data_root}")
    with (pbc / "splits.csv").open(newline="") as file:
        val = [row for row in csv.DictReader(file) if row["split"] == "val"]
    few = [row for name in ("eosinophil", "lymphocyte", "neutrophil")
           for row in [row for row in val if row["label"] == name][:3]]  # fmt: skip
    with (tmp_path / "few.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(few[0]))
        writer.writeheader()
        writer.writerows(few)
    told = cli("bench", "explain", pbc, "-o", tmp_path, "--splits", tmp_path / "few.csv",
               "--attributes", pbc / "wbcatt.csv", "--device", "cpu", "--json")  # fmt: skip
    assert told.code == 0, told.err
    assert told.json["cells"] == 9
    for reference in ("any cell", "blurred"):
        for rival in ("random", "edges"):
            for kind in ("deletion", "insertion"):
                assert told.json["gains"][reference]["support"][rival][kind]["ci95"][0] > 0
    assert told.json["attributes"]["in_cell"]["mean"] > 0.7
    assert set(told.json["attributes"]["directions"]) == set(DIRECTIONS)
