"""Budgets for other laboratories: how cells are changed, how far, and what that does to the weights."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from helpers import CLASSES, tiny_model, write_discs
from torch import Tensor

from cytodiffusion import calibration
from cytodiffusion.bundle import load
from cytodiffusion.calibration import calibrate, calibrations, changed, elsewhere, load_canvases
from cytodiffusion.classify.classifier import Budget
from cytodiffusion.classify.draws import stratified
from cytodiffusion.classify.fit import Plan, Seen, fit_sequence
from cytodiffusion.classify.measure import Measurement
from cytodiffusion.data.images import Preprocess
from cytodiffusion.data.pixels import Pixels
from cytodiffusion.data.readers import read_dataset

T = TypeVar("T")
PLAN = Plan(levels=4, trials=4, naming=4, race_cells=6, race_trials=22, paper_most=22, low=0.1)


def result(work: Generator[Any, None, T]) -> T:
    """What a generator returns."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def canvases(each: int, side: int = 24, seed: int = 0) -> Pixels:
    """Two classes told apart twice: by colour, which is plain to see, and by a hole in the middle."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1], each)
    y, x = np.mgrid[:side, :side] - side / 2 + 0.5
    far = np.hypot(x, y)
    images = np.full((2 * each, 3, side, side), 220.0)
    for image, label in zip(images, labels, strict=True):
        colour = np.array([[200, 60, 120], [60, 200, 120]][label])[:, None]
        image[:, far < side / 4] = colour + rng.normal(0, 5, (3, 1))
        hole = rng.normal([12, -12][label], 8)
        image[:, far < side / 9] = (image[:, far < side / 9] + hole).clip(0, 255)
    digests = [f"{seed}-{i}" for i in range(2 * each)]
    return Pixels(images.astype(np.uint8), labels, digests, [])


# --- how cells are changed -----------------------------------------------------------------------


def test_a_cell_is_changed_by_its_seed_and_reach() -> None:
    cells = canvases(4)
    plain = cells.images[:, :, 4:20, 4:20].astype(float)
    first, again = (changed(cells, 16, 3.0, seed=1) for _ in range(2))
    assert first.images.shape == (8, 3, 16, 16)
    np.testing.assert_array_equal(first.images, again.images)
    assert (first.images != changed(cells, 16, 3.0, seed=2).images).any()
    assert (first.labels is cells.labels, first.digests) == (True, cells.digests)
    moved = [np.abs(changed(cells, 16, r, 1).images - plain).mean() for r in (1.0, 4.0, 16.0)]
    assert moved == sorted(moved)


def test_white_stays_white() -> None:
    """The noise of a camera goes past white; it is cut off there, not counted on from black."""
    white = Pixels(np.full((64, 3, 24, 24), 255, np.uint8), np.zeros(64, int), ["w"] * 64, [])
    found = changed(white, 16, 1.0, seed=0).images.astype(float)
    means = found.mean((2, 3), keepdims=True)
    assert (found.std((2, 3)) > 1).any()  # some are noisy
    assert np.abs(found - means).max() < 80
    assert changed(white, 16, 16.0, seed=0).images.mean() > 100  # and no value is lost


def test_reach_is_of_colours_alone() -> None:
    near, far = elsewhere(1.0), elsewhere(3.0)
    for name in ("brightness", "contrast", "hue", "stain", "light"):
        assert getattr(far, name) == pytest.approx(3 * getattr(near, name))
    assert (far.zoom, far.affine, far.blur, far.far) == (near.zoom, near.affine, near.blur, 0)


def test_canvases_have_room_and_each_class_as_often(tmp_path: Path) -> None:
    samples = read_dataset(write_discs(tmp_path, each=9))[:-4]  # 9, 9 and 5
    plan, preprocess = replace(PLAN, abroad_cells=15), Preprocess(size=16, crop=0.6)
    found = result(load_canvases(samples, CLASSES, preprocess, plan))
    assert found is not None
    assert np.bincount(found.labels).tolist() == [5, 5, 5]
    assert found.images.shape[2:] == (24, 24)


def test_without_two_of_each_class_there_are_none(tmp_path: Path) -> None:
    write_discs(tmp_path, each=2)
    (tmp_path / CLASSES[0] / "00.png").write_bytes(b"no image")
    samples = read_dataset(tmp_path)
    assert result(load_canvases(samples, CLASSES, Preprocess(size=16), PLAN)) is None


# --- how far -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [1.7, 5.0, 14.0])
def test_three_of_five_are_named_right_at_the_reach_that_is_found(
    wanted: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A world where a share 3 / (3 + 2 (reach / wanted)^4) of the cells is named right, the rest wrong."""
    cells = canvases(100)
    monkeypatch.setattr(calibration, "changed", lambda cells, size, reach, seed: (cells, reach))

    class Known(calibration.Work):
        def measured(self, pixels: Any, measurement: Measurement) -> Any:
            few, reach = pixels
            right = np.arange(len(few.labels)) % 100 < 300 / (3 + 2 * (reach / wanted) ** 4)
            named = np.where(right, few.labels, 1 - few.labels)
            errors = np.ones((len(named), len(measurement.draws), 3), dtype=np.float32)
            errors[np.arange(len(named)), :, named] = 0.5
            yield 1
            return errors, np.zeros((len(named), 0))

    every = Measurement(calibration.candidates(PLAN), 3, calibration.POSES)
    work = Known(lambda *_: None, every, replace(PLAN, abroad_cells=800), 1)
    assert result(calibration._reach(work, cells, 16)) == pytest.approx(wanted, rel=0.15)


