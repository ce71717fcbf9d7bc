"""`bench augment`: choices and gains by hand, what a training sees, and a tiny run of the command."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import CLASSES, Tiny, cli, contents, disc, tiny_model, write_discs

from cytodiffusion.bundle import DEMO
from cytodiffusion.cli import topup
from cytodiffusion.cli.topup import Job, World
from cytodiffusion.data.images import Preprocess
from cytodiffusion.data.mark import Mark, marked_png
from cytodiffusion.data.pixels import Pixels
from cytodiffusion.data.readers import read_dataset
from cytodiffusion.errors import DataError
from cytodiffusion.evaluate.augment import ARMS, choose, gains, mirrored, missing, row, summary
from cytodiffusion.evaluate.baselines import SHAPES
from cytodiffusion.evaluate.low_data import interval

RARE = CLASSES[1]
LABELS = np.array([0, 1, 2, -1] * 8)

# --- by hand -------------------------------------------------------------------------------------


def test_few_of_the_rare_class_and_all_of_the_others() -> None:
    rows = choose(LABELS, 1, 3, None, seed=0, repeat=0)
    assert np.bincount(LABELS[rows]).tolist() == [8, 3, 8]
    rows = choose(LABELS, 1, 3, 5, seed=0, repeat=0)
    assert np.bincount(LABELS[rows]).tolist() == [5, 3, 5]
    assert len(set(rows.tolist())) == 13


def test_a_smaller_choice_is_part_of_a_larger_one_and_repeats_differ() -> None:
    small, large = (set(choose(LABELS, 1, n, 5, seed=0, repeat=1).tolist()) for n in (2, 6))
    assert small < large
    assert {LABELS[i] for i in large - small} == {1}
    assert large != set(choose(LABELS, 1, 6, 5, seed=0, repeat=2).tolist())
    assert large != set(choose(LABELS, 1, 6, 5, seed=1, repeat=1).tolist())


def test_the_class_lacks_what_the_others_have_in_the_mean() -> None:
    labels = np.repeat([0, 1, 3], [10, 3, 5])  # of class 2 there is none
    assert missing(labels, 1) == 8 - 3
    with pytest.raises(DataError, match="With 10 cells the class is not rarer"):
        missing(labels, 0)


def test_the_margin_mirrors_what_is_inside() -> None:
    image = np.arange(16, dtype=np.uint8).reshape(1, 1, 4, 4).repeat(3, axis=1)
    wide = mirrored(image, 1.5)
    assert wide.shape == (1, 3, 6, 6)
    np.testing.assert_array_equal(wide[:, :, 1:-1, 1:-1], image)
    assert wide[0, 0, 0].tolist() == [5, 4, 5, 6, 7, 6]
    np.testing.assert_array_equal(mirrored(image, 1.0), image)


def made(arm: str, values: list[tuple[float, float | None]]) -> list[dict[str, Any]]:
    """Rows of 10 cells with this recall and precision in each repeat."""
    return [
        {"labels": 10, "repeat": r, "classifier": "resnet", "trained_on": arm, "recall": recall,
         "precision": precision, "balanced_accuracy": recall / 2, "steps": 5, "seconds": 1.0}
        for r, (recall, precision) in enumerate(values)
    ]  # fmt: skip


def test_gains_are_taken_repeat_by_repeat() -> None:
    rows = made("real", [(0.2, 0.9), (0.4, None)])[::-1] + made("drawn", [(0.5, 0.8), (0.6, 0.8)])
    rows += made("copies", [(0.5, 0.7), (0.3, 0.6)])
    real, copies = gains(rows)
    assert [(g["gain_of"], g["over"]) for g in (real, copies)] == [
        ("drawn", "real"), ("drawn", "copies"),
    ]  # fmt: skip
    assert real["recall"] == pytest.approx(0.25)
    assert real["recall_ci95"] == pytest.approx(interval([0.3, 0.2]))
    assert real["precision"] is None
    assert real["precision_ci95"] is None
    assert copies["recall"] == pytest.approx(0.15)
    assert copies["precision_ci95"] == pytest.approx(interval([0.1, 0.2]))
    assert copies["balanced_accuracy"] == pytest.approx(0.075)
    means = {each["trained_on"]: each["recall"] for each in summary(rows)}
    assert means == pytest.approx({"real": 0.3, "drawn": 0.55, "copies": 0.4})
    assert summary(rows)[0]["recall_ci95"][0] == 0  # a share is not below it; a difference may be
    assert copies["recall_ci95"][0] == -1


def test_a_row_by_hand() -> None:
    """One of two rare cells is found, and one other cell is taken for one."""
    truth, told = np.array([0, 0, 0, 1, 1]), np.eye(2)[[0, 0, 1, 1, 0]]
    found = row(10, 0, "resnet", "drawn", truth, told, 1, {"steps": 7})
    assert (found["recall"], found["precision"], found["steps"]) == (0.5, 0.5, 7)
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    never = row(10, 0, "resnet", "real", truth, np.eye(2)[[0] * 5], 1, {})
    assert (never["recall"], never["precision"]) == (0, None)


# --- one training --------------------------------------------------------------------------------


def some_cells(name: str, labels: list[int]) -> Pixels:
    images = np.random.default_rng(len(name)).integers(0, 256, (len(labels), 3, 16, 16), np.uint8)
    digests = [f"{name}{i}" for i in range(len(labels))]
    return Pixels(images, np.array(labels), digests, [])


@pytest.fixture
def world(tmp_path: Path) -> World:
    drawn = {(3, r): some_cells("drawn", [1] * 12) for r in (0, 1)}
    return World(
        out=tmp_path, classes=CLASSES, rare=1, preprocess=Preprocess(size=16, crop=1.0),
        real=some_cells("real", [0, 1, 2] * 10), drawn=drawn, test=some_cells("test", [0, 1, 2]),
        others=8, drawn_cells=None, minutes=None, steps=2, seed=0, device="cpu",
    )  # fmt: skip


def test_drawn_cells_and_copies_are_as_many(world: World) -> None:
    real, drawn, copies = (topup.given_to(world, Job(3, 0, "resnet", arm)) for arm in ARMS)
    assert np.bincount(real[1]).tolist() == [8, 3, 8]
    for images, labels, digests in (drawn, copies):
        assert np.bincount(labels).tolist() == [8, 8, 8]
        assert len(images) == len(digests) == 24
        assert digests[:19] == real[2]
        np.testing.assert_array_equal(images[:19], real[0])
    assert len(set(drawn[2][19:])) == 5
    assert all(digest.startswith("drawn") for digest in drawn[2][19:])
    own = [digest for digest, label in zip(real[2], real[1], strict=True) if label == 1]
    assert sorted(Counter(copies[2][19:]).values()) == [1, 2, 2]
    assert set(copies[2][19:]) == set(own)
    np.testing.assert_array_equal(copies[0][19], real[0][real[1] == 1][0])


def test_other_drawn_cells_are_kept_under_another_name(world: World) -> None:
    job, same = Job(3, 0, "resnet", "drawn"), Job(3, 0, "resnet", "copies")
    before = topup.place(world, job), topup.place(world, same)
    world.drawn[3, 0].digests[:] = [f"new{i}" for i in range(12)]
    assert topup.place(world, job) != before[0]
    assert topup.place(world, same) == before[1]


def test_one_model_cannot_have_seen_two_choices_alone() -> None:
    marks = [Mark("m", weights, 0, RARE) for weights in "ab"]
    topup.check_apart({(3, 0): {marks[0]}, (3, 1): {marks[1]}})
    with pytest.raises(DataError, match=r"drew for 3 cells, repeat 0, and for 4, repeat 1"):
        topup.check_apart({(3, 0): {marks[0]}, (4, 1): {marks[0], marks[1]}})


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_model(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """A ResNet that is trained in a moment."""
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
        patch.setitem(SHAPES, "resnet", SHAPES["resnet"] | sizes)
        yield


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight of each class are to train on, two to test on."""
    return write_discs(tmp_path_factory.mktemp("augment") / "cells", each=10)


