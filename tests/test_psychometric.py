"""The psychometric function against a transcription, closed forms, scipy and simulated answers."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import typer
from helpers import cli
from scipy import optimize, stats

from cytodiffusion.cli.main import app
from cytodiffusion.errors import CytoDiffusionError, DataError, OutputError, SettingsError
from cytodiffusion.evaluate import plots
from cytodiffusion.evaluate.answers import Judged, read_all, read_answers
from cytodiffusion.evaluate.psychometric import FAMILIES, GRID, Analysis, Curve, analyse, fit
from cytodiffusion.release import commit

WEIBULL = Curve("weibull", (0.5, 4.0), guess=0.125, lapse=0.04)
BETA = Curve("beta", (4.0, 3.0), guess=0.125, lapse=0.04)
HOSTILE = '"><script>alert(1)</script>{{ 7 * 7 }} "#$x$'


def simulate(curve: Curve, n: int, seed: int) -> Judged:
    """Answers of somebody who follows the curve, a third of them nearly certain."""
    rng = np.random.default_rng(seed)
    x = np.where(rng.random(n) < 1 / 3, rng.uniform(0.9, 1, n), rng.uniform(0.1, 0.9, n))
    return Judged.of(x, rng.random(n) < curve(x))


def finish(work) -> Analysis:
    """What a generator returns."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def analysis(judged: Judged, family: str = "weibull", guess: float | None = 0.125, **more):
    settings = {"level": 0.9, "seed": 0, "draws": 60} | more
    return finish(analyse(fit(judged, family=family, guess=guess), **settings))


def uncertainty(out: Path, predictions: list[Path], *flags: str, **options: object) -> int:
    """The command, with its errors as they are; returns the exit code."""
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    words = ["bench", "uncertainty", *map(str, predictions), "-o", str(out), *words, *flags]
    return typer.main.get_command(app).main(words, standalone_mode=False) or 0


def groups(table: dict[float, tuple[int, int]]) -> Judged:
    """{confidence: (right, answers)}."""
    x = np.repeat(list(table), [n for _, n in table.values()])
    return Judged.of(x, np.concatenate([np.arange(n) < k for k, n in table.values()]))


# -------------------------------------------------------------------------------------- the curve


def test_the_curve_by_hand():
    """At the scale, Weibull has risen by 1 - 1/e; the beta function of 1 and 1 is a straight line."""
    at_scale = WEIBULL(np.array([0.0, 0.5, 1.0]))
    assert at_scale[0] == 0.125
    assert at_scale[1] == pytest.approx(0.125 + 0.835 * (1 - math.exp(-1)))
    assert at_scale[2] == pytest.approx(0.96, abs=1e-6)
    line = Curve("beta", (1.0, 1.0), guess=0.2, lapse=0.1)
    assert line(GRID) == pytest.approx(0.2 + 0.7 * GRID)


@pytest.mark.parametrize(("p", "q"), [(0.3, 0.7), (0.5, 1.0), (0.9, 12.0)])
def test_scipy_has_the_same_distributions(p, q):
    weibull = Curve("weibull", (p, q), guess=0.0, lapse=0.0)
    beta = Curve("beta", (p, q), guess=0.0, lapse=0.0)
    assert weibull(GRID) == pytest.approx(stats.weibull_min.cdf(GRID, q, scale=p))
    assert beta(GRID) == pytest.approx(stats.beta.cdf(GRID, p, q))


def test_steep_curves_are_steps():
    x = np.array([0.0, 0.4, 0.6, 1.0])
    steps = [0.1, 0.1, 0.9, 0.9]
    assert Curve("weibull", (0.5, 100.0), 0.1, 0.1)(x) == pytest.approx(steps, abs=1e-6)
    assert Curve("beta", (1000.0, 1000.0), 0.1, 0.1)(x) == pytest.approx(steps, abs=1e-6)


