"""When to stop: gates, thresholds and their bound, against counts by hand and worlds that are known."""

import numpy as np
import pytest
import torch
from scipy import stats

from cytodiffusion.classify.draws import stratified
from cytodiffusion.classify.evidence import DenoiserMeter
from cytodiffusion.classify.fit import fit_sequence
from cytodiffusion.classify.measure import Measurement
from cytodiffusion.classify.sequential import (
    NEVER,
    Sequence,
    chance_of_same,
    depths_reached,
    fit_gate,
    gap,
    learn_threshold,
    upper_limit,
)
from cytodiffusion.data.transforms import POSES
from cytodiffusion.networks.exact import GaussianWorld


def test_gap_by_hand():
    np.testing.assert_allclose(gap(np.array([[1.0, 5.0, 3.5], [2.0, 2.0, 0.0]])), [1.5, 0.0])


def test_the_gate_finds_the_chance_again():
    """Agreement drawn from a logistic curve in the gap."""
    rng = np.random.default_rng(0)
    logits = np.zeros((20_000, 3))
    logits[:, 0] = rng.uniform(0, 6, 20_000)
    chance = 1 / (1 + np.exp(1.0 - 1.5 * logits[:, 0]))
    a, b = fit_gate(logits, rng.random(20_000) < chance)
    assert (a, b) == (pytest.approx(-1.0, abs=0.1), pytest.approx(1.5, abs=0.1))
    np.testing.assert_allclose(chance_of_same(logits, (a, b)), chance, atol=0.03)


def test_a_gate_never_prefers_a_small_gap():
    logits = np.tile(np.array([[0.0, 15.0], [0.0, 0.1], [14.0, 0.0], [0.2, 0.0]]), (10, 1))
    assert fit_gate(logits, np.tile([False, True], 20))[1] == 0


def test_there_is_a_gate_where_all_agree():
    _, slope = fit_gate(np.array([[0.0, 5.0], [3.0, 0.0]]), np.array([True, True]))
    assert slope > 0


def test_there_is_a_gate_where_none_agree():
    logits = np.array([[0.0, 1.0], [3.0, 0.0]])
    assert (chance_of_same(logits, fit_gate(logits, np.array([False, False]))) < 0.5).all()


def test_cells_stop_at_the_first_depth_that_will_do():
    chance = np.array([[0.9, 0.2, 0.3], [0.2, 0.95, 0.1], [0.1, 0.1, 0.1], [0.99, 0.99, 0.1]])
    strange = np.zeros((4, 3), dtype=bool)
    strange[3, 0] = True  # strange at depth 1 alone
    assert depths_reached(chance, strange, 0.9).tolist() == [1, 2, 3, 2]
    assert depths_reached(chance, strange, NEVER).tolist() == [3] * 4


@pytest.mark.parametrize(("events", "n"), [(0, 300), (3, 1000), (40, 90)])
def test_upper_limit_is_the_exact_one(events, n):
    """At the limit, as few events as these have a chance of 5 %."""
    assert stats.binom.cdf(events, n, upper_limit(events, n)) == pytest.approx(0.05)


def test_upper_limit_of_all():
    assert upper_limit(7, 7) == 1.0


