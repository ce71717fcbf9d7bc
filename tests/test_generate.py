"""`generate`: the same seed is the same cell, every cell is marked, and nothing is drawn twice."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CLASSES, Tiny, cli, contents, tiny_model, write_discs

from cytodiffusion import synthesis
from cytodiffusion.bundle import ZOO, Model, load, verify
from cytodiffusion.data.images import decode
from cytodiffusion.data.mark import Mark, read_mark
from cytodiffusion.data.readers import read_dataset
from cytodiffusion.diffusion.gain import Gain
from cytodiffusion.synthesis import (
    BATCH,
    CONDITIONAL,
    Cell,
    Drawing,
    draw,
    draw_all,
    save_gain,
    turning,
    usual,
)

QUICK = ("--steps", 3, "--device", "cpu")
SHORT = Drawing(steps=3, churn=1.0)
CELLS = [Cell(name, seed) for seed in range(4) for name in CLASSES]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_model(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Model:
    return load(tiny.bundle)


@pytest.fixture(scope="module")
def out(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "out"
    told = cli("generate", "-m", tiny.bundle, "-o", folder, "--per-class", 3, *QUICK)
    assert told.code == 0, told.err
    return folder


def manifest(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def files(model: Model, cells: list[Cell], workers: int = 1) -> dict[Cell, bytes]:
    return {cell: data for batch in draw_all(model, cells, SHORT, workers) for cell, data in batch}


# --- one cell ------------------------------------------------------------------------------------


def test_the_same_seed_is_the_same_cell_whatever_the_batch(model: Model) -> None:
    """Alone, in another order, and beside twelve others drawn by two workers: the same file."""
    every = files(model, CELLS, workers=2)
    assert len(every) == 12 > BATCH
    assert len({decode(data).tobytes() for data in every.values()}) == 12
    assert files(model, CELLS[::-1]) == every
    for cell in CELLS[:2]:
        assert files(model, [cell]) == {cell: every[cell]}


def test_noise_is_of_seed_class_and_step(model: Model) -> None:
    """Without churn one draw is used; with it, the way differs and the start does not."""
    still, moved = (draw(model, CELLS[:1], Drawing(steps=4, churn=c)) for c in (0.0, 1.6))
    again = draw(model, CELLS[:1], Drawing(steps=4, churn=1.6))
    assert again.equal(moved)
    assert not torch.allclose(still, moved, atol=1e-3)


def test_no_noise_serves_twice(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two cells of one seed: the start, three steps with churn, two looks."""
    asked, real = list[tuple](), synthesis.standard_normal
    monkeypatch.setattr(
        synthesis, "standard_normal", lambda *given: asked.append(given) or real(*given)
    )
    draw(model, CELLS[:2], Drawing(steps=3, churn=1.0, looks=2))
    assert len(asked) == len(set(asked)) == 2 * (1 + 3 + 2)


def test_the_last_looks_are_a_mean_of_guesses(model: Model) -> None:
    """With the noise of a look so small that nothing is to be seen, the cell stays as it is."""
    drawn, looked = (
        draw(model, CELLS[:2], Drawing(steps=4, looks=looks, look_sigma=1e-4)) for looks in (0, 3)
    )
    torch.testing.assert_close(looked, drawn, atol=1e-3, rtol=0)
    blurred = draw(model, CELLS[:2], Drawing(steps=4, looks=3, look_sigma=0.5))
    assert not torch.allclose(blurred, drawn, atol=0.05)


def test_a_class_conditional_model_is_guided(model: Model) -> None:
    assert usual(model).guidance == 1
    model.classifier.together = False
    try:
        assert usual(model).guidance == CONDITIONAL > 1
    finally:
        model.classifier.together = True


def test_every_pose_has_its_turn() -> None:
    """A guess that sees its upper left corner: over eight steps every corner is seen twice."""
    corner = turning(lambda noisy, sigma: noisy * (torch.arange(16).view(4, 4) == 0))
    image = 1 + torch.arange(16.0).view(1, 1, 4, 4)
    seen = sum(corner(image, torch.ones(1)) for _ in range(8)) / image
    assert seen.flatten().tolist() == [2, 0, 0, 2] + [0] * 8 + [2, 0, 0, 2]


def test_the_gain_of_a_bundle_is_used(tiny: Tiny, model: Model, tmp_path: Path) -> None:
    """A gain of 0 sees no noise at all: what is drawn is the noise it began with."""
    bundle = tiny.copy(tmp_path / "spoilt")
    save_gain(bundle, Gain(np.array([0.1, 10.0]), np.array([0.0, 1.0]), np.zeros((2, 2))))
    assert verify(bundle) < 2e-3
    found = draw(load(bundle), CELLS[:2], Drawing(steps=3, churn=0.0, looks=0))
    assert found.std().item() == pytest.approx(20, rel=0.1)
    assert draw(model, CELLS[:2], Drawing(steps=3, churn=0.0, looks=0)).std() < 5


# --- a folder of cells ---------------------------------------------------------------------------


def test_every_cell_is_marked_and_listed(tiny: Tiny, model: Model, out: Path) -> None:
    rows = manifest(out)
    assert [(row["label"], row["seed"]) for row in rows] == [
        (name, str(seed)) for name in CLASSES for seed in range(3)
    ]
    request = json.loads((out / "request.json").read_text())
    for row in rows:
        mark = read_mark((out / row["path"]).read_bytes())
        assert mark == Mark(model.name, model.weights_sha256, int(row["seed"]), row["label"])
        assert {name: row[name] for name in request} == {k: str(v) for k, v in request.items()}
    assert request["steps"] == 3
    samples = read_dataset(out)
    assert [sample.label for sample in samples] == [row["label"] for row in rows]
    assert all(sample.read() for sample in samples)


