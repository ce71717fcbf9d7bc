"""Features of the first pass: told with the errors, kept with them, and what strangeness makes of them.

In the world of tests/test_evidence.py the features of a noisy image are its mean colour, so that what a
cell must be told is one line by hand.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cytodiffusion import calibration
from cytodiffusion.classify.anomaly import (
    Cells,
    doubt,
    fit_anomaly,
    pattern,
    squash,
)
from cytodiffusion.classify.calibrate import folds
from cytodiffusion.classify.classifier import Budget, Classifier
from cytodiffusion.classify.draws import Draws, stratified
from cytodiffusion.classify.evidence import DenoiserMeter, LookingMeter, features_of
from cytodiffusion.classify.fit import Plan, Seen, candidates, choose_draws, fit_race, fit_sequence
from cytodiffusion.classify.measure import POOL, Done, Measurement
from cytodiffusion.classify.race import PaperRace, paper_draws
from cytodiffusion.classify.sequential import Rule, Sequence
from cytodiffusion.data.pixels import Pixels
from cytodiffusion.data.transforms import POSES
from cytodiffusion.diffusion.noise import log_spaced
from cytodiffusion.diffusion.precondition import EDMDenoiser, VPDenoiser
from cytodiffusion.engines.engine import GraphMeter
from cytodiffusion.errors import DataError
from cytodiffusion.evaluate import anomaly as bench
from cytodiffusion.networks.compact import CompactNetwork, CompactSettings, Form
from cytodiffusion.networks.exact import GaussianWorld
from cytodiffusion.types import Classes, ErrorTable

K, SIDE = 3, 16
MEANS = 0.3 * torch.randn(K, 3, 4, 4, generator=torch.Generator().manual_seed(1))
DRAWS = stratified(5, 0.2, 3.0)


class Told:
    """All that a meter asks of the network in a denoiser."""

    features_told = 3


class ColourWorld(GaussianWorld):
    """The world of Gaussian classes; the features of a noisy image are its mean colour."""

    def __init__(self) -> None:
        super().__init__(MEANS, 0.5)
        self.network = Told()

    def look(self, noisy: Tensor, sigma: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self(noisy, sigma, labels), noisy.mean((2, 3))


@functools.cache
def denoiser(form: Form) -> EDMDenoiser:
    """A tiny network whose every weight counts: layers that begin at zero are drawn as well."""
    torch.manual_seed(1)
    settings = CompactSettings(
        classes=K, size=SIDE, form=form, unshuffle=2, width=16, multipliers=(1, 2), blocks=1,
        attention=4, head_width=8,
    )  # fmt: skip
    network = CompactNetwork(settings)
    for weight in network.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.1)
    return EDMDenoiser(network).eval().requires_grad_(False)


def images(count: int, side: int = SIDE, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def names(count: int) -> list[str]:
    return [f"cell {i}" for i in range(count)]


def rows(count: int, side: int = SIDE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    clean, noise = images(count, side), images(count, side, seed=1)
    return clean, noise, torch.linspace(0.1, 3.0, count), torch.arange(K + 1).expand(count, -1)


# --- meters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [None, 5.0])
def test_errors_are_the_same_whether_or_not_one_looks(radius: float | None) -> None:
    meter = DenoiserMeter(denoiser("heads"), radius)
    errors, features = meter.look(*rows(6))
    assert errors.equal(meter(*rows(6)))
    assert features.shape == (6, meter.features)
    assert features_of(meter) == 16


def test_guesses_are_the_same_whether_or_not_one_looks() -> None:
    model, (noisy, _, sigma, labels) = denoiser("heads"), rows(4)
    assert model.look(noisy, sigma, labels)[0].equal(model(noisy, sigma, labels))


def test_features_are_means_of_the_grid_of_the_noisy_image() -> None:
    """By hand, whichever labels are asked for."""
    model, (clean, noise, sigma, labels) = denoiser("heads"), rows(4)
    noisy = clean + sigma.view(-1, 1, 1, 1) * noise
    scaled = noisy / (sigma**2 + 0.25).sqrt().view(-1, 1, 1, 1)
    want = model.network.features(scaled, sigma.log() / 4).mean((2, 3))
    for asked in (labels, labels[:, :1], labels.flip(1)):
        assert DenoiserMeter(model).look(clean, noise, sigma, asked)[1].equal(want)


def test_without_one_trunk_for_all_classes_there_are_no_features() -> None:
    """Those of the class-conditional form hang on the class; a VP denoiser cannot look."""
    heads, levels = denoiser("heads").network, log_spaced(50, 0.01, 50.0).float()
    for model in (denoiser("conditional"), VPDenoiser(heads, levels), GaussianWorld(MEANS, 0.5)):
        assert features_of(DenoiserMeter(model)) == 0
    assert features_of(lambda *rows: torch.zeros(1)) == 0
    assert not isinstance(lambda *rows: torch.zeros(1), LookingMeter)


@pytest.mark.parametrize("kind", ["conditional", "vp", "function", "graph"])
def test_a_meter_without_features_measures_as_ever(kind: str) -> None:
    def function(clean, noise, sigma, labels):  # type: ignore[no-untyped-def]
        return torch.ones(labels.shape)

    levels = log_spaced(50, 0.01, 50.0).float()
    meter = {
        "conditional": DenoiserMeter(denoiser("conditional")),
        "vp": DenoiserMeter(VPDenoiser(denoiser("heads").network, levels)),
        "function": function,
        "graph": GraphMeter(lambda *rows: (torch.ones(16, 1), torch.ones(16, 4)), heads=False),
    }[kind]
    work = Measurement(DRAWS, K + 1, POSES, together=kind != "conditional")
    errors, features = work.look(meter, images(3), names(3))
    assert features.shape == (3, 0)
    assert np.isfinite(errors).all()


def test_a_graph_tells_as_many_features_as_errors() -> None:
    """Any number of rows, the last batch filled up: each row its own."""

    def run(clean: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return clean.mean((2, 3)), noise.mean((2, 3))

    meter = GraphMeter(run, heads=True, features=3)
    for count in (1, 16, 21, 40):
        clean, noise, sigma, labels = rows(count)
        errors, features = meter.look(clean, noise, sigma, labels[:, [2, 0]])
        assert errors.equal(clean.mean((2, 3))[:, [2, 0]])
        assert features.equal(noise.mean((2, 3)))


# --- measured with the errors --------------------------------------------------------------------


def first_look(cells: Tensor, digests: list[str], draws: Draws) -> np.ndarray:
    """Mean colour of each noisy cell in trial 0, by hand."""
    clean = POSES[draws.trials[0].pose](cells)
    noise = draws.noise(0, digests, tuple(cells.shape[1:]))
    return (clean + np.float32(draws.trials[0].sigma) * noise).mean((2, 3)).numpy()


@pytest.mark.parametrize("together", [True, False])
def test_features_are_those_of_the_first_trial(together: bool) -> None:
    world, cells = ColourWorld(), images(7, 4)
    work = Measurement(DRAWS, K + 1, POSES, together=together, batch=3)
    errors, features = work.look(DenoiserMeter(world), cells, names(7))
    np.testing.assert_allclose(features, first_look(cells, names(7), DRAWS), atol=1e-6)
    assert features.dtype == np.float32
    plain = Measurement(DRAWS, K + 1, POSES, batch=3).measure(
        DenoiserMeter(GaussianWorld(MEANS, 0.5)), cells, names(7)
    )
    np.testing.assert_allclose(errors, plain, rtol=1e-6)


def leaving(errors: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Cells leave after one to four trials, each by its own first feature."""
    leave = 1 + (np.abs(features[:, 0]) * 1e4).astype(int) % 4
    stays = np.ones((len(errors), errors.shape[2] - 1), dtype=bool)
    stays[errors.shape[1] >= leave, 1:] = False
    return stays