@pytest.mark.parametrize("curve", [WEIBULL, BETA], ids=lambda curve: curve.family)
def test_the_threshold_undoes_the_curve(curve):
    for x in (0.2, 0.5, 0.7):
        level = float(curve(np.array([x]))[0])
        assert curve.threshold(level) == pytest.approx(x)
    assert curve.threshold(0.1) == 0  # luck alone is better
    assert curve.threshold(0.97) == math.inf  # lapses forbid it
    late = Curve("weibull", (2.0, 1.0), guess=0.0, lapse=0.0)  # F(1) = 1 - exp(-1/2) = .39
    assert late.threshold(0.5) == math.inf


def test_the_likelihood_is_the_product_over_answers():
    x, right = [0.2, 0.9, 0.5, 0.9, 1.0], [True, True, False, False, True]
    expected = 0.0
    for one, correct in zip(x, right, strict=True):
        chance = 0.125 + (1 - 0.125 - 0.04) * (1 - math.exp(-((one / 0.5) ** 4)))
        expected += math.log(chance if correct else 1 - chance)
    judged = Judged.of(np.array(x), np.array(right))
    assert judged.log_likelihood(WEIBULL) == pytest.approx(expected)


def test_the_deviance_is_that_of_the_binned_shares():
    """Four confidences of ten answers, one bin each: 2 sum of k log(k/np) + (n-k) log(...)."""
    table = {0.2: (2, 10), 0.4: (4, 10), 0.6: (10, 10), 0.8: (9, 10)}
    expected = 0.0
    for x, (k, n) in table.items():
        p = float(WEIBULL(np.array([x]))[0])
        expected += 2 * (stats.binom.logpmf(k, n, k / n) - stats.binom.logpmf(k, n, p))
    judged = groups(table)
    assert [(b.n, b.accuracy) for b in judged.bins()] == [(10, k / 10) for k in (2, 4, 10, 9)]
    assert judged.deviance(WEIBULL) == pytest.approx(expected)


# ---------------------------------------------------------------------------------------- the fit


@pytest.mark.parametrize("true", [WEIBULL, BETA], ids=lambda curve: curve.family)
def test_shares_on_a_curve_give_that_curve(true):
    """Three confidences and three numbers to fit: the shares decide them exactly."""
    x, n = np.array([0.3, 0.5, 0.95]), 100_000
    k = (n * true(x)).round().astype(int)
    found = fit(Judged(x, np.full(3, n), k), family=true.family, guess=0.125)
    assert found.curve.parameters() == pytest.approx(true.parameters(), rel=0.01)
    assert found.at_bounds == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("guess", [0.125, None])
def test_no_other_search_does_better(family, guess):
    judged = simulate(WEIBULL, 300, seed=5)
    found = fit(judged, family=family, guess=guess)
    low, high = (0.125, 0.125) if guess else (0, 0.5)

    def loss(theta):
        p, q = np.exp(theta[:2])
        return -judged.log_likelihood(Curve(family, (float(p), float(q)), low + theta[3], theta[2]))

    ranges = [np.log(ends) for ends in FAMILIES[family].bounds] + [(0, 0.5), (0, high - low + 1e-9)]
    oracle = optimize.differential_evolution(loss, ranges, seed=0, maxiter=60, popsize=8)
    assert found.log_likelihood >= -oracle.fun - 1e-3
    assert found.free == (3 if guess else 4)
    assert found.aic == pytest.approx(2 * found.free - 2 * found.log_likelihood)


@pytest.mark.parametrize("true", [WEIBULL, BETA], ids=lambda curve: curve.family)
@pytest.mark.parametrize("guess", [0.125, None])
def test_known_numbers_are_found(true, guess):
    """Within twice their intervals, four standard errors: for any seed, not for a lucky one."""
    found = analysis(simulate(true, 500, seed=1), true.family, guess, draws=40)
    known = true.parameters() | {"threshold": true.threshold(0.9)}
    intervals = found.intervals | {"threshold": found.threshold_ci95}
    for name, value in known.items():
        if name != "guess" or guess is None:
            low, high = intervals[name]
            assert abs(value - (low + high) / 2) <= high - low, name
    assert intervals["threshold"][1] - intervals["threshold"][0] < 0.3
    inside = (found.band[0] <= true(GRID)) & (true(GRID) <= found.band[1])
    assert inside.mean() > 0.5
    assert (found.band[0] <= found.fit.curve(GRID) + 1e-6).all()
    assert found.fit_p > 0.01


