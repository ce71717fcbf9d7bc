"""Metrics against numbers worked out by hand, a printed table, scikit-learn and symmetries."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle

from cytodiffusion.errors import DataError
from cytodiffusion.evaluate import metrics
from cytodiffusion.evaluate.intervals import (
    balanced_interval,
    binomial_interval,
    mean_interval,
    percentiles,
)

NAMES = ("a", "b", "c")

# Five cells by hand: right, right, wrong, right, wrong.
TRUTH = np.array([0, 0, 0, 1, 1])
TABLE = np.array(
    [[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.3, 0.5, 0.2], [0.1, 0.9, 0.0], [0.7, 0.2, 0.1]]
)
SETS = TABLE >= 0.3


def random_answers(seed: int, n: int = 400, k: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Cells of `k` classes, about two in three of them named correctly."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, k, n)
    scores = rng.normal(0, 1, (n, k)) + 1.8 * np.eye(k)[truth]
    powers = np.exp(scores)
    return truth, powers / powers.sum(axis=1, keepdims=True)


# ---------------------------------------------------------------------------------------- by hand


def test_by_hand():
    assert metrics.accuracy(TRUTH, TABLE) == pytest.approx(3 / 5)
    assert metrics.balanced_accuracy(TRUTH, TABLE) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert metrics.macro_f1(TRUTH, TABLE) == pytest.approx((4 / 6 + 2 / 4) / 2)
    assert metrics.confusion(TRUTH, TABLE).tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 0]]
    expected = -np.log([0.8, 0.6, 0.3, 0.9, 0.2]).mean()
    assert metrics.nll(TRUTH, TABLE) == pytest.approx(expected)
    assert metrics.brier(TRUTH[:1], TABLE[:1]) == pytest.approx(0.04 + 0.01 + 0.01)
    # each confidence is alone in its bin
    gaps = [0.2, 0.4, 0.5, 0.1, 0.7]
    assert metrics.ece(TRUTH, TABLE) == pytest.approx(sum(gaps) / 5)
    # right: .8 .6 .9, wrong: .5 .7; only (.6, .7) of the six pairs is in the wrong order
    assert metrics.auroc_correct(TRUTH, TABLE) == pytest.approx(5 / 6)


def test_conformal_sets_by_hand():
    assert metrics.coverage(TRUTH, SETS) == pytest.approx(4 / 5)
    assert metrics.mean_set_size(SETS) == pytest.approx((1 + 2 + 2 + 1 + 1) / 5)
    assert metrics.coverage_per_class(TRUTH, SETS) == [1.0, 0.5, None]


def test_coverage_table_by_hand():
    """Limits of .6 on 1 - p let in what is likelier than .4; class a may have any probability."""
    limits = {("all", 0.5): np.full(3, 0.6), ("class", 0.9): np.array([1.0, 0.35, 0.35])}
    first, second = metrics.coverage_table(TRUTH, TABLE, limits, NAMES)
    assert (first["sets"], first["asked"], first["coverage"]) == ("all", 0.5, 3 / 5)
    assert first["mean_set_size"] == 1.0
    assert first["furthest"] == {"class": "a", "coverage": 2 / 3}
    assert second["coverage"] == 4 / 5  # the last cell is of class b, at .2
    assert second["furthest"] == {"class": "b", "coverage": 0.5}
    assert second["empty"] == 0
    assert second["coverage_ci95"] == list(binomial_interval(4, 5))


def test_per_class_by_hand():
    found = metrics.per_class(TRUTH, TABLE, NAMES, SETS)
    assert found["a"] == {
        "n": 3,
        "recall": pytest.approx(2 / 3),
        "recall_ci95": list(binomial_interval(2, 3)),
        "precision": pytest.approx(2 / 3),
        "f1": pytest.approx(2 / 3),
        "coverage": 1.0,
    }
    undefined = dict.fromkeys(("recall", "recall_ci95", "precision", "f1", "coverage"))
    assert found["c"] == {"n": 0} | undefined


def test_risk_coverage_by_hand():
    answered, wrong = metrics.risk_coverage(TRUTH, TABLE)
    assert answered == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert wrong == pytest.approx([0, 0, 1 / 3, 1 / 4, 2 / 5])  # .9 .8 .7 .6 .5


def test_cells_of_equal_confidence_have_no_order():
    same = np.array([[0.6, 0.4], [0.6, 0.4]])
    for truth in (np.array([0, 1]), np.array([1, 0])):
        assert metrics.risk_coverage(truth, same)[1] == pytest.approx([0.5, 0.5])
        assert metrics.auroc_correct(truth, same) == 0.5


def test_reliability_is_what_the_calibration_error_averages():
    truth, table = random_answers(3)
    bins = metrics.reliability(truth, table)
    assert sum(b.n for b in bins) == len(truth)
    assert all(b.low < b.confidence <= b.high for b in bins)
    total = sum(b.n * abs(b.confidence - b.accuracy) for b in bins) / len(truth)
    assert metrics.ece(truth, table) == pytest.approx(total)


def test_equal_mass_bins():
    """Two bins of two cells each: (.6, .7) with one right, (.8, .9) with both right."""
    table = np.array([[0.6, 0.4], [0.7, 0.3], [0.8, 0.2], [0.9, 0.1]])
    found = metrics.ece(np.array([0, 1, 0, 0]), table, bins=2, equal_mass=True)
    assert found == pytest.approx((2 * abs(0.65 - 0.5) + 2 * abs(0.85 - 1)) / 4)


def test_a_probability_of_zero_keeps_nll_finite():
    assert metrics.nll(np.array([1]), np.array([[1.0, 0.0]])) == pytest.approx(-math.log(1e-12))


# ------------------------------------------------------------------------------- another library


@pytest.mark.parametrize("seed", range(4))
def test_scikit_learn_agrees(seed):
    truth, table = random_answers(seed)
    named, confidence = table.argmax(axis=1), table.max(axis=1)
    precision, recall, f1, n = oracle.precision_recall_fscore_support(truth, named)
    assert metrics.accuracy(truth, table) == pytest.approx(oracle.accuracy_score(truth, named))
    assert metrics.balanced_accuracy(truth, table) == pytest.approx(
        oracle.balanced_accuracy_score(truth, named)
    )
    assert metrics.macro_f1(truth, table) == pytest.approx(
        oracle.f1_score(truth, named, average="macro")
    )
    assert metrics.nll(truth, table) == pytest.approx(oracle.log_loss(truth, table))
    assert metrics.brier(truth, table) == pytest.approx(
        sum(oracle.brier_score_loss(truth == k, table[:, k]) for k in range(5))
    )
    assert metrics.auroc_correct(truth, table) == pytest.approx(
        oracle.roc_auc_score(named == truth, confidence)
    )
    np.testing.assert_array_equal(
        metrics.confusion(truth, table), oracle.confusion_matrix(truth, named)
    )
    found = metrics.per_class(truth, table, "abcde").values()
    assert [c["precision"] for c in found] == pytest.approx(precision)
    assert [c["recall"] for c in found] == pytest.approx(recall)
    assert [c["f1"] for c in found] == pytest.approx(f1)
    assert [c["n"] for c in found] == n.tolist()


def test_absent_classes_are_left_out_as_in_scikit_learn():
    truth, table = random_answers(0)
    kept = truth != 2
    truth, table = truth[kept], table[kept]
    named = table.argmax(axis=1)
    present = [0, 1, 3, 4]
    assert 2 in named
    assert metrics.macro_f1(truth, table) == pytest.approx(
        oracle.f1_score(truth, named, average="macro", labels=present)
    )
    assert metrics.balanced_accuracy(truth, table) == pytest.approx(
        oracle.recall_score(truth, named, average="macro", labels=present)
    )


# -------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    ("n", "percent", "low", "high"),
    [
        (100, 0, 0, 3.6),
        (100, 1, 0, 5.4),
        (100, 5, 1.6, 11.3),
        (100, 10, 4.9, 17.6),
        (100, 50, 39.8, 60.2),
        (200, 1, 0.1, 3.6),
        (200, 5, 2.4, 9.0),
        (200, 10, 6.2, 15.0),
        (1000, 1, 0.5, 1.8),
        (1000, 10, 8.2, 12.0),
    ],
)
def test_the_printed_table_of_the_differential(n, percent, low, high):
    """Limits of a share, in percent, as haematology prints them for counts of n cells."""
    found = [round(100 * bound, 1) for bound in binomial_interval(percent * n // 100, n)]
    assert found == [low, high]


@given(st.integers(1, 500), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
def test_the_interval_inverts_the_binomial_tail(n, share, level):
    """At the lower limit, seeing this many or more has a chance of exactly (1 - level) / 2."""
    from scipy.stats import binom

    successes = round(share * n)
    low, high = binomial_interval(successes, n, level)
    assert low <= successes / n <= high
    if successes > 0:
        assert binom.sf(successes - 1, n, low) == pytest.approx((1 - level) / 2, rel=1e-6)
    if successes < n:
        assert binom.cdf(successes, n, high) == pytest.approx((1 - level) / 2, rel=1e-6)


def test_no_trials_say_nothing():
    assert binomial_interval(0, 0) == (0, 1)
    with pytest.raises(DataError, match="impossible"):
        binomial_interval(3, 2)


def test_the_interval_of_one_share_is_its_own():
    for hits in (0, 7, 30):
        found = mean_interval(np.array([hits]), np.array([30]))
        assert found == pytest.approx(binomial_interval(hits, 30))


def test_the_interval_of_a_mean_by_hand():
    """Distances to the ends of .8 of 10 and of 1 of 4, halved, added in squares."""
    (low, high), (least, _) = binomial_interval(8, 10), binomial_interval(4, 4)
    found = mean_interval(np.array([8, 4]), np.array([10, 4]))
    below = math.hypot(0.8 - low, 1 - least) / 2
    assert found == pytest.approx((0.9 - below, min(1, 0.9 + (high - 0.8) / 2)))


@pytest.mark.parametrize(
    ("n", "recalls"),
    [
        ([100, 120, 100, 3, 1], [0.8, 0.8, 0.8, 0.6, 0.6]),
        ([20] * 8, [0.95] * 8),
        ([300] * 8, [0.97] * 8),
    ],
    ids=["two rare classes", "small classes", "large classes"],
)
def test_intervals_of_balanced_accuracy_hold_the_truth(n, recalls):
    """As often as they say, by 1,000 draws, or at worst nearly so."""
    rng, n, recalls = np.random.default_rng(0), np.array(n), np.array(recalls)
    ends = np.array([mean_interval(hits, n) for hits in rng.binomial(n, recalls, (1000, len(n)))])
    assert ((ends[:, 0] <= recalls.mean()) & (recalls.mean() <= ends[:, 1])).mean() > 0.92


def test_balanced_interval_counts_classes():
    truth = np.array([0, 0, 0, 3, 3])
    right = np.array([True, False, True, True, True])
    wanted = mean_interval(np.array([2, 2]), np.array([3, 2]))
    assert balanced_interval(truth, right) == wanted


def test_draws_that_do_not_differ_give_no_interval():
    assert percentiles(np.full(9, 0.5)) is None
    assert percentiles(np.full(9, np.nan)) is None
    assert percentiles(np.array([np.nan, *np.linspace(0, 1, 101)])) == pytest.approx([0.025, 0.975])


def test_bootstrap_of_a_mean_is_as_wide_as_theory_says():
    """Of the NLL: 2 x 1.96 standard errors, with the spread within the classes."""
    truth, table = random_answers(1, n=2000)
    found = metrics.summarise(truth, table, "abcde", draws=4000)
    surprise = -np.log(table[np.arange(2000), truth])
    within = sum((truth == k).sum() * surprise[truth == k].var() for k in range(5))
    low, high = found["nll_ci95"]
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(within) / 2000, rel=0.05)
    assert (low + high) / 2 == pytest.approx(found["nll"], rel=0.01)


def test_a_stratified_resample_keeps_the_mix_of_classes():
    """All cells of a class alike: only the mix of classes could make resamples differ."""
    truth, table = np.array([0] * 30 + [1] * 70), np.tile([0.9, 0.1], (100, 1))
    found = metrics.summarise(truth, table, "ab")
    assert found["nll"] == pytest.approx(-0.3 * math.log(0.9) - 0.7 * math.log(0.1))
    assert found["nll_ci95"] is None


@pytest.mark.parametrize("seed", range(3))
def test_calibration_interval_holds_its_own_value(seed):
    """In a calibrated model resampling alone adds to the error; the shift is taken back."""
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.5, 1, 1000)
    truth = (rng.random(1000) > confidence).astype(int)
    found = metrics.summarise(truth, np.stack([confidence, 1 - confidence], axis=1), "ab")
    low, high = found["ece_ci95"]
    assert (low + high) / 2 == pytest.approx(found["ece"], rel=0.15)


# ------------------------------------------------------------------------------- all of it, JSON

KEYS = [
    "accuracy",
    "balanced_accuracy",
    "macro_f1",
    "ece",
    "nll",
    "brier",
    "auroc_correct",
    "coverage",
    "mean_set_size",
]


def test_summary_has_every_key_and_is_json():
    truth, table = random_answers(0)
    found = metrics.summarise(truth, table, "abcde", table >= 0.1)
    assert set(found) == {"n", "per_class", "confusion", *KEYS, *(f"{key}_ci95" for key in KEYS)}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for key in KEYS:
        low, high = found[f"{key}_ci95"]
        assert low < found[key] < high
    assert found["confusion"]["classes"] == list("abcde")
    assert np.sum(found["confusion"]["counts"]) == found["n"] == 400


def test_summary_says_what_the_functions_say():
    truth, table = random_answers(5)
    sets = table >= 0.1
    found = metrics.summarise(truth, table, "abcde", sets)
    for key in KEYS[:7]:
        assert found[key] == pytest.approx(getattr(metrics, key)(truth, table))
    assert found["coverage"] == metrics.coverage(truth, sets)
    assert found["mean_set_size"] == pytest.approx(metrics.mean_set_size(sets))
    assert found["per_class"] == metrics.per_class(truth, table, "abcde", sets)


@settings(max_examples=10, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_order_of_the_cells_changes_nothing(random):
    truth, table = random_answers(2, n=60)
    order = random.sample(range(60), 60)
    first = metrics.summarise(truth, table, "abcde", table >= 0.1, draws=50)
    assert metrics.summarise(
        truth[order], table[order], "abcde", (table >= 0.1)[order], draws=50
    ) == (first)
    np.testing.assert_allclose(
        metrics.risk_coverage(truth[order], table[order]), metrics.risk_coverage(truth, table)
    )


def test_the_seed_decides_the_draws():
    truth, table = random_answers(2)
    one, same, other = (metrics.summarise(truth, table, "abcde", seed=s) for s in (1, 1, 2))
    assert one == same
    assert one["nll"] == other["nll"]
    assert one["nll_ci95"] != other["nll_ci95"]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_ranges(n, k, seed):
    rng = np.random.default_rng(seed)
    truth, table = rng.integers(0, k, n), rng.dirichlet(np.ones(k), n)
    found = metrics.summarise(truth, table, "abcdef"[:k], table > 0.3, draws=20)
    json.dumps(found, allow_nan=False)
    for key in ("accuracy", "balanced_accuracy", "macro_f1", "ece", "coverage"):
        assert 0 <= found[key] <= 1
    assert 0 <= found["brier"] <= 2
    assert found["nll"] >= 0
    assert found["auroc_correct"] is None or 0 <= found["auroc_correct"] <= 1
    assert 0 <= metrics.ece(truth, table, equal_mass=True) <= 1


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30))
def test_a_perfect_model(labels):
    truth = np.array(labels)
    table = np.eye(3)[truth]
    found = metrics.summarise(truth, table, NAMES, table > 0, draws=10)
    for key in ("accuracy", "balanced_accuracy", "macro_f1", "coverage", "mean_set_size"):
        assert found[key] == 1
    for key in ("ece", "nll", "brier"):
        assert found[key] == 0
    assert found["auroc_correct"] is None
    assert found["auroc_correct_ci95"] is None
    low, high = found["balanced_accuracy_ci95"]
    assert 0 < low < high == 1


def test_small_integer_labels_do_not_overflow():
    truth = np.array([120, 0], dtype=np.int8)
    table = np.eye(121)[[120, 0]]
    assert metrics.confusion(truth, table)[120, 120] == 1


def test_without_sets_nothing_is_said_of_them():
    found = metrics.summarise(TRUTH, TABLE, NAMES)
    assert found["coverage"] is found["mean_set_size_ci95"] is None
    assert found["per_class"]["a"]["coverage"] is None


@pytest.mark.parametrize(
    ("truth", "table", "sets", "message"),
    [
        (TRUTH[:0], TABLE[:0], None, "no cells"),
        (TRUTH, TABLE[:4], None, r"probabilities have shape \(4, 3\)"),
        (TRUTH, TABLE, SETS[:, :2], r"sets have shape \(5, 2\)"),
        (TRUTH + 2, TABLE, None, "3 classes allow 0 to 2"),
        (TRUTH - 1, TABLE, None, "from -1 to 0"),
        (TRUTH, 2 * TABLE, None, "sum to 1"),
        (TRUTH, TABLE * np.nan, None, "sum to 1"),
    ],
)
def test_what_cannot_be_evaluated(truth, table, sets, message):
    with pytest.raises(DataError, match=message):
        metrics.summarise(truth, table, NAMES, sets)