def streamed(
    order: list[int], workers: int = 1, batch: int = 4, policy: object = leaving
) -> dict[int, Done]:
    """What is told of each cell of the tiny network, by its number."""
    cells, called = images(30), names(30)
    work = Measurement(DRAWS, K + 1, POSES, policy, batch=batch)
    meter, found = DenoiserMeter(denoiser("heads")), {}
    for done in work.stream(meter, order, lambda i: (cells[i], called[i]), workers):
        found[order[done.place]] = done
    return found


def test_company_order_and_threads_change_no_bit() -> None:
    """Among more cells than are in flight, of which some leave early and others run every trial."""
    every = list(range(30))
    assert len(every) > POOL * 4
    want = streamed(every)
    depths = {int((~np.isnan(done.errors[:, 0])).sum()) for done in want.values()}
    assert len(depths) > 2
    shuffled = np.random.default_rng(0).permutation(30).tolist()
    others = [streamed(shuffled), streamed(every, workers=3), streamed([17]), streamed([3, 17, 29])]
    for found in [*others, streamed(shuffled, workers=2)]:
        for i, done in found.items():
            assert np.array_equal(done.features, want[i].features)
            assert np.array_equal(done.errors, want[i].errors, equal_nan=True)
    all_trials = streamed(every, policy=None)
    for i in every:
        assert np.array_equal(all_trials[i].features, want[i].features)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_the_size_of_a_batch_changes_nothing(batch: int) -> None:
    want = streamed(list(range(30)), policy=None)
    for i, done in streamed(list(range(30)), batch=batch, policy=None).items():
        np.testing.assert_allclose(done.features, want[i].features, rtol=0, atol=1e-5)