def test_a_given_guess_rate_is_kept_and_has_no_interval():
    found = analysis(simulate(WEIBULL, 200, seed=0), guess=0.25, draws=40)
    assert found.fit.curve.guess == 0.25
    assert found.intervals["guess"] is None


def test_the_order_of_the_answers_changes_nothing():
    rng = np.random.default_rng(0)
    x, right = rng.random(60), rng.random(60) < 0.6
    order = rng.permutation(60)
    first = analysis(Judged.of(x, right), draws=40).as_dict()
    assert analysis(Judged.of(x[order], right[order]), draws=40).as_dict() == first
    assert analysis(Judged.of(x, right), draws=40, seed=1).as_dict() != first


# -------------------------------------------------------------------------- how far to trust it


def test_intervals_cover_as_often_as_they_say():
    """Of 12 intervals, 95 % should hold the true threshold: fewer than 10 has a chance of 2 %."""
    true, held = WEIBULL.threshold(0.8), 0
    for seed in range(12):
        low, high = analysis(simulate(WEIBULL, 120, seed), level=0.8, draws=40).threshold_ci95
        held += low <= true <= high
    assert held >= 10


def test_the_judgement_of_the_fit():
    """Chances of a true curve are spread over [0, 1]; accuracy that falls has none."""
    good = [analysis(simulate(WEIBULL, 120, seed), draws=40).fit_p for seed in range(10)]
    assert 0.25 < np.mean(good) < 0.75  # 0.5 +- 2.7 standard errors
    falling = groups({0.2: (45, 50), 0.4: (40, 50), 0.6: (25, 50), 0.8: (10, 50), 1.0: (5, 50)})
    assert analysis(falling, draws=40).fit_p == pytest.approx(1 / 41)


def test_a_lapse_rate_of_zero_has_an_upper_end():
    """100 of 100 right where F is 1, the rest far below: (1 - lapse)^100 falls by exp(-1.92)."""
    judged = groups({0.1: (50, 400), 0.2: (51, 400), 0.3: (60, 400), 1.0: (100, 100)})
    found = analysis(judged, draws=40)
    assert found.fit.curve.lapse == pytest.approx(0, abs=1e-6)
    low, high = found.intervals["lapse"]
    assert low == 0
    assert high == pytest.approx(1 - math.exp(-stats.chi2.ppf(0.95, 1) / 200), rel=0.05)


def test_a_threshold_that_is_not_reached_is_said_to_be_so():
    poor = groups({0.2: (10, 60), 0.5: (20, 60), 0.8: (30, 60), 1.0: (36, 60)})
    told = analysis(poor, draws=40).as_dict()
    assert told["threshold"] is None
    assert told["threshold_ci95"][1] is None
    json.dumps(told, allow_nan=False)


def test_a_step_says_that_its_steepness_is_not_decided():
    step = groups({x / 20: (10 * (x > 10), 10) for x in range(1, 21)})
    told = analysis(step, guess=0.0, draws=40).as_dict()
    assert "shape" in told["at_bounds"]
    assert 0.5 < told["threshold"] < 0.56
    json.dumps(told, allow_nan=False)


X = np.linspace(0, 1, 50)


@pytest.mark.parametrize(
    ("x", "right", "told"),
    [
        (X, X >= 0, "All 50 answers are right.* No curve was fitted"),
        (X, X < 0, "All 50 answers are wrong"),
        (np.full(50, 0.7), X > 0.5, "have 1 different confidence, too few for 3 numbers"),
        (np.where(X > 0.5, 0.7, 0.2), X > 0.3, "have 2 different confidences"),
        (X[:19], X[:19] > 0.1, "19 answers are too few; give at least 20"),
        (100 * X, X > 0.5, "49 are not, the first is 2.04.* Divide percentages by 100"),
        (np.where(X > 0.9, np.nan, X), X > 0.5, "5 are not, the first is nan"),
    ],
)
def test_answers_without_a_curve(x, right, told):
    with pytest.raises(DataError, match=told) as error:
        fit(Judged.of(x, right), family="weibull", guess=0.125)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"family": "logit"}, "no family 'logit'. Choose weibull or beta"),
        ({"guess": 1.0}, r"lies in \[0, 1\), not 1.0"),
        ({"guess": math.nan}, "not nan"),
        ({"level": 1.0}, r"an accuracy in \(0, 1\), not 1.0"),
    ],
)
def test_settings_that_will_not_do(wrong, told):
    with pytest.raises(SettingsError, match=told):
        analysis(simulate(WEIBULL, 50, seed=0), **wrong)


