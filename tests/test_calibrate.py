"""Fitted weights, conformal sets and p-values on cells drawn from a model that is known."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from cytodiffusion.classify.anomaly import (
    Cells,
    distances,
    doubt,
    fit_anomaly,
    pattern,
    squash,
)
from cytodiffusion.classify.as_json import calibration_from_json, calibration_to_json
from cytodiffusion.classify.calibrate import (
    HeldOut,
    PrefixPosterior,
    change_prior,
    choose_trials,
    fit_prefix,
    folds,
    nll,
    out_of_fold,
)
from cytodiffusion.classify.classifier import Budget, Classifier, RaceReader, Reading
from cytodiffusion.classify.conformal import lac_sets, threshold, thresholds
from cytodiffusion.classify.draws import stratified
from cytodiffusion.classify.evidence import DenoiserMeter
from cytodiffusion.classify.fit import Seen, fit_race, fit_sequence, spread
from cytodiffusion.classify.measure import Measurement
from cytodiffusion.classify.race import PaperRace, paper_draws
from cytodiffusion.data.transforms import POSES
from cytodiffusion.errors import DataError, SettingsError
from cytodiffusion.networks.exact import GaussianWorld
from cytodiffusion.types import Classes, ErrorTable


def cells(
    count: int, weight: np.ndarray, bias: np.ndarray, seed: int = 0, shared: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Errors, and truths drawn from p(k) = softmax(b_k - sum_i w_i E_ki): the model itself.

    `shared` adds what all classes of a trial have in common.
    """
    rng = np.random.default_rng(seed)
    errors = rng.normal(3.0, 1.0, (count, len(weight), len(bias)))
    errors += shared * rng.normal(size=(count, len(weight), 1))
    logits = bias - np.einsum("mtk,t->mk", errors, weight)
    truth = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    return errors.astype(np.float32), truth


WEIGHT, BIAS = np.array([1.5, 0.0, 0.7]), np.array([0.5, -0.5, 0.0])


def loss(x: np.ndarray, features: np.ndarray, truth: np.ndarray, ridge: float) -> float:
    """The module's first equation, written out: mean NLL + ridge (|v|^2 + |b|^2)."""
    trials = features.shape[1]
    logits = x[trials:] - np.einsum("mtk,t->mk", features, x[:trials])
    top = logits.max(1, keepdims=True)
    logs = logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))
    return float(-logs[np.arange(len(truth)), truth].mean() + ridge * (x @ x))


@pytest.mark.parametrize("ridge", [1e-3, 0.1])
def test_the_fit_is_the_optimum_of_the_stated_loss(ridge):
    """Brute force, without gradients of ours, from another start."""
    errors, truth = cells(300, WEIGHT, BIAS)
    found = fit_prefix(errors, truth, ridge)
    centred = errors - errors.mean(2, keepdims=True, dtype=np.float64)
    scale = np.sqrt((centred**2).mean((0, 2)))
    np.testing.assert_allclose(found.scale, scale, rtol=1e-4)
    features = centred / found.scale[:, None]
    bounds = [(0, None)] * 3 + [(None, None)] * 3
    best = minimize(loss, np.ones(6), (features, truth, ridge), bounds=bounds, tol=1e-12)
    x = np.concatenate([found.weight, found.bias])
    assert loss(x, features, truth, ridge) == pytest.approx(best.fun, abs=1e-6)
    np.testing.assert_allclose(x, best.x, atol=5e-3)


def test_slope_is_zero_where_a_weight_is_positive_and_positive_where_it_is_zero():
    """The conditions of Karush, Kuhn and Tucker, with finite differences."""
    errors, truth = cells(300, np.array([1.0, 0.3, -0.8]), BIAS)
    found = fit_prefix(errors, truth, 1e-3)
    assert found.weight[2] == 0
    centred = errors.astype(np.float64) - errors.mean(2, keepdims=True)
    features, x = centred / found.scale[:, None], np.concatenate([found.weight, found.bias])
    steps = 1e-5 * np.eye(6)
    slope = [
        (loss(x + h, features, truth, 1e-3) - loss(x - h, features, truth, 1e-3)) / 2e-5
        for h in steps
    ]
    np.testing.assert_allclose(np.delete(slope, 2), 0, atol=2e-4)
    assert slope[2] > 0


def test_known_weights_are_found_again():
    errors, truth = cells(8000, WEIGHT, BIAS, shared=2.0)
    found = fit_prefix(errors, truth, 1e-8)
    np.testing.assert_allclose(found.weight / found.scale, WEIGHT, atol=0.08)
    np.testing.assert_allclose(found.bias - found.bias.mean(), BIAS - BIAS.mean(), atol=0.08)


