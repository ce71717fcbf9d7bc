"""A run that learns, and one that is cut and ends with the same weights."""

import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import write_discs
from torch import nn

from cytodiffusion.bundle import ZOO
from cytodiffusion.classify.draws import stratified
from cytodiffusion.classify.evidence import DenoiserMeter
from cytodiffusion.classify.measure import Measurement
from cytodiffusion.cli.console import Console
from cytodiffusion.cli.train import at_scale_of, deal, first_weights, settings_from, split_samples
from cytodiffusion.data.images import Preprocess, to_tensor
from cytodiffusion.data.look import Look
from cytodiffusion.data.readers import read_dataset
from cytodiffusion.data.taxonomy import Taxonomy
from cytodiffusion.data.transforms import POSES
from cytodiffusion.errors import ModelError, OutputError, SettingsError
from cytodiffusion.train import loop
from cytodiffusion.train.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    load_optimizer,
    optimizer_tensors,
    save_checkpoint,
)
from cytodiffusion.train.ema import EMA
from cytodiffusion.train.loop import (
    Progress,
    Run,
    TrainingSet,
    batch_indices,
    learning_rate,
    mix,
    train,
)
from cytodiffusion.train.record import read_metrics, record
from cytodiffusion.train.settings import (
    NetworkSettings,
    TrainSettings,
    dump_settings,
    load_settings,
    make_settings,
)
from cytodiffusion.types import UNLABELLED

CLASSES = ("red", "green", "blue")


def settings(**changes) -> TrainSettings:
    network = {"unshuffle": 4, "width": 16, "multipliers": (1,), "blocks": 1, "head_width": 4}
    network |= changes.pop("network", {})
    small = {
        "network": NetworkSettings(**network),
        "preprocess": Preprocess(size=16),
        "steps": 8,
        "batch": 8,
        "warmup": 2,
        "ema": 0.9,
        "checkpoint_minutes": 1000.0,
    }
    return TrainSettings(**small | changes)