def write_drawn(folder: Path, each: int, weights: str = "a" * 64) -> Path:
    """Marked discs of every class, as `generate` writes cells."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = disc(name, 100 + i, 16).transpose(2, 0, 1)
            mark = Mark("drawer", weights, i, name)
            (folder / name / f"{i:06}.png").write_bytes(marked_png(pixels, mark))
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drawn(tmp_path_factory.mktemp("augment") / "drawn", each=6)


@pytest.fixture(scope="module")
def words(tiny: Tiny) -> list[object]:
    return ["-m", tiny.bundle, "--class", "lymphocytes", "--labels", 3, "--repeats", 2, "--steps", 2,
            "--jobs", 1, "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def out(
    cells: Path, drawn: Path, words: list[object], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("augment") / "out"
    said = cli("bench", "augment", cells, drawn, "-o", folder, *words)
    assert said.code == 0, said.err
    assert "3 real cells, repeat 1, resnet, topped up by copies: recall" in said.err
    assert "training: 6 of 6 trainings" in said.err
    assert "Drawn by drawer (aaaaaaaaaaaa)." in said.out
    assert "The gain is an upper bound" in said.out
    return folder


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_the_command(out: Path) -> None:
    found = results(out)
    asked = [(3, repeat, arm) for repeat in (0, 1) for arm in ARMS]
    assert [(r["labels"], r["repeat"], r["trained_on"]) for r in found["rows"]] == asked
    assert [r["added"] for r in found["rows"]] == [0, 5, 5] * 2
    assert {r["steps"] for r in found["rows"]} == {2}
    assert [g["over"] for g in found["gains"]] == ["real", "copies"]
    assert found["test_cells"] == dict.fromkeys(CLASSES, 2)
    assert found["training_cells"] == 24
    assert found["gain_is_an_upper_bound"] is True
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 1
    assert "The gain is an upper bound" in page
    assert "drawer (aaaaaaaaaaaa)" in page
    assert "generate -m runs/3-0/bundle --classes lymphocyte --per-class 5 " in page


def test_run_again_nothing_is_trained(
    cells: Path, drawn: Path, out: Path, words: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(out)
    monkeypatch.setattr(topup, "_train", None)
    said = cli("bench", "augment", cells, drawn, "-o", out, *words, "--json")
    assert said.code == 0, said.err
    assert contents(out) == before
    assert said.json == results(out)


def test_the_cells_of_a_choice_are_a_split_to_train_on(
    cells: Path, out: Path, words: list[object], tmp_path: Path
) -> None:
    """The same files without drawn cells; two of each class to calibrate on; none of the test."""
    said = cli("bench", "augment", cells, "nowhere/{labels}-{repeat}", "-o", tmp_path, *words,
               "--choices", "--json")  # fmt: skip
    assert said.code == 0, said.err
    assert contents(tmp_path) == {
        name: data for name, data in contents(out).items() if name.startswith("choices/")
    }
    assert len(said.json["then"]) == 3
    samples = read_dataset(cells, splits=tmp_path / "choices" / "3-1.csv")
    counted = Counter((sample.label, sample.split) for sample in samples)
    assert (counted[RARE, "train"], counted[RARE, "val"]) == (1, 2)
    assert (counted[CLASSES[0], "train"], counted[CLASSES[0], "val"]) == (6, 2)
    other = read_dataset(cells, splits=tmp_path / "choices" / "3-0.csv")
    assert {s.name for s in other if s.label == RARE} != {
        s.name for s in samples if s.label == RARE
    }


def test_a_model_for_each_choice_gives_no_upper_bound(
    cells: Path, words: list[object], tmp_path: Path
) -> None:
    for repeat in (0, 1):
        write_drawn(tmp_path / f"3-{repeat}", each=5, weights=str(repeat) * 64)
    pattern = tmp_path / "{labels}-{repeat}"
    said = cli("bench", "augment", cells, pattern, "-o", tmp_path / "out", *words, "--json")
    assert said.code == 0, said.err
    assert said.json["gain_is_an_upper_bound"] is False
    assert said.json["drawn_by"] == ["drawer (000000000000)", "drawer (111111111111)"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "upper bound.</strong>" not in page
    assert "drawing from the same few cells" in page


def test_a_drawn_cell_among_the_real_ones_is_refused(
    drawn: Path, words: list[object], tmp_path: Path
) -> None:
    real = write_discs(tmp_path / "cells", each=10)
    image = drawn / RARE / "000000.png"
    (real / RARE / "99.png").write_bytes(image.read_bytes())
    said = cli("bench", "augment", real, drawn, "-o", tmp_path / "out", *words)
    assert said.code == 2
    assert "1 of these images are marked as synthetic, first 'lymphocyte/99.png'" in said.complaint
    assert not (tmp_path / "out").exists()


def test_real_cells_do_not_pass_for_drawn_ones(
    cells: Path, words: list[object], tmp_path: Path
) -> None:
    said = cli("bench", "augment", cells, cells, "-o", tmp_path / "out", *words)
    assert said.code == 2
    assert "is not marked as synthetic" in said.complaint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--class", "blast"], "no class 'blast' among the training cells"),
        (["--labels", "3,9"], "fewer of: lymphocyte 8"),
        (["--labels", "8"], "nothing to top up"),
        (["--labels", "2"], "from 3 on, as in 10,20,50; not '2'"),
        (["--drawn", "7"], "holds 6 drawn cells of lymphocyte that can be read, not 7"),
        (["--baselines", "none"], "name one at least"),
        (["--split", "train"], "trained on"),
        (["-m", "nonsense"], "no model 'nonsense'"),
    ],
    ids=str,
)
def test_a_wrong_call_writes_nothing(
    cells: Path, drawn: Path, words: list[object], tmp_path: Path, more: list[str], said: str
) -> None:
    found = cli("bench", "augment", cells, drawn, "-o", tmp_path / "out", *words, *more)
    assert found.code == 2
    assert said in found.complaint
    assert not (tmp_path / "out").exists()


def test_half_a_pattern_is_refused(cells: Path, words: list[object], tmp_path: Path) -> None:
    found = cli("bench", "augment", cells, "drawn/{repeat}", "-o", tmp_path / "out", *words)
    assert found.code == 2
    assert "give both" in found.complaint


# --- real cells ----------------------------------------------------------------------------------


@pytest.mark.real
def test_real_cells(
    data_root: Path, split_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few real basophils beside the shipped drawn ones; run again, nothing is trained."""
    given = ["bench", "augment", data_root / "pbc", DEMO, "-o", tmp_path, "--splits", split_file,
             "--class", "basophil", "--labels", 3, "--repeats", 1, "--steps", 3, "--jobs", 1,
             "--device", "cpu", "--json"]  # fmt: skip
    said = cli(*given)
    assert said.code == 0, said.err
    assert [r["added"] for r in said.json["rows"]] == [0, 3, 3]
    assert said.json["training_cells"] == 48
    assert set(said.json["test_cells"].values()) == {2}
    assert said.json["drawn_by"][0].startswith("pbc8 (")
    with split_file.open(newline="") as file:
        tested = {each["path"] for each in csv.DictReader(file) if each["split"] == "test"}
    with (tmp_path / "choices" / "3-0.csv").open(newline="") as file:
        chosen = list(csv.DictReader(file))
    assert Counter(each["label"] for each in chosen)["basophil"] == 3
    assert len(chosen) == 3 + 7 * 6
    assert not {each["path"] for each in chosen} & tested
    told = {path.name.split("-")[3]: np.load(path)["probabilities"]
            for path in (tmp_path / "told").iterdir()}  # fmt: skip
    assert set(told) == set(ARMS)
    assert np.abs(told["drawn"] - told["copies"]).max() > 1e-6
    monkeypatch.setattr(topup, "_train", None)
    assert cli(*given).json == said.json