def test_two_classes_are_logistic_regression():
    """With K = 2 the posterior is a logistic regression on E_0 - E_1."""
    errors, truth = cells(2000, np.array([1.0, 0.5]), np.array([0.4, -0.4]))
    ours = fit_prefix(errors, truth, 1e-9).probabilities(errors)
    gaps = errors[:, :, 0] - errors[:, :, 1]
    theirs = LogisticRegression(C=1e9, tol=1e-10).fit(gaps, truth).predict_proba(gaps)
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_what_all_classes_share_changes_no_probability():
    errors, truth = cells(100, WEIGHT, BIAS)
    posterior = fit_prefix(errors, truth)
    moved = errors + np.random.default_rng(1).normal(size=(100, 3, 1)).astype(np.float32)
    np.testing.assert_allclose(
        posterior.probabilities(moved), posterior.probabilities(errors), atol=1e-5
    )


def test_probabilities_by_hand():
    posterior = PrefixPosterior(np.array([2.0]), np.array([4.0]), np.array([0.0, np.log(3.0)]))
    found = posterior.probabilities(np.array([[[1.0, 1.0], [9.0, 1.0]]]))  # a prefix of one
    np.testing.assert_allclose(found, [[0.25, 0.75]])


def test_missing_errors_are_refused():
    errors, truth = cells(20, WEIGHT, BIAS)
    errors[3, 1, 2] = np.nan
    with pytest.raises(DataError, match="missing"):
        fit_prefix(errors, truth)


# --- out of fold ---------------------------------------------------------------------------------


def test_every_cell_is_held_out_once():
    truth = np.repeat([0, 1, 2], [30, 11, 7])
    parts = list(folds(truth, 3))
    assert sorted(np.concatenate([held for _, held in parts])) == list(range(48))
    for fit, held in parts:
        assert not set(fit) & set(held)
        assert set(truth[fit]) == {0, 1, 2}


def test_out_of_fold_leaves_the_cell_out():
    """A cell's errors change no weights by which its own fold is read."""
    errors, truth = cells(60, WEIGHT, BIAS)
    before = out_of_fold(errors, truth)
    cell = 17
    held = next(held for _, held in folds(truth, 3) if cell in held)
    poisoned = errors.copy()
    poisoned[cell] *= np.linspace(-9, 9, 3)
    after = out_of_fold(poisoned, truth)
    others = np.setdiff1d(held, [cell])
    np.testing.assert_array_equal(after[others], before[others])
    elsewhere = np.setdiff1d(np.arange(60), held)
    assert np.abs(after[elsewhere] - before[elsewhere]).max() > 1e-3


@pytest.mark.parametrize(("truth", "classes"), [([0, 0, 0, 1], 2), ([0, 0, 1, 1], 3)])
def test_a_class_of_fewer_than_two_cells_is_refused(truth, classes):
    """Also one that has none at all: every cell would be normal to a model without its mean."""
    with pytest.raises(DataError, match="at least two"):
        list(folds(np.array(truth), classes))


def test_nll_by_hand():
    found = nll(np.array([[0.5, 0.5], [0.9, 0.1]]), np.array([0, 1]))
    assert found == pytest.approx((np.log(2) + np.log(10)) / 2)


# --- which trials --------------------------------------------------------------------------------


def test_the_informative_trial_is_chosen_first():
    errors, truth = cells(200, np.array([0.0, 0.2, 0.0, 2.0]), np.zeros(3))
    assert choose_trials(errors, truth, 2) == [3, 1]


def test_a_copy_of_what_is_known_is_not_chosen_next():
    """The greedy search looks at what a trial adds."""
    errors, truth = cells(300, np.array([2.0, 1.0]), np.zeros(3))
    with_copy = np.concatenate([errors[:, :1], errors], axis=1)  # 0 and 1 are the same, 2 is new
    first, second = choose_trials(with_copy, truth, 2)
    assert first in (0, 1)
    assert second == 2


def test_no_more_trials_than_there_are():
    errors, truth = cells(60, WEIGHT, BIAS)
    assert sorted(choose_trials(errors, truth, 9)) == [0, 1, 2]


def test_the_other_trials_lie_where_none_is_near():
    sigmas = np.array([0.05, 0.1, 2.0, 10.0, 100.0])
    assert spread([1], sigmas, 3) == [1, 4, 2]  # the far end; then nearest to midway
    assert sorted(spread([1], sigmas, 9)) == [0, 1, 2, 3, 4]
    assert spread([2, 0], np.ones(3), 9) == [2, 0, 1]  # of equal levels each once