# ------------------------------------------------------------------------------------- the tables


def write_csv(path: Path, columns: str, lines: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns.split(","), *lines])
    return path


def people(path: Path, *readers: str, n: int = 60) -> Path:
    """A table in which every reader follows the Weibull curve."""
    rng = np.random.default_rng(len(readers))
    lines = []
    for reader in readers:
        x = rng.choice([0.2, 0.4, 0.6, 0.8, 1.0], n)
        right = rng.random(n) < WEIBULL(x)
        words = [("No", "YES"), ("0", "1"), ("false", "True")]
        lines += [[x[i], words[i % 3][int(right[i])], reader] for i in range(n)]
    return write_csv(path, "confidence,correct,reader", lines)


def evaluated(folder: Path, n: int = 200) -> Path:
    """An OUT folder of `evaluate`, with one image that could not be read."""
    rng = np.random.default_rng(7)
    x = rng.uniform(0.2, 1, n)
    named = np.where(rng.random(n) < WEIBULL(x), "a", "b")
    lines = [[f"{i}.png", "a", named[i], x[i], 0.5, 0.5, "ok"] for i in range(n)]
    lines.append(["x.png", "a", "", "", "", "", "unreadable"])
    write_csv(
        folder / "predictions.csv", "path,label,predicted,confidence,prob_a,prob_b,flag", lines
    )
    return folder


def test_the_folder_of_evaluate(tmp_path):
    (found,) = read_answers(evaluated(tmp_path / "eval"))
    assert (found.name, found.classes, found.left_out) == ("eval", 2, 1)
    assert found.judged.n.sum() == 200
    lines = (tmp_path / "eval" / "predictions.csv").read_text().splitlines()
    assert found.judged.right.sum() == sum(",a,a," in line for line in lines)


def test_words_for_right_and_wrong(tmp_path):
    words = ["1", "true", "Yes", "0", "FALSE", " no"]
    lines = [[i / 10, word, "me"] for i, word in enumerate(words)]
    path = write_csv(tmp_path / "x.csv", "confidence,correct,notes", lines)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as spreadsheets save it
    (found,) = read_answers(path)
    assert found.judged.right.tolist() == [1, 1, 1, 0, 0, 0]
    assert (found.name, found.classes) == ("x", None)


def test_one_entry_for_each_reader_under_names_that_differ(tmp_path):
    first, second = (
        people(tmp_path / "1" / "p.csv", "Ann", "Bob"),
        people(tmp_path / "p.csv", "Ann"),
    )
    names = [found.name for found in read_all([first, second])]
    assert names == [f"p, Ann ({first})", "p, Bob", f"p, Ann ({second})"]
    with pytest.raises(DataError, match="given twice"):
        read_all([first, first])