def cells(each: int = 6, size: int = 24, seed: int = 0) -> TrainingSet:
    """Discs on grey; the colour is the class."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] - size / 2 + 0.5
    labels = np.repeat(np.arange(3), each)
    canvases = np.full((len(labels), 3, size, size), 128.0)
    for canvas, label in zip(canvases, labels, strict=True):
        disc = np.hypot(x, y) < rng.uniform(4, 6)
        canvas[label][disc] = 230
        canvas[(label + 1) % 3][disc] = 30
    canvases += rng.normal(0, 10, canvases.shape)
    return TrainingSet(canvases.clip(0, 255).astype(np.uint8), labels, CLASSES)


def go(folder: Path, chosen: TrainSettings, stop: int | None = None, data=None) -> Run:
    """Train to the end, or as if killed when step `stop` is reported."""
    run = Run(folder, chosen, data or cells(), device="cpu")
    for progress in train(run, report_every=1):
        if progress.step == stop:
            break
    return run


def state(folder: Path) -> tuple[dict, dict]:
    return load_checkpoint(latest_checkpoint(folder / "checkpoint"))


def assert_same(one: Path, other: Path, **tolerance: float) -> None:
    """The same step, weights, running mean and optimiser: to the bit unless a tolerance is given."""
    (first, said), (second, also) = state(one), state(other)
    assert said == also
    assert first.keys() == second.keys() == {"model", "ema", "optimizer"}
    for part in first:
        assert first[part].keys() == second[part].keys()
        for name, value in first[part].items():
            torch.testing.assert_close(
                value, second[part][name], **tolerance or {"atol": 0, "rtol": 0}
            )


# --- learning ------------------------------------------------------------------------------------


def test_a_tiny_run_learns_to_name_cells(tmp_path):
    chosen = settings(steps=120, batch=16, learning_rate=3e-3, warmup=10, sharpness=30.0)
    run = Run(tmp_path, chosen, cells(20), device="cpu")
    reports = list(train(run, report_every=40))
    assert [report.step for report in reports] == [40, 80, 120]
    assert reports[-1].losses["own"] < 0.85 * reports[0].losses["own"]
    unseen = cells(10, size=16, seed=9)
    errors = Measurement(stratified(2, 0.5, 2.0), 4, POSES).measure(
        DenoiserMeter(run.denoiser("ema")), to_tensor(unseen.canvases), [str(i) for i in range(30)]
    )
    named = errors[:, :, :3].mean(1).argmin(1)
    assert (named == unseen.labels).mean() > 0.9


def test_losses_reported_are_means_since_the_last_report(tmp_path):
    chosen = settings(steps=5)
    first = Run(tmp_path / "a", chosen, cells(), "cpu")
    single = [progress.losses["total"] for progress in train(first, report_every=1)]
    grouped = list(train(Run(tmp_path / "b", chosen, cells(), "cpu"), report_every=3))
    assert [p.step for p in grouped] == [3, 5]
    assert [p.images for p in grouped] == [24, 16]
    found = [p.losses["total"] for p in grouped]
    assert found == pytest.approx([np.mean(single[:3]), np.mean(single[3:])])


def test_a_gradient_is_cut_to_the_largest_norm(tmp_path):
    norms = []
    for clip in (1e-12, 1e12):
        chosen = settings(steps=2, clip=clip, optimizer="adamw")
        go(tmp_path / str(clip), chosen)
        kept = state(tmp_path / str(clip))[0]["optimizer"]
        means = [value for name, value in kept.items() if name.endswith("exp_avg")]
        norms.append(sum(mean.square().sum() for mean in means).sqrt())
    assert norms[0] < 1e-11 < norms[1]


def test_the_best_weights_are_those_of_the_lowest_validation_nll(tmp_path):
    scores = iter([3.0, 1.0, 2.0])
    run = Run(tmp_path, settings(steps=3), cells(), device="cpu")
    kept = {}
    for progress in train(
        run, report_every=1, validate_every=1, validate=lambda denoiser: {"nll": next(scores)}
    ):
        kept[progress.step] = run.denoiser("ema").state_dict()
    assert run.best_score == 1.0
    best, resumed = (
        run.denoiser("best").state_dict(),
        Run(tmp_path, settings(steps=3), cells(), "cpu"),
    )
    for name, value in best.items():
        assert value.equal(kept[2][name])
        assert value.equal(resumed.denoiser("best").state_dict()[name])
    assert resumed.best_score == 1.0


# --- cut and gone on -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["heads", "conditional"])
def test_a_run_that_was_killed_twice_ends_with_the_same_weights(tmp_path, form):
    """A checkpoint after every step; the kill at step n comes before that of n is written."""
    chosen = settings(checkpoint_minutes=1e-9, network={"form": form, "dropout": 0.3})
    go(tmp_path / "whole", chosen)
    first, second = sorted(
        np.random.default_rng(len(form)).choice(np.arange(2, 8), 2, replace=False)
    )
    for stop in (first, second, None):
        run = go(tmp_path / "cut", chosen, stop)
    assert run.step == 8
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_the_scale_of_float16_gradients_goes_on_where_it_was(tmp_path, monkeypatch):
    """A scaler that doubles at every step, on this processor: from 8 it comes to 8 x 2^8."""
    plain = loop._accelerator

    def scaling(chosen: TrainSettings, device: str):
        accelerator = plain(chosen, device)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
        return accelerator

    monkeypatch.setattr(loop, "_accelerator", scaling)
    chosen = settings(checkpoint_minutes=1e-9)
    go(tmp_path / "whole", chosen)
    for stop in (3, None):
        go(tmp_path / "cut", chosen, stop)
    assert state(tmp_path / "cut")[1]["scaler"]["scale"] == 8 * 2**8
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_the_first_report_after_a_cut_is_of_what_was_done_since(tmp_path):
    """Gone on at step 2 of 8 with a report every 3: one step, then three, then two."""
    chosen = settings()
    single = Run(tmp_path / "whole", chosen, cells(), device="cpu")
    losses = [progress.losses["total"] for progress in train(single, report_every=1)]
    go(tmp_path / "cut", chosen, 2).save()
    run = Run(tmp_path / "cut", chosen, cells(), device="cpu")
    found = list(train(run, report_every=3))
    assert [p.images for p in found] == [8, 24, 16]
    wanted = [losses[2], np.mean(losses[3:6]), np.mean(losses[6:])]
    assert [p.losses["total"] for p in found] == pytest.approx(wanted)


def test_a_run_that_was_cut_is_judged_at_the_same_steps(tmp_path):
    """Cut at 4, after the third step, at which it is due, and before the fifth, which is reported."""

    def judged(run: Run) -> list[int]:
        steps = []
        every = {"report_every": 5, "validate_every": 3, "validate": lambda _: {"nll": 1.0}}
        for progress in train(run, **every):
            steps += [progress.step] * (progress.validation is not None)
        return steps

    chosen = settings(steps=12)
    go(tmp_path / "cut", chosen, 4).save()
    whole = judged(Run(tmp_path / "whole", chosen, cells(), device="cpu"))
    assert judged(Run(tmp_path / "cut", chosen, cells(), device="cpu")) == whole == [5, 10, 12]


def test_a_torn_last_line_of_the_metrics_goes(tmp_path):
    run = Run(tmp_path, settings(), cells(), device="cpu")
    for step in (1, 2):
        record(run, Progress(step, 8, 1.0, 8))
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 3, "lo')
    for step in (3, 4):
        record(run, Progress(step, 8, 1.0, 8))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_killed_between_checkpoints(tmp_path):
    """Steps 4 to 6 are lost and done again."""
    chosen = settings()
    go(tmp_path / "whole", chosen)
    run = go(tmp_path / "cut", chosen, 3)
    run.save()
    for progress in train(run, report_every=1):
        if progress.step == 6:
            break
    assert latest_checkpoint(tmp_path / "cut" / "checkpoint").name == "3"
    again = Run(tmp_path / "cut", chosen, cells(), device="cpu")
    assert again.step == 3
    list(train(again))
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_killed_before_the_first_checkpoint(tmp_path):
    go(tmp_path / "whole", settings())
    go(tmp_path / "cut", settings(), 3)
    assert latest_checkpoint(tmp_path / "cut" / "checkpoint") is None
    go(tmp_path / "cut", settings())
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_another_seed_gives_other_weights(tmp_path):
    go(tmp_path / "a", settings(steps=2))
    go(tmp_path / "b", settings(steps=2, seed=1))
    first, second = state(tmp_path / "a")[0]["model"], state(tmp_path / "b")[0]["model"]
    assert not all(first[name].equal(second[name]) for name in first)


def test_a_finished_run_does_nothing_more(tmp_path):
    go(tmp_path, settings(steps=2))
    before = state(tmp_path)
    assert list(train(Run(tmp_path, settings(steps=2), cells(), device="cpu"))) == []
    assert before[1] == state(tmp_path)[1]


def test_other_settings_are_refused_but_for_more_steps(tmp_path):
    go(tmp_path, settings(steps=2))
    with pytest.raises(SettingsError, match="other settings"):
        Run(tmp_path, settings(steps=2, learning_rate=1e-4), cells(), device="cpu")
    assert load_settings(tmp_path / "settings.yaml") == settings(steps=2)
    assert go(tmp_path, settings(steps=4)).step == 4


def test_other_classes_are_refused(tmp_path):
    """The same number of classes in another order would silently mix up the heads."""
    go(tmp_path, settings(steps=2))
    data = cells()
    swapped = TrainingSet(data.canvases, data.labels, ("green", "red", "blue"))
    with pytest.raises(SettingsError, match="red"):
        Run(tmp_path, settings(steps=2), swapped, device="cpu")


def altered(data: TrainingSet, what: str) -> TrainingSet:
    canvases, labels = data.canvases.copy(), data.labels.copy()
    if what == "a pixel":
        canvases[-1, 0, 0, 0] ^= 1
    elif what == "a label":
        labels[0] = 1
    elif what == "the order":
        canvases[:2] = canvases[1::-1].copy()
    else:
        canvases, labels = canvases[:-1], labels[:-1]
    return replace(data, canvases=canvases, labels=labels)


@pytest.mark.parametrize("what", ["a pixel", "a label", "the order", "one less"])
def test_other_images_or_labels_are_refused(tmp_path, what):
    go(tmp_path, settings(steps=2))
    before = state(tmp_path)[1]
    with pytest.raises(SettingsError, match="other images or labels"):
        go(tmp_path, settings(steps=4), data=altered(cells(), what))
    assert state(tmp_path)[1] == before
    assert go(tmp_path, settings(steps=4)).step == 4


def test_a_checkpoint_that_does_not_say_of_which_images_it_is_goes_on(tmp_path):
    """As those of older versions."""
    go(tmp_path, settings(steps=2))
    path = latest_checkpoint(tmp_path / "checkpoint") / "state.json"
    values = json.loads(path.read_text())
    del values["data_sha256"]
    path.write_text(json.dumps(values))
    assert go(tmp_path, settings(steps=4)).step == 4
    assert state(tmp_path)[1]["data_sha256"] == cells().sha256  # from now on it is known


def test_fewer_steps_than_were_done_are_refused(tmp_path):
    go(tmp_path, settings(steps=4))
    before = state(tmp_path)[1]
    with pytest.raises(SettingsError, match="has done 4 steps"):
        Run(tmp_path, settings(steps=3), cells(), device="cpu")
    assert state(tmp_path)[1] == before
    assert go(tmp_path, settings(steps=4)).step == 4


def test_a_folder_without_a_checkpoint_can_be_begun_with_other_settings(tmp_path):
    """What was cut before anything was trained holds nothing that other settings would spoil."""
    Run(tmp_path, settings(steps=2), cells(), device="cpu")
    assert (tmp_path / "settings.yaml").exists()
    other = settings(steps=2, learning_rate=1e-4)
    assert go(tmp_path, other, data=cells(seed=3)).step == 2
    assert load_settings(tmp_path / "settings.yaml") == other


def test_a_bundle_without_its_checkpoint_is_not_trained_over(tmp_path):
    """The checkpoint may have been deleted to save room."""
    Run(tmp_path, settings(steps=2), cells(), device="cpu")
    (tmp_path / "bundle").mkdir()
    with pytest.raises(SettingsError, match="begun with other settings"):
        Run(tmp_path, settings(steps=2, learning_rate=1e-4), cells(), device="cpu")
    assert load_settings(tmp_path / "settings.yaml") == settings(steps=2)


# --- parts and processes -------------------------------------------------------------------------


def test_a_batch_in_two_parts_is_the_same_batch(tmp_path):
    still = {"network": {"dropout": 0.0}, "steps": 4}
    one = go(tmp_path / "one", settings(**still))
    two = go(tmp_path / "two", settings(**still, accumulate=2))
    for name, value in one.learner.state_dict().items():
        torch.testing.assert_close(value, two.learner.state_dict()[name], atol=1e-5, rtol=1e-4)


SCRIPT = """
    import sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    sys.path.insert(0, sys.argv[2])
    from test_train import go, settings
    run = go(Path(sys.argv[1]), settings(network={"dropout": 0.0}, steps=4))
    print("processes", run.accelerator.num_processes)
    run.close()
    for name in Path("/proc/self/task").glob("*/comm"):  # where there is a /proc
        assert "gloo" not in name.read_text(), "a thread listens on, and may abort the process"
