"""`bench cost`: passes counted by hand, accuracy against scikit-learn, and the paper's views."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CLASSES, cli, tiny_model, write_discs
from sklearn.metrics import balanced_accuracy_score

from cytodiffusion.bundle import Parts, load, save_bundle
from cytodiffusion.classify.calibrate import HeldOut
from cytodiffusion.classify.classifier import Budget, RaceReader
from cytodiffusion.classify.draws import stratified
from cytodiffusion.classify.race import PaperRace, paper_draws
from cytodiffusion.evaluate.cost import Measured, compare, passes, procedure, row
from cytodiffusion.evaluate.views import OPERATIONS, PaperView

NAN = np.nan


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with a paper's race of 30 trials instead of 2,000."""
    model = load(tiny_model(tmp_path_factory.getbasetemp()).bundle)
    race = PaperRace(paper_draws(30))
    paper = replace(model.classifier.budgets["paper"], draws=race.draws, policy=race,
                    reader=RaceReader(race.weights, 1.0))  # fmt: skip
    budgets = model.classifier.budgets | {"paper": paper}
    folder = tmp_path_factory.mktemp("short") / "tiny"
    texts = {"card": "", "license": "", "data_license": "", "origin": {}}
    save_bundle(folder, Parts("tiny", model.denoiser, model.classes, model.preprocess, budgets,
                              model.taxonomy, **texts))  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_discs(tmp_path_factory.mktemp("bench") / "cells", each=5, first=60)


@pytest.fixture(scope="module")
def out(bundle: Path, cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "out"
    told = cli("bench", "cost", cells, "-m", bundle, "-o", folder, "--device", "cpu",
               "--procedures", "paper,full,fast,race")  # fmt: skip
    assert told.code == 0, told.err
    return folder


def rows(folder: Path) -> dict[str, dict]:
    return {
        each["name"]: each
        for each in json.loads((folder / "results.json").read_text())["procedures"]
    }


# --- what is counted -----------------------------------------------------------------------------


def test_passes_by_hand():
    """Cell 0 runs three trials, class 1 leaving after the first; cell 1 runs one."""
    errors = np.array([
        [[1, 1, 1], [1, NAN, 1], [1, NAN, 1]],
        [[1, 1, 1], [NAN] * 3, [NAN] * 3],
    ])  # fmt: skip
    assert passes(errors, together=True).tolist() == [[1, 2, 3], [1, 1, 1]]
    assert passes(errors, together=False).tolist() == [[3, 5, 7], [3, 3, 3]]


def test_the_table_is_what_was_measured(bundle: Path, cells: Path, out: Path) -> None:
    model = load(bundle)
    found = rows(out)
    assert list(found) == ["paper", "full", "fast", "race"]
    for name, told in found.items():
        (path,) = (out / "measured").glob(f"*-{name}-*.npz")
        measured = Measured.load(path)
        answers = procedure(model.classifier, name)[1].reader.probabilities(measured.errors)
        assert told["cells"] == 15 == len(set(measured.digests))
        assert told["balanced_accuracy"] == pytest.approx(
            balanced_accuracy_score(measured.truth, answers.argmax(1))
        )
        ran = (~np.isnan(measured.errors[:, :, 0])).sum(1)
        if name in ("full", "fast"):
            assert told["passes_per_cell"] == pytest.approx(ran.mean())
        assert told["cells_per_second"] == pytest.approx(15 / measured.seconds)
        assert told["curve"][-1]["passes"] == pytest.approx(told["passes_per_cell"])
        assert told["curve"][-1]["balanced_accuracy"] == pytest.approx(told["balanced_accuracy"])
    assert found["full"]["passes_per_cell"] == 8
    assert found["paper"]["passes_per_cell"] >= 21
    assert found["paper"]["passes_of_paper"] == 1
    ratio = found["paper"]["passes_per_cell"] / found["fast"]["passes_per_cell"]
    assert found["fast"]["passes_of_paper"] == pytest.approx(ratio)
    assert found["race"]["drop_bound"] == 0.05
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "bench cost" in page


def test_measured_once(bundle: Path, cells: Path, out: Path) -> None:
    """Run again, with one procedure more: the others are read, and say the same."""
    before = rows(out)
    told = cli("bench", "cost", cells, "-m", bundle, "-o", out, "--device", "cpu",
               "--procedures", "paper,full,fast,race,balanced")  # fmt: skip
    assert told.code == 0, told.err
    assert told.err.count("measured before") == 4
    after = rows(out)
    assert {name: after[name] for name in before} == before


def test_two_models_are_compared_across(bundle: Path, cells: Path, out: Path) -> None:
    """With itself under another name a model differs by nothing, and its passes are as many."""
    told = cli("bench", "cost", cells, "-m", bundle, "-m", bundle, "-o", out, "--device", "cpu",
               "--procedures", "paper,fast", "--json")  # fmt: skip
    assert told.code == 0, told.err
    across, own = told.json["across"], {each["name"]: each for each in told.json["procedures"]}
    assert [(each["name"], each["paper_of"]) for each in across] == [
        ("paper", "tiny"), ("fast", "tiny"), ("paper", "tiny"), ("fast", "tiny")
    ]  # fmt: skip
    for each in across:
        assert each["passes_of_paper"] == own[each["name"]]["passes_of_paper"]
    assert across[0]["balanced_accuracy_gain"] == 0
    assert across[1]["balanced_accuracy_gain"] == own["fast"]["balanced_accuracy_gain"]
    assert "Across networks" in (out / "report.html").read_text()


def test_a_limit_takes_as_many_of_each_class(bundle: Path, cells: Path, tmp_path: Path) -> None:
    told = cli("bench", "cost", cells, "-m", bundle, "-o", tmp_path, "--limit", 6,
               "--procedures", "fast", "--json", "--device", "cpu")  # fmt: skip
    assert told.code == 0, told.err
    assert told.json["procedures"][0]["cells"] == 6
    (path,) = (tmp_path / "measured").iterdir()
    assert np.bincount(Measured.load(path).truth).tolist() == [2, 2, 2]


def test_an_unreadable_image_is_left_out(bundle: Path, cells: Path, tmp_path: Path) -> None:
    write_discs(tmp_path / "in", each=2)
    (tmp_path / "in" / CLASSES[0] / "00.png").write_bytes(b"no image")
    told = cli("bench", "cost", tmp_path / "in", "-m", bundle, "-o", tmp_path / "out",
               "--procedures", "fast", "--json", "--device", "cpu")  # fmt: skip
    assert told.code == 1
    assert told.json["procedures"][0]["cells"] == 5


def test_nothing_but_unreadable_images_is_an_error(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / CLASSES[0]).mkdir(parents=True)
    (tmp_path / "in" / CLASSES[0] / "00.png").write_bytes(b"no image")
    told = cli("bench", "cost", tmp_path / "in", "-m", bundle, "-o", tmp_path / "out",
               "--procedures", "fast", "--device", "cpu")  # fmt: skip
    assert told.code == 2
    assert "None of the 1 images could be read" in told.complaint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["--procedures", "quick"], ["-m", "nonsense"]], ids=str)
