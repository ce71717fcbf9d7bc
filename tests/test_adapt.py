"""`adapt`: what is taken for labels, what is strange beside it, and a tiny model that learns dim discs."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from helpers import CLASSES, Result, Tiny, cli, contents, tiny_model, write_discs
from PIL import Image

from cytodiffusion import adaptation
from cytodiffusion.bundle import Parts, compact_network, load, save_bundle, verify
from cytodiffusion.classify.adapt import beside, sure_names
from cytodiffusion.classify.anomaly import AnomalyModel, Cells, pattern
from cytodiffusion.classify.as_json import calibration_from_json, calibration_to_json
from cytodiffusion.classify.classifier import ALARM, Budget
from cytodiffusion.classify.draws import stratified
from cytodiffusion.classify.fit import Seen, fit_sequence
from cytodiffusion.data.images import Preprocess
from cytodiffusion.data.load import look_of
from cytodiffusion.data.look import Look, crop_for
from cytodiffusion.data.match import Fit, fit_frames
from cytodiffusion.data.readers import read_dataset
from cytodiffusion.diffusion.precondition import EDMDenoiser
from cytodiffusion.evaluate import baselines
from cytodiffusion.networks.compact import CompactNetwork
from cytodiffusion.train import loop
from cytodiffusion.train.settings import FINE_TUNE, load_settings

STEPS = 4  # of a round here; a real one has 200
SHARES = (0.5, 0.5)  # of each name, as the method has it

# --- what is taken for labels --------------------------------------------------------------------


def named(*cells: tuple[int, float]) -> np.ndarray:
    """Probabilities of 4 classes: (name, its probability); the rest goes to the next class alone."""
    found = np.zeros((len(cells), 4))
    for row, (name, sure) in zip(found, cells, strict=True):
        row[name], row[(name + 1) % 4] = sure, 1 - sure
    return found


def test_the_surer_share_of_each_name_by_hand() -> None:
    """Four cells are named 0, three 2; names are compared with their own kind alone."""
    cells = named((0, 0.9), (2, 0.6), (0, 0.7), (0, 0.8), (2, 0.55), (0, 0.6), (2, 0.58))
    assert sure_names(cells, 0.5).tolist() == [0, 2, -1, 0, -1, -1, 2]
    assert sure_names(cells, 0.7).tolist() == [0, 2, 0, 0, 2, -1, 2]
    assert sure_names(cells, 1.0).tolist() == cells.argmax(1).tolist()


def test_how_sure_is_told_from_the_second() -> None:
    """A smaller probability may be the surer name, where the rest is spread over many."""
    cells = np.array([[0.55, 0.44, 0.01, 0.0], [0.5, 0.2, 0.15, 0.15]])
    assert sure_names(cells, 0.5).tolist() == [-1, 0]


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_one_cell_at_least_keeps_a_name_that_any_has(share: float) -> None:
    cells = named((0, 0.9), (3, 0.51), (0, 0.95))
    assert sure_names(cells, share).tolist() == [-1, 3, 0]


def test_among_equals_the_first_keep_their_name() -> None:
    assert sure_names(named(*[(1, 0.75)] * 6), 0.5).tolist() == [1, 1, 1, -1, -1, -1]


# --- strangeness beside a batch ------------------------------------------------------------------

TRIALS, WIDTH = 4, 6
FITTED, BATCH = 900, 701  # cells that budgets are fitted on, and those of another laboratory
FLOOR = np.array([1.0, 0.8, 0.5, 0.3])  # mean error of each trial


def world(count: int, seed: int, moved: float = 0.0) -> tuple[Seen, np.ndarray]:
    """Cells of 3 classes, the own one with smaller errors. `moved`: everything as another trunk sees it."""
    rng = np.random.default_rng(seed)
    truth = np.arange(count) % 3
    logs = rng.normal(0.0, 0.05, (count, TRIALS, 4)) + rng.normal(0, 0.1, (count, TRIALS, 1))
    logs[np.arange(count), :, truth] -= rng.normal(0.25, 0.1, (count, 1))
    features = rng.normal(0.0, 1.0, (count, WIDTH)) + np.eye(WIDTH)[truth] + moved
    errors = FLOOR[:, None] * np.exp(logs + moved / 10)
    return Seen(errors.astype(np.float32), features.astype(np.float32)), truth


@pytest.fixture(scope="module")
def before() -> dict[str, Budget]:
    """Budgets fitted on FITTED cells."""
    seen, truth = world(FITTED, seed=1)
    return fit_sequence(stratified(TRIALS, 0.1, 3.0), seen, truth, ending="-abroad")


@pytest.fixture(scope="module")
def batch() -> Seen:
    return world(BATCH, seed=2, moved=1.5)[0]


def run(budget: Budget, seen: Seen) -> np.ndarray:
    """The errors of cells that run trial by trial until the budget's policy calls them done."""
    found, going = np.full_like(seen.errors, np.nan), np.arange(len(seen.errors))
    assert seen.features is not None
    for trial in range(TRIALS):
        found[going, trial] = seen.errors[going, trial]
        assert budget.policy is not None
        still = budget.policy(found[going, : trial + 1], seen.features[going])
        going = going[still.sum(1) > 1]
    return found