"""


def test_two_processes_train_as_one_does(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(script), str(tmp_path / "two"), here],
        capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("processes 2") == 2
    go(tmp_path / "one", settings(network={"dropout": 0.0}, steps=4))
    # Adam divides a gradient near zero by its own size, and so its rounding: 2 % of one step of 1e-3.
    assert_same(tmp_path / "one", tmp_path / "two", atol=2e-5, rtol=1e-4)


# --- the parts -----------------------------------------------------------------------------------


def test_running_mean_by_hand():
    """Steps 0, 1, 2: decays 1/10, 2/11 and, at the target, .2."""
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    ema = EMA(layer, 0.2)
    mean = 1.0
    for step, (value, decay) in enumerate([(2.0, 1 / 10), (3.0, 2 / 11), (5.0, 0.2)]):
        layer.weight.data.fill_(value)
        ema.update(layer, step)
        mean = decay * mean + (1 - decay) * value
        assert ema.mean["weight"].item() == pytest.approx(mean)


def test_running_mean_copies_whole_numbers():
    norm = nn.BatchNorm1d(2)
    ema = EMA(norm, 0.9)
    norm.num_batches_tracked.fill_(7)
    ema.update(norm, 0)
    assert ema.mean["num_batches_tracked"].item() == 7


@pytest.mark.parametrize(
    ("step", "share"),
    [(0, 0.1), (4, 0.5), (9, 1.0), (50, 1.0), (70, 1.0), (85, 0.5), (99, 1 / 30)],
)
def test_learning_rate(step, share):
    """Up over 10 steps, level, down over the last 30 of 100."""
    chosen = settings(steps=100, warmup=10, cooldown=0.3, learning_rate=0.02)
    assert learning_rate(step, chosen) == pytest.approx(0.02 * share)


def test_learning_rate_without_warm_up_or_cool_down():
    chosen = settings(steps=100, warmup=0, cooldown=0.0, learning_rate=0.02)
    assert {learning_rate(step, chosen) for step in range(100)} == {0.02}


UNEVEN = TrainingSet(
    np.zeros((1000, 3, 1, 1), np.uint8), np.repeat([0, 1], [900, 100]), ("many", "few")
)


def epoch(balance: float, number: int = 0) -> np.ndarray:
    chosen = settings(batch=50, balance=balance)
    return np.concatenate([batch_indices(UNEVEN, chosen, 20 * number + i) for i in range(20)])


@pytest.mark.parametrize(("balance", "few"), [(0.0, 0.1), (0.5, 0.25), (1.0, 0.5)])
def test_classes_come_up_in_proportion_to_a_power_of_their_count(balance, few):
    """900 and 100: shares 9 : 1, 3 : 1 and 1 : 1."""
    assert (epoch(balance) >= 900).mean() == pytest.approx(few, abs=0.03)


def test_an_epoch_shows_every_image_once():
    first, second = epoch(0.0), epoch(0.0, 1)
    assert sorted(first) == sorted(second) == list(range(1000))
    assert not (first == second).all()


def test_the_images_of_a_class_take_turns():
    """Balanced, 500 of 100 and 500 of 900 give or take those cut off with the last batch."""
    times = np.bincount(epoch(1.0), minlength=1000)
    assert times[900:].min() >= 3
    assert times[900:].max() <= 6
    assert times[:900].max() <= 2


def test_a_set_smaller_than_a_batch():
    few = TrainingSet(np.zeros((3, 3, 1, 1), np.uint8), np.arange(3), CLASSES)
    assert sorted(batch_indices(few, settings(batch=6, balance=0.0), 5)) == [0, 0, 1, 1, 2, 2]


def test_images_without_labels_are_trained_on(tmp_path):
    data = cells()
    labels = np.where(np.arange(18) % 2, data.labels, UNLABELLED)
    run = go(tmp_path, settings(steps=2), data=TrainingSet(data.canvases, labels, CLASSES))
    assert all(value.isfinite().all() for value in run.learner.state_dict().values())


def test_seeds_of_steps_do_not_meet():
    seeds = {mix(seed, step) for seed in range(20) for step in range(500)}
    assert len(seeds) == 10_000
    assert mix(1, 2) != mix(2, 1)


# --- checkpoints ---------------------------------------------------------------------------------

TENSORS = {"model": {"a/b": torch.arange(3.0), "whole": torch.tensor(7)}}


def test_a_checkpoint_comes_back(tmp_path):
    save_checkpoint(tmp_path, 5, TENSORS, {"note": [1, "x"]})
    tensors, said = load_checkpoint(latest_checkpoint(tmp_path))
    assert said == {"step": 5, "note": [1, "x"]}
    assert tensors["model"]["a/b"].equal(TENSORS["model"]["a/b"])
    assert tensors["model"]["whole"].equal(TENSORS["model"]["whole"])


def test_the_newest_whole_checkpoint_counts(tmp_path):
    """10 is newer than 9; what is half written is passed over, and cleared away by the next."""
    for step in (9, 10):
        (tmp_path / str(step)).mkdir()
    (tmp_path / "11.part").mkdir()
    (tmp_path / "11.part" / "model.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path).name == "10"
    save_checkpoint(tmp_path, 12, TENSORS, {})
    assert [path.name for path in tmp_path.iterdir()] == ["12"]


def test_a_newer_checkpoint_stays(tmp_path):
    for step in (9, 4):
        save_checkpoint(tmp_path, step, TENSORS, {})
    assert latest_checkpoint(tmp_path).name == "9"


def test_a_run_goes_on_past_a_half_written_checkpoint(tmp_path):
    chosen = settings(checkpoint_minutes=1e-9)
    go(tmp_path / "whole", chosen)
    go(tmp_path / "cut", chosen, 5)
    part = tmp_path / "cut" / "checkpoint" / "5.part"
    part.mkdir()
    (part / "state.json").write_text(json.dumps({"step": 5}))
    go(tmp_path / "cut", chosen)
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_there_may_be_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None


def test_what_cannot_be_written_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match="run again"):
        save_checkpoint(tmp_path / "file" / "checkpoint", 1, TENSORS, {})


def test_a_full_disk_is_an_output_error_and_leaves_the_last_checkpoint(tmp_path):
    """The system refuses to let any file grow past 2 kB: safetensors meets it, not Python."""
    save_checkpoint(tmp_path, 1, TENSORS, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises(OutputError, match="Free some"):
            save_checkpoint(tmp_path, 2, {"model": {"big": torch.zeros(5000)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("network.multipliers=[0,1]", "greater than or equal to 1"),
        ("network.multipliers=[-1,1]", "greater than or equal to 1"),
        ("sigma_mean=.nan", "finite"),
        ("learning_rate=.inf", "finite"),
        ("augmentation.hue=.inf", "finite"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, said):
    with pytest.raises(SettingsError, match=said):
        make_settings("tiny", [change])


def test_settings_of_a_run_that_cannot_be_read_are_one_line(tmp_path):
    (tmp_path / "settings.yaml").write_text("a: [")
    with pytest.raises(SettingsError, match="cannot be read") as told:
        load_settings(tmp_path / "settings.yaml")
    assert "\n" not in str(told.value)


def test_a_run_from_before_there_was_a_choice_goes_on_with_its_optimiser(tmp_path):
    made = yaml.safe_load(dump_settings(make_settings("tiny", ["optimizer=adamw"])))
    made.pop("optimizer")
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(made))
    assert load_settings(tmp_path / "settings.yaml").optimizer == "adamw"


# --- beginning with the weights of another run -----------------------------------------------------


def finished(folder) -> Run:
    run = Run(folder, settings(steps=4), cells(), "cpu")
    list(train(run))
    return run


def test_a_run_begins_with_the_running_mean_of_another(tmp_path):
    first = finished(tmp_path / "a")
    start = first_weights(str(tmp_path / "a"), cells().classes)
    second = Run(tmp_path / "b", settings(steps=2, seed=5), cells(), "cpu", start)
    for name, value in second.learner.state_dict().items():
        assert value.equal(first.ema.mean[name]), name
    assert second.step == 0
    list(train(second))
    assert Run(tmp_path / "b", settings(steps=2, seed=5), cells(), "cpu").step == 2


def test_only_the_trunk_is_taken_where_the_classes_are_others(tmp_path):
    first = finished(tmp_path / "a")
    data = replace(cells(), classes=tuple(f"other {name}" for name in cells().classes))
    start = first_weights(str(tmp_path / "a"), data.classes)
    second = Run(tmp_path / "b", settings(steps=2), data, "cpu", start)
    network, mean = second.learner.denoiser.network, first.ema.mean
    assert network.stem.weight.equal(mean["denoiser.network.stem.weight"])
    assert not network.change.out.weight.any()  # begins at zero
    assert mean["denoiser.network.change.out.weight"].any()


def test_a_run_says_at_first_what_another_said_of_the_classes_that_both_know(tmp_path):
    """Another order, one class less, and a new one: it begins as "any cell"."""
    first, names = finished(tmp_path / "a"), cells().classes
    wanted = (names[2], "blast", names[0])
    data = replace(cells(), labels=np.arange(len(cells().labels)) % 3, classes=wanted)
    start = first_weights(str(tmp_path / "a"), wanted)
    second = Run(tmp_path / "b", settings(steps=2), data, "cpu", start)
    noisy, sigma = torch.randn(2, 3, 16, 16), torch.full((2,), 0.5)

    def guesses(run: Run, labels: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return run.denoiser("ema")(noisy, sigma, torch.tensor([labels, labels]))

    old = guesses(first, [2, len(names), 0, len(names)])
    assert (old[:, 0] - old[:, 1]).abs().max() > 0
    torch.testing.assert_close(guesses(second, [0, 1, 2, 3]), old)
    list(train(second))


def test_cells_are_shown_as_large_as_those_of_the_run_that_is_begun_with(tmp_path):
    small, large = (Look(nucleus=n, cell=0.4) for n in (0.2, 0.4))
    there = settings(preprocess=Preprocess(size=16, crop=0.5, look=small))
    (tmp_path / "settings.yaml").write_text(dump_settings(there))
    here = settings(preprocess=Preprocess(size=16, look=large))
    start, console = str(tmp_path), Console(False)
    assert at_scale_of(start, here, [], console).preprocess.crop == 1.0
    assert at_scale_of(start, here, ["preprocess.crop=0.7"], console) == here
    same = settings(preprocess=Preprocess(size=16, look=small))
    assert at_scale_of(start, same, [], console).preprocess.crop == 0.5


@pytest.mark.parametrize("found", [True, False], ids=["cells found", "no cell found"])
def test_the_light_of_what_is_begun_with_stays(tmp_path, found):
    """Also with a crop of one's own, and where no white cell was found in the frames."""
    home = Look(light=(250, 240, 230), density=(0.9, 1.4, 0.4), nucleus=0.2, cell=0.4)
    matched = Preprocess(size=16, crop=0.5, look=home, match="light")
    (tmp_path / "settings.yaml").write_text(dump_settings(settings(preprocess=matched)))
    look = home.model_copy(update={"light": (200, 200, 200), "cell": 0.3}) if found else Look()
    here = settings(preprocess=Preprocess(size=16, look=look, crop=0.7))
    start, console = str(tmp_path), Console(False)
    for changes in ([], ["preprocess.crop=0.7"], ["steps=7", " preprocess.crop = 0.7"]):
        told = at_scale_of(start, here, changes, console).preprocess
        assert told.match == "light"
        assert (told.look.light, told.look.density) == (home.light, home.density)
        assert (told.look.nucleus, told.look.cell) == (look.nucleus, look.cell)
        if changes or not found:
            assert told.crop == 0.7
    told = at_scale_of(start, here, ["preprocess.match=nothing"], console).preprocess
    assert told.match == "nothing"
    assert told.look == look


