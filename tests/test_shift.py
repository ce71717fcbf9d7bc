"""`bench shift`: known priors, frames of known scale, and a tiny run of the command."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import CLASSES, TINY, cli, disc, tiny_model, write_discs
from PIL import Image
from scipy.special import softmax
from sklearn.metrics import balanced_accuracy_score

from cytodiffusion.bundle import load
from cytodiffusion.classify.adapt import centred, em_prior
from cytodiffusion.cli.console import Console
from cytodiffusion.cli.labs import Bench, Lab, join
from cytodiffusion.data.images import Preprocess, decode
from cytodiffusion.data.load import Reframed, cells_key, look_of, reframed
from cytodiffusion.data.look import Look
from cytodiffusion.data.readers import read_dataset
from cytodiffusion.data.sample import HeldBytes, Sample, png
from cytodiffusion.data.taxonomy import Taxonomy
from cytodiffusion.evaluate.shift import STEPS, Told, adapted, mean_row, preprocesses, row
from cytodiffusion.train.settings import make_settings

# --- reading without labels ----------------------------------------------------------------------


def test_the_share_of_classes_is_found_without_labels():
    """Two Gaussians, likelihoods exact, 3 of 4 cells of the second; told with even shares."""
    rng = np.random.default_rng(0)
    truth = (rng.random(4000) < 0.75).astype(int)
    x = rng.normal(2.0 * truth, 1.0)
    even = softmax(-0.5 * (x[:, None] - [0.0, 2.0]) ** 2, axis=1)
    share = em_prior(even, np.array([0.5, 0.5]))
    assert share.sum() == pytest.approx(1)
    assert share[1] == pytest.approx(0.75, abs=0.03)


def test_where_the_prior_is_right_it_stays():
    told = np.array([[0.9, 0.1], [0.1, 0.9]])
    np.testing.assert_allclose(em_prior(told, np.array([0.5, 0.5])), [0.5, 0.5], atol=1e-6)


def test_centred_logits_have_one_mean():
    logits = np.random.default_rng(0).normal([5, 0, -5], size=(7, 3))
    moved = centred(logits)
    np.testing.assert_allclose(moved.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(np.diff(moved, axis=0), np.diff(logits, axis=0))


# --- what is counted -----------------------------------------------------------------------------


def told(truth: list[int], named: list[int]) -> Told:
    return Told(np.array(truth), np.eye(3)[named] * 0.7 + 0.1, 8.0, 2.0)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")  # scikit-learn's
def test_a_row_by_hand():
    found = row(told([0, 0, 0, 0, 2], [0, 0, 0, 1, 2]), CLASSES)
    assert found["accuracy"] == 0.8
    assert found["balanced_accuracy"] == pytest.approx(0.875)
    assert found["balanced_accuracy"] == balanced_accuracy_score([0, 0, 0, 0, 2], [0, 0, 0, 1, 2])
    assert found["classes_missing"] == ["lymphocyte"]
    assert found["recall"] == {"eosinophil": 0.75, "neutrophil": 1.0}
    assert found["cells_per_second"] == 2.5
    assert found["target_labels_used"] is False
    low, high = found["balanced_accuracy_ci95"]
    assert low < 0.875 <= high


def test_the_mean_weighs_every_set_alike():
    big, small = told([0, 1] * 50, [0, 0] * 50), told([0, 1], [0, 1])
    found = mean_row([big, small])
    assert found["accuracy"] == pytest.approx((0.5 + 1) / 2)
    assert found["cells"] == 102


def test_a_step_decides_how_frames_are_read():
    plain, look = Preprocess(crop=0.5), Look(nucleus=0.271 * 1.4)
    (raw,) = preprocesses(STEPS["as trained"], plain, look)
    assert raw == plain
    (matched,) = preprocesses(STEPS["abroad"], plain, look)
    assert (matched.match, matched.crop) == ("light", pytest.approx(0.7))
    crops = [each.crop for each in preprocesses(STEPS["abroad + zooms"], plain, look)]
    assert crops == pytest.approx([0.7 * 0.87, 0.7, 0.7 * 1.15])


@pytest.mark.parametrize("step", ["light + scale + centre", "abroad + centre"])
def test_centring_takes_away_what_a_laboratory_adds_to_a_class(step: str) -> None:
    """A bias of every class changes nothing; without centring it does."""
    logits = np.random.default_rng(0).normal(size=(30, 3))
    biased = logits + np.array([4.0, 0.0, -2.0])
    centred, plain = STEPS[step], STEPS["light + scale"]
    np.testing.assert_allclose(adapted(biased, centred), adapted(logits, centred), rtol=1e-9)
    np.testing.assert_allclose(adapted(logits, plain), softmax(logits, axis=1), rtol=1e-9)
    assert (adapted(biased, plain).argmax(1) == 0).mean() > 0.9


# --- several laboratories ------------------------------------------------------------------------


@pytest.mark.parametrize("crop", [0.4, 1.3])
def test_a_reframed_image_shows_the_same(crop: float) -> None:
    source = HeldBytes(png(disc("lymphocyte", 0, 60)))
    wanted = Preprocess(size=24, crop=crop).canvas(decode(source()))
    (sample,) = reframed([Sample("a", None, source=source)], crop, 0.8)
    found = Preprocess(size=24, crop=0.8).canvas(decode(sample.read()))
    assert np.abs(found.astype(int) - wanted).mean() < 3
    assert Image.open(io.BytesIO(Reframed(source, 2.0)())).size == (120, 120)


def test_what_was_trained_on_is_known_by_images_labels_and_frame() -> None:
    one, other = (HeldBytes(png(disc("lymphocyte", i, 60))) for i in range(2))
    cells = [Sample("a", "lymphocyte", source=one), Sample("b", "monocyte", source=other)]
    changed = [
        [replace(cells[0], source=other), cells[1]],
        [replace(cells[0], label="monocyte"), cells[1]],
        [replace(cells[0], name="c"), cells[1]],
        reframed(cells, 0.4, 0.8),
        reframed(cells, 0.5, 0.8),
    ]
    assert len({cells_key(found) for found in (cells, *changed)}) == 1 + len(changed)
    assert cells_key(reframed(cells, 0.4, 0.8)) == cells_key(reframed(list(cells), 0.4, 0.8))


def test_small_sets_are_repeated_when_they_are_joined(tmp_path: Path) -> None:
    cells = read_dataset(write_discs(tmp_path, each=2))
    look, _ = look_of(cells)
    large = Lab("large", [replace(s, split="train") for s in cells] * 8, [0] * 48, look, ("a",))
    small = Lab("small", [replace(s, split="train") for s in cells[:3]], [0] * 3, look, ("a",))
    bench = Bench(
        tmp_path, make_settings("tiny"), Taxonomy.load(), 0, "cpu", "torch", Console(False)
    )
    assert len(join(bench, [large, small])["train"]) == 48 + 4 * 3


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.getbasetemp()).cells


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.getbasetemp()).bundle


@pytest.fixture(scope="module")
def abroad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Discs in dim light, two classes, and one cell of a class that nobody asks about."""
    folder = write_discs(tmp_path_factory.mktemp("shift") / "abroad", each=12, first=50)
    for path in sorted(folder.rglob("*.png")):
        Image.fromarray((np.asarray(Image.open(path)) * 0.8).astype(np.uint8)).save(path)
    (folder / "platelet").mkdir()
    Image.new("RGB", (32, 32), "white").save(folder / "platelet" / "a.png")
    for path in (folder / "eosinophil").iterdir():
        path.unlink()
    return folder