def test_a_wrong_call_writes_nothing(
    bundle: Path, cells: Path, tmp_path: Path, words: list
) -> None:
    told = cli("bench", "cost", cells, "-m", bundle, "-o", tmp_path / "out", *words)
    assert told.code == 2
    assert words[1] in told.complaint
    assert not (tmp_path / "out").exists()


def measured(right: np.ndarray, seconds: float = 1.0) -> Measured:
    """Two classes, one trial; the answer is right where `right` is."""
    truth = np.arange(len(right)) % 2
    errors = np.ones((len(right), 1, 3), dtype=np.float32)
    errors[np.arange(len(right)), 0, np.where(right, truth, 1 - truth)] = 0.5
    nothing = np.zeros((len(right), 0), dtype=np.float32)
    return Measured(errors, nothing, truth, tuple(map(str, range(len(right)))), seconds)


class Lowest:
    """Takes the class of the lowest error."""

    def probabilities(self, errors: np.ndarray) -> np.ndarray:
        return np.eye(2)[np.nansum(errors[:, :, :-1], axis=1).argmin(1)]

    def anomaly(self, errors: np.ndarray) -> np.ndarray:
        return np.zeros(len(errors))


HELD = HeldOut(np.array([0, 1]), np.eye(2), np.zeros(2))
LOWEST = Budget(stratified(1, 0.1, 1.0), Lowest(), HELD)


def test_gains_are_paired():
    """Two procedures that err on the same cells differ by nothing, for certain."""
    rng = np.random.default_rng(0)
    right = rng.random(400) < 0.8
    same = compare(measured(right), LOWEST, measured(right), LOWEST)
    assert same["balanced_accuracy_gain"] == 0
    better = compare(measured(right | (rng.random(400) < 0.5)), LOWEST, measured(right), LOWEST)
    low, high = better["balanced_accuracy_gain_ci95"]
    assert 0 < low < better["balanced_accuracy_gain"] < high < 0.2


def test_a_row_has_the_speed_and_an_interval():
    told = row(measured(np.arange(100) % 10 > 0, seconds=4.0), LOWEST, "full", together=True)
    assert told["cells_per_second"] == 25
    assert told["accuracy"] == pytest.approx(0.9)
    low, high = told["balanced_accuracy_ci95"]
    assert low < told["balanced_accuracy"] < high
    assert told["seconds_to_95"] == pytest.approx(1 / 25)


# --- the paper's views ---------------------------------------------------------------------------


def images(size: int = 16) -> torch.Tensor:
    return 2 * torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0)) - 1


@pytest.mark.parametrize("shipped", [False, True])
def test_a_view_depends_on_its_trial_alone(shipped: bool) -> None:
    view = PaperView(7, 3, shipped)
    whole = view(images())
    assert whole.shape == images().shape
    assert whole.abs().max() <= 1
    torch.testing.assert_close(view(images()[1:2]), whole[1:2])
    assert not torch.allclose(PaperView(7, 4, shipped)(images()), whole)


def test_a_grey_field_stays_a_grey_field() -> None:
    """Turns and flips see nothing in it; jitter moves its light by a quarter at the most."""
    grey = torch.zeros(1, 3, 16, 16)
    for trial in range(10):
        seen = PaperView(0, trial)(grey)
        assert seen.std() < 1e-5
        assert 0.75 * 0.5 <= (seen.mean() + 1) / 2 <= 1.25 * 0.5


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_gives_an_image(name: str) -> None:
    from PIL import Image

    image = Image.fromarray((np.random.default_rng(0).random((16, 16, 3)) * 255).astype(np.uint8))
    for sign in (-1.0, 1.0):
        changed = OPERATIONS[name](image, sign)
        assert (changed.size, changed.mode) == (image.size, image.mode)
        assert (np.asarray(changed) == np.asarray(image)).all() == (name == "identity")