def test_fine_tuning_takes_the_shape_of_what_it_begins_with(tmp_path):
    there = settings(network={"width": 24}, preprocess=Preprocess(size=32))
    (tmp_path / "settings.yaml").write_text(dump_settings(there))
    found = settings_from("fine-tune", ["steps=7", "network.dropout=0"], str(tmp_path))
    assert found.network == there.network.model_copy(update={"dropout": 0.0})
    assert (found.preprocess.size, found.steps, found.learning_rate) == (32, 7, 3e-4)
    with pytest.raises(SettingsError, match="--from pbc8-far"):
        settings_from("fine-tune", [], None)


def test_of_few_cells_a_third_is_held_out_and_none_left_to_test_on(tmp_path):
    source = write_discs(tmp_path / "cells", each=9)
    parts = split_samples(source, None, tmp_path, 0, Taxonomy.load(), Console(False))
    assert {name: len(found) for name, found in parts.items()} == {"train": 18, "val": 9, "test": 0}


def test_copies_of_a_picture_are_dealt_to_one_side(tmp_path):
    source = write_discs(tmp_path, each=12)
    for path in sorted(source.glob("*/*.png")):
        shutil.copy(path, path.with_name(f"copy-{path.name}"))
    dealt = {s.name: s.split for s in deal(read_dataset(source), 0, Console(False))}
    assert len(dealt) == 72
    assert all(dealt[name] == dealt[name.replace("copy-", "")] for name in dealt)
    assert len(set(dealt.values())) > 1