@pytest.mark.parametrize(
    ("columns", "line", "told"),
    [
        (
            "confidence,correct",
            ["90", "1"],
            "line 3: the confidence '90' is not a number from 0 to 1",
        ),
        ("confidence,correct", ["nan", "1"], "line 3: the confidence 'nan' is not"),
        ("confidence,correct", ["", "1"], "line 3: the confidence '' is not"),
        ("confidence,correct", ["0.5", "maybe"], "line 3: 'maybe' is none of 1, true, yes, 0"),
        ("confidence,correct,reader", ["0.5", "1", ""], "line 3: the reader is missing"),
        (
            "label,predicted,confidence",
            ["", "a", "0.5"],
            "line 3: the label or the predicted class",
        ),
        ("confidence,correct", ["0.5"], "Line 3 of .* has 1 fields, its first line has 2"),
        (
            "path,predicted,confidence",
            ["x", "a", "0.5"],
            "names cells without labels: run `evaluate`",
        ),
        ("sure,right", ["0.5", "1"], "has the columns sure, right. Give the OUT folder of"),
    ],
)
def test_bad_lines_are_named(tmp_path, columns, line, told):
    fine = {"confidence": "0.5", "correct": "1", "reader": "Ann"}
    path = write_csv(
        tmp_path / "x.csv", columns, [[fine.get(c, "a") for c in columns.split(",")], line]
    )
    with pytest.raises(DataError, match=told) as error:
        read_answers(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("divider", [";", "\t"])
def test_tables_of_other_programs(tmp_path, divider):
    """As spreadsheets write them where the comma stands in numbers."""
    rows = [["0.5", "1", "Ann"], ["0.9", "0", "Ann"]]
    plain = write_csv(tmp_path / "plain.csv", "confidence,correct,reader", rows)
    other = tmp_path / "other" / "plain.csv"
    other.parent.mkdir()
    other.write_text(plain.read_text().replace(",", divider))
    (one,), (same,) = read_answers(plain), read_answers(other)
    assert one.name == same.name
    for name in ("confidence", "right"):
        assert getattr(one.judged, name).tolist() == getattr(same.judged, name).tolist()


def test_many_bad_lines_are_counted(tmp_path):
    path = write_csv(tmp_path / "x.csv", "confidence,correct", [["2", "1"]] * 9)
    with pytest.raises(DataError, match=r"line 6: .* and 4 more lines\. Mend"):
        read_answers(path)


@pytest.mark.parametrize("content", [None, b"", b"confidence,correct\n", b"\xff\xfe\x00"])
def test_tables_that_hold_nothing(tmp_path, content):
    path = tmp_path / "x.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.csv"):
        read_answers(path)


# ---------------------------------------------------------------------------------- the command


def test_a_model_beside_people(tmp_path, capsys):
    table = people(tmp_path / "people.csv", "Ann", HOSTILE)
    out = tmp_path / "out"
    uncertainty(out, [evaluated(tmp_path / "eval"), table], "--json", draws=40)
    told = capsys.readouterr()
    values = json.loads((out / "results.json").read_text())
    assert json.loads(told.out) == values
    assert [row["name"] for row in values["curves"]] == [
        "eval", "people, Ann", f"people, {HOSTILE}",
    ]  # fmt: skip
    model, person = values["curves"][:2]
    assert (model["n"], model["left_out"], person["n"]) == (200, 1, 60)
    assert model["fit"]["guess"] == person["fit"]["guess"] == 0.5
    assert "people, Ann: the table does not tell the number of classes: guess 1/2" in told.err
    sums = {f: sum(row["aic_of_family"][f] for row in values["curves"]) for f in FAMILIES}
    assert {row["fit"]["family"] for row in values["curves"]} == {min(sums, key=sums.get)}
    assert model["fit"]["aic"] == model["aic_of_family"][model["fit"]["family"]]
    assert 0.5 < model["auroc_correct"] < 1
    low, high = model["auroc_correct_ci95"]
    assert low < model["auroc_correct"] < high


def test_the_weights_that_answered_are_named(tmp_path):
    folder, out = evaluated(tmp_path / "eval"), tmp_path / "out"
    (folder / "metrics.json").write_text(json.dumps({"weights_sha256": "ab" * 32}))
    uncertainty(out, [folder, people(tmp_path / "people.csv", "Ann")], draws=40)
    values = json.loads((out / "results.json").read_text())
    assert values["weights"] == {"eval": "ab" * 6}
    assert values["commit"] == commit()
    assert "ab" * 6 in (out / "report.html").read_text("utf-8")
    (folder / "metrics.json").write_text("{}")
    with pytest.raises(DataError, match="does not say which weights"):
        uncertainty(out, [folder], draws=40)