def test_a_policy_is_shown_the_first_trials_features_at_every_depth() -> None:
    world, cells, seen = ColourWorld(), images(5, 4), []

    def watching(errors: np.ndarray, features: np.ndarray) -> np.ndarray:
        seen.append((errors.shape[1], features.copy()))
        return np.ones((len(errors), K), dtype=bool)

    work = Measurement(DRAWS, K + 1, POSES, watching)
    _, features = work.look(DenoiserMeter(world), cells, names(5))
    assert [depth for depth, _ in seen] == [1, 2, 3, 4, 5]
    assert all(np.array_equal(told, features) for _, told in seen)


def test_a_source_that_is_passed_over_takes_no_ones_features() -> None:
    world, cells = ColourWorld(), images(4, 4)
    work = Measurement(DRAWS, K + 1, POSES)

    def prepare(i: int) -> tuple[Tensor, str] | None:
        return None if i == 1 else (cells[i], names(4)[i])

    found = {d.place: d.features for d in work.stream(DenoiserMeter(world), range(4), prepare)}
    want = first_look(cells, names(4), DRAWS)
    assert sorted(found) == [0, 2, 3]
    for i, told in found.items():
        np.testing.assert_allclose(told, want[i], atol=1e-6)


# --- strangeness ---------------------------------------------------------------------------------

FAR = 6.0  # by how much a stranger's features are off, in standard deviations