def exits(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells whose first depth agrees with the last with the chance that the gate says."""
    rng = np.random.default_rng(seed)
    chance = np.stack([rng.beta(8, 1, n), np.ones(n)], axis=1)
    same = np.stack([rng.random(n) < chance[:, 0], np.ones(n, dtype=bool)], axis=1)
    return chance, np.zeros((n, 2), dtype=bool), same


def test_the_threshold_is_the_laxest_whose_bound_is_allowed():
    chance, strange, same = exits(3000, 0)
    threshold, said = learn_threshold(chance, strange, same, 0.02)
    stop = chance[:, 0] >= threshold
    assert said.disagreed == (~same[stop, 0]).sum()
    assert said.bound == pytest.approx(
        stats.beta.ppf(0.95, said.disagreed + 1, 3000 - said.disagreed)
    )
    assert said.bound <= 0.02
    assert said.trials == pytest.approx(2 - stop.mean())
    assert 0.1 < stop.mean() < 1  # it was worth while, and not everything went


def test_the_bound_holds_on_new_cells():
    """In 95 of 100 worlds or more; counted over 100 with 400 cells each."""
    kept = 0
    for seed in range(100):
        threshold, _ = learn_threshold(*exits(400, seed), 0.05)
        chance, _, same = exits(20_000, 10_000 + seed)
        kept += ((chance[:, 0] >= threshold) & ~same[:, 0]).mean() <= 0.05
    assert stats.binom.cdf(kept, 100, 0.95) > 0.01


def test_too_few_cells_allow_no_early_stop():
    """With 20 cells even no disagreement at all leaves a bound of 14 %."""
    chance, strange, same = exits(20, 0)
    threshold, said = learn_threshold(chance, strange, same, 0.02)
    assert threshold == NEVER
    assert (said.disagreed, said.bound, said.trials) == (0, 0.0, 2.0)


# --- a sequence of trials, fitted and run ----------------------------------------------------------

K = 3
MEANS = 0.3 * torch.randn(K, 3, 4, 4, generator=torch.Generator().manual_seed(1))
WORLD = GaussianWorld(MEANS, 0.5)
DRAWS = stratified(6, 0.2, 3.0, frozen=True)


def cells(each: int, seed: int) -> tuple[torch.Tensor, np.ndarray, list[str]]:
    truth = torch.arange(K).repeat(each)
    images = WORLD.sample(truth, torch.Generator().manual_seed(seed)).float()
    return images, truth.numpy(), [f"{seed}-{i}" for i in range(len(truth))]


def measured(images: torch.Tensor, names: list[str], policy: Sequence | None = None) -> np.ndarray:
    measurement = Measurement(DRAWS, K + 1, (POSES[0],) * 8, policy)
    return measurement.measure(DenoiserMeter(WORLD), images, names)


@pytest.fixture(scope="module")
def budgets():
    images, truth, names = cells(400, 2)
    return fit_sequence(DRAWS, measured(images, names), truth)


def test_stopping_early_disagrees_no_more_than_allowed(budgets):
    images, truth, names = cells(400, 3)
    full, fast = (budgets[name].reader for name in ("full", "fast"))
    every, some = measured(images, names, full), measured(images, names, fast)
    ran = (~np.isnan(some[:, :, 0])).sum(1)
    assert (~np.isnan(every)).all()
    assert ran.mean() < 0.8 * len(DRAWS)
    answers = [r.probabilities(e).argmax(1) for r, e in ((full, every), (fast, some))]
    assert (answers[0] != answers[1]).mean() <= 0.03  # allowed: 0.02; 1,200 cells
    assert (answers[0] == truth).mean() > 0.8


def test_what_was_measured_is_a_prefix_of_the_whole(budgets):
    images, _, names = cells(20, 4)
    every, some = measured(images, names), measured(images, names, budgets["fast"].reader)
    np.testing.assert_array_equal(some[~np.isnan(some)], every[~np.isnan(some)])


def test_a_cell_is_read_at_the_depth_that_it_ran(budgets):
    images, _, names = cells(5, 5)
    reader, errors = budgets["fast"].reader, measured(images, names)
    errors[3, 2:] = np.nan
    read = reader.probabilities(errors)
    np.testing.assert_allclose(
        read[3], reader.depths[1].posterior.probabilities(errors[3:4, :, :-1])[0]
    )
    np.testing.assert_allclose(
        read[4], reader.depths[5].posterior.probabilities(errors[4:5, :, :-1])[0]
    )


def test_a_stranger_runs_every_trial(budgets):
    """However clear its name, a cell unlike the held-out ones is never done early."""
    reader = budgets["fast"].reader
    images, _, names = cells(60, 6)
    errors = measured(images, names, reader)
    stopped = errors[np.isnan(errors[:, 1, 0])][:, :1]
    assert len(stopped) > 20
    assert not reader(stopped).any()
    odd = stopped.copy()
    odd[:, :, :-1] *= 5.0  # the order of the classes stays, the pattern against "any cell" does not
    assert reader(odd).all()


def test_held_out_cells_are_judged_without_themselves(budgets):
    """Their accuracy is that of new cells, not better; and there is a verdict for each."""
    images, truth, names = cells(400, 7)
    held, reader = budgets["balanced"].held, budgets["balanced"].reader
    new = reader.probabilities(measured(images, names, reader)).argmax(1) == truth
    judged = held.probabilities.argmax(1) == held.truth
    assert len(held.truth) == len(held.anomaly) == 1200
    assert judged.mean() == pytest.approx(new.mean(), abs=0.04)
    np.testing.assert_allclose(held.prior, 1 / 3)