def test_the_page(tmp_path):
    out = tmp_path / "out"
    uncertainty(out, [people(tmp_path / "people.csv", "Ann", HOSTILE)], draws=40, guess="fit")
    page = (out / "report.html").read_text("utf-8")
    row = json.loads((out / "results.json").read_text())["curves"][0]
    fitted = row["fit"]
    assert page.startswith("<!DOCTYPE html>")
    assert "Research use only. Not a medical device; not for diagnosis." in page
    assert page.count("<svg ") == 3  # both together, and each alone
    assert "prefers-color-scheme: dark" in page
    assert "<script" not in page
    assert "{{" in page  # the reader's name is text, not a template
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'"#([\w-]+)"', page)) | set(re.findall(r"url\(#([\w-]+)", page)) <= set(
        ids
    )
    assert not re.search(r"(src|href)=\"(?!#)|url\((?!#)|@import", page)
    for name in ("guess", "lapse"):
        low, high = fitted[f"{name}_ci95"]
        assert f"{fitted[name]:.3f} ({low:.3f} – {high:.3f})" in page  # noqa: RUF001
    assert f"cytodiffusion bench uncertainty {tmp_path}" in page


def test_the_same_answers_give_the_same_bytes(tmp_path):
    table = people(tmp_path / "people.csv", "Ann")
    uncertainty(tmp_path / "out", [table], draws=40, guess="0.125")
    before = [(tmp_path / "out" / name).read_bytes() for name in ("results.json", "report.html")]
    uncertainty(tmp_path / "out", [table], draws=40, guess="0.125")
    assert before == [
        (tmp_path / "out" / name).read_bytes() for name in ("results.json", "report.html")
    ]


def test_who_has_no_curve_is_named_and_the_rest_is_done(tmp_path, capsys):
    perfect = write_csv(tmp_path / "perfect.csv", "confidence,correct", [[0.9, 1], [1, 1]] * 20)
    out = tmp_path / "out"
    assert (
        uncertainty(out, [people(tmp_path / "p.csv", "Ann"), perfect], draws=40, guess=0.125) == 1
    )
    assert "Not fitted: perfect: All 40 answers are right" in capsys.readouterr().err
    rows = json.loads((out / "results.json").read_text())["curves"]
    assert rows[0]["fit"] is not None
    assert rows[1]["fit"] is None
    assert rows[1]["auroc_correct"] is None
    assert "All 40 answers are right" in rows[1]["problem"]
    assert "no curve: All 40 answers are right" in (out / "report.html").read_text()


def test_calls_that_are_wrong_write_nothing(tmp_path):
    table, folder = people(tmp_path / "p.csv", "Ann"), evaluated(tmp_path / "eval")
    few = write_csv(tmp_path / "few.csv", "confidence,correct", [[0.9, 1]])
    out = tmp_path / "out"
    for predictions, more, told in [
        ([], {}, "nothing to fit. Give the OUT folder"),
        ([few], {}, "few: 1 answers are too few"),
        ([table], {"guess": "luck"}, "--guess takes a number, fit or auto, not 'luck'"),
        ([table], {"family": "logit"}, "no family 'logit'"),
        ([table], {"level": 2.0}, "an accuracy in"),
        ([tmp_path / "no.csv"], {}, "no.csv cannot be read"),
    ]:
        with pytest.raises(CytoDiffusionError, match=told):
            uncertainty(out, predictions, draws=40, **more)
        assert not out.exists()
    with pytest.raises(SettingsError, match="its report would be lost"):
        uncertainty(folder, [table], draws=40)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="it is a file"):
        uncertainty(tmp_path / "file", [table], draws=40)


def test_from_the_command_line(tmp_path):
    table, out = people(tmp_path / "p.csv", "Ann"), tmp_path / "out"
    said = cli("bench", "uncertainty", table, "-o", out, "--guess=0.125", "--draws=40", "--json")
    assert said.code == 0
    assert [row["name"] for row in said.json["curves"]] == ["p, Ann"]
    wrong = cli("bench", "uncertainty", tmp_path / "no.csv", "-o", out)
    assert wrong.code == 2
    assert "no.csv cannot be read" in wrong.complaint


def test_lines_can_be_told_apart():
    assert len({plots.key(i) for i in range(12)}) == 12
    assert all("var(--" in plots.key(i) or "currentColor" in plots.key(i) for i in range(12))
