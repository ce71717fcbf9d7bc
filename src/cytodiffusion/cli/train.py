"""`train`: a folder of labelled cells in, a bundle out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from cytodiffusion.cli.console import NOTICE, Console, Device, Json, Labels, cores, pick_device

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from cytodiffusion.classify.fit import Plan
    from cytodiffusion.data.images import Preprocess
    from cytodiffusion.data.pixels import Pixels
    from cytodiffusion.data.sample import Sample
    from cytodiffusion.data.taxonomy import Taxonomy
    from cytodiffusion.train.loop import Run
    from cytodiffusion.train.settings import TrainSettings


FEW = 20  # cells of a class, of which a tenth is too few to calibrate on
POSED = 16  # held-out cells on which turning of latents is measured
VAL = "the split 'val'"
UNSAID = "No licence has been stated for {} yet.\n"


def train(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Labelled images.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="RUN", help="Folder of the run.")],
    preset: Annotated[
        str,
        typer.Option(
            help="tiny, cpu, cpu-far, fine-tune (with --from), gpu, gpu-large or paper-..."
        ),
    ] = "cpu",
    splits: Annotated[
        Path | None, typer.Option(help="CSV with path,label,split; else one is made.")
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=V", help="Change one setting; docs/cli.md lists them."),
    ] = None,
    taxonomy: Labels = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="RUN|MODEL", help="Begin with the weights of a run or of a model."
        ),
    ] = None,
    json: Json = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Decides every random number.")] = None,
    device: Device = "auto",
) -> None:
    """Train on the split `train`, calibrate on `val`, and write RUN/bundle.

    Killed and run again, it goes on from its last checkpoint and ends with the same weights.
    """
    from cytodiffusion.data.taxonomy import Taxonomy

    changes = [*(change or []), *([f"seed={seed}"] if seed is not None else [])]
    settings = settings_from(preset, changes, start)
    device = device if device == "auto" else pick_device(device)
    labels = Taxonomy.load(taxonomy)
    console = Console(json)
    console.note(NOTICE)
    parts = split_samples(source, splits, out, settings.seed, labels, console)
    settings = with_look(settings, parts["train"], console)
    if start:
        settings = at_scale_of(start, settings, changes, console)
    run, held = run_training(parts, out, settings, device, labels, console, start)
    if run is not None:
        told = [f"latent.start={_source(c.partition('=')[2])}" if c.startswith("latent.start=") else c
                for c in changes]  # fmt: skip
        origin = {"data": source.resolve().name, "preset": preset, "changes": told}
        origin |= {"start": Path(start).resolve().name} if start else {}
        result = write_bundle(
            run, held, parts["val"], out / "bundle", out.name, origin, labels, console
        )
        then = f"cytodiffusion predict CELLS -m {out / 'bundle'} -o {out / 'cells'}"
        if parts["test"]:
            then = (f"cytodiffusion evaluate {source} -m {out / 'bundle'} "
                    f"--splits {splits or out / 'splits.csv'} --split test -o {out / 'test'}")  # fmt: skip
        console.result(result, f"Wrote {out / 'bundle'}. Try: {then}")
    if console.unread:
        raise typer.Exit(1)


def with_look(
    settings: TrainSettings, samples: Sequence[Sample], console: Console
) -> TrainSettings:
    """Settings that say what these frames look like, for `predict --match`, unless they were told."""
    from cytodiffusion.data.load import look_of
    from cytodiffusion.data.look import Look
    from cytodiffusion.errors import DataError

    if settings.preprocess.look != Look():
        return settings
    try:
        look, _ = look_of(samples)
    except DataError:
        console.note(
            "No white cell was found in these frames: predict --match brings others to the look of PBC's."
        )
        return settings
    preprocess = settings.preprocess.model_copy(update={"look": look})
    return settings.model_copy(update={"preprocess": preprocess})


def settings_from(preset: str, changes: Sequence[str], start: str | None) -> TrainSettings:
    """Settings of a preset; fine-tune takes the shape of the network from what it begins with.

    Raises SettingsError, ModelError.
    """
    from cytodiffusion.errors import SettingsError
    from cytodiffusion.train.settings import make_settings

    if preset != "fine-tune":
        return make_settings(preset, [*changes])
    if start is None:
        raise SettingsError("The preset fine-tune begins with a model. Give one: --from pbc8-far.")
    begun = begun_with(start)
    taken = [f"network.{name}={value}" for name, value in begun.shape.items()]
    taken += [f"preprocess.size={begun.preprocess.size}", f"sigma_data={begun.sigma_data}"]
    return make_settings(preset, [*taken, *changes])


def at_scale_of(
    start: str, settings: TrainSettings, changes: Sequence[str], console: Console
) -> TrainSettings:
    """Settings with the light of `start` and its crop, or one that shows clearly larger cells no larger.

    What is among the `changes` stays, and so does the crop of the preset where it is not known how large
    the cells are. Nothing changes where another kind of network is trained.
    """
    from cytodiffusion.data.look import Look, crop_for, larger_cells

    def asked(name: str) -> bool:
        return any(c.strip().startswith((f"preprocess.{name}", "preprocess=")) for c in changes)

    if settings.latent is not None:
        return settings
    here, there, change = settings.preprocess, begun_with(start).preprocess, dict[str, Any]()
    if not asked("crop") and here.look != Look():
        crop, times = there.crop, here.look.nucleus / there.look.nucleus
        if larger_cells(here.look, there.look):
            crop = crop_for(crop, here.look, there.look)
            beyond = "; what lies beyond the frames is made up" * (crop > 1)
            console.note(
                f"Nuclei are {times:.1f} times as large as those {start} knows: crop {crop}{beyond}."
            )
        elif crop != here.crop:
            console.note(f"Crop {crop}, as that of {start}.")
        change["crop"] = crop
    if not asked("match") and here.match == "nothing" != there.match:
        console.note(f"Every frame is brought to the light that {start} knows, as it does.")
        light = {"light": there.look.light, "density": there.look.density}
        change |= {"match": there.match, "look": here.look.model_copy(update=light)}
    return settings.model_copy(update={"preprocess": here.model_copy(update=change)})


class Begun(NamedTuple):
    """What a network was made for: its shape, by the names of settings, and the images it takes."""

    shape: dict[str, Any]
    preprocess: Preprocess
    sigma_data: float


def begun_with(start: str) -> Begun:
    """The same of a run or a model that another training begins with."""
    import json

    from cytodiffusion.bundle import find_bundle
    from cytodiffusion.data.images import Preprocess
    from cytodiffusion.train.settings import NetworkSettings, load_settings

    run = Path(start) / "settings.yaml"
    if run.exists():
        settings = load_settings(run)
        shape = settings.network.model_dump(mode="json")
        return Begun(shape, settings.preprocess, settings.sigma_data)
    folder = find_bundle(start)
    config = json.loads((folder / "config.json").read_text())
    known = {
        n: config["settings"][n] for n in NetworkSettings.model_fields if n in config["settings"]
    }
    preprocess = Preprocess.model_validate_json((folder / "preprocess.json").read_text())
    return Begun(known, preprocess, config.get("sigma_data", 0.5))


def split_samples(
    source: Path, splits: Path | None, out: Path, seed: int, taxonomy: Taxonomy, console: Console
) -> dict[str, Sequence[Sample]]:
    """Samples of the splits train, val and test; a split file is made where none is given."""
    from collections import Counter
    from dataclasses import replace

    from cytodiffusion.data.mark import refuse_marked
    from cytodiffusion.data.pixels import class_names
    from cytodiffusion.data.readers import read_dataset
    from cytodiffusion.data.split import Row, write_split
    from cytodiffusion.errors import DataError

    samples = taxonomy.respell(read_dataset(source, splits=splits))
    labelled = [sample for sample in samples if sample.label is not None]
    if not labelled:
        raise DataError(f"{source} has no labels. Put each class in a folder of its own.")
    made, path = False, out / "splits.csv"
    if all(sample.split is None for sample in labelled):
        made = not path.exists()
        if made and (out / "settings.yaml").exists():
            raise DataError(f"{out} was begun with --splits. Give the same file to go on.")
        labelled = (
            deal(labelled, seed, console) if made else _dealt(labelled, source, path, taxonomy)
        )
    parts = {name: [s for s in labelled if s.split == name] for name in ("train", "val")}
    named = Counter(sample.split or "none" for sample in labelled)
    said = ", ".join(f"{name} {count:,}" for name, count in named.items())
    for name, found in parts.items():
        if not found:
            raise DataError(
                f"The split '{name}' is empty; there are: {said}. Training needs 'train', and 'val' to "
                "calibrate on."
            )
    if out_of := len(labelled) - sum(named[name] for name in ("train", "val", "test")):
        console.note(
            f"{out_of:,} labelled images are not in train, val or test: left out ({said})."
        )
    check_held(parts["val"], class_names(parts["train"], taxonomy), taxonomy)
    refuse_marked(parts["val"], "cells to calibrate on")
    if made:
        console.note("No split was given: made one (see splits.csv in the run folder).")
        write_split((Row(s.name, str(s.label), str(s.split)) for s in labelled), path)
    bare = [sample for sample in samples if sample.label is None]
    unlabelled = [replace(s, split="train") for s in bare if s.split in (None, "train")]
    if out_of := len(bare) - len(unlabelled):
        console.note(f"{out_of:,} images without a label are not in train: left out.")
    test = [sample for sample in labelled if sample.split == "test"]
    return {"train": [*parts["train"], *unlabelled], "val": parts["val"], "test": test}


def _dealt(
    labelled: Sequence[Sample], source: Path, path: Path, taxonomy: Taxonomy
) -> list[Sample]:
    """The samples as the run's own split file deals them.

    Raises DataError for cells that it does not deal, or deals under another label.
    """
    from cytodiffusion.data.readers import read_dataset
    from cytodiffusion.errors import DataError

    again = taxonomy.respell(read_dataset(source, splits=path))
    then = {sample.name: sample.label for sample in again}
    if new := sorted(s.name for s in labelled if s.name not in then):
        raise DataError(
            f"{len(new)} labelled images are not in {path}, first '{new[0]}'; this run was begun with "
            "it. Train on all of them in another folder (-o); to go on without them, give that file as "
            "--splits."
        )
    if other := sorted(s.name for s in labelled if s.label != then[s.name]):
        raise DataError(
            f"{len(other)} images have another label in {path}, first '{other[0]}'; this run "
            "was begun with it. Train with the new labels in another folder (-o)."
        )
    return again


def deal(
    labelled: Sequence[Sample],
    seed: int,
    console: Console,
    shares: Mapping[str, float] | None = None,
) -> list[Sample]:
    """The samples with splits, in the order of a split file; copies of one picture on one side.

    Without `shares` as usual: none to test on where a class has few.
    """
    from collections import Counter
    from dataclasses import replace

    from cytodiffusion.data.check import check
    from cytodiffusion.data.split import FRACTIONS, split

    console.start()
    found = check(
        labelled,
        progress=lambda done: console.progress("looking for copies", done, len(labelled), "images"),
    )
    by_name = {sample.name: sample for sample in labelled}
    if shares is None:
        real = (sample.label for sample in labelled if sample.name not in found.synthetic)
        fewest = min(Counter(real).values(), default=0)
        shares = {"train": 2 / 3, "val": 1 / 3} if fewest < FEW else FRACTIONS
    rows = split(
        labelled, shares, seed=seed, duplicates=found.duplicate_groups(), synthetic=found.synthetic
    ).rows
    return [replace(by_name[row.name], split=row.split) for row in rows]


def check_held(
    val: Sequence[Sample], classes: Sequence[str], taxonomy: Taxonomy, where: str = VAL
) -> None:
    """Raises DataError where a class cannot be calibrated: now, not after an hour."""
    from cytodiffusion.data.pixels import class_index

    check_counts([class_index(sample.label, classes, taxonomy) for sample in val], classes, where)


def check_counts(labels: Sequence[int], classes: Sequence[str], where: str = VAL) -> None:
    """The same of the images that could be read, by their columns. Raises DataError."""
    from collections import Counter

    from cytodiffusion.errors import DataError

    held = Counter(labels)
    few = [f"{name}: {held[k]}" for k, name in enumerate(classes) if held[k] < 2]
    if few:
        raise DataError(
            f"Calibration needs at least two images of every class; {where} has {', '.join(few)}. "
            "Give more images, or a split of your own with --splits."
        )


def run_training(
    parts: dict[str, Sequence[Sample]], out: Path, settings: TrainSettings, device: str,
    taxonomy: Taxonomy, console: Console, start: str | None = None,
) -> tuple[Run | None, Pixels]:  # fmt: skip
    """Train to the end. The run is None in the helper processes of a run over several.

    Raises OutputError where another process trains in OUT.
    """
    from cytodiffusion.files import alone

    with alone(out):
        return _train_alone(parts, out, settings, device, taxonomy, console, start)


def _train_alone(
    parts: dict[str, Sequence[Sample]], out: Path, settings: TrainSettings, device: str,
    taxonomy: Taxonomy, console: Console, start: str | None,
) -> tuple[Run | None, Pixels]:  # fmt: skip
    from cytodiffusion.data.pixels import class_names, load_pixels
    from cytodiffusion.files import writing_to
    from cytodiffusion.release import validator
    from cytodiffusion.train.loop import Run, TrainingSet, train
    from cytodiffusion.train.record import draw_samples, plot_progress, record

    classes = class_names(parts["train"], taxonomy)
    weights = first_weights(start, classes) if start else None
    pixels = []
    for name, margin in (("train", settings.augmentation.margin), ("val", 1.0)):
        work = load_pixels(
            parts[name], classes, settings.preprocess, margin, cores(), taxonomy
        )  # fmt: skip
        pixels.append(console.follow(work, f"reading {name}", len(parts[name]), "images"))
    fitted, held = pixels
    check_counts(held.labels.tolist(), classes, f"{VAL}, of what could be read,")
    with writing_to(out):
        data = TrainingSet(fitted.images, fitted.labels, classes)
        run = Run(out, settings, data, device, weights)
    main = run.accelerator.is_main_process
    if run.begun and not run.step and main:
        console.note(f"Begins with {run.begun:,} weights of {start}; the others are new.")
    if main:  # helpers leave it to this one
        console.not_read(*fitted.problems, *held.problems)
    if settings.latent is not None and settings.latent.cache:
        encode_views(run, console)
    space, radius = run.learner.space, run.learner.radius
    validate = validator(held, len(classes), settings.together, space, radius) if main else None
    before, began_at = run.step, run.step
    if before:
        console.note(f"Going on from step {before:,}.")
    console.start()
    every = max(50, settings.steps // 5)
    for progress in train(run, validate=validate, validate_every=every):
        if not main:
            continue
        with writing_to(out):
            record(run, progress)
        console.progress("training", progress.step * settings.batch,
                         settings.steps * settings.batch, "images",
                         before=began_at * settings.batch)  # fmt: skip
        if progress.validation:
            told = ", ".join(f"{name} {value:.4f}" for name, value in progress.validation.items())
            console.note(f"step {progress.step:,}: validation {told}")
            with writing_to(out):
                plot_progress(run)
                draw_samples(run)
    run.close()
    return (run if main else None), held


def encode_views(run: Run, console: Console) -> None:
    """Encode the views that training on latents takes, or go on doing so."""
    from cytodiffusion.files import writing_to
    from cytodiffusion.train.latent import LatentLearner, keep_latents

    learner, images = run.learner, run.data.canvases
    assert isinstance(learner, LatentLearner)
    with writing_to(run.folder), run.accelerator.main_process_first():
        work = keep_latents(learner, images, run.folder, run.settings.seed)
        console.follow(work, "encoding", len(images), "images")


def first_weights(start: str, classes: Sequence[str]) -> dict[str, Tensor]:
    """Weights of a run (its running mean) or of a bundle, named as in training.

    What belongs to classes is matched by their names (`for_classes`). Raises ModelError.
    """
    from cytodiffusion.bundle import find_bundle, read_weights
    from cytodiffusion.errors import ModelError
    from cytodiffusion.networks.compact import for_classes
    from cytodiffusion.train.checkpoint import latest_checkpoint, load_checkpoint

    checkpoint = latest_checkpoint(Path(start) / "checkpoint")
    if checkpoint is not None:
        tensors, state = load_checkpoint(checkpoint)
        found, known = tensors["ema"], state["classes"]
    else:
        plain, known = read_weights(find_bundle(start))
        found = {f"denoiser.network.{name}": value for name, value in plain.items()}
    if list(known) != list(classes) and any(name.startswith("unet.") for name in found):
        raise ModelError(
            f"{start} was fine-tuned for other classes ({', '.join(known)}), which its attentions hold "
            "apart. Begin with the model that it began with: --set latent.start=..."
        )
    return for_classes(found, known, classes)


def latent_facts(run: Run, held: Pixels) -> dict[str, Any]:
    """What a fine-tuned network began with, and what it costs to turn latents in place of cells."""
    from cytodiffusion.data.images import to_tensor
    from cytodiffusion.data.transforms import POSES
    from cytodiffusion.networks.latent import LatentSpace, pose_error

    latent, space = run.settings.latent, run.learner.space
    if latent is None or not isinstance(space, LatentSpace):
        return {}
    worst = pose_error(space, to_tensor(held.images[:POSED]), POSES).max()
    return {"pretrained": _source(latent.start), "pose_error": round(float(worst), 3)}


def _source(start: str) -> str:
    """A name on the hub, or that of a folder: paths of a machine are no one's business."""
    return Path(start).resolve().name if Path(start).exists() else start