def found_rows(folder: Path) -> dict[tuple[str, str], dict]:
    values = json.loads((folder / "results.json").read_text())
    return {(each["method"], each["set"]): each for each in values["rows"]}


def test_the_command(home: Path, bundle: Path, abroad: Path, tmp_path: Path) -> None:
    words = ["bench", "shift", "--train", home, "--foreign", abroad, "-m", bundle, "-o", tmp_path,
             "--home", 6, "--device", "cpu"]  # fmt: skip
    said = cli(*words, "--steps", "as trained,abroad,abroad + centre")
    assert said.code == 0, said.err
    assert "1 cells of other classes are left out (platelet)" in said.err
    found = found_rows(tmp_path)
    name = load(bundle).name
    assert set(found) == {
        (f"{name}, {step}", where)
        for step in ("as trained", "abroad", "abroad + centre")
        for where in ("home", "abroad", "mean of foreign sets")
    }
    one = found[f"{name}, abroad", "abroad"]
    assert (one["cells"], one["passes_per_cell"]) == (24, 8)
    assert set(one["recall"]) == {"lymphocyte", "neutrophil"}
    assert "none used" in (tmp_path / "report.html").read_text()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "measured").iterdir()}
    assert len(kept) == 4  # two sets, the step and `centre` read the same
    again = cli(*words, "--steps", "as trained,abroad")
    assert again.code == 0, again.err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "measured").iterdir()} == kept
    assert found_rows(tmp_path)[f"{name}, abroad", "abroad"] | {"cells_per_second": 0} == one | {
        "cells_per_second": 0
    }