def known(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Errors, truths, probabilities and features of three classes; each class has features of its own."""
    rng = np.random.default_rng(seed)
    truth = np.arange(count) % K
    logs = rng.normal(0, 0.2, (count, 2, K + 1)) - 2
    logs[np.arange(count), :, truth] -= 0.7
    centres = np.array([[4.0, 0.0], [0.0, 4.0], [-4.0, -4.0]])
    features = centres[truth] + rng.normal(0, 0.5, (count, 2))
    chances = np.exp(-3 * logs[:, :, :K].sum(1))
    probabilities = chances / chances.sum(1, keepdims=True)
    return np.exp(logs).astype(np.float32), truth, probabilities, features.astype(np.float32)


def test_features_come_last_in_the_pattern() -> None:
    errors = np.exp(np.array([[[1.0, 2.0, 0.5], [4.0, 0.0, 1.0]]]))
    found = pattern(errors, np.array([[7.0, -8.0]], dtype=np.float32))
    np.testing.assert_allclose(found, [[0.5, 1.5, 3.0, -1.0, 0.5, 1.0, 7.0, -8.0]])
    assert found.dtype == np.float64
    np.testing.assert_array_equal(pattern(errors, np.zeros((1, 0))), pattern(errors))


def test_every_class_has_a_mean_of_its_own_features() -> None:
    """A cell between the classes is strange, though the mean of all features is there."""
    errors, truth, probabilities, features = known(300, 1)
    model, _ = fit_anomaly(Cells(errors, probabilities, features), truth)
    want = np.stack([features[truth == k].mean(0) for k in range(K)])
    np.testing.assert_allclose(model.means[:, -2:], want, rtol=1e-5)
    own = model.distances(errors, want[truth].astype(np.float32))
    middle = model.distances(errors, np.zeros_like(features))
    assert np.median(np.hypot(*middle)) > 2 * np.median(np.hypot(*own))
    other = want[(truth + 1) % K].astype(np.float32)  # the features of another class, as strange
    strange = model.distances(errors, other)
    assert np.median(np.hypot(*strange)) > 1.5 * np.median(np.hypot(*own))


def test_a_stranger_that_the_features_alone_see() -> None:
    errors, truth, probabilities, features = known(400, 1)
    seeing, scores = fit_anomaly(Cells(errors, probabilities, features), truth)
    blind, _ = fit_anomaly(Cells(errors, probabilities), truth)
    errors, _, probabilities, features = known(90, 2)
    odd = features + np.float32(FAR * 0.5)
    plain = seeing.anomaly(errors, probabilities, features)
    strange = seeing.anomaly(errors, probabilities, odd)
    assert (strange > plain).mean() > 0.98
    assert (strange > np.quantile(scores, 0.99)).mean() > 0.95
    assert blind.means.shape[1] == seeing.means.shape[1] - 2


def test_held_out_scores_are_of_fits_without_the_cell() -> None:
    """Fold by fold, by hand; and an outlier among the known does not excuse itself."""
    errors, truth, probabilities, features = known(60, 3)
    features[7] += 40
    _, scores = fit_anomaly(Cells(errors, probabilities, features), truth)
    near = np.zeros((2, 60))
    for fit, held in folds(truth, K):
        part, _ = fit_anomaly(Cells(errors[fit], probabilities[fit], features[fit]), truth[fit])
        near[:, held] = part.distances(errors[held], features[held])
    units = np.append(
        np.quantile(near, 0.95, axis=1), np.quantile(doubt(probabilities), np.linspace(0, 1, 65))
    )
    np.testing.assert_allclose(scores, squash(near, doubt(probabilities), units), rtol=1e-9)
    assert scores.argmax() == 7
    whole, _ = fit_anomaly(Cells(errors, probabilities, features), truth)
    own = np.hypot(*whole.distances(errors[7:8], features[7:8]))
    assert np.hypot(*near[:, 7]) > 3 * own[0]


def test_a_model_with_features_says_what_a_table_lacks() -> None:
    errors, truth, probabilities, features = known(60, 3)
    model, _ = fit_anomaly(Cells(errors, probabilities, features), truth)
    for lacking in (None, np.zeros((60, 0), dtype=np.float32)):
        with pytest.raises(DataError, match="without the network's features") as told:
            model.distances(errors, lacking)
        assert "\n" not in str(told.value)


def test_a_model_without_features_passes_over_those_it_is_given() -> None:
    errors, truth, probabilities, features = known(60, 3)
    model, _ = fit_anomaly(Cells(errors, probabilities), truth)
    with_them = model.anomaly(errors, probabilities, features)
    np.testing.assert_array_equal(with_them, model.anomaly(errors, probabilities))


# --- budgets, tables, replay ---------------------------------------------------------------------

SEQUENCE = stratified(4, 0.3, 2.0, frozen=True)
CLASSES = Classes(("a", "b", "c"))


def cells(each: int, seed: int) -> tuple[Tensor, np.ndarray, list[str]]:
    truth = torch.arange(K).repeat(each)
    world = GaussianWorld(MEANS, 0.5)
    drawn = world.sample(truth, torch.Generator().manual_seed(seed)).float()
    return drawn, truth.numpy(), [f"{seed}-{i}" for i in range(len(truth))]


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    """Fitted in the coloured world, with a race that knows nothing of features."""
    world, (drawn, truth, digests) = ColourWorld(), cells(150, 2)
    meter, poses = DenoiserMeter(world), (POSES[0],) * 8
    work = Measurement(SEQUENCE, K + 1, poses)
    errors, features = work.look(meter, drawn, digests)
    budgets = fit_sequence(SEQUENCE, Seen(errors, features), truth)
    race = PaperRace(paper_draws(22))
    few = slice(0, 60)
    raced = Measurement(race.draws, K + 1, poses, race).measure(meter, drawn[few], digests[few])
    budgets["paper"] = fit_race(raced, truth[few], race)
    return Classifier(world, CLASSES, budgets, poses, name="coloured")


def test_every_depth_rests_on_errors_so_far_and_features(classifier: Classifier) -> None:
    reader = classifier.budget("full").reader
    assert isinstance(reader, Sequence)
    shapes = [depth.anomalies.means.shape for depth in reader.depths]
    assert shapes == [(K, count * (K + 1) + 3) for count in (1, 2, 3, 4)]


@pytest.mark.parametrize("budget", ["fast", "balanced", "full", "paper"])
def test_a_saved_table_gives_the_same_anomaly(
    classifier: Classifier, tmp_path: Path, budget: str
) -> None:
    drawn, _, digests = cells(10, 3)
    table = classifier.measure(drawn, digests, budget)
    table.save(tmp_path / "t.npz")
    loaded = ErrorTable.load(tmp_path / "t.npz")
    assert loaded.features is not None
    assert loaded.features.shape == (30, 3)
    assert loaded.features.dtype == np.float32
    ours, theirs = (classifier.read(each, budget) for each in (table, loaded))
    assert np.array_equal(ours.anomaly, theirs.anomaly)
    assert np.array_equal(ours.anomaly_p, theirs.anomaly_p)
    order = [4, 20, 7]
    part = classifier.read(loaded.rows(order), budget)
    assert np.array_equal(part.anomaly, ours.anomaly[order])


def test_a_table_without_features_is_refused(classifier: Classifier, tmp_path: Path) -> None:
    """As one saved before there were any; a race, which needs none, reads it."""
    drawn, _, digests = cells(2, 3)
    for budget in ("fast", "balanced", "full"):
        table = replace(classifier.measure(drawn, digests, budget), features=None)
        table.save(tmp_path / "old.npz")
        old = ErrorTable.load(tmp_path / "old.npz")
        assert old.features is None
        assert old.rows([1]).features is None
        with pytest.raises(DataError, match="Measure the cells again") as told:
            classifier.read(old, budget)
        assert "\n" not in str(told.value)
    raced = classifier.measure(drawn, digests, "paper")
    bare = classifier.read(replace(raced, features=None), "paper")
    np.testing.assert_array_equal(bare.anomaly, classifier.read(raced, "paper").anomaly)


def test_only_the_features_of_a_table_make_it_stranger(classifier: Classifier) -> None:
    drawn, _, digests = cells(20, 4)
    table = classifier.measure(drawn, digests, "full")
    assert table.features is not None
    moved = replace(table, features=table.features + np.float32(2))
    plain, odd = (classifier.read(each, "full") for each in (table, moved))
    assert (odd.anomaly > plain.anomaly).all()
    assert set(odd.flags) == {"anomalous"}
    assert np.array_equal(odd.probabilities, plain.probabilities)


def test_a_cell_with_strange_features_runs_every_trial(classifier: Classifier) -> None:
    """Under the cautious rule alone, and though its errors would let it go at once."""
    rule = Rule(0.6)
    full = classifier.budget("full").reader
    assert isinstance(full, Sequence)
    drawn, _, digests = cells(20, 5)
    table = classifier.measure(drawn, digests, "full")
    errors, features = table.errors[:, :1], table.features
    assert features is not None
    gone = Sequence(full.depths, rule)(errors, features).sum(1) == 1
    assert gone.sum() > 20
    odd = features[gone] + np.float32(2)
    assert Sequence(full.depths, rule)(errors[gone], odd).all()
    hasty = Sequence(full.depths, replace(rule, cautious=False))
    assert (hasty(errors[gone], odd).sum(1) == 1).all()


def test_measured_live_is_as_told_from_all_trials(classifier: Classifier) -> None:
    """Whether a cell goes on hangs on its features; and the others' do not get in."""
    drawn, _, digests = cells(30, 6)
    drawn = torch.cat([drawn, drawn[:20] + 0.8])  # strangers, seen by their colour as well
    digests += [f"stranger {i}" for i in range(20)]
    lax = Budget(SEQUENCE, Sequence(classifier.budget("full").reader.depths, Rule(0.6)),
                 classifier.budget("full").held)  # fmt: skip
    budget = replace(lax, policy=lax.reader)
    live = Classifier(classifier.denoiser, CLASSES, {"lax": budget}, (POSES[0],) * 8)
    table = live.measure(drawn, digests, "lax")
    ran = (~np.isnan(table.errors[:, :, 0])).sum(1)
    assert ran[:90].mean() < 3
    assert (ran[90:] == 4).all()
    assert len(set(ran.tolist())) > 1
    reader = budget.reader  # each cell by itself, at its depth, with its own features
    for i in range(0, 110, 3):
        depth, told = reader.depths[ran[i] - 1], reader.probabilities(table.errors[i : i + 1])
        own = table.errors[i : i + 1, : ran[i]], told, table.features[i : i + 1]
        assert live.read(table, "lax").anomaly[i] == pytest.approx(depth.anomalies.anomaly(*own)[0])
    every = classifier.measure(drawn, digests, "full")
    assert np.array_equal(every.features, table.features)
    told = bench.as_told(budget, bench.Measured(every.errors, every.errors, every.features))
    np.testing.assert_allclose(told, live.read(table, "lax").anomaly, rtol=1e-9)


# --- calibrated ----------------------------------------------------------------------------------


def test_the_chosen_trials_and_their_places() -> None:
    rng = np.random.default_rng(0)
    truth = np.arange(120) % K
    errors = rng.normal(3, 0.3, (120, 5, K + 1)).astype(np.float32)
    errors[np.arange(120), 3, truth] -= 1  # the fourth candidate tells classes apart
    plan = Plan(levels=5, trials=3, naming=1, seed=4)
    draws, order = choose_draws(errors, truth, plan)
    assert order[0] == 3
    assert len(set(order)) == len(order) == 3
    assert draws.trials == tuple(candidates(plan).trials[t] for t in order)
    assert (draws.seed, draws.frozen) == (4, True)


@pytest.mark.parametrize("form", ["heads", "conditional"])
def test_calibration_takes_the_features_of_the_first_trial_that_a_cell_will_run(
    form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of the first candidate; and it measures as many cells as it says."""
    plan = Plan(levels=4, trials=2, naming=1, race_cells=6, race_trials=22, paper_most=22)
    pixels = ((images(18) + 1) * 127.5).round().numpy().astype(np.uint8)
    held = Pixels(pixels, np.arange(18) % K, names(18), [])
    meter, given = DenoiserMeter(denoiser(form)), []

    def chosen(errors: np.ndarray, truth: np.ndarray, plan: Plan) -> tuple[Draws, list[int]]:
        every = candidates(plan)
        return replace(every, trials=(every.trials[2], every.trials[0])), [2, 0]

    def watched(*words: object, **others: object) -> dict[str, Budget]:
        given.append(words)
        return fit_sequence(*words, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(calibration, "choose_draws", chosen)
    monkeypatch.setattr(calibration, "fit_sequence", watched)
    work = calibration.calibrate(meter, held, K, form == "heads", plan)
    counts = []
    while True:
        try:
            counts.append(next(work))
        except StopIteration as end:
            budgets = end.value.budgets
            break
    assert counts == list(range(1, calibration.calibrations(meter, held, None, plan) + 1))
    assert len(counts) == 18 * (2 if form == "heads" else 1) + 2 * 6
    ((draws, (errors, features), *_),) = given
    shown = torch.from_numpy(pixels).float() / 127.5 - 1
    live = Measurement(draws, K + 1, POSES, together=form == "heads")
    wanted, seen = live.look(meter, shown, names(18))
    assert np.array_equal(features, seen)
    assert features.shape == (18, 16 if form == "heads" else 0)
    np.testing.assert_allclose(errors, wanted, rtol=1e-5)
    assert all(len(budgets[name].held.anomaly) == 18 for name in ("fast", "balanced", "full"))
