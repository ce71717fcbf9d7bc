"""The paper's race against direct transcriptions of its formulas and scipy's t-test."""

import numpy as np
import pytest
import torch
from scipy import stats

from cytodiffusion.classify import fit
from cytodiffusion.classify.draws import Draws, Trial
from cytodiffusion.classify.evidence import DenoiserMeter
from cytodiffusion.classify.measure import Measurement
from cytodiffusion.classify.race import (
    BettingRace,
    PaperRace,
    keep,
    last_standing,
    paper_draws,
    paper_weight,
    standing,
    sweeps,
    wealth,
    zeta,
)
from cytodiffusion.data.transforms import POSES
from cytodiffusion.diffusion.noise import scaled_linear_alpha_bar, sigma_of_alpha_bar
from cytodiffusion.networks.exact import GaussianWorld

LEVELS = sigma_of_alpha_bar(scaled_linear_alpha_bar()).numpy()
RNG = np.random.default_rng(5)


def quartic(t: float) -> float:
    tau = (1000 - t) / 1000
    return 0.92706 + 9.83654 * tau - 4.68406 * tau**2 + 6.01854 * tau**3 - 9.33979 * tau**4


@pytest.mark.parametrize("t", [1, 250, 500, 999])
def test_weight(t):
    """An error of the clean image is sigma^2 times that of the noise."""
    found = paper_weight(LEVELS[[t]])[0]
    assert found * LEVELS[t] ** 2 == pytest.approx(1 / quartic(t), rel=1e-4)


@pytest.mark.parametrize("most", [999, 2000, 150])
def test_levels_are_a_permutation_of_even_times(most):
    found = paper_draws(most, seed=3).sigmas
    want = LEVELS[np.linspace(1, 999, most).round().astype(int)]
    np.testing.assert_allclose(np.sort(found), want)
    assert not np.allclose(found, want)


def test_every_trial_of_the_paper_has_fresh_noise():
    draws = paper_draws(50)
    assert len({trial.draw for trial in draws.trials}) == 50
    assert paper_draws(50, seed=1) == paper_draws(50, seed=1) != paper_draws(50, seed=2)
    assert not draws.frozen


def test_keep_is_the_paired_t_test():
    weighted = RNG.normal(size=(200, 25, 4)) + np.array([0, 0.3, 0.6, 0.9])
    alive = np.ones((200, 4), dtype=bool)
    found = keep(weighted, alive, 0.01)
    for i in range(200):
        leader = weighted[i].mean(0).argmin()
        for k in range(4):
            p = stats.ttest_rel(weighted[i, :, k], weighted[i, :, leader]).pvalue
            assert found[i, k] == (k == leader or not p < 0.01)
    assert 0.2 < found.mean() < 0.9


def test_a_class_that_has_left_does_not_lead():
    weighted = np.ones((1, 10, 3)) + 1e-3 * RNG.normal(size=(1, 10, 3))
    weighted[0, :, 0] = -5
    alive = np.array([[False, True, True]])
    assert keep(weighted, alive, 2e-3)[0, 1:].all()


def test_equal_classes_all_stay():
    weighted = np.repeat(RNG.normal(size=(1, 30, 1)), 3, axis=2)
    assert keep(weighted, np.ones((1, 3), dtype=bool), 2e-3).all()


def far_apart(trials: int) -> np.ndarray:
    """Errors of the noise 3, 1 and 5 times what they are for class 1, give or take 1 %.

    The last column, "any cell", would win.
    """
    errors = np.array([3, 1, 5, 0.1]) * (1 + 0.01 * RNG.normal(size=(1, trials, 4)))
    return errors / paper_weight(paper_draws(100).sigmas[:trials])[:, None]


def test_first_check_after_21_trials_then_every_5():
    race = PaperRace(paper_draws(100))
    checked = [n for n in range(1, 60) if not race(far_apart(n)).all()]
    assert checked == [21, 26, 31, 36, 41, 46, 51, 56]


def test_the_leader_is_never_dropped():
    race = PaperRace(paper_draws(100), alpha=1.0)
    assert race(far_apart(21)).tolist() == [[False, True, False]]


def test_a_class_that_has_left_stays_out():
    errors = far_apart(22)
    errors[0, 21, 0] = np.nan
    assert PaperRace(paper_draws(100))(errors).tolist() == [[False, True, True]]


# --- the betting race ----------------------------------------------------------------------------


