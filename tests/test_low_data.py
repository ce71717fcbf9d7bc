"""`bench low-data`: choices and intervals by hand, what a training sees, and a tiny run of the command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import CLASSES, cli, contents, tiny_model, write_discs
from scipy.special import softmax
from scipy.stats import ttest_1samp

from cytodiffusion.cli import few
from cytodiffusion.cli.benches import percent
from cytodiffusion.cli.console import Console
from cytodiffusion.cli.few import Job, World
from cytodiffusion.data.taxonomy import Taxonomy
from cytodiffusion.errors import DataError
from cytodiffusion.evaluate.baselines import SHAPES, BaselineSettings, train_baseline
from cytodiffusion.evaluate.low_data import (
    Method,
    check_counts,
    choose,
    gains,
    interval,
    read,
    row,
    summary,
)
from cytodiffusion.train.loop import Run, TrainingSet, train

CHANGES = ("steps=4", "batch=4", "preprocess.size=16", "preprocess.crop=1.0", "network.unshuffle=2")
SMALL = ("--preset=tiny", "--steps=4", "--first-steps=2", *(f"--set={each}" for each in CHANGES[1:]),
         "--device=cpu", "--labels=2", "--repeats=2")  # fmt: skip
LABELS = np.array([0, 1, 2, -1] * 8)

# --- by hand -------------------------------------------------------------------------------------


def test_as_many_of_each_class_are_chosen() -> None:
    rows = choose(LABELS, 5, seed=0, repeat=0)
    assert np.bincount(LABELS[rows]).tolist() == [5, 5, 5]
    assert len(set(rows.tolist())) == 15


def test_a_smaller_choice_is_part_of_a_larger_one_and_repeats_differ() -> None:
    small, large = (set(choose(LABELS, n, seed=0, repeat=1).tolist()) for n in (2, 6))
    assert small < large
    assert large != set(choose(LABELS, 6, seed=0, repeat=2).tolist())
    assert large != set(choose(LABELS, 6, seed=1, repeat=1).tolist())


def test_a_class_with_too_few_cells_is_named() -> None:
    check_counts(["a", "a", "b", "b"], [1, 2])
    with pytest.raises(DataError, match=r"fewer of: b 1\. Give smaller"):
        check_counts(["a", "a", "b"], [1, 2])


def test_what_all_classes_find_hard_changes_no_reading() -> None:
    errors = np.random.default_rng(0).random((5, 2, 3)).astype(np.float32)
    nats = np.array([10.0, 30.0])
    told = read(errors, nats)
    by_hand = softmax(-(10 * errors[:, 0] + 30 * errors[:, 1]) / 2, axis=1)
    np.testing.assert_allclose(told, by_hand, atol=1e-5)
    np.testing.assert_allclose(read(errors + np.float32(0.5), nats), told, atol=1e-4)
    assert (read(errors[:, :1], nats[:1]).argmax(1) == errors[:, 0].argmin(1)).all()


def test_the_interval_is_students() -> None:
    values = [0.7, 0.8, 0.75, 0.9]
    assert interval(values) == pytest.approx(list(ttest_1samp(values, 0).confidence_interval(0.95)))
    assert interval([0.7]) is None


def made(method: Method, values: list[float]) -> list[dict[str, Any]]:
    """Rows of 10 labels that were as good as this in each repeat."""
    truth, right = np.array([0, 1]), np.eye(2)
    rows = [row(10, r, method, truth, right, {"seconds": 6.0}) for r in range(len(values))]
    return [each | {"balanced_accuracy": v} for each, v in zip(rows, values, strict=True)]


def test_the_best_baseline_with_the_same_cells_is_taken_repeat_by_repeat() -> None:
    """The other baseline, better in the first repeat, and the one with unlabelled cells are not."""
    rows = made(Method("ours", False), [0.9, 0.7]) + made(Method("vit", False), [0.7, 0.6])
    rows += made(Method("resnet", False), [0.8, 0.3]) + made(Method("vit", True), [0.95, 0.95])
    (found,) = gains(rows)
    assert (found["method"], found["baseline"]) == ("ours", "vit")
    assert found["gain"] == pytest.approx(0.15)
    assert found["gain_ci95"] == pytest.approx(interval([0.2, 0.1]))
    means = {each["method"]: each["balanced_accuracy"] for each in summary(rows)}
    assert means == pytest.approx(
        {"ours": 0.8, "vit": 0.65, "resnet": 0.55, "vit + unlabelled": 0.95}
    )


def test_a_row_by_hand() -> None:
    told = np.eye(2)[[0, 0, 1, 1]]
    found = row(10, 0, Method("ours", True), np.array([0, 0, 0, 1]), told, {"steps": 7})
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert (found["accuracy"], found["method"], found["steps"]) == (0.75, "ours + unlabelled", 7)


# --- one training --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_discs(tmp_path_factory.mktemp("low-data") / "cells", each=8)


@pytest.fixture
def world(cells: Path, tmp_path: Path) -> World:
    labels, console = Taxonomy.load(), Console(False)
    settings = few.settings_of("tiny", [*CHANGES, "checkpoint_minutes=1e-9"])
    found = few.list_cells(cells, None, "test", 0, labels, Console(False))
    train, test = (
        few.read_cells(part, "cells", CLASSES, settings.preprocess, margin, labels, console)
        for part, margin in zip(found, (1.5, 1.0), strict=True)
    )
    return World(tmp_path, settings, CLASSES, train, test, 0, 0, "cpu")


def test_labels_of_the_rest_are_hidden(world: World) -> None:
    alone, known = few.given_to(world, Job(3, 0, Method("ours", False)))
    every, shown = few.given_to(world, Job(3, 0, Method("ours", True)))
    assert np.bincount(known).tolist() == [3, 3, 3]
    assert len(every) == len(world.train.labels) == 18
    np.testing.assert_array_equal(np.flatnonzero(shown >= 0), alone)
    np.testing.assert_array_equal(shown[alone], known)


def test_no_cell_is_in_training_and_in_the_test(world: World) -> None:
    assert len(world.test.labels) == 6
    assert not set(world.test.digests) & set(world.train.digests)


def test_unlabelled_cells_of_the_test_are_not_trained_on(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_discs(tmp_path / split, each=2)
        (tmp_path / split / "eosinophil" / "01.png").rename(tmp_path / split / "bare.png")
    train, _ = few.list_cells(tmp_path, None, "test", 0, Taxonomy.load(), Console(False))
    assert [sample.name for sample in train if sample.label is None] == ["train/bare.png"]


def test_a_cut_training_goes_on_and_says_the_same(world: World) -> None:
    job = Job(3, 1, Method("ours", True))
    whole = few.work(replace(world, out=world.out / "whole"), job)
    folder = world.out / "runs" / few.place(world, job).stem
    data = TrainingSet(world.train.images, few.given_to(world, job)[1], CLASSES)
    settings = world.settings.model_copy(update={"seed": 1})
    for progress in train(Run(folder, settings, data, "cpu"), report_every=1):
        if progress.step == 3:
            break
    assert Run(folder, settings, data, "cpu").step == 2  # of 4
    found = few.work(world, job)
    np.testing.assert_array_equal(found.probabilities, whole.probabilities)
    assert found.steps == 4
    assert not folder.exists()


def test_ours_begins_with_what_was_learned_without_labels(world: World) -> None:
    """Once for all repeats, and its time counts in each."""
    begun = replace(world, first_steps=4)
    few.train_first(begun, Console(False))
    alone, rest = (Job(3, 0, Method("ours", rest)) for rest in (False, True))
    assert few.place(begun, alone) == few.place(world, alone)
    assert few.place(begun, rest) != few.place(world, rest)
    found, plain = few.work(begun, rest), few.work(world, rest)
    assert np.abs(found.probabilities - plain.probabilities).max() > 1e-4
    first = few.spent(few.first_folder(begun))
    assert first > 0
    assert found.seconds >= round(first, 1)


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Iterator[None]:
    """A ResNet that is trained in a moment."""
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
        patch.setitem(SHAPES, "resnet", SHAPES["resnet"] | sizes)
        yield


@pytest.fixture(scope="module")
def out(cells: Path, small: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("low-data") / "out"
    said = cli(
        "bench", "low-data", cells, "-o", folder, *SMALL, "--baselines", "resnet", "--jobs", 1
    )
    assert said.code == 0, said.err
    assert "2 labels, repeat 1, resnet + unlabelled: balanced accuracy" in said.err
    assert "training: 8 of 8 trainings" in said.err
    return folder


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_the_command(out: Path) -> None:
    found = results(out)
    methods = ["ours", "ours + unlabelled", "resnet", "resnet + unlabelled"]
    asked = [(2, method, repeat) for method in methods for repeat in (0, 1)]
    assert [(r["labels"], r["method"], r["repeat"]) for r in found["rows"]] == asked
    assert [each["method"] for each in found["summary"]] == methods
    assert {gain["baseline"] for gain in found["gains"]} == {"resnet", "resnet + unlabelled"}
    assert found["test_cells"] == dict.fromkeys(CLASSES, 2)
    assert (found["training_cells"], found["labels_of_other_cells"]) == (18, "none used")
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 1
    assert "--labels 2 " in page
    assert not list((out / "runs").iterdir())


def test_a_baseline_trains_for_as_long_as_ours(out: Path) -> None:
    took = {(r["method"], r["repeat"]): r["seconds"] for r in results(out)["rows"]}
    for (method, repeat), seconds in took.items():
        if method.startswith("resnet"):  # which ends with a whole step
            assert took[method.replace("resnet", "ours"), repeat] <= seconds + 0.1


def test_run_again_only_what_is_new_is_trained(
    cells: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, kept = results(out), contents(out / "told")
    words = ["bench", "low-data", cells, "-o", out, *SMALL, "--baselines", "resnet", "--jobs", 1]
    with monkeypatch.context() as patch:
        patch.setattr(few, "_train_ours", None)
        patch.setattr(few, "_train_baseline", None)
        assert cli(*words).code == 0
    assert (results(out), contents(out / "told")) == (before, kept)
    more = cli(*words, "--labels", "2,3", "--no-unlabelled", "--json")
    assert more.code == 0, more.err
    now = contents(out / "told")
    assert now.items() >= kept.items()
    new = sorted(name.rsplit("-", 1)[0] for name in now.keys() - kept)
    assert new == ["3-0-ours", "3-0-resnet", "3-1-ours", "3-1-resnet"]
    old = [r for r in before["rows"] if not r["unlabelled"]]
    assert [r for r in more.json["rows"] if r["labels"] == 2] == old


def test_both_begin_with_what_was_trained_elsewhere(
    cells: Path, world: World, small: None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of the classes that are asked for alone; what does not learn says what it said before."""
    about = BaselineSettings(kind="resnet", steps=2, batch=4, learning_rates=(1e-3,))
    training = train_baseline(world.train.images, world.train.labels, CLASSES,
                              world.settings.preprocess, world.settings.augmentation, about)  # fmt: skip
    begun, out = world.out / "begun", world.out / "out"
    Console(False).follow(percent(training), "training", 100, "%").save(begun)
    model = tiny_model(tmp_path_factory.getbasetemp()).bundle
    said = cli("bench", "low-data", cells, "-o", out, "--set=learning_rate=1e-12", "--steps=4",
               "--device=cpu", "--labels=2", "--repeats=1", "--jobs=1", "--from", model,
               "--baselines=resnet", "--baseline-from", begun, "--classes=Neutrophils,lymphocyte",
               "--share=0.4", "--json")  # fmt: skip
    assert said.code == 0, said.err
    assert set(said.json["test_cells"]) == {"neutrophil", "lymphocyte"}
    assert "resnet: begun" in said.json["pretrained"]
    assert said.json["labels_of_other_cells"] == "those of what was trained before"
    assert "Every method saw" in (page := (out / "report.html").read_text())
    assert "what was spent before is not counted" in page
    assert "training without labels" not in said.err
    assert [row["method"] for row in said.json["rows"]] == [
        "ours", "ours + unlabelled", "resnet", "resnet + unlabelled",
    ]  # fmt: skip
    assert said.json["rows"][0]["balanced_accuracy"] > 0.9


