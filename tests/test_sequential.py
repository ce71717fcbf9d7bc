"""When to stop: gates, thresholds and their bound, against counts by hand and worlds that are known."""

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import softmax

from cytodiffusion.classify.draws import stratified
from cytodiffusion.classify.evidence import DenoiserMeter
from cytodiffusion.classify.fit import Seen, fit_sequence
from cytodiffusion.classify.measure import Measurement
from cytodiffusion.classify.sequential import (
    NEVER,
    Rule,
    Sequence,
    absorb,
    fit_gate,
    gap,
    learn_threshold,
    replay,
    staying,
    upper_limit,
)
from cytodiffusion.data.transforms import POSES
from cytodiffusion.networks.exact import GaussianWorld


def chance_of_same(logits: np.ndarray, gate: tuple[float, float]) -> np.ndarray:
    """P(same | gap) of each cell."""
    return 1 / (1 + np.exp(-gate[0] - gate[1] * gap(logits)))


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


PLAIN = (0.0, 1.0)  # a gate whose chance is the logistic function of the gap


def gaps(chance: np.ndarray) -> np.ndarray:
    """Logits of two classes whose first leads so that PLAIN gives this chance."""
    return np.stack([np.log(chance / (1 - chance)), np.zeros_like(chance)], axis=-1)


def test_cells_stop_at_the_first_depth_that_will_do():
    chance = np.array([[0.9, 0.6, 0.6], [0.6, 0.95, 0.6], [0.6, 0.6, 0.6], [0.99, 0.99, 0.6]])
    strange = np.zeros((4, 3), dtype=bool)
    strange[3, 0] = True  # strange at depth 1 alone

    def depth(rule: Rule) -> list[int]:
        return replay(gaps(chance), strange, (PLAIN,) * 3, rule).depth.tolist()

    assert depth(Rule(0.89)) == [1, 2, 3, 2]
    assert depth(Rule(0.89, cautious=False)) == [1, 2, 3, 1]
    assert depth(Rule(NEVER)) == [3] * 4


def test_classes_leave_together_or_one_by_one():
    logits = np.array([[0.0, -1.0, -5.0], [0.0, -4.0, -5.0], [np.nan, 0.0, -5.0]])
    calm = np.zeros(3, dtype=bool)
    together = staying(logits, calm, PLAIN, Rule(0.95))
    assert together.tolist() == [[1, 1, 1], [1, 0, 0], [0, 1, 0]]
    apart = staying(logits, calm, PLAIN, Rule(0.95, apart=True))
    assert apart.tolist() == [[1, 1, 0], [1, 0, 0], [0, 1, 0]]
    strange = staying(logits, ~calm, PLAIN, Rule(0.95, apart=True))
    assert strange.tolist() == [[1, 1, 1], [1, 1, 1], [0, 1, 1]]


def test_the_leader_stays_however_lax_the_rule():
    assert staying(np.array([[1.0, 0.0]]), np.array([False]), (9.0, 1.0), Rule(0.5)).any()


def test_what_has_left_keeps_its_probability():
    before = np.array([[0.7, 0.2, 0.1]])
    after = absorb(before, np.array([[2.0, np.nan, 2.0]]))
    np.testing.assert_allclose(after, [[0.4, 0.2, 0.4]])
    whole = np.array([[0.3, -1.0, 0.2]])
    np.testing.assert_array_equal(absorb(before, whole), softmax(whole, axis=1))


def test_passes_of_classes_that_leave_one_by_one():
    """Three classes and "any cell"; then the two that are left; then the cell is done."""
    logits = np.array([[[0.0, -1.0, -5.0], [0.0, -5.0, 9.0], [0.0, 0.0, 0.0]]])
    calm = np.zeros((1, 3), dtype=bool)
    found = replay(logits, calm, (PLAIN,) * 3, Rule(0.95, apart=True))
    assert (found.depth.tolist(), found.whole.tolist(), found.passes.tolist()) == ([2], [1], [6])
    assert found.probabilities.argmax() == 0  # class 2 had left before it led


@pytest.mark.parametrize(("events", "n"), [(0, 300), (3, 1000), (40, 90)])
def test_upper_limit_is_the_exact_one(events, n):
    """At the limit, as few events as these have a chance of 5 %."""
    assert stats.binom.cdf(events, n, upper_limit(events, n)) == pytest.approx(0.05)


def test_upper_limit_of_all():
    assert upper_limit(7, 7) == 1.0


def exits(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, tuple]:
    """Cells whose first depth agrees with the last with the chance that the gate says."""
    rng = np.random.default_rng(seed)
    first = gaps(0.5 + rng.beta(8, 1, n) / 2)
    last = gaps(np.full(n, 0.9))
    differs = rng.random(n) > chance_of_same(first, PLAIN)
    last[differs] = last[differs, ::-1]
    return np.stack([first, last], axis=1), np.zeros((n, 2), dtype=bool), (PLAIN,) * 2