def test_unlabelled_cells_of_val_and_test_are_not_trained_on(tmp_path, capsys):
    for split in ("train", "val", "test"):
        write_discs(tmp_path / split, each=3)
        (tmp_path / split / "eosinophil" / "02.png").rename(tmp_path / split / "bare.png")
    parts = split_samples(tmp_path, None, tmp_path / "out", 0, Taxonomy.load(), Console(False))
    assert [s.name for s in parts["train"] if s.label is None] == ["train/bare.png"]
    assert "2 images without a label are not in train: left out." in capsys.readouterr().err


@pytest.mark.parametrize("name", [path.parent.name for path in ZOO.glob("*/config.json")])
def test_every_released_model_can_be_fine_tuned(name, tmp_path):
    """The network that its settings make takes all of its weights."""
    found = settings_from("fine-tune", [], name)
    start = first_weights(name, ("basophil", "blast", "neutrophil"))
    images = np.zeros((3, 3, 2 * found.preprocess.size, 2 * found.preprocess.size), np.uint8)
    data = TrainingSet(images, np.arange(3), ("basophil", "blast", "neutrophil"))
    learner = Run(tmp_path, found, data, "cpu", start).learner
    network = learner.denoiser.network.state_dict()
    assert all(
        value.equal(start[f"denoiser.network.{name}"].float()) for name, value in network.items()
    )


