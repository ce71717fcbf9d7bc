"""Real or drawn: a set that gives nothing away, answers in a real browser, numbers known beforehand."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import CLASSES, Result, cli, contents, disc, tiny_model, write_discs
from PIL import Image
from scipy.stats import norm
from sklearn.metrics import cohen_kappa_score

from cytodiffusion.bundle import ZOO, load
from cytodiffusion.data.images import Preprocess, decode
from cytodiffusion.data.mark import Mark, marked_png
from cytodiffusion.data.readers import read_dataset
from cytodiffusion.data.sample import HeldBytes, Sample
from cytodiffusion.errors import DataError
from cytodiffusion.evaluate.authenticity import (
    Table,
    agreement,
    cohen,
    discrimination,
    fleiss,
    summarise,
)
from cytodiffusion.evaluate.blinded import (
    COLUMNS,
    KEY,
    Answer,
    Gathered,
    Truth,
    blind,
    gather,
    plain_png,
    read_answers,
    read_key,
)
from cytodiffusion.release import commit

DEMO = ZOO.parent / "demo"
EACH = 2  # real cells of each of three classes: twelve cells with the drawn ones


def finish(work) -> Any:
    """What a generator returns."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def everyone(n: int) -> np.ndarray:
    return np.arange(n)[None]


# --- told apart ----------------------------------------------------------------------------------


def test_discrimination_by_hand() -> None:
    """15 of 20 drawn and 4 of 30 real cells called drawn; half a cell and one are added."""
    z = norm.ppf([15.5 / 21, 4.5 / 31])
    found = discrimination(*np.array([[15], [20], [4], [30]]))
    assert np.ravel(found) == pytest.approx([z[0] - z[1], -(z[0] + z[1]) / 2])


def test_discrimination_of_who_guesses_and_who_always_says_drawn() -> None:
    d_prime, c = discrimination(*np.array([[10, 20, 10, 20], [20, 20, 20, 20]]).T)
    assert d_prime == pytest.approx([0, 0], abs=1e-12)
    assert c == pytest.approx([0, -norm.ppf(20.5 / 21)])


def table(said: list[list[int]], drawn: list[int]) -> Table:
    """Readers' answers, all at the same confidence, each after the seconds of its place."""
    key = {f"c{i}": Truth(bool(d), CLASSES[i % 2]) for i, d in enumerate(drawn)}
    answers = {
        f"reader {r}": {
            f"c{i}": Answer(bool(a), 0.75, float(i)) for i, a in enumerate(row) if a >= 0
        }
        for r, row in enumerate(said)
    }
    return Table.of(key, answers)


def test_numbers_of_one_reader_by_hand() -> None:
    """Drawn: 3 of 4 right; real: 1 of 2, one not answered."""
    told = summarise(table([[1, 1, 1, 0, 1, 0, -1]], [1, 1, 1, 1, 0, 0, 0]), "one")
    assert (told["n"], told["unanswered"], told["median_seconds"]) == (6, 1, 2.5)
    assert told["accuracy"] == pytest.approx(4 / 6)
    assert (told["sensitivity"], told["specificity"]) == (0.75, 0.5)
    z = norm.ppf([3.5 / 5, 1.5 / 3])
    assert told["d_prime"] == pytest.approx(z[0] - z[1])
    assert told["criterion"] == pytest.approx(-(z[0] + z[1]) / 2)
    first, second = told["classes"]  # eosinophil: cells 0, 2, 4; lymphocyte: 1, 3, 5
    assert (first["accuracy"], first["sensitivity"], first["specificity"]) == (2 / 3, 1.0, 0.0)
    assert (second["accuracy"], second["sensitivity"], second["specificity"]) == (2 / 3, 0.5, 1.0)


def test_two_readers_who_answer_alike_know_no_more_than_one() -> None:
    """The exact interval takes their answers for independent; the resamples of cells do not."""
    rng = np.random.default_rng(0)
    drawn = [0, 1] * 40
    row = [d if rng.random() < 0.7 else 1 - d for d in drawn]
    one, two = summarise(table([row], drawn), "one"), summarise(table([row, row], drawn), "two")
    for name in ("accuracy", "accuracy_cells_ci95"):
        assert two[name] == pytest.approx(one[name])
    assert np.ptp(two["accuracy_ci95"]) < 0.8 * np.ptp(one["accuracy_ci95"])
    assert np.ptp(one["accuracy_cells_ci95"]) == pytest.approx(
        np.ptp(one["accuracy_ci95"]), rel=0.2
    )