def test_folders_alone_are_read_as_classes(out: Path, tmp_path: Path) -> None:
    for path in out.glob("*/*.png"):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        (tmp_path / path.parent.name / path.name).write_bytes(path.read_bytes())
    assert {sample.label for sample in read_dataset(tmp_path)} == set(CLASSES)


def test_cut_and_run_again(tiny: Tiny, out: Path, tmp_path: Path) -> None:
    """More cells, after one was lost and one torn: the rest is not drawn again, all is as at once."""
    folder, words = tmp_path / "out", ("generate", "-m", tiny.bundle, *QUICK)
    assert cli(*words, "-o", folder, "--per-class", 2).code == 0
    (folder / CLASSES[0] / "000000.png").unlink()
    torn = folder / CLASSES[1] / "000001.png"
    torn.write_bytes(torn.read_bytes()[:60])
    kept = folder / CLASSES[2] / "000000.png"
    before = kept.stat().st_mtime_ns
    told = cli(*words, "-o", folder, "--per-class", 3, "--json")
    assert told.json["drawn"] == 5
    assert told.json["cells"] == 9
    assert kept.stat().st_mtime_ns == before
    assert contents(folder) == contents(out)


def test_an_image_that_was_not_drawn_is_not_listed(tiny: Tiny, out: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(out, tmp_path / "out")
    write_discs(tmp_path / "real", each=1)
    for foreign in (tmp_path / "real").glob("*/*.png"):
        shutil.copy(foreign, folder / foreign.parent.name / "000077.png")
    assert (folder / CLASSES[0] / "000077.png").exists()
    told = cli("generate", "-m", tiny.bundle, *QUICK, "-o", folder, "--per-class", 3, "--json")
    assert (told.json["drawn"], told.json["cells"]) == (0, 9)
    assert manifest(folder) == manifest(out)


def test_some_classes_from_a_seed_on(tiny: Tiny, out: Path, tmp_path: Path) -> None:
    told = cli("generate", "-m", tiny.bundle, "-o", tmp_path / "out", "--classes", CLASSES[1],
               "--seed", 2, "--per-class", 2, *QUICK)  # fmt: skip
    assert told.code == 0, told.err
    paths = [row["path"] for row in manifest(tmp_path / "out")]
    assert paths == [f"{CLASSES[1]}/000002.png", f"{CLASSES[1]}/000003.png"]
    assert (tmp_path / "out" / paths[0]).read_bytes() == (out / paths[0]).read_bytes()


def test_classes_in_other_spellings(tiny: Tiny, out: Path, tmp_path: Path) -> None:
    """In folders of the model's own words."""
    told = cli("generate", "-m", tiny.bundle, "-o", tmp_path / "out", "--classes",
               "NEUTROPHIL, Eosinophils", "--per-class", 1, *QUICK)  # fmt: skip
    assert told.code == 0, told.err
    paths = [row["path"] for row in manifest(tmp_path / "out")]
    assert sorted(paths) == ["eosinophil/000000.png", "neutrophil/000000.png"]
    for path in paths:
        assert (tmp_path / "out" / path).read_bytes() == (out / path).read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--classes", ""], "--classes names no class"),
        (["--classes", " ,"], "--classes names no class"),
        (["--classes", "blast"], "does not know the class 'blast'"),
        (["--sampler", "euler"], "There are: heun, ddim, dpm++"),
        (["-m", "nonsense"], "no model 'nonsense'"),
    ],
    ids=str,
)
def test_a_wrong_call_writes_nothing(
    tiny: Tiny, tmp_path: Path, words: list[str], said: str
) -> None:
    told = cli("generate", "-m", tiny.bundle, "-o", tmp_path / "out", *QUICK, *words)
    assert told.code == 2
    assert said in told.complaint
    assert not (tmp_path / "out").exists()


def test_other_settings_are_not_mixed_in(tiny: Tiny, out: Path) -> None:
    before = contents(out)
    told = cli("generate", "-m", tiny.bundle, "-o", out, "--steps", 4, "--device", "cpu")
    assert told.code == 2
    assert "other settings" in told.complaint
    assert contents(out) == before


def test_a_folder_of_real_cells_is_left_alone(tiny: Tiny) -> None:
    before = contents(tiny.cells)
    told = cli("generate", "-m", tiny.bundle, "-o", tiny.cells, *QUICK)
    assert told.code == 2
    assert "cannot be mixed up" in told.complaint
    assert contents(tiny.cells) == before


@pytest.mark.skipif(not (ZOO / "pbc8").is_dir(), reason="pbc8 is not in the zoo yet")
def test_the_released_model_draws_what_is_asked_for(tmp_path: Path) -> None:
    """One cell of each class, with few steps: most are named as asked, by the model itself."""
    told = cli("generate", "-o", tmp_path, "--per-class", 1, "--steps", 12, "--device", "cpu")
    assert told.code == 0, told.err
    model = load("pbc8")
    paths = [tmp_path / row["path"] for row in manifest(tmp_path)]
    answers = model.read(paths, crop=1.0).answers()
    right = [a.predicted == path.parent.name for a, path in zip(answers, paths, strict=True)]
    assert sum(right) >= 6