def stops(logits: np.ndarray, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """Which cells stop at once, and which of these answer otherwise than at the end."""
    stop = chance_of_same(logits[:, 0], PLAIN) >= rule.threshold
    return stop, stop & (logits[:, 0].argmax(1) != logits[:, 1].argmax(1))


def test_the_threshold_is_the_laxest_whose_bound_is_allowed():
    logits, strange, gates = exits(3000, 0)
    rule, said = learn_threshold(logits, strange, gates, Rule(), 0.02)
    stop, differs = stops(logits, rule)
    assert said.disagreed == differs.sum()
    assert said.bound == pytest.approx(
        stats.beta.ppf(0.95, said.disagreed + 1, 3000 - said.disagreed)
    )
    assert said.bound <= 0.02
    assert said.trials == said.passes == pytest.approx(2 - stop.mean())
    assert 0.1 < stop.mean() < 1  # it was worth while, and not everything went


def test_the_bound_holds_on_new_cells():
    """In 95 of 100 worlds or more; counted over 100 with 400 cells each."""
    kept = 0
    for seed in range(100):
        rule, _ = learn_threshold(*exits(400, seed), Rule(), 0.05)
        kept += stops(exits(20_000, 10_000 + seed)[0], rule)[1].mean() <= 0.05
    assert stats.binom.cdf(kept, 100, 0.95) > 0.01


def test_a_threshold_whose_stricter_ones_are_not_allowed_is_not_taken():
    """40 of 300 are right after one trial, wrong and surer after two: a lax rule stops them in time."""
    chance = np.tile([0.51, 0.51, 0.9], (300, 1))
    chance[:40, :2] = [0.8, 0.05]
    calm = np.zeros((300, 3), dtype=bool)
    rule, _ = learn_threshold(gaps(chance), calm, (PLAIN,) * 3, Rule(), 0.05)
    assert rule.threshold > 0.9


def test_too_few_cells_allow_no_early_stop():
    """With 20 cells even no disagreement at all leaves a bound of 14 %."""
    rule, said = learn_threshold(*exits(20, 0), Rule(), 0.02)
    assert rule.threshold == NEVER
    assert (said.disagreed, said.trials) == (0, 2.0)


# --- a sequence of trials, fitted and run ----------------------------------------------------------

K = 3
MEANS = 0.3 * torch.randn(K, 3, 4, 4, generator=torch.Generator().manual_seed(1))
WORLD = GaussianWorld(MEANS, 0.5)
DRAWS = stratified(6, 0.2, 3.0, frozen=True)


def cells(each: int, seed: int) -> tuple[torch.Tensor, np.ndarray, list[str]]:
    truth = torch.arange(K).repeat(each)
    images = WORLD.sample(truth, torch.Generator().manual_seed(seed)).float()
    return images, truth.numpy(), [f"{seed}-{i}" for i in range(len(truth))]


def measured(
    images: torch.Tensor, names: list[str], policy: Sequence | None = None, together: bool = True
) -> np.ndarray:
    measurement = Measurement(DRAWS, K + 1, (POSES[0],) * 8, policy, together)
    return measurement.measure(DenoiserMeter(WORLD), images, names)


@pytest.fixture(scope="module")
def budgets():
    images, truth, names = cells(400, 2)
    return fit_sequence(DRAWS, Seen(measured(images, names)), truth)


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
    reader = budgets["balanced"].reader
    images, _, names = cells(60, 6)
    errors = measured(images, names, reader)
    stopped = errors[np.isnan(errors[:, 1, 0])][:, :1]
    assert len(stopped) > 20
    assert (reader(stopped).sum(1) == 1).all()
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


def test_held_out_cells_are_as_strange_as_where_they_stopped(budgets):
    """Many of `fast` after one trial; those of `full` after all."""
    images, truth, names = cells(400, 2)
    errors = measured(images, names)[:, :1]
    first = fit_sequence(DRAWS.first(1), Seen(errors), truth)["full"].held.anomaly
    fast, full = ((budgets[name].held.anomaly == first).mean() for name in ("fast", "full"))
    assert fast > 0.2
    assert full < 0.05


@pytest.fixture(scope="module")
def apart():
    """The same trials where every class costs a pass."""
    images, truth, names = cells(400, 2)
    return fit_sequence(DRAWS, Seen(measured(images, names)), truth, apart=True)


def test_classes_that_have_left_cost_nothing(apart, budgets):
    """After the first trial; beside whole cells, which stop by the same rule."""
    images, _, names = cells(400, 3)
    passes = []
    for budget, together in ((budgets["full"], True), (apart["full"], False)):
        rule = Rule(1 - 1e-9, apart=not together, cautious=False)
        errors = measured(images, names, Sequence(budget.reader.depths, rule), together)
        passes.append((~np.isnan(errors[:, 1:])).sum((1, 2)).mean())
    assert 0 < passes[1] < 0.7 * passes[0]


def test_answers_hold_where_classes_leave(apart):
    images, _, names = cells(400, 3)
    full, hasty = (apart[name].reader for name in ("full", "balanced"))
    every = measured(images, names)
    some = measured(images, names, hasty, together=False)
    passes = (~np.isnan(some)).sum((1, 2))
    assert passes.mean() == pytest.approx(apart["balanced"].agreement.passes, rel=0.05)
    answers = [r.probabilities(e).argmax(1) for r, e in ((full, every), (hasty, some))]
    assert (answers[0] != answers[1]).mean() <= 0.01  # allowed: 0.005; 1,200 cells
    np.testing.assert_allclose(hasty.probabilities(some).sum(1), 1)


def test_strangeness_is_read_where_every_class_was_in(apart):
    images, _, names = cells(40, 5)
    reader, every = apart["balanced"].reader, measured(images, names)
    some = measured(images, names, reader, together=False)
    some_left = np.isnan(some).any(2)
    whole = np.where(some_left.any(1), some_left.argmax(1), some.shape[1])
    assert len(set(whole.tolist())) > 1
    for count in set(whole.tolist()):
        rows = np.flatnonzero(whole == count)
        np.testing.assert_array_equal(
            reader.anomaly(some)[rows], reader.anomaly(every[rows, :count])
        )


def test_cells_that_have_all_lost_a_class_are_still_judged(apart):
    """None of them is whole, so that none is strange."""
    images, _, names = cells(5, 8)
    errors = measured(images, names)[:, :2]
    errors[:, 1, [0, K]] = np.nan
    stays = apart["balanced"].reader(errors)
    assert not stays[:, 0].any()
    assert stays[:, 1:].any(1).all()