def test_what_is_trained_here_knows_the_look_of_its_own_frames(
    home: Path, abroad: Path, tmp_path: Path
) -> None:
    """The dim laboratory is at home here: its light is not brought to that of another."""
    said = cli("bench", "shift", "--train", abroad, "--foreign", home, "-o", tmp_path, *TINY[:1], *TINY[2:],
               "--set=steps=2", "--steps", "as trained", "--home", 4, "--device", "cpu")  # fmt: skip
    assert said.code == 0, said.err
    (run,) = tmp_path.glob("run-*/bundle")
    there = load(run).preprocess.look
    known = [s for s in read_dataset(abroad) if s.label in ("lymphocyte", "neutrophil")]
    assert there == look_of(known)[0]
    assert there != Look()


def test_all_sets_but_one(home: Path, bundle: Path, abroad: Path, tmp_path: Path) -> None:
    """Trains a model and a baseline without each set, on the others."""
    said = cli("bench", "shift", "--train", home, "--foreign", abroad, "-m", bundle, "-o", tmp_path,
               *TINY[:1], *TINY[2:], "--set=steps=10", "--steps", "as trained", "--home", 6,
               "--leave-one-out", "--baselines", "vit", "--minutes", 0.01, "--device", "cpu")  # fmt: skip
    assert said.code == 0, said.err
    found = found_rows(tmp_path)
    for method in ("ours, all sets but this, abroad", "vit, all sets but this, light + scale"):
        assert {where for m, where in found if m == method} >= {"abroad", home.name}
    assert ("vit, as trained", "abroad") in found
    assert (f"{load(bundle).name}, as trained", "abroad") in found


@pytest.mark.parametrize(
    "words", [["--steps", "magic"], ["--baselines", "oracle"], ["--foreign", "nowhere"]], ids=str
)
def test_a_wrong_call_writes_nothing(
    home: Path, bundle: Path, abroad: Path, tmp_path: Path, words: list[str]
) -> None:
    said = cli("bench", "shift", "--train", home, "--foreign", abroad, "-m", bundle, "-o",
               tmp_path / "out", *words)  # fmt: skip
    assert said.code == 2
    assert words[1] in said.complaint
    assert not (tmp_path / "out").exists()


@pytest.mark.real
def test_real_cells_of_another_laboratory(data_root: Path, tmp_path: Path) -> None:
    """Raabin's cells: its light and scale matter, and no label is needed to match them."""
    if not (data_root / "raabin").is_dir():
        pytest.skip(f"no raabin/ in {data_root}")
    for folder in sorted((data_root / "raabin").iterdir()):
        (tmp_path / "some" / folder.name).mkdir(parents=True)
        for path in sorted(folder.iterdir())[::8]:
            Image.open(path).save(tmp_path / "some" / folder.name / f"{path.stem}.png")
    pbc = data_root / "pbc"
    words = ["bench", "shift", "--train", pbc, "--splits", pbc / "splits.csv", "-m", "pbc8"]
    words += ["--foreign", tmp_path / "some", "-o", tmp_path / "out", "--device", "cpu"]
    said = cli(*words, "--home", 25, "--steps", "as trained,abroad")
    assert said.code == 0, said.err
    found = found_rows(tmp_path / "out")
    assert found["pbc8, abroad", "some"]["accuracy"] > found["pbc8, as trained", "some"]["accuracy"]
    assert found["pbc8, abroad", "home"]["accuracy"] > 0.9