# --- conformal -----------------------------------------------------------------------------------


def plain(scores: np.ndarray, asked: float) -> float:
    return threshold(scores, np.ones(len(scores)), 1.0, asked)


@given(st.integers(1, 60), st.floats(0.05, 0.99))
def test_coverage_is_exact_for_exchangeable_scores(count, asked):
    """Of the n + 1 ways to call one score the new one, k = ceil((n + 1) coverage) are covered."""
    scores = np.random.default_rng(count).permutation(count + 1).astype(float) / (count + 2)
    covered = sum(scores[i] <= plain(np.delete(scores, i), asked) for i in range(count + 1))
    assert covered == min(int(np.ceil((count + 1) * asked)), count + 1)
    assert covered / (count + 1) >= asked


def simulated(count: int, seed: int = 0, bias: np.ndarray = BIAS) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are right, and truths drawn from them."""
    errors, truth = cells(count, WEIGHT, bias, seed)
    return PrefixPosterior(np.ones(3), WEIGHT, bias).probabilities(errors), truth


def held_by(sets: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return sets[np.arange(len(truth)), truth]


def test_coverage_of_simulated_cells():
    (fit, known), (new, truth) = simulated(3000, 1), simulated(3000, 2)
    sets = lac_sets(new, thresholds(fit, known, 0.9))
    assert held_by(sets, truth).mean() == pytest.approx(0.9, abs=0.025)
    assert 1 < sets.sum(1).mean() < 3


def test_every_class_is_covered_as_often_as_asked():
    """A rare class too, which sets for all cells together leave out."""
    bias = np.array([1.5, 0.0, -2.0])
    (fit, known), (new, truth) = simulated(6000, 1, bias), simulated(6000, 2, bias)
    together = held_by(lac_sets(new, thresholds(fit, known, 0.9)), truth)
    each = held_by(lac_sets(new, thresholds(fit, known, 0.9, "class")), truth)
    for k in range(3):
        assert each[truth == k].mean() == pytest.approx(0.9, abs=0.05)
    assert together[truth == 2].mean() < 0.8


def test_coverage_where_classes_come_up_more_often():
    """Label shift: the same cells of each class, in other numbers."""
    (fit, known), (new, truth) = simulated(6000, 1), simulated(6000, 2)
    ratio = np.array([0.2, 1.0, 4.0])
    lots = np.random.default_rng(0).choice(6000, 6000, p=ratio[truth] / ratio[truth].sum())
    moved, told = change_prior(new[lots], ratio), change_prior(fit, ratio)
    sets = lac_sets(moved, thresholds(told, known, 0.9, ratio=ratio))
    assert held_by(sets, truth[lots]).mean() == pytest.approx(0.9, abs=0.025)


def test_restricted_answers_are_covered_as_often_as_asked():
    """Two classes of three can come up: the third neither fills the sets nor sets their limits."""
    bias = np.array([0.5, -0.5, 1.5])
    (fit, known), (new, truth) = simulated(6000, 1, bias), simulated(6000, 2, bias)
    ratio = np.array([1.0, 1.0, 0.0])
    limits = thresholds(change_prior(fit, ratio), known, 0.9, ratio=ratio)
    sets = lac_sets(change_prior(new, ratio), limits)[truth < 2]
    assert held_by(sets, truth[truth < 2]).mean() == pytest.approx(0.9, abs=0.03)
    assert not change_prior(new, ratio)[:, 2].any()


def test_a_changed_prior_is_bayes_rule():
    """Changed to what the cells were drawn with, the probabilities are right again."""
    errors, _ = cells(50, WEIGHT, BIAS)
    first = PrefixPosterior(np.ones(3), WEIGHT, BIAS).probabilities(errors)
    second = PrefixPosterior(np.ones(3), WEIGHT, BIAS + np.log([1, 2, 3])).probabilities(errors)
    np.testing.assert_allclose(change_prior(first, np.array([1.0, 2, 3])), second, rtol=1e-6)


def test_too_few_scores_let_every_class_in():
    limits = thresholds(np.array([[0.9, 0.1, 0.0], [0.2, 0.0, 0.8]]), np.array([0, 2]), 0.95)
    assert lac_sets(np.array([[0.0, 0.3, 0.7]]), limits).all()


@pytest.mark.parametrize("asked", [0.0, 1.0, -2.0, 95.0])
def test_coverage_must_be_a_share(asked):
    with pytest.raises(SettingsError, match="0 and 1"):
        plain(np.zeros(3), asked)


# --- anomaly -------------------------------------------------------------------------------------


def table(count: int, seed: int, strange: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Errors of K = 3 classes and "any cell": the own class is better by a factor of two or so."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, count)
    logs = rng.normal(0, 0.2, (count, 4, 4)) - 2
    logs[np.arange(count), :, truth] -= 0.7
    logs[:, ::2, 0] += strange
    logs[:, 1::2, 1] += strange
    errors = np.exp(logs + rng.normal(0, 1, (count, 4, 1))).astype(np.float32)
    logits = -3 * (logs[:, :, :3]).sum(1)
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return errors, truth, powers / powers.sum(1, keepdims=True)


def test_p_values_of_normal_cells_are_uniform_and_of_strangers_small():
    errors, truth, probabilities = table(800, 1)
    model, scores = fit_anomaly(Cells(errors, probabilities), truth)
    held = HeldOut(truth, probabilities, scores)
    errors, _, probabilities = table(1500, 2)
    p = held.p_value(model.anomaly(errors, probabilities))
    assert stats.kstest(p, "uniform").statistic < 0.06
    errors, _, probabilities = table(200, 3, strange=3.0)
    anomaly = model.anomaly(errors, probabilities)
    assert held.p_value(anomaly).max() < 0.01
    assert (anomaly > model.limit).all()
    assert ((anomaly >= 0) & (anomaly <= 1)).all()


def test_p_value_by_hand():
    """(1 + held-out cells at least as strange) / (1 + held-out cells), ties included."""
    held = HeldOut(np.zeros(4, dtype=int), np.ones((4, 1)), np.array([0.1, 0.4, 0.4, 0.2]))
    found = held.p_value(np.array([0.05, 0.1, 0.3, 0.4, 0.5]))
    np.testing.assert_allclose(found, [1.0, 1.0, 3 / 5, 3 / 5, 1 / 5])


def test_a_cell_as_strange_as_the_alarm_allows_is_flagged():
    """One that is stranger than all of 99 held-out cells: its p-value is 1 / 100."""
    held = HeldOut(np.zeros(99, dtype=int), np.ones((99, 1)), np.linspace(0, 0.8, 99))
    anomaly, ones = np.array([0.9, 0.8]), np.ones(2)
    reading = Reading(Classes(("a", "b")), np.eye(2), np.eye(2) > 0, anomaly, held.p_value(anomaly),
                      np.ones(2, dtype=int), ones)  # fmt: skip
    assert reading.flags == ["anomalous", "ok"]


def test_stranger_cells_score_higher():
    errors, truth, probabilities = table(300, 1)
    model, _ = fit_anomaly(Cells(errors, probabilities), truth)
    means = []
    for strange in (0.0, 0.5, 1.0, 2.0):
        errors, _, probabilities = table(200, 4, strange)
        means.append(model.anomaly(errors, probabilities).mean())
    assert all(low < high for low, high in pairwise(means))


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_errors_of_an_unheard_of_size_are_strange(size):
    """In both tails: a smooth image is too easy to denoise, a noisy one too hard."""
    errors, truth, probabilities = table(300, 1)
    model, scores = fit_anomaly(Cells(errors, probabilities), truth)
    errors, _, probabilities = table(50, 5)
    assert (model.anomaly(errors * np.float32(size), probabilities) > scores.max()).all()


def test_doubt_counts_by_its_rank():
    """A cell at the mean of its class has no distance, so that s is the share of cells with less doubt."""
    errors, truth, probabilities = table(300, 1)
    model, _ = fit_anomaly(Cells(errors, probabilities), truth)
    middle = squash(np.zeros((2, 300)), doubt(probabilities), model.units)
    rank = stats.rankdata(doubt(probabilities)) / 300
    np.testing.assert_allclose(middle / (1 - middle), rank, atol=0.02)
    near = np.diag([1.0, 2.0, 3.0])[:2] * model.units[:2, None]  # one unit off, two within, nothing
    beyond = squash(near, np.array([0.0, 0.0, 50.0]), model.units)
    np.testing.assert_allclose(beyond, [0.5, 0.8, 0.5], atol=0.01)  # s = 1, 2^2 and 1
    far = squash(2 * near, np.zeros(3), model.units)
    np.testing.assert_allclose(far, [16 / 17, 16 / 17, 0], atol=0.01)  # 2^4, 4^2 and 0


def test_the_distance_has_two_parts():
    """Means on the x axis: y is off the line through them, whatever the class."""
    means, precision = np.array([[0.0, 1.0], [4.0, 1.0]]), np.diag([1.0, 4.0])
    g = np.array([[1.0, 1.0], [3.5, 3.0], [-2.0, 0.0]])
    off, within = distances(g, means, precision)
    np.testing.assert_allclose(off, [0, 4, 2], atol=1e-6)
    np.testing.assert_allclose(within, [1, 0.5, 2])
    (off, within) = distances(g, means[:1], precision)  # one mean: there is no line
    np.testing.assert_allclose(within, 0, atol=1e-6)
    np.testing.assert_allclose(off, np.hypot(g[:, 0], 2 * (g[:, 1] - 1)))


@pytest.mark.parametrize("count", [1, 2, 4, 12])
def test_both_parts_make_the_mahalanobis_distance(count):
    """To the nearest mean, of few and of more than there are directions; the same bits for one cell."""
    rng = np.random.default_rng(0)
    means, g, spread = (rng.normal(size=(n, 9)) for n in (count, 30, 12))
    precision = spread.T @ spread
    gaps = g[:, None] - means
    whole = np.sqrt(np.einsum("mkf,fg,mkg->mk", gaps, precision, gaps).min(1))
    found = distances(g, means, precision)
    np.testing.assert_allclose(np.hypot(*found), whole)
    for i in range(30):
        np.testing.assert_array_equal(distances(g[i : i + 1], means, precision)[:, 0], found[:, i])


def test_pattern_by_hand():
    errors = np.exp(np.array([[[1.0, 2.0, 0.5], [4.0, 0.0, 1.0]]]))
    np.testing.assert_allclose(pattern(errors), [[0.5, 1.5, 3.0, -1.0, 0.5, 1.0]])


# --- the paper's race ----------------------------------------------------------------------------


def test_the_temperature_of_the_race_is_the_best_there_is():
    """No other of a fine grid has a lower NLL on the same cells."""
    means = 0.25 * torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    world, truth = GaussianWorld(means, 0.3), torch.arange(3).repeat(20)
    images = world.sample(truth, torch.Generator().manual_seed(2))
    race = PaperRace(paper_draws(40))
    measurement = Measurement(race.draws, 4, (POSES[0],) * 8, race)
    errors = measurement.measure(DenoiserMeter(world), images, [str(i) for i in range(60)])
    budget = fit_race(errors, truth.numpy(), race)
    reader, judged = budget.reader, budget.held.probabilities
    best = nll(reader.probabilities(errors), truth.numpy())
    for factor in np.geomspace(0.1, 10, 41):
        other = replace(reader, temperature=reader.temperature * factor)
        assert nll(other.probabilities(errors), truth.numpy()) >= best - 1e-3
    np.testing.assert_allclose(judged.sum(1), 1)
    assert best <= nll(judged, truth.numpy()) + 1e-3  # judged without the cell


# --- as JSON -------------------------------------------------------------------------------------


def test_a_saved_calibration_gives_the_same_answers():
    errors, truth, probabilities = table(200, 1)
    budgets = fit_sequence(stratified(4, 0.1, 2.0, seed=3, frozen=True), Seen(errors), truth)
    budget, draws = budgets["balanced"], paper_draws(30, seed=5)
    held = HeldOut(truth, probabilities, np.random.default_rng(1).random(200))
    rules = PaperRace(draws, least=8, alpha=0.01)
    race = Budget(draws, RaceReader(rules.weights, 0.3), held, rules)
    budgets["paper"] = race
    again = calibration_from_json(json.loads(json.dumps(calibration_to_json(budgets))))
    assert again["balanced"].draws == budget.draws
    assert again["fast"].reader.rule == budgets["fast"].reader.rule
    assert again["fast"].agreement == budgets["fast"].agreement
    assert again["paper"].draws == draws
    assert again["paper"].policy == race.policy

    world, classes = GaussianWorld(torch.zeros(3, 3, 2, 2), 1.0), Classes(("a", "b", "c"))
    names = tuple(str(i) for i in range(200))
    wide = np.tile(errors, (1, 8, 1))[:, :30]
    for name, numbers, sigmas in (
        ("balanced", errors, budget.draws.sigmas),
        ("paper", wide, draws.sigmas),
    ):
        measured = ErrorTable(numbers, sigmas, names, classes, 0, "m")
        first, second = (
            Classifier(world, classes, these, POSES).read(measured, name)
            for these in (budgets, again)
        )
        np.testing.assert_allclose(first.probabilities, second.probabilities, atol=1e-5)
        np.testing.assert_allclose(first.anomaly, second.anomaly, atol=1e-4)
        np.testing.assert_allclose(first.anomaly_p, second.anomaly_p, atol=0.011)
        assert (first.sets == second.sets).mean() > 0.99
        assert first.predicted.tolist() == second.predicted.tolist()
    assert nll(budget.held.probabilities, truth) < np.log(3)