def p_values(budget: Budget, seen: Seen) -> np.ndarray:
    return budget.held.p_value(budget.reader.anomaly(run(budget, seen), seen.features))


BUDGETS = ("fast", "balanced", "full")


@pytest.mark.parametrize("name", BUDGETS)
def test_names_and_probabilities_stay(before: dict[str, Budget], batch: Seen, name: str) -> None:
    """Of cells that ran all trials, and of such as stopped early; the sets too."""
    old = before[f"{name}-abroad"]
    new = beside(old, *batch)
    for errors in (batch.errors, run(new, batch), run(old, batch)):
        one, other = (each.reader.probabilities(errors) for each in (old, new))
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(old.held.truth, new.held.truth)
    np.testing.assert_array_equal(old.held.probabilities, new.held.probabilities)
    assert (old.draws, old.agreement) == (new.draws, new.agreement)


@pytest.mark.parametrize("name", BUDGETS)
def test_as_many_are_strange_as_at_home(before: dict[str, Budget], batch: Seen, name: str) -> None:
    """Of the cells themselves and of others from there, where half were before."""
    old = before[f"{name}-abroad"]
    assert (p_values(old, batch) <= ALARM).mean() > 0.3
    new = beside(old, *batch)
    others = world(3000, seed=3, moved=1.5)[0]
    for cells in (batch, others):
        p = p_values(new, cells)
        assert 0.001 < (p <= ALARM).mean() < 0.03
        assert abs(np.median(p) - 0.5) < 0.1


@pytest.mark.parametrize("name", BUDGETS)
def test_a_tenth_of_strangers_does_little_harm(
    before: dict[str, Budget], batch: Seen, name: str
) -> None:
    """They are flagged all the same, and the others no more than without them."""
    far = np.arange(BATCH) % 10 == 0
    assert batch.features is not None
    mixed = Seen(
        np.where(far[:, None, None], 3 * batch.errors, batch.errors),
        np.where(far[:, None], batch.features + 20, batch.features),
    )
    new = beside(before[f"{name}-abroad"], *mixed)
    flagged = p_values(new, mixed) <= ALARM
    assert flagged[far].mean() > 0.95
    assert flagged[~far].mean() < 0.02


def test_some_budgets_stop_early(before: dict[str, Budget], batch: Seen) -> None:
    """Or else the tests above would say less than they seem to."""
    ran = [np.isfinite(run(beside(each, *batch), batch)).all(2).sum(1) for each in before.values()]
    fast, balanced, full = (each.mean() for each in ran)
    assert fast < balanced < full == TRIALS


@pytest.mark.parametrize("name", BUDGETS)
def test_what_is_far_off_is_strange(before: dict[str, Budget], batch: Seen, name: str) -> None:
    """By its errors, all of them ten times as large; or by its features."""
    new = beside(before[f"{name}-abroad"], *batch)
    assert batch.features is not None
    few = Seen(batch.errors[:20], batch.features[:20])
    for strange in (
        Seen(10 * few.errors, few.features),
        Seen(few.errors, batch.features[:20] + 20),
    ):
        assert p_values(new, strange) == pytest.approx(1 / (1 + FITTED))


@pytest.mark.parametrize("count", [60, BATCH, FITTED + 1])
def test_it_is_read_from_a_file_as_it_was(before: dict[str, Budget], count: int) -> None:
    """Fewer cells than it was fitted on, or more; seven digits may part cells that are near each other."""
    part = world(count, seed=4, moved=1.5)[0]
    budgets = {name: beside(before[f"{name}-abroad"], *part) for name in BUDGETS}
    text = json.dumps(calibration_to_json(budgets))
    again = calibration_from_json(json.loads(text))
    assert json.dumps(calibration_to_json(again)) == text
    for name, new in budgets.items():
        one, other = p_values(new, part), p_values(again[name], part)
        np.testing.assert_allclose(one, other, atol=3.5 / (1 + FITTED))


def old_model(classes: int, width: int) -> AnomalyModel:
    """A model of home whose means and unit are not those of the batch."""
    units = np.append([9.0, 9.0], np.linspace(0, 9, 65))
    return AnomalyModel(np.zeros((classes, width)), np.eye(width), units, 0.5)


def test_the_unit_is_that_of_the_batch() -> None:
    """Two classes whose means lie elsewhere; the covariance stays, and the median is the usual one."""
    rng = np.random.default_rng(0)
    named = np.repeat([0, 1], 500)
    errors = np.exp(rng.normal(0, 0.3, (1000, 1, 3)) + 2 * named[:, None, None])
    sure = np.abs(np.eye(2)[named] - rng.uniform(0, 0.4, (1000, 1)))
    old = old_model(classes=3, width=3)
    new = old.beside(Cells(errors, sure), usual=0.6)
    g = pattern(errors)
    np.testing.assert_allclose(new.means, [g[named == k].mean(0) for k in (0, 1)])
    np.testing.assert_array_equal(new.precision, old.precision)
    assert np.median(new.anomaly(errors, sure)) == pytest.approx(0.6, abs=0.01)
    assert new.limit == old.limit