def test_interval_of_d_prime_holds_the_truth() -> None:
    """Of 40 readers of 200 cells with a d' of 1.5, about 95 % of the intervals do."""
    rng, drawn, held = np.random.default_rng(1), [0, 1] * 100, 0
    for _ in range(40):
        said = (rng.normal(size=200) + 1.5 * np.array(drawn) > 0.75).astype(int).tolist()
        low, high = summarise(table([said], drawn), "one")["d_prime_ci95"]
        held += low <= 1.5 <= high
    assert 34 <= held <= 40


# --- agreement -----------------------------------------------------------------------------------


def test_cohen_against_scikit_learn() -> None:
    first, second = np.random.default_rng(0).integers(0, 2, (2, 30))
    found = cohen(first, second)(everyone(30))[0]
    assert found == pytest.approx(cohen_kappa_score(first, second))
    same = np.ones(5, int)
    assert np.isnan(cohen(same, same)(everyone(5))[0])  # nothing that chance leaves over


def test_fleiss_of_a_printed_table() -> None:
    """The worked example of the encyclopedias: 14 raters, 10 subjects, 5 categories, kappa .210."""
    rows = """0 0 0 0 14/0 2 6 4 2/0 0 3 5 6/0 3 9 2 0/2 2 8 1 1/7 7 0 0 0/3 2 6 3 0/2 5 3 2 2/
              6 5 2 1 0/0 2 2 3 7"""
    counts = np.array([row.split() for row in rows.split("/")], int)
    assert fleiss(counts)(everyone(10))[0] == pytest.approx(0.210, abs=5e-4)


def test_agreement_is_over_cells_that_all_answered() -> None:
    said = [[1, 1, 0, 0, 1], [1, 1, 0, 0, -1], [1, 0, 0, 1, 0]]
    found = agreement(table(said, [1, 0, 1, 0, 1]))
    pairs = {tuple(row["readers"]): row for row in found["pairs"]}
    assert [row["n"] for row in pairs.values()] == [4, 5, 4]
    assert pairs["reader 0", "reader 1"]["kappa"] == 1
    assert pairs["reader 1", "reader 2"]["kappa"] == 0
    assert found["all"]["n"] == 4
    assert found["all"]["agreement"] == pytest.approx((1 + 1 / 3 + 1 + 1 / 3) / 4)
    assert agreement(table(said[:2], [1, 0, 1, 0, 1]))["all"] is None


# --- the set -------------------------------------------------------------------------------------


def picture(seed: int, size: int = 16) -> bytes:
    return plain_png(disc("neutrophil", seed, size).transpose(2, 0, 1))


def test_gather_goes_on_past_what_cannot_be_read_and_takes_no_picture_twice() -> None:
    files = [picture(0), picture(0), b"no image", picture(1), picture(2, size=8)]
    samples = [Sample(str(i), "a", source=HeldBytes(data)) for i, data in enumerate(files)]
    whole = Preprocess(size=16, crop=1.0)
    found = finish(gather(samples, [0] * 5, whole, 9, np.random.default_rng(0)))
    assert len(found.pngs) == len(set(found.pngs)) == 3
    assert found.problems == ["2: not an image in a known format"]
    assert found.enlarged == 1
    assert len(finish(gather(samples, [0] * 5, whole, 2, np.random.default_rng(0))).pngs) == 2


def gathered(first: int) -> Gathered:
    return Gathered(
        [picture(first + i) for i in range(6)], [0, 0, 0, 1, 1, 1], [f"name{i}" for i in range(6)],
        [], 0,
    )  # fmt: skip