def read_canvases(
    samples: Sequence[Sample], classes: Sequence[str], preprocess: Preprocess, plan: Plan,
    taxonomy: Taxonomy, console: Console,
) -> Pixels | None:  # fmt: skip
    """Cells for the budgets of other laboratories; None, and why, where there are too few."""
    from cytodiffusion.calibration import load_canvases

    work = load_canvases(samples, classes, preprocess, plan, cores(), taxonomy)
    canvases = console.follow(work, "reading once more", plan.abroad_cells, "images")
    if canvases is None:
        console.note(
            "Too few cells of some class could be read: no budgets for other laboratories."
        )
    return canvases


def write_bundle(
    run: Run, held: Pixels, val: Sequence[Sample], folder: Path, name: str, origin: dict[str, Any],
    taxonomy: Taxonomy, console: Console,
) -> dict[str, Any]:  # fmt: skip
    """Calibrate the best weights on the held-out cells and write the bundle; `held`: `val`, as read."""
    import torch

    from cytodiffusion.bundle import Parts, save_bundle
    from cytodiffusion.calibration import calibrate, calibrations, cautions, plan_of
    from cytodiffusion.classify.evidence import DenoiserMeter
    from cytodiffusion.release import commit, make_card
    from cytodiffusion.types import PIXELS, Classes

    classes, settings, learner = Classes(run.data.classes), run.settings, run.learner
    denoiser = run.denoiser("best" if run.best else "ema")
    if learner.space is PIXELS:
        denoiser.cpu()  # small, and quicker there on many threads
    plan = plan_of(settings.together, learner.space, settings.seed)
    on_gpu = next(denoiser.parameters()).is_cuda
    workers = 1 if on_gpu else cores()
    torch.set_num_threads(1)  # one for each worker
    meter = DenoiserMeter(denoiser, learner.radius)
    canvases = read_canvases(val, classes.names, settings.preprocess, plan, taxonomy, console)
    calibrated = console.follow(
        calibrate(
            meter, held, len(classes), settings.together, plan, workers, learner.space, canvases,
        ),
        "calibrating", calibrations(meter, held, canvases, plan), "cells",
    )  # fmt: skip
    for caution in cautions(calibrated.budgets):
        console.note(caution)
    origin = {
        **{"recipe": "cytodiffusion train", "commit": commit(), "seed": settings.seed},
        **{"steps": run.step, "train_images": len(run.data.labels), "val_sha256": held.sha256},
        "abroad_reach": calibrated.reach,
        **latent_facts(run, held),
        **origin,
    }
    parameters = sum(weight.numel() for weight in denoiser.parameters())
    card = make_card(
        name, classes, settings.preprocess, learner.form, parameters, calibrated, origin
    )
    save_bundle(
        folder,
        Parts(
            name=name, denoiser=denoiser, classes=classes, preprocess=settings.preprocess,
            budgets=calibrated.budgets, taxonomy=taxonomy, card=card, origin=origin,
            space=learner.space, radius=learner.radius, license=UNSAID.format("these weights"),
            data_license=UNSAID.format("the images"),
        ),
    )  # fmt: skip
    return {"bundle": str(folder), "validation": calibrated.scores}