def test_a_tenth_of_another_class_does_little_harm() -> None:
    """Far from both classes in the direction in which they differ, which is where units could widen."""
    rng = np.random.default_rng(0)
    place = rng.permutation(np.repeat([0.0, 1.0, 4.0], [450, 450, 100]))
    noise = rng.normal(0, 0.3, (1000, 4, 3))
    noise[:, :, :2] += 2 * place[:, None, None]
    sure = np.abs(np.eye(2)[(place > 0).astype(int)] - rng.uniform(0, 0.4, (1000, 1)))
    cells = Cells(np.exp(noise), sure)
    new = old_model(classes=2, width=12).beside(cells, usual=0.4)
    told = new.anomaly(cells.errors, cells.probabilities)
    strange = place == 4
    assert (told[strange] > np.quantile(told[~strange], 0.99)).all()


def test_cells_that_are_all_alike_have_a_unit_too() -> None:
    errors, sure = np.ones((60, 1, 3)), np.tile([1.0, 0.0], (60, 1))
    old = old_model(classes=2, width=3)
    assert np.isfinite(old.beside(Cells(errors, sure), usual=0.4).units).all()


def test_the_unit_is_found_without_the_cell_itself() -> None:
    """Ten cells are near means of their own; others from there would all seem strange beside them."""
    rng = np.random.default_rng(0)

    def cells(count: int) -> Cells:
        sure = rng.uniform(0.5, 1, count)
        return Cells(np.exp(rng.normal(size=(count, 40, 3))), np.stack([sure, 1 - sure], axis=1))

    old, others = old_model(classes=2, width=120), cells(200)
    told = [old.beside(cells(10), usual=0.6).anomaly(*others[:2]) for _ in range(40)]
    assert np.mean([np.median(each) for each in told]) < 0.6  # .58; with the cell itself .62


# --- what is done to every frame -----------------------------------------------------------------


def test_what_was_found_is_settled() -> None:
    """Light, crop, and with the crop the size of the cells, so that no crop is looked for again."""
    plain = Preprocess(crop=0.5)
    seen = Look(light=(200, 200, 200), nucleus=0.4, cell=0.6)
    larger = plain.look.model_copy(update={"nucleus": 0.4, "cell": 0.6})
    assert Fit(False, None).settled(plain) == plain
    assert Fit(True, None, "", seen).settled(plain) == plain.model_copy(update={"match": "light"})
    assert Fit(True, 0.7, "", seen).settled(plain) == plain.model_copy(
        update={"match": "light", "crop": 0.7, "look": larger}
    )
    assert Fit(False, 0.7).settled(plain) == plain.model_copy(update={"crop": 0.7})
    assert Fit(True, None).settled(plain) == plain.model_copy(update={"match": "light"})


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_model(tmp_path_factory.getbasetemp())