def test_a_class_conditional_run_begins_with_the_trunk_of_one_with_heads(tmp_path):
    first = finished(tmp_path / "a")
    start = first_weights(str(tmp_path / "a"), cells().classes)
    plan = settings(steps=2, network={"form": "conditional"})
    second = Run(tmp_path / "b", plan, cells(), "cpu", start).learner.state_dict()
    new = {
        name
        for name, value in second.items()
        if not value.equal(first.ema.mean.get(name, value + 1))
    }
    assert new == {"denoiser.network.label.weight"}


def test_weights_that_do_not_fit_are_refused(tmp_path):
    finished(tmp_path / "a")
    start = first_weights(str(tmp_path / "a"), cells().classes)
    other = settings(steps=1, sharpness=3.0)
    wide = other.model_copy(update={"network": other.network.model_copy(update={"width": 32})})
    with pytest.raises(SettingsError, match="same network settings"):
        Run(tmp_path / "b", wide, cells(), "cpu", start)
    with pytest.raises(ModelError, match="no model"):
        first_weights(str(tmp_path / "nothing"), cells().classes)


def test_weights_that_run_away_are_told(tmp_path: Path) -> None:
    run = Run(tmp_path, settings(steps=4), cells(), device="cpu")
    with torch.no_grad():
        next(run.learner.parameters()).fill_(float("nan"))
    with pytest.raises(SettingsError, match=r"no numbers any more at step 2.*learning_rate"):
        list(train(run, report_every=2))


class InGroups(torch.optim.SGD):
    """Keeps its state as optimisers of 8 bits do: some of it in a group."""

    def put(self, values: list[float]) -> None:
        for parameter, value in zip(self.param_groups[0]["params"], values, strict=True):
            state = {
                "step": 3,
                "group": {"mean": torch.full((2,), value), "codes": torch.arange(2)},
            }
            self.state[parameter] = state


def test_state_in_groups_is_saved_and_put_back(tmp_path: Path) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    one, other = InGroups(parameters), InGroups(parameters)
    one.put([1.0, 2.0])
    taken = {"optimizer": optimizer_tensors(one, ["a", "b.c"])}
    assert set(taken["optimizer"]) >= {"a/step", "a/group/mean", "b.c/group/codes"}
    save_checkpoint(tmp_path, 3, taken, {})
    load_optimizer(other, ["a", "b.c"], load_checkpoint(tmp_path / "3")[0]["optimizer"])
    for parameter in parameters:
        want, got = one.state[parameter], other.state[parameter]
        assert int(got["step"]) == want["step"]
        assert got["group"]["mean"].equal(want["group"]["mean"])
        assert got["group"]["codes"].equal(want["group"]["codes"])