def wealth_by_hand(weighted: np.ndarray) -> list[float]:
    """The gambler's fortunes of one image, in plain loops."""
    sweeps, classes = weighted.shape
    fortunes, gaps = [1.0] * classes, [[0.5] for _ in range(classes)]
    for i in range(1, sweeps):
        leader = int(np.argmin(weighted[:i].sum(0)))
        for k in range(classes):
            gap = float(np.clip(weighted[i, k] - weighted[i, leader], -1, 1))
            mean = np.mean(gaps[k])
            spread = (0.25 + np.sum((gaps[k] - mean) ** 2)) / (len(gaps[k]) + 1)
            fortunes[k] *= 1 + min(max(mean / (spread + mean**2), 0.0), 0.9) * gap
            gaps[k].append(gap)
    return fortunes


def test_wealth_is_what_the_gambler_has():
    weighted = RNG.normal(0, 0.4, (6, 25, 4)) + np.array([0, 0.1, 0.3, 0.6])
    want = [wealth_by_hand(one) for one in weighted]
    np.testing.assert_allclose(wealth(weighted), want, rtol=1e-9)


def test_the_best_class_is_dropped_no_more_often_than_stated():
    """Two best classes tie, the hardest case; looked at after each of 150 trials."""
    n, alpha = 2000, 0.1
    errors = RNG.normal(0, 0.3, (n, 150, 4)) + np.array([0, 0, 0.05, 0.1])
    gone = np.zeros(n, dtype=bool)
    for trials in range(1, 151, 3):
        gone |= wealth(errors[:, :trials])[:, 0] >= 1 / alpha
    assert stats.binom.sf(gone.sum() - 1, n, alpha) > 0.01
    assert gone.any()


def race_of(count: int, levels: int = 4, weight: float = 1.0) -> BettingRace:
    draws = sweeps(np.geomspace(0.1, 2.0, levels), count)
    return BettingRace(draws, np.full(len(draws), weight), levels)


def test_worse_classes_leave_and_the_best_is_left():
    race = race_of(50, weight=0.25)
    errors = RNG.normal(0, 0.2, (50, 200, 4)) + np.array([0.3, 0, 0.4, -1.0])  # "any cell" is best
    assert race(errors[:, :4]).all()
    alive = race(errors)
    assert alive[:, 1].mean() > 0.9
    assert not alive[:, [0, 2]].any()


def test_classes_leave_only_when_a_sweep_is_whole():
    race = race_of(50, weight=0.25)
    errors = np.ones((1, 200, 4)) + np.array([0.5, 0, 0.5, 0])
    left = [n for n in range(1, 201) if not race(errors[:, :n]).all()]
    assert left
    assert all(n % 4 == 0 for n in left)


def test_levels_that_favour_another_class_make_no_one_leave():
    """Class 1 is better at one level of a sweep and as much worse at another: on balance, a tie.

    One list of levels serves all cells, so chance alone must not let a class leave.
    """
    race = race_of(40, levels=2, weight=0.5)
    errors = np.ones((1, 80, 3))
    errors[0, ::2, 1] += 1
    errors[0, 1::2, 1] -= 1
    assert race(errors)[0].all()


def test_the_race_stops_when_one_class_is_left():
    means = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    world, truth = GaussianWorld(means, 0.2), torch.arange(3).repeat(4)
    images = world.sample(truth, torch.Generator().manual_seed(2))
    race = race_of(20, weight=2.0)
    measurement = Measurement(race.draws, 4, (POSES[0],) * 8, race)
    errors = measurement.measure(DenoiserMeter(world), images, [str(i) for i in range(12)])
    ran = (~np.isnan(errors[:, :, 0])).sum(1)
    assert (last_standing(errors[:, :, :-1], race.weights).argmin(1) == truth.numpy()).all()
    assert ran.max() < 40


def test_sweeps_take_fresh_noise_at_the_same_levels():
    draws = sweeps(np.array([0.1, 0.5]), 3)
    np.testing.assert_allclose(draws.sigmas, [0.1, 0.5] * 3)
    assert [trial.draw for trial in draws.trials] == list(range(6))
    assert [trial.pose for trial in draws.trials] == [0, 0, 1, 1, 2, 2]
    assert not draws.frozen


# --- scores --------------------------------------------------------------------------------------

SIGMAS = paper_draws(30).sigmas
WEIGHTS = paper_weight(SIGMAS)