def dim(folder: Path) -> Path:
    for path in sorted(folder.rglob("*.png")):
        Image.fromarray((np.asarray(Image.open(path)) * 0.8).astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 discs in dim light; the first of them are larger than those at home."""
    return dim(write_discs(tmp_path_factory.mktemp("abroad") / "other-lab", each=20, first=100))


def adapt(cells: Path, model: object, out: Path, *words: object) -> Result:
    return cli("adapt", cells, "-m", model, "-o", out, f"--set=steps={STEPS}", "--device=cpu",
               "--json", *words)  # fmt: skip


@dataclass(frozen=True)
class Adapted:
    out: Path
    said: Result

    @property
    def bundle(self) -> Path:
        return self.out / "bundle"


@pytest.fixture(scope="module")
def after(tiny: Tiny, cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    """Not to be written to."""
    out = tmp_path_factory.mktemp("after") / "theirs"
    said = adapt(cells, tiny.bundle, out)
    assert said.code == 0, said.err
    return Adapted(out, said)


def weights(bundle: Path) -> bytes:
    return (bundle / "model.safetensors").read_bytes()


def rounds(out: Path) -> list[dict[str, Any]]:
    return [
        each["taken_for_labelled"]
        for each in json.loads((out / "rounds.json").read_text())["rounds"]
    ]


def test_it_is_a_bundle_like_any_other(
    tiny: Tiny, after: Adapted, cells: Path, tmp_path: Path
) -> None:
    """With the same network and classes; of what was written on the way only the rounds stay."""
    assert {path.name for path in after.out.iterdir()} == {"bundle", "rounds.json"}
    assert verify(after.bundle) <= 1e-5
    assert cli("models", "verify", after.bundle, "--device", "cpu").code == 0
    old, new = load(tiny.bundle), load(after.bundle)
    assert new.name == "theirs"
    assert (new.classes, new.form) == (old.classes, old.form)
    assert set(new.classifier.budgets) == {"fast", "balanced", "full"}
    assert weights(after.bundle) != weights(tiny.bundle)
    said = after.said.json
    assert said["bundle"] == str(after.bundle)
    assert [each["taken_for_labelled"] for each in said["rounds"]] == rounds(after.out)
    assert all(each["seconds"] >= 0 for each in said["rounds"])


def test_frames_are_read_as_was_found(
    tiny: Tiny, after: Adapted, cells: Path, tmp_path: Path
) -> None:
    """In the light and at the scale of training, from now on unasked: nothing is left to be matched."""
    plain, kept = load(tiny.bundle).preprocess, load(after.bundle).preprocess
    frames = read_dataset(cells)
    fit = fit_frames(frames, plain)
    assert fit.light
    assert fit.crop is not None  # from a glance; what is kept is from all of them
    crop = crop_for(plain.crop, look_of(frames)[0], plain.look)
    assert (kept.match, kept.crop, kept.size) == ("light", crop, plain.size)
    again = fit_frames(frames, kept)
    assert (again.light, again.crop, again.told) == (False, None, "")
    assert fit.told in after.said.err
    told = cli("predict", cells, "-m", after.bundle, "-o", tmp_path, "--device", "cpu", "--json")
    assert told.code == 0, told.err
    assert (told.json["cells"], told.json["crop"], told.json["match"]) == (60, crop, "light")
    assert "differ" not in told.err
    assert "anomalous" not in told.json["flags"]


def test_a_crop_that_was_asked_for_stays(asked: Path, cells: Path) -> None:
    kept = load(asked / "bundle").preprocess
    assert (kept.match, kept.crop) == ("light", 0.9)
    again = fit_frames(read_dataset(cells), kept)
    assert (again.light, again.crop, again.told) == (False, None, "")


def test_the_surer_of_the_names_are_learned_from(
    tiny: Tiny, after: Adapted, cells: Path, tmp_path: Path
) -> None:
    """Of all trials, by the weights for other laboratories; every name at least once."""
    told = cli("predict", cells, "-m", tiny.bundle, "-o", tmp_path, "--budget", "full-abroad",
               "--match", "light", "--crop", load(after.bundle).preprocess.crop, "--device", "cpu",
               "--json")  # fmt: skip
    found = rounds(after.out)
    counts = told.json["counts"]
    assert found[0] == {name: math.ceil(SHARES[0] * count) for name, count in counts.items()}
    assert len(found) == len(SHARES)
    for each, share in zip(found, SHARES, strict=True):
        assert share * 60 <= sum(each.values()) < share * 60 + len(CLASSES)


def test_it_says_what_it_was_made_of(tiny: Tiny, after: Adapted) -> None:
    card, before = ((each / "card.md").read_text() for each in (after.bundle, tiny.bundle))
    old, new = load(tiny.bundle), load(after.bundle)
    assert f"{old.name}, adapted to 60 cells of another laboratory" in card
    assert f"2 rounds of {STEPS} steps" in card
    assert card.count("Not a medical device; not for diagnosis.") == 2
    assert card.endswith(before)
    origin = new.config["origin"]
    assert (origin["recipe"], origin["start"]) == ("cytodiffusion adapt", old.name)
    assert (origin["data"], origin["train_images"], origin["seed"]) == ("other-lab", 60, 0)
    assert (origin["steps"], origin["changes"]) == (STEPS, [f"steps={STEPS}"])
    assert (origin["before"], origin["answers"]) == (old.config["origin"], list(CLASSES))
    licence = [(each / "data_license.txt").read_text() for each in (tiny.bundle, after.bundle)]
    assert licence[1].startswith(licence[0])
    assert "other-lab" in licence[1].removeprefix(licence[0])
    assert "not for diagnosis" in after.said.err


def scattered(cells: Path, folder: Path, names: Sequence[str]) -> Path:
    """The same files under other labels, drawn at random."""
    rng = np.random.default_rng(0)
    for path in sorted(cells.rglob("*.png")):
        place = folder / str(rng.choice(names)) / f"{path.parent.name}-{path.name}"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    return folder


AS_ASKED = ("--match", "light", "--crop", 0.9)


@pytest.fixture(scope="module")
def asked(tiny: Tiny, cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of a call that says what is done to the frames."""
    out = tmp_path_factory.mktemp("asked") / "out"
    told = adapt(cells, tiny.bundle, out, *AS_ASKED)
    assert told.code == 0, told.err
    return out


def same(one: Path, other: Path) -> bool:
    """Whether two OUT hold the same, to the byte, apart from names and texts."""
    first, second = (contents(each / "bundle") for each in (one, other))
    own = ("config.json", "card.md", "data_license.txt", "checksums.json")
    assert set(first) == set(second)
    return rounds(one) == rounds(other) and all(
        first[name] == second[name] for name in first if name not in own
    )


@pytest.mark.parametrize("names", [CLASSES, (".",), ("blast", "never seen")], ids=str)
def test_labels_are_not_read(
    tiny: Tiny, asked: Path, cells: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    """Wrong ones, none at all, or some that no model knows: the same to the byte."""
    told = adapt(scattered(cells, tmp_path / "in", names), tiny.bundle, tmp_path / "b", *AS_ASKED)
    assert told.code == 0, told.err
    assert same(tmp_path / "b", asked)


def test_labels_do_not_decide_how_frames_are_read(
    tiny: Tiny, cells: Path, after: Adapted, tmp_path: Path
) -> None:
    told = adapt(scattered(cells, tmp_path / "in", CLASSES), tiny.bundle, tmp_path / "b")
    assert told.code == 0, told.err
    assert same(tmp_path / "b", after.out)


def test_classes_that_do_not_come_up_are_not_learned(
    tiny: Tiny, cells: Path, tmp_path: Path
) -> None:
    told = adapt(cells, tiny.bundle, tmp_path, "--classes", "neutrophil,lymphocyte")
    assert told.code == 0, told.err
    for each, share in zip(rounds(tmp_path), SHARES, strict=True):
        assert set(each) <= {"lymphocyte", "neutrophil"}
        assert share * 60 <= sum(each.values()) < share * 60 + 2
    assert load(tmp_path / "bundle").classes.names == CLASSES  # it may still be asked about them
    row = "| answers | lymphocyte, neutrophil |"
    assert row in (tmp_path / "bundle" / "card.md").read_text()


def test_the_order_of_the_classes_changes_nothing(tiny: Tiny, cells: Path, tmp_path: Path) -> None:
    first = adapt(cells, tiny.bundle, tmp_path, "--classes", "neutrophil,lymphocyte")
    again = adapt(cells, tiny.bundle, tmp_path, "--classes", "lymphocyte,neutrophil")
    assert (first.code, again.code) == (0, 0), again.err


@pytest.mark.parametrize("given", ["neutrophil", "neutrophil,Neutrophil"])
def test_classes_between_which_nothing_is_to_be_told(
    tiny: Tiny, cells: Path, tmp_path: Path, given: str
) -> None:
    told = adapt(cells, tiny.bundle, tmp_path, "--classes", given)
    assert told.code == 2
    assert "neutrophil" in told.err
    assert list(tmp_path.iterdir()) == []


def test_the_seed_decides(tiny: Tiny, after: Adapted, cells: Path, tmp_path: Path) -> None:
    """Seed 0 is that of `after`; that it gives the same again, test_cut_and_run_again sees."""
    assert adapt(cells, tiny.bundle, tmp_path, "--seed", 1).code == 0
    assert weights(tmp_path / "bundle") != weights(after.bundle)
    assert load(tmp_path / "bundle").config["origin"]["seed"] == 1


def test_it_is_said_where_cells_are_not_of_another_laboratory(tiny: Tiny, tmp_path: Path) -> None:
    home = write_discs(tmp_path / "in", each=20, first=200)
    told = adapt(home, tiny.bundle, tmp_path / "out")
    assert told.code == 0, told.err
    assert "not clearly of another laboratory" in told.err
    assert load(tmp_path / "out" / "bundle").preprocess == load(tiny.bundle).preprocess


def test_it_is_not_said_where_light_and_scale_were_asked_for(
    tiny: Tiny, cells: Path, tmp_path: Path
) -> None:
    """Nor are such cells read with the weights from home."""
    told = adapt(cells, tiny.bundle, tmp_path, "--match", "light,scale")
    assert told.code == 0, told.err
    assert "not clearly of another laboratory" not in told.err
    assert "weights from home" not in told.err


def test_labelled_cells_go_on_from_it_in_its_light(
    tiny: Tiny, after: Adapted, cells: Path, tmp_path: Path
) -> None:
    """`train --from` shows frames as the model that it begins with does."""
    told = cli("train", cells, "-o", tmp_path, "--preset", "fine-tune", "--from", after.bundle,
               "--set=steps=2", "--device=cpu")  # fmt: skip
    assert told.code == 0, told.err
    assert "brought to the light" in told.err
    kept, there = (load(each).preprocess for each in (tmp_path / "bundle", after.bundle))
    assert kept.match == "light"
    assert kept.look.light == there.look.light
    assert load_settings(tmp_path / "settings.yaml").preprocess == kept


def test_an_unreadable_image_is_named_and_the_rest_is_done(
    tiny: Tiny, cells: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(cells, tmp_path / "in"))
    (source / "neutrophil" / "103.png").write_bytes(b"")
    for _ in range(2):  # also when all is done
        told = adapt(source, tiny.bundle, tmp_path / "out")
        assert told.code == 1
        assert told.err.count("Not read: neutrophil/103.png: the file is empty") == 1
        assert len(told.json["rounds"]) == len(SHARES)
    assert verify(tmp_path / "out" / "bundle") <= 1e-5
    assert load(tmp_path / "out" / "bundle").config["origin"]["train_images"] == 59


# --- cut, and run again --------------------------------------------------------------------------


class Work:
    """Counts steps of training and cells that are named; ends the program before one of them."""

    def __init__(self, patch: pytest.MonkeyPatch, ends: Callable[[Work], bool]) -> None:
        self.steps = self.looks = self.begun = self.saved = 0
        self.ends = ends
        for owner, name, counter in (
            (loop, "_optimise", "steps"),
            (adaptation, "look", "looks"),
            (adaptation, "begin_round", "begun"),
            (adaptation, "save_adapted", "saved"),
        ):
            patch.setattr(owner, name, self._counted(getattr(owner, name), counter))

    def _counted(self, work: Callable[..., Any], counter: str) -> Callable[..., Any]:
        def counted(*given: Any) -> Any:
            if self.ends(self):
                raise KeyboardInterrupt
            setattr(self, counter, getattr(self, counter) + 1)
            return work(*given)

        return counted


CUTS: dict[str, Callable[[Work], bool]] = {
    "before any training": lambda work: work.begun == 0 and work.looks == 1,
    "after the first round": lambda work: work.steps == STEPS and work.looks == 1,
    "before the second round": lambda work: work.begun == 1 and work.looks == 2,
    "within the second round": lambda work: work.steps == STEPS + 3,
    "before the cells are named at last": lambda work: work.steps == 2 * STEPS and work.looks == 2,
    "before the bundle": lambda work: work.looks == 3 and work.begun == 2,
}


@pytest.mark.parametrize("cut", CUTS)
def test_cut_and_run_again(
    tiny: Tiny, after: Adapted, cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    cut: str,
) -> None:  # fmt: skip
    """The same to the byte as a run that was not cut, and nothing of it is done twice."""
    words = (cells, tiny.bundle, tmp_path / "theirs", "--set=checkpoint_minutes=0.000001")
    with monkeypatch.context() as patch:
        first = Work(patch, CUTS[cut])
        told = adapt(*words)
    assert told.code == 130
    stopped = json.loads(told.err.splitlines()[-1])
    assert stopped == {"error": "Stopped. Run the same command again to go on."}
    assert not (tmp_path / "theirs" / "bundle").exists()
    with monkeypatch.context() as patch:
        second = Work(patch, lambda _: False)
        told = adapt(*words)
    assert told.code == 0, told.err
    assert first.steps + second.steps == 2 * STEPS
    assert (first.looks + second.looks, second.saved) == (3, 1)
    assert same(tmp_path / "theirs", after.out)
    assert {path.name for path in (tmp_path / "theirs").iterdir()} == {"bundle", "rounds.json"}


def test_run_again_when_done(
    tiny: Tiny, after: Adapted, cells: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = contents(after.out)
    times = {path: path.stat().st_mtime_ns for path in after.out.rglob("*")}
    work = Work(monkeypatch, lambda _: True)
    told = adapt(cells, tiny.bundle, after.out)
    assert told.code == 0, told.err
    assert told.json == after.said.json
    assert (work.steps, work.looks, work.saved) == (0, 0, 0)
    assert contents(after.out) == kept
    assert {path: path.stat().st_mtime_ns for path in after.out.rglob("*")} == times


# --- refused -------------------------------------------------------------------------------------


@pytest.fixture
def nothing_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("done")

    monkeypatch.setattr(adaptation, "look", refuse)
    monkeypatch.setattr(adaptation, "begin_round", refuse)


@pytest.mark.usefixtures("nothing_done")
@pytest.mark.parametrize("files", [49, 50], ids=["49", "49 of 50"])
def test_too_few_cells(tiny: Tiny, tmp_path: Path, files: int) -> None:
    """49, or 50 of which one cannot be read."""
    source = dim(write_discs(tmp_path / "in", each=17))
    paths = sorted(source.rglob("*.png"))
    for path in paths[files:]:
        path.unlink()
    if files == 50:
        paths[7].write_bytes(b"")
    told = adapt(source, tiny.bundle, tmp_path / "out")
    assert told.code == 2
    assert told.complaint.startswith("Error: 49 different cells are too few")
    assert "it takes 50" in told.complaint
    assert told.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.fixture(scope="module")
def conditional(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose network has the class as an input; nothing of it was trained."""
    model = load(tiny.bundle)
    network, sigma_data = compact_network(model)
    other = CompactNetwork(network.settings.model_copy(update={"form": "conditional"}))
    folder = tmp_path_factory.mktemp("conditional") / "by-class"
    save_bundle(
        folder,
        Parts(
            name="by-class", denoiser=EDMDenoiser(other, sigma_data), classes=model.classes,
            preprocess=model.preprocess, budgets=model.classifier.budgets, taxonomy=model.taxonomy,
            card="", license="", data_license="", origin={},
        ),
    )  # fmt: skip
    return folder


@pytest.mark.usefixtures("nothing_done")
def test_a_class_conditional_network(conditional: Path, cells: Path, tmp_path: Path) -> None:
    told = adapt(cells, conditional, tmp_path / "out")
    assert told.code == 2
    assert "'by-class' cannot be adapted" in told.complaint
    assert "a head for each class" in told.complaint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("nothing_done")
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--classes", "neutrophil,blast"], "blast"),
        (["--set", "steps=0"], "steps"),
        (["--set", "step=9"], "step"),
        (["--match", "magic"], "magic"),
        (["-m", "no-such-model"], "no-such-model"),
    ],
    ids=str,
)
def test_a_wrong_call_writes_nothing(
    tiny: Tiny, cells: Path, tmp_path: Path, words: list[str], named: str
) -> None:
    told = adapt(cells, tiny.bundle, tmp_path / "out", *words)
    assert told.code == 2
    assert named in told.complaint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("nothing_done")
@pytest.mark.parametrize(
    "words",
    [
        ["--seed", "1"],
        ["--set", "steps=5"],
        ["--classes", "neutrophil,lymphocyte"],
        ["--crop", "1"],
    ],
    ids=str,
)
def test_another_call_does_not_go_on_in_the_same_folder(
    tiny: Tiny, after: Adapted, cells: Path, words: list[str]
) -> None:
    kept = contents(after.out)
    told = adapt(cells, tiny.bundle, after.out, *words)
    assert told.code == 2
    assert str(after.out) in told.complaint
    assert "another folder" in told.complaint
    assert contents(after.out) == kept


@pytest.mark.usefixtures("nothing_done")
def test_other_cells_do_not_go_on_in_the_same_folder(
    tiny: Tiny, after: Adapted, cells: Path, tmp_path: Path
) -> None:
    source, kept = Path(shutil.copytree(cells, tmp_path / "in")), contents(after.out)
    (source / "neutrophil" / "103.png").unlink()
    told = adapt(source, tiny.bundle, after.out)
    assert told.code == 2
    assert str(after.out) in told.complaint
    assert contents(after.out) == kept


@pytest.mark.usefixtures("nothing_done")
@pytest.mark.parametrize("kind", ["run of the model", "another bundle", "bundle with more"])
def test_what_is_in_the_way_is_not_lost(
    tiny: Tiny, after: Adapted, cells: Path, tmp_path: Path, kind: str
) -> None:
    """As the very model that is begun with, where its run is given for OUT."""
    out = tmp_path / "out"
    shutil.copytree(tiny.run if kind == "run of the model" else after.out, out)
    (out / "rounds.json").unlink(missing_ok=True)
    if kind == "bundle with more":
        (out / "bundle" / "thesis.txt").write_text("years of work")
    kept = contents(out)
    told = adapt(cells, out / "bundle" if kind == "run of the model" else tiny.bundle, out)
    assert told.code == 2
    assert str(out) in told.complaint
    assert contents(out) == kept


@pytest.mark.parametrize("change", ["network.width=32", "preprocess.crop=0.9", "seed=3"])
def test_what_the_model_or_an_option_decides_cannot_be_set(
    tiny: Tiny, cells: Path, tmp_path: Path, change: str
) -> None:
    told = adapt(cells, tiny.bundle, tmp_path / "out", "--set", change)
    assert told.code == 2
    assert f"'{change.split('=')[0].split('.')[0]}'" in told.complaint
    assert not (tmp_path / "out").exists()


def test_a_call_that_could_not_train_can_be_mended(tiny: Tiny, cells: Path, tmp_path: Path) -> None:
    """In the same folder: nothing was learned yet."""
    assert adapt(cells, tiny.bundle, tmp_path / "out", "--set", "accumulate=3").code == 2
    assert adapt(cells, tiny.bundle, tmp_path / "out").code == 0


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"about": "x"}'])
def test_a_record_that_is_none(tiny: Tiny, cells: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "rounds.json").write_text(text)
    told = adapt(cells, tiny.bundle, tmp_path)
    assert told.code == 2
    assert "another folder" in told.complaint


# --- beside others -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """81 discs for training and 54 held out, in splits.csv."""
    folder = write_discs(tmp_path_factory.mktemp("bench") / "home", each=45, first=300)
    lines = ["path,label,split"]
    for name in CLASSES:
        parts = ["train"] * 27 + ["val"] * 18
        lines += [f"{name}/{300 + i}.png,{name},{part}" for i, part in enumerate(parts)]
    (folder / "splits.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rounds, and a small baseline."""
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    monkeypatch.setitem(FINE_TUNE, "steps", STEPS)
    monkeypatch.setitem(baselines.SHAPES, "vit", baselines.SHAPES["vit"] | small)


def shift(home: Path, foreign: Path, model: Path, out: Path, *words: object) -> Result:
    return cli("bench", "shift", "--train", home, "--splits", home / "splits.csv", "--foreign", foreign,
               "-m", model, "-o", out, "--home", 54, "--device", "cpu", "--json", *words)  # fmt: skip


def rows(said: Result) -> dict[tuple[str, str], dict[str, Any]]:
    """What was told, times left out."""
    return {(row["method"], row["set"]): row | {"cells_per_second": 0} for row in said.json["rows"]}


@pytest.mark.usefixtures("short")
def test_in_bench_shift(
    tiny: Tiny, home: Path, cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each set has its own model; a baseline goes on too, for as long as ours; nothing is done twice."""
    minutes, train = list[float](), baselines.train_baseline

    def timed(*given: Any, **more: Any) -> Any:
        settings = next(each for each in given if isinstance(each, baselines.BaselineSettings))
        minutes.append(settings.minutes or 0)
        return train(*given, **more)

    monkeypatch.setattr(baselines, "train_baseline", timed)
    words = (home, cells, tiny.bundle, tmp_path, "--steps", "self-trained,abroad")
    with monkeypatch.context() as patch:
        work = Work(patch, lambda _: False)
        said = shift(*words)
    assert said.code == 0, said.err
    assert (work.steps, work.looks, work.saved) == (2 * 2 * STEPS, 2 * 3, 2)
    name, sets = load(tiny.bundle).name, {"home", cells.name, "mean of foreign sets"}
    found = rows(said)
    methods = {f"{name}, self-trained", f"{name}, abroad"}
    assert set(found) == {(method, where) for method in methods for where in sets}
    mine = found[f"{name}, self-trained", cells.name]
    assert (mine["cells"], mine["passes_per_cell"], mine["target_labels_used"]) == (60, 8, False)
    models = {load(each).config["origin"]["data"]: each.parent
              for each in (tmp_path / "adapted").glob("*/bundle")}  # fmt: skip
    assert set(models) == {home.name, cells.name}
    assert all(verify(each / "bundle") <= 1e-5 for each in models.values())
    there = load(models[cells.name] / "bundle").preprocess
    assert fit_frames(read_dataset(cells), there).told == ""
    kept = contents(tmp_path / "adapted")

    work = Work(monkeypatch, lambda _: True)  # from here on nothing of ours may be done
    beside_vit = shift(*words, "--baselines", "vit", "--minutes", 0.01)
    assert beside_vit.code == 0, beside_vit.err
    more = rows(beside_vit)
    assert {where for method, where in more if method == "vit, self-trained"} == sets
    assert {key: more[key] for key in found} == found
    took = {data: [each["seconds"] / 60 for each in json.loads((out / "rounds.json").read_text())["rounds"]]
            for data, out in models.items()}  # fmt: skip
    assert minutes == pytest.approx([0.01, *took[home.name], *took[cells.name]])

    minutes.clear()
    again = shift(*words, "--baselines", "vit", "--minutes", 0.01)
    assert again.code == 0, again.err
    assert rows(again) == more
    assert (minutes, work.steps, work.looks) == ([], 0, 0)
    assert contents(tmp_path / "adapted") == kept


@pytest.mark.usefixtures("short")
def test_sets_that_are_too_small_are_left_out(
    tiny: Tiny, home: Path, cells: Path, tmp_path: Path
) -> None:
    said = shift(home, cells, tiny.bundle, tmp_path, "--steps", "self-trained", "--home", 12)
    assert said.code == 0, said.err
    assert "self-trained is left out: home has 12 cells" in said.err
    assert {where for _, where in rows(said)} == {cells.name, "mean of foreign sets"}


@pytest.mark.usefixtures("short")
def test_a_baseline_that_names_no_cell_of_a_class_goes_on_with_the_others(
    tiny: Tiny, home: Path, cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = baselines.Baseline.predict_proba

    def blind(*given: Any) -> np.ndarray:
        told = ask(*given)
        return told * [1, 1, 0] + 1e-9 if told.shape[1] == 3 else told

    monkeypatch.setattr(baselines.Baseline, "predict_proba", blind)
    said = shift(home, cells, tiny.bundle, tmp_path, "--steps", "self-trained", "--baselines", "vit",
                 "--minutes", 0.01)  # fmt: skip
    assert said.code == 0, said.err


# --- real cells ----------------------------------------------------------------------------------

FIVE = "basophil,eosinophil,lymphocyte,monocyte,neutrophil"


@pytest.fixture
def any_precision() -> Iterator[None]:
    """The first training of a process settles the precision of all that follow; not here."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.real
@pytest.mark.usefixtures("any_precision")
def test_real_cells_of_another_laboratory(data_root: Path, tmp_path: Path) -> None:
    """Half of Raabin's cells, files without a label: named clearly better than before, few strange."""
    if not (data_root / "raabin").is_dir():
        pytest.skip(f"no raabin/ in {data_root}")
    (tmp_path / "in").mkdir()
    truth = dict[str, str]()
    for folder in sorted((data_root / "raabin").iterdir()):
        for path in sorted(folder.iterdir())[::2]:
            name = f"{len(truth):03}{path.suffix}"
            truth[name] = folder.name
            shutil.copy(path, tmp_path / "in" / name)

    def ask(out: str, *words: object) -> tuple[float, float]:
        """Share of cells named right, and flagged as anomalous."""
        told = cli("predict", tmp_path / "in", "-o", tmp_path / out, "--classes", FIVE, "--device",
                   "cpu", *words)  # fmt: skip
        assert told.code == 0, told.err
        with (tmp_path / out / "predictions.csv").open(newline="") as file:
            found = list(csv.DictReader(file))
        assert len(found) == len(truth)
        right = np.mean([truth[row["path"]] == row["predicted"] for row in found])
        return float(right), float(np.mean([row["flag"] == "anomalous" for row in found]))

    before, _ = ask("before", "-m", "pbc8-far")
    told = cli("adapt", tmp_path / "in", "-o", tmp_path / "out", "--classes", FIVE, "--set=steps=30",
               "--set=batch=16", "--set=precision=bf16", "--device", "cpu")  # fmt: skip
    assert told.code == 0, told.err
    bundle = tmp_path / "out" / "bundle"
    assert load(bundle).config["origin"]["start"] == "pbc8-far"  # which is taken unasked
    after, strange = ask("after", "-m", bundle)
    assert after > before + 0.1
    assert strange <= 0.03