def test_ids_and_order_do_not_depend_on_what_is_real() -> None:
    """The same pictures with real and drawn swapped make the same page."""
    sets = [gathered(0), gathered(10)]
    cells, swapped = blind(*sets, ["a", "b"], 2, 5), blind(*sets[::-1], ["a", "b"], 2, 5)
    assert [(c.id, c.png) for c in cells] == [(c.id, c.png) for c in swapped]
    assert all(c.truth != s.truth for c, s in zip(cells, swapped, strict=True))
    assert set(Counter((c.truth, c.label) for c in cells).values()) == {2}
    assert [c.id for c in blind(*sets, ["a", "b"], 2, 6)] != [c.id for c in cells]


def test_a_set_without_a_common_class_is_refused() -> None:
    real, drawn = gathered(0), gathered(10)
    with pytest.raises(DataError, match="No class has both"):
        blind(Gathered(real.pngs, [0] * 6, real.names, [], 0),
              Gathered(drawn.pngs, [1] * 6, drawn.names, [], 0), ["a", "b"], 2, 0)  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, whose crop is the whole frame."""
    return tiny_model(tmp_path_factory.getbasetemp()).bundle


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Frames of 128 px, with metadata, and marked drawn cells of 64 px."""
    folder = tmp_path_factory.mktemp("authenticity")
    real = write_discs(folder / "real", each=4, size=128)
    for name in CLASSES:
        for seed in range(3):
            path = folder / "drawn" / name / f"{seed:06}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = disc(name, 50 + seed, 64).transpose(2, 0, 1)
            path.write_bytes(marked_png(pixels, Mark("tiny", "0" * 64, seed, name)))
    return real, folder / "drawn"


def prepare(bundle: Path, sources: tuple[Path, Path], out: Path, *words: object) -> Result:
    return cli("bench", "authenticity", "prepare", *sources, "-o", out, "-m", bundle, *words)


@pytest.fixture(scope="module")
def prepared(
    bundle: Path, sources: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "test"
    said = prepare(bundle, sources, out, "--per-class", EACH, "--seed", 3, "--json")
    assert said.code == 0, said.err
    assert said.json["cells"] == 12
    assert said.json["classes"] == dict.fromkeys(CLASSES, 2 * EACH)
    return out


def key_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "key.csv").read_text())))


def test_files_give_nothing_away(prepared: Path) -> None:
    """One size, one mode, one length; no chunk but the picture's; nothing of the names."""
    files = [path.read_bytes() for path in sorted((prepared / "cells").iterdir())]
    assert len({len(data) for data in files}) == 1
    for data in files:
        image = Image.open(io.BytesIO(data))
        assert (image.size, image.mode, image.info) == ((64, 64), "RGB", {})
        assert set(re.findall(rb"IHDR|tEXt|zTXt|iTXt|eXIf|pHYs|iCCP|tIME|gAMA", data)) == {b"IHDR"}
    rows = key_of(prepared)
    assert Counter((row["truth"], row["class"]) for row in rows) == {
        (truth, name): EACH for truth in ("real", "drawn") for name in CLASSES
    }
    assert sorted(row["id"] for row in rows) == [
        p.stem for p in sorted((prepared / "cells").iterdir())
    ]


def test_the_page_holds_ids_and_pictures_alone(prepared: Path) -> None:
    text = (prepared / "test.html").read_text()
    found = json.loads(re.search(r'id="cells">(.*?)</script>', text).group(1))
    rows = key_of(prepared)
    assert [cell[0] for cell in found] == [row["id"] for row in rows]
    assert len({len(cell[1]) for cell in found}) == 1
    assert not any(row["source"] in text or row["class"] in text for row in rows)
    assert "http:" not in text
    assert "https:" not in text


def test_prepare_again_is_the_same_and_another_test_is_not_lost(
    bundle: Path, sources: tuple[Path, Path], prepared: Path
) -> None:
    before = contents(prepared)
    assert prepare(bundle, sources, prepared, "--per-class", EACH, "--seed", 3).code == 0
    assert contents(prepared) == before
    said = prepare(bundle, sources, prepared, "--per-class", EACH, "--seed", 4)
    assert said.code == 2
    assert "key of another test" in said.complaint
    assert contents(prepared) == before