def judging(images: Tensor, labels: Tensor, sigma: Tensor) -> Tensor:
    """Errors (n, k): by colour at small noise, by the middle at large; "any cell" in between."""
    side = images.shape[-1]
    y, x = torch.meshgrid(*(2 * [torch.arange(side) - side / 2 + 0.5]), indexing="ij")
    far = (x**2 + y**2).sqrt()
    middle = images[:, :, far < side / 7].mean((1, 2))
    ring = images[:, :, (far > side / 5) & (far < side / 3.2)]
    colour = ring.mean(2)[:, 1] - ring.mean(2)[:, 0]  # green less red
    told = torch.where(sigma < 0.7, colour, ring.mean((1, 2)) - middle)[:, None]
    wanted = torch.tensor([-1.0, 1.0, 0.0])[labels]
    return (1.2 - told * wanted).clamp(min=0.01)


def meter(images: Tensor, noise: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    return judging(images, labels, sigma)


def test_what_another_laboratory_changes_loses_its_weight() -> None:
    """At home colour is the better witness; abroad, where colours change, the hole in the middle is."""
    cells = canvases(60)
    home = replace(cells, images=cells.images[:, :, 4:20, 4:20])
    budgets = result(calibrate(meter, home, 2, True, PLAN, canvases=cells)).budgets

    def share(name: str) -> float:
        """Of the weight, on colour."""
        budget = budgets[name]
        weight = budget.reader.depths[-1].posterior.weight
        weight = weight / budget.reader.depths[-1].posterior.scale
        return float(weight[budget.draws.sigmas < 0.7].sum() / weight.sum())

    assert budgets["full"].draws.sigmas.min() < 0.7 < budgets["full"].draws.sigmas.max()
    assert share("full-abroad") < 0.7 * share("full")


def test_it_measures_as_many_cells_as_it_says() -> None:
    cells = canvases(60)
    home = replace(cells, images=cells.images[:, :, 4:20, 4:20])
    counts = list(calibrate(meter, home, 2, True, PLAN, canvases=cells))
    assert counts == list(range(1, calibrations(meter, home, cells, PLAN) + 1))


def test_they_stand_beside_those_of_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Read back from a bundle: other cells were told, each class as often; races have no twin."""
    found = load(tiny_model(tmp_path_factory.getbasetemp()).bundle).classifier
    twin: Callable[[str], str] = found.abroad
    assert (twin("balanced"), twin("race"), twin("full-abroad")) == (
        "balanced-abroad",
        "race",
        "full-abroad",
    )
    held = found.budget("full-abroad").held
    assert len(set(np.bincount(held.truth))) == 1
    assert (held.probabilities[:3] != found.budget("full").held.probabilities[:3]).any()
    assert len(found.budget("full-abroad").draws) == len(found.budget("full").draws)


def measured(rng: np.random.Generator, truth: np.ndarray, spread: float) -> Seen:
    """Errors (n, 3 trials, 2 classes and "any cell") of a world where images vary by `spread`."""
    own = np.eye(3)[truth] * [1, 1, 0]
    level = rng.normal(0, spread, (len(truth), 3, 1)) + rng.normal(0, 0.05, (len(truth), 3, 3))
    return Seen(np.exp(level - 0.3 * own[:, None]).astype(np.float32))


def test_strangeness_is_told_from_what_changed_less() -> None:
    """Weights come from cells that vary much; next to those that vary little the others are strange."""
    rng, truth = np.random.default_rng(3), np.arange(400) % 2
    draws = stratified(3, 0.1, 2.0, seed=3, frozen=True)
    far, near = (measured(rng, truth, spread) for spread in (1.0, 0.1))
    plain, told = fit_sequence(draws, far, truth), fit_sequence(draws, far, truth, reference=near)

    def flagged(budgets: dict[str, Budget], spread: float) -> float:
        """Of new cells, at a false-alarm rate of 5 %."""
        budget = budgets["full"]
        errors = measured(rng, np.arange(2000) % 2, spread).errors
        return float((budget.held.p_value(budget.reader.anomaly(errors)) <= 0.05).mean())

    assert flagged(plain, 1.0) == pytest.approx(0.05, abs=0.03)
    assert flagged(told, 0.1) == pytest.approx(0.05, abs=0.03)
    assert flagged(told, 1.0) > 0.8
    weights = [each["full"].reader.depths[-1].posterior.weight for each in (plain, told)]
    np.testing.assert_array_equal(*weights)
    np.testing.assert_array_equal(*(each["full"].held.probabilities for each in (plain, told)))
    agreed = told["balanced"].agreement
    assert agreed is not None
    assert agreed.trials > 2.5  # what is strange runs all three