def some_errors(n: int = 5, trials: int = 30, classes: int = 8) -> np.ndarray:
    errors = RNG.gamma(2.0, size=(n, trials, classes)) * SIGMAS[:trials, None] ** 2
    errors[0, 21:, -1] = np.nan
    errors[1, 26:, [0, 1]] = np.nan
    return errors


def standing_by_hand(errors: np.ndarray) -> np.ndarray:
    trials, classes = errors.shape
    sums, ran = np.zeros(classes), np.zeros(classes)
    for i in range(trials):
        e = errors[i] * paper_weight(SIGMAS[i : i + 1])[0]
        best = min(x for x in e if not np.isnan(x))
        for c in range(classes):
            if not np.isnan(e[c]):
                sums[c] += e[c] - best
                ran[c] += 1
    return sums / ran / (sums / ran).mean()


def test_standing_is_the_papers_relative_error():
    errors = some_errors()
    want = np.stack([standing_by_hand(one) for one in errors])
    np.testing.assert_allclose(standing(errors, WEIGHTS), want)


def test_those_that_left_stand_behind_those_that_stayed():
    errors = some_errors()
    errors[0, :21, -1] = 0.0  # by its mean it would win
    scores = last_standing(errors, WEIGHTS)
    assert scores[0].argmax() == 7
    assert np.sort(scores[1].argsort()[-2:]).tolist() == [0, 1]
    np.testing.assert_allclose(scores[2:], standing(errors, WEIGHTS)[2:])


def zeta_by_hand(scores: np.ndarray, classes: int) -> float:
    e, k = sorted(scores), min(classes - 1, 10)
    gaps = sum(e[j] - e[0] for j in range(1, k)) / k
    spread = sum(abs(e[j] - e[m]) for j in range(1, k) for m in range(1, k))
    return gaps - spread / (k * (k - 1))


@pytest.mark.parametrize("classes", [3, 8, 14])
def test_zeta(classes):
    errors = some_errors(classes=classes)
    want = [zeta_by_hand(row, classes) for row in standing(errors, WEIGHTS)]
    np.testing.assert_allclose(zeta(errors, WEIGHTS), want)


def test_zeta_is_high_where_one_class_stands_out():
    clear, muddled = np.full((1, 1, 5), 2.0), np.array([[[1.0, 1.4, 2.0, 2.4, 3.0]]])
    clear[..., 0] = 1.0
    assert zeta(clear, WEIGHTS[:1]) > zeta(muddled, WEIGHTS[:1])


# --- a whole race --------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [True, False])
def test_a_race_between_classes_that_are_far_apart(together):
    """Each cell ends with its own class, at the first check: 21 passes for every class."""
    classes = 4
    means = torch.randn(classes, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    world, truth = GaussianWorld(means, 0.2), torch.arange(classes).repeat(3)
    images = world.sample(truth, torch.Generator().manual_seed(2))
    draws, names = paper_draws(60), [str(i) for i in range(len(truth))]
    measurement = Measurement(
        draws, classes + 1, (POSES[0],) * 8, PaperRace(draws), together, anyone=False
    )
    errors = measurement.measure(DenoiserMeter(world), images, names)[:, :, :-1]
    passes = (~np.isnan(errors)).sum((1, 2))
    assert (last_standing(errors, paper_weight(draws.sigmas)).argmin(1) == truth.numpy()).all()
    assert passes.min() >= 21 * classes
    assert passes.max() < 60 * classes


def test_held_out_cells_are_judged_by_the_temperature_of_the_others(monkeypatch):
    """Whatever their own names are, their probabilities stay."""
    rng = np.random.default_rng(0)
    errors, race = 1 + 0.1 * rng.random((40, 21, 4)), PaperRace(paper_draws(21))
    halves = np.split(np.arange(40), 2)
    monkeypatch.setattr(fit, "folds", lambda *_: [halves, halves[::-1]])
    truth = rng.integers(0, 3, 40)
    other = np.append(truth[:20], errors[20:, :, :3].mean(1).argmin(1))
    told = [fit.fit_race(errors, each, race).held.probabilities[20:] for each in (truth, other)]
    np.testing.assert_array_equal(*told)


def test_a_race_between_equals_goes_on_to_the_end():
    world = GaussianWorld(torch.zeros(3, 3, 2, 2), 0.2)
    draws = Draws(tuple(Trial(0.5, i) for i in range(30)))
    measurement = Measurement(draws, 4, POSES, PaperRace(draws))
    errors = measurement.measure(DenoiserMeter(world), torch.zeros(1, 3, 2, 2), ["a"])
    assert not np.isnan(errors).any()