def test_prepare_says_what_is_wrong(
    bundle: Path, sources: tuple[Path, Path], tmp_path: Path
) -> None:
    real, drawn = sources
    swapped = prepare(bundle, (drawn, real), tmp_path / "a")
    assert swapped.code == 2
    assert "marked as synthetic" in swapped.complaint
    spoilt = shutil.copytree(real, tmp_path / "spoilt")
    (spoilt / "neutrophil" / "00.png").write_bytes(b"no image")
    said = prepare(bundle, (spoilt, drawn), tmp_path / "b", "--per-class", 4, "--size", 100)
    assert said.code == 1
    assert "Not read: neutrophil/00.png" in said.err
    assert "eosinophil: 3 of each kind instead of 4" in said.err
    assert "drawn cells have fewer than 100 px" in said.err
    assert len(key_of(tmp_path / "b")) == 18


@pytest.mark.real
@pytest.mark.skipif(not (ZOO / "pbc8").exists(), reason="pbc8 is not in this checkout")
def test_real_cells_take_the_way_of_the_released_model(data_root: Path, tmp_path: Path) -> None:
    """pbc8's own crop and size; beside them cells that it drew."""
    raabin, out = data_root / "raabin", tmp_path / "out"
    said = cli("bench", "authenticity", "prepare", raabin, DEMO, "-o", out, "--per-class", 1)
    assert said.code == 0, said.err
    rows, way = key_of(out), load("pbc8", engine="torch").preprocess
    assert Counter(row["truth"] for row in rows) == {"real": 5, "drawn": 5}
    frames, drawn = ({s.name: s for s in read_dataset(each)} for each in (raabin, DEMO))
    for row in rows:
        shown = np.asarray(Image.open(out / "cells" / f"{row['id']}.png")).transpose(2, 0, 1)
        if row["truth"] == "real":
            expected = way.canvas(decode(frames[row["source"]].read()))
        else:  # to the last bit as it was drawn
            expected = np.asarray(decode(drawn[row["source"]].read())).transpose(2, 0, 1)
        assert (shown == expected).all()


# --- what comes back -----------------------------------------------------------------------------


def write_answers(
    path: Path, rows: list[tuple[Any, ...]], columns: tuple[str, ...] = COLUMNS
) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def all_right(folder: Path, reader: str = "Anna") -> list[tuple[Any, ...]]:
    return [(reader, row["id"], row["truth"], 5, 1.5) for row in key_of(folder)]


def score(prepared: Path, out: Path, *answers: Path) -> Result:
    return cli("bench", "authenticity", "score", *answers, "--key", prepared / "key.csv", "-o", out,
               "--draws", 40, "--json")  # fmt: skip


def test_the_weights_that_drew_are_named(prepared: Path, tmp_path: Path) -> None:
    """As the drawn cells' marks say; nothing of it where a key stands alone."""
    path = write_answers(tmp_path / "anna.csv", all_right(prepared))
    said = score(prepared, tmp_path / "out", path)
    assert said.json["weights"] == {"tiny": "0" * 12}
    assert said.json["commit"] == commit()
    assert "0" * 12 not in (prepared / "test.html").read_text()
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(prepared / "key.csv", alone)
    assert "weights" not in score(alone, tmp_path / "again", path).json
    (alone / "drawn.json").write_text("{")
    assert "drawn.json is no JSON" in score(alone, tmp_path / "again", path).complaint


def test_answers_divided_by_semicolons(prepared: Path, tmp_path: Path) -> None:
    path = write_answers(tmp_path / "anna.csv", all_right(prepared))
    other = tmp_path / "other.csv"
    other.write_text(path.read_text().replace(",", ";"))
    same = [score(prepared, tmp_path / each.stem, each).json["pooled"] for each in (path, other)]
    assert same[0] == same[1]