def test_two_at_a_time_say_what_one_does(cells: Path, out: Path, tmp_path: Path) -> None:
    said = cli("bench", "low-data", cells, "-o", tmp_path, *SMALL, "--no-unlabelled",
               "--baselines", "none", "--jobs", 2)  # fmt: skip
    assert said.code == 0, said.err
    for path in (tmp_path / "told").iterdir():
        with np.load(path) as found, np.load(out / "told" / path.name) as wanted:
            np.testing.assert_allclose(found["probabilities"], wanted["probabilities"], atol=1e-5)
    assert len(results(tmp_path)["rows"]) == 2
    assert results(tmp_path)["gains"] == []


def test_an_unreadable_image_is_named(cells: Path, tmp_path: Path) -> None:
    write_discs(tmp_path / "cells", each=8)
    (tmp_path / "cells" / CLASSES[0] / "00.png").write_bytes(b"no image")
    said = cli("bench", "low-data", tmp_path / "cells", "-o", tmp_path / "out", *SMALL, "--repeats", 1,
               "--labels", 2, "--no-unlabelled", "--baselines", "none", "--jobs", 1)  # fmt: skip
    assert said.code == 1
    assert "Not read: eosinophil/00.png" in said.err
    assert results(tmp_path / "out")["training_cells"] + 6 >= 23


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--labels", "2,7"], "fewer of: eosinophil 6, lymphocyte 6, neutrophil 6"),
        (["--labels", "1"], "not '1'"),
        (["--labels", "few"], "not 'few'"),
        (["--baselines", "vgg"], "no baseline 'vgg'"),
        (["--split", "train"], "trained on"),
        (["--set", "network.form=conditional"], "form=heads"),
        (["--splits", "nowhere.csv"], "nowhere.csv"),
        (["--from", "nothing"], "no model 'nothing'"),
        (["--baseline-from", "."], "has no trained baseline"),
        (
            ["--from", "pbc8", "--baselines", "resnet"],
            "a --baseline-from for each of the --baselines",
        ),
        (["--preset", "fine-tune"], "--from pbc8-far"),
        (["--classes", "neutrophil,blast"], "has no cell of: blast"),
    ],
    ids=str,
)
def test_a_wrong_call_writes_nothing(
    cells: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    found = cli("bench", "low-data", cells, "-o", tmp_path / "out", *SMALL, *words)
    assert found.code == 2
    assert said in found.complaint
    assert not (tmp_path / "out").exists()


# --- real cells ----------------------------------------------------------------------------------


@pytest.mark.real
def test_real_cells(data_root: Path, split_file: Path, tmp_path: Path) -> None:
    """Of 48 cells 16 have labels; what learns from all of them and what from 16 is told apart."""
    words = ["bench", "low-data", data_root / "pbc", "-o", tmp_path, "--splits", split_file, "--labels", 2,
             "--repeats", 1, "--preset", "tiny", "--steps", 5, "--first-steps", 2, "--set", "batch=8",
             "--baselines", "none", "--jobs", 1, "--device", "cpu", "--json"]  # fmt: skip
    said = cli(*words)
    assert said.code == 0, said.err
    assert said.json["training_cells"] == 48
    assert set(said.json["test_cells"].values()) == {2}
    assert [r["method"] for r in said.json["rows"]] == ["ours", "ours + unlabelled"]
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "told").iterdir()}
    assert len(kept) == 2
    first, second = (np.load(path)["probabilities"] for path in kept)
    assert first.shape == (16, 8)
    assert np.abs(first - second).max() > 1e-6
    assert cli(*words).json == said.json
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "told").iterdir()} == kept