def test_lines_that_are_no_answers_are_named_and_the_rest_is_done(
    prepared: Path, tmp_path: Path
) -> None:
    good = all_right(prepared)
    first, second, third = (row[1] for row in good[:3])
    wrong = {"real": "drawn", "drawn": "real"}[good[4][2]]
    bad = [("Anna", "c0", "real", 5, 1), ("", first, "real", 5, 1), ("Anna", first, "maybe", 5, 1),
           ("Anna", second, "real", 6, 1), ("Anna", third, "real", 5, "soon"),
           ("Anna", "c1", "real", 5, 1), ("Anna", good[4][1], wrong, 1, 1)]  # fmt: skip
    path = write_answers(tmp_path / "anna.csv", good + bad)
    other = write_answers(tmp_path / "ben.csv", [("Ben", first)], ("reader", "id"))
    foreign = write_answers(tmp_path / "carl.csv", [("Carl", "c9", "real", 5, 1)])
    said = score(prepared, tmp_path / "out", path, other, foreign, tmp_path / "none.csv")
    assert said.code == 1
    found = said.json
    assert [row["name"] for row in found["readers"]] == ["Anna"]
    assert found["pooled"]["accuracy"] == pytest.approx(11 / 12)  # the last answer counts
    told = "\n".join(found["problems"])
    for words in ("line 14: the key has no cell 'c0'", "line 15: the reader is missing",
                  "line 16: the answer 'maybe'", "line 17: the confidence '6'",
                  "line 18: the seconds 'soon'", "and 1 more lines", "no column answer",
                  "answers another test", "none.csv cannot be read",
                  "Anna answered 1 cell more than once"):  # fmt: skip
        assert words in told, words
    assert len(found["problems"]) == 10
    notes = [json.loads(line).get("note") for line in said.err.splitlines()]
    assert set(found["problems"]) <= set(notes)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("id,truth,class\nc1,real,a\n", "both real and drawn"),
        ("id,truth,class\nc1,real,a\nc1,drawn,a\n", "there twice"),
        ("id,truth,class\nc1,synthetic,a\n", "not real or drawn"),
        ("id,class\nc1,a\n", "no column truth"),
    ],
)
def test_a_key_that_is_none(key: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "key.csv"
    path.write_text(key)
    with pytest.raises(DataError, match=words):
        read_key(path)


def test_answers_to_another_test_are_no_answers(prepared: Path, tmp_path: Path) -> None:
    path = write_answers(tmp_path / "a.csv", [("Anna", "c9", "real", 5, 1)])
    said = score(prepared, tmp_path / "out", path)
    assert said.code == 2
    assert "answers another test" in said.complaint
    assert not (tmp_path / "out").exists()
    assert score(prepared, prepared, path).code == 2  # the folder of the test is not written to
    with pytest.raises(DataError, match="No answer can be used"):
        read_answers([tmp_path / "none.csv"], read_key(prepared / "key.csv"))


def test_confidence_meets_the_psychometric_function(tmp_path: Path) -> None:
    """200 cells; each step is right as often as it says: accuracy .75 at a confidence of about .75."""
    key = tmp_path / "key.csv"
    lines, answers = [], []
    for i in range(200):
        step, place = 1 + i % 5, i // 5
        right = place < 40 * (0.45 + 0.1 * step)
        truth = ("real", "drawn")[place % 2]
        lines.append(f"c{i},{truth},a,x")
        answers.append(("Anna <b>", f"c{i}", truth if right else
                        {"real": "drawn", "drawn": "real"}[truth], step, 2))  # fmt: skip
    key.write_text("\n".join([",".join(KEY), *lines]) + "\n")
    path = write_answers(tmp_path / "a.csv", answers)
    said = cli("bench", "authenticity", "score", path, "--key", key, "-o", tmp_path / "out",
               "--draws", 40, "--json")  # fmt: skip
    assert said.code == 0, said.err
    curve = said.json["readers"][0]["psychometric"]
    assert [part["confidence"] for part in curve["observed"]] == pytest.approx(
        [0.55, 0.65, 0.75, 0.85, 0.95]
    )
    assert [part["accuracy"] for part in curve["observed"]] == pytest.approx(
        [0.55, 0.65, 0.75, 0.85, 0.95]
    )
    assert curve["fit"]["threshold"] == pytest.approx(0.75, abs=0.02)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Anna &lt;b&gt;" in page
    assert "Anna <b>" not in page


# --- in a browser --------------------------------------------------------------------------------


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """Debian's chromium, with nothing kept and nothing fetched; it saves files to `saved`."""
    webdriver = pytest.importorskip("selenium.webdriver")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("no chromium here; on Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for word in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 f"user-data-dir={tmp_path / 'profile'}", "window-size=1280,900"):  # fmt: skip
        options.add_argument(f"--{word}")
    options.add_experimental_option(
        "prefs", {"download.default_directory": str(tmp_path / "saved")}
    )
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield opened
    opened.quit()


class Reader:
    """Somebody at the keyboard."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        for key in keys:
            ActionChains(self.browser, duration=0).send_keys(key).perform()

    def click(self, selector: str) -> None:
        self.browser.find_element("css selector", selector).click()

    def sees(self, selector: str, text: str) -> None:
        """Waits for it: a busy machine draws late."""
        until = time.monotonic() + 30
        while (shown := self.browser.find_element("css selector", selector).text) != text:
            assert time.monotonic() < until, f"{selector} says {shown!r}, not {text!r}"
            time.sleep(0.05)

    def begin(self, name: str) -> None:
        self.press(*name, "\ue007")  # enter

    def save(self, path: Path) -> Path:
        self.press("\ue007")  # the button to save is in focus at the end
        until = time.monotonic() + 30
        while not path.exists():
            assert time.monotonic() < until, f"{path} was not saved"
            time.sleep(0.05)
        return path


BACK, ENTER, LEFT, RIGHT = "\ue003", "\ue007", "\ue012", "\ue014"


def test_a_reader_in_a_browser(browser: Any, prepared: Path, tmp_path: Path) -> None:
    """By keyboard, with a step back, a reload, the mouse; the file is scored as known beforehand."""
    keys = [row["truth"][0] for row in key_of(prepared)]  # r or d, in the order of the page
    reader = Reader(browser)
    browser.get((prepared / "test.html").as_uri())
    reader.begin('Anna "A"')
    reader.sees("#count", "Cell 1 of 12")
    reader.press("3")  # nothing yet: neither real nor drawn was said
    reader.sees("#count", "Cell 1 of 12")
    shown = browser.find_element("css selector", "#cell")
    assert shown.size == {"height": 384, "width": 384}
    assert shown.get_property("naturalWidth") == 64
    reader.press({"r": "d", "d": "r"}[keys[0]], "5")  # wrong,
    reader.press(BACK, keys[0], "5")  # taken back,
    reader.press(BACK, ENTER)  # and kept
    reader.press({"r": LEFT, "d": RIGHT}[keys[1]], "4")
    for key in keys[2:5]:
        reader.press(key, "5")
    reader.press(keys[5])
    browser.refresh()
    reader.sees("#count", "Cell 6 of 12")  # goes on, the half-given answer forgotten
    reader.sees("#who", 'Anna "A"')
    reader.click({"r": "[data-kind=real]", "d": "[data-kind=drawn]"}[keys[5]])
    reader.click("[data-sure='3']")
    for key in keys[6:]:
        reader.press(key, "5")
    reader.sees("#count", "12 of 12 cells answered")
    anna = reader.save(tmp_path / "saved" / "answers-Anna-A-.csv")
    reader.click("#leave")
    reader.begin("Ben")
    for _ in keys:
        reader.press("d", "1")  # who says drawn of everything
    ben = reader.save(tmp_path / "saved" / "answers-Ben.csv")
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]

    rows = list(csv.DictReader(io.StringIO(anna.read_text())))
    assert [row["confidence"] for row in rows] == list("545553555555")
    assert all(0 < float(row["seconds"]) < 60 for row in rows)
    said = score(prepared, tmp_path / "out", anna, ben)
    assert said.code == 0, said.err
    first, second = said.json["readers"]
    assert (first["name"], first["n"], first["accuracy"]) == ('Anna "A"', 12, 1.0)
    assert first["accuracy_ci95"] == pytest.approx([0.025 ** (1 / 12), 1])
    assert first["d_prime"] == pytest.approx(2 * norm.ppf(6.5 / 7))
    assert first["criterion"] == pytest.approx(0, abs=1e-12)
    assert (second["accuracy"], second["sensitivity"], second["specificity"]) == (0.5, 1, 0)
    assert second["d_prime"] == pytest.approx(0, abs=1e-12)
    assert second["criterion"] == pytest.approx(-norm.ppf(6.5 / 7))
    assert said.json["pooled"]["accuracy"] == 0.75
    assert said.json["agreement"]["pairs"][0]["kappa"] == pytest.approx(0)
    assert "12 answers are too few" in first["psychometric"]["problem"]
