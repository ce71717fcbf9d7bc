"""`bench fidelity`: are drawn cells what was asked for, like real ones, and no copies?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from cytodiffusion.cli.benches import (
    digest_of,
    load_baseline,
    percent,
    tell_unmarked,
    write_results,
)
from cytodiffusion.cli.console import (
    NOTICE,
    Console,
    Context,
    Device,
    Json,
    ModelName,
    Out,
    Seed,
    call_of,
    cores,
    pick_device,
)

if TYPE_CHECKING:
    import numpy as np

    from cytodiffusion.bundle import Model
    from cytodiffusion.data.images import Preprocess
    from cytodiffusion.data.sample import Sample
    from cytodiffusion.evaluate.baselines import Baseline
    from cytodiffusion.evaluate.features import Extractor
    from cytodiffusion.evaluate.fidelity import Nearest

T = TypeVar("T")
SHOWN = 12  # closest pairs


@dataclass(frozen=True)
class Cells:
    """Images at the model's size, 8-bit, (n, 3, s, s); `canvases` are wider ones to train on."""

    pixels: np.ndarray
    labels: np.ndarray
    names: list[str]
    digests: list[str]
    canvases: np.ndarray

    def rows(self, chosen: np.ndarray) -> Cells:
        """Some of the cells."""
        names, digests = ([each[i] for i in chosen] for each in (self.names, self.digests))
        return Cells(
            self.pixels[chosen], self.labels[chosen], names, digests, self.canvases[chosen]
        )


def fidelity(
    context: Context,
    drawn: Annotated[Path, typer.Argument(metavar="DRAWN", help="What `generate` wrote.")],
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Real labelled images.")],
    out: Out,
    model: ModelName = "pbc8",
    splits: Annotated[Path | None, typer.Option(help="CSV with path,label,split.")] = None,
    split: Annotated[str, typer.Option(help="Real cells to compare with.")] = "val",
    train_split: Annotated[
        str, typer.Option(help="Real cells that the model was trained on.")
    ] = "train",
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the baseline.json of a classifier of the same classes, to name the cells "
            "instead of one trained here."
        ),
    ] = None,
    features: Annotated[
        str,
        typer.Option(help="trunk, baseline, or a folder with a pretrained network (DINOv2, ...)."),
    ] = "trunk",
    minutes: Annotated[
        float,
        typer.Option(min=0.001, help="Processor time for each of the two classifiers trained."),
    ] = 10.0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of each, instead of minutes.")
    ] = None,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Compare drawn cells with real ones: OUT/results.json and report.html.

    Class agreement, by the model and by an independent classifier; a classifier trained to tell real
    from drawn; FID, KID, precision, recall, density, coverage; the nearest training cells. Run again,
    what was trained is not trained anew. The report shows real cells: mind where OUT is.
    """
    import numpy as np

    from cytodiffusion.bundle import load
    from cytodiffusion.data.images import Preprocess
    from cytodiffusion.errors import SettingsError
    from cytodiffusion.evaluate.baselines import BaselineSettings, library
    from cytodiffusion.evaluate.fidelity import check_counts, matched, render
    from cytodiffusion.evaluate.report import write_page

    console = Console(json)
    library()  # a missing one is said now
    if split == train_split:
        raise SettingsError(
            f"--split and --train-split are both '{split}': real cells to compare with are those that the "
            "model was not trained on, val or test."
        )
    loaded = load(model, pick_device(device), engine="torch")
    other = load_baseline(baseline, loaded) if baseline else None
    settings = BaselineSettings(minutes=None if steps else minutes, steps=steps, seed=seed)
    extractor = None if features == "baseline" else _extractor(features, loaded)
    listed = _listed(drawn, source, splits, (split, train_split))
    tell_unmarked(listed[0], drawn, console)
    console.note(NOTICE)
    whole = Preprocess(size=loaded.preprocess.size, crop=1.0)  # drawn cells fill their frame
    forged = _read(listed[0], whole, loaded, "drawn cells", console)
    real = _read(listed[1], loaded.preprocess, loaded, "real cells", console)
    training = _read(listed[2], loaded.preprocess, loaded, "training cells", console, margin=1.5)
    rows = matched(forged.labels, real.labels, seed)
    both = forged.rows(rows[0]), real.rows(rows[1])
    check_counts(len(rows[1]), len(rows[0]))  # now, not after both trainings

    judge = other or _independent(loaded, training, settings, out, console)
    cells = {"drawn": len(forged.names), "real": len(real.names), "matched": len(rows[0]),
             "training": len(training.names)}  # fmt: skip
    results: dict[str, Any] = {
        "cells": cells,
        "independent": {
            "classifier": judge.settings.kind,
            "given": other is not None,
            **judge.trained,
        },
        "agreement": _agreement(loaded, judge, forged, both[1]),
    }
    results["real_or_drawn"] = _authentic(loaded, both, settings, out, device, console)
    extractor = extractor or judge.features
    name = {"trunk": f"trunk of {loaded.name}", "baseline": "the independent classifier's"}
    told, near = _alike(both, training, extractor, loaded, seed)
    results["alike"] = {"features": name.get(features, features), **told}
    pixels = _nearest_pixels(both, training, console)
    results["copies"] = _copies({"pixels": pixels, "features": near})

    facts = {"command": call_of(context), "seed": seed, **_origin(loaded)}
    values = {**results, **facts}
    write_results(out, values)
    order = np.argsort(pixels[0].ratio, kind="stable")[:SHOWN]
    shown = [_picture(both[0], training, pixels[0], i) for i in order.tolist()]
    page = render(f"Cells drawn by {loaded.name}, beside {source.name}", results, shown, facts)
    write_page(out / "report.html", page)
    console.result(values, "\n".join([*_lines(results), f"See {out}."]))
    if console.unread:
        raise typer.Exit(1)


# --- reading -------------------------------------------------------------------------------------


def _listed(
    drawn: Path, source: Path, splits: Path | None, names: Sequence[str]
) -> list[list[Sample]]:
    """Drawn cells, real ones, and those of training. Raises DataError for what cannot be that."""
    from cytodiffusion.data.mark import refuse_marked
    from cytodiffusion.data.readers import read_dataset
    from cytodiffusion.errors import DataError

    every = [read_dataset(drawn)]
    every += [read_dataset(source, splits=splits, split=name) for name in names]
    every = [[sample for sample in samples if sample.label is not None] for samples in every]
    for samples, where in zip(every, (drawn, source, source), strict=True):
        if not samples:
            raise DataError(f"{where} has no labels. Put each class in a folder of its own.")
    refuse_marked([*every[1], *every[2]], "real cells to compare with")
    return every


def _read(
    samples: Sequence[Sample], preprocess: Preprocess, model: Model, what: str, console: Console,
    margin: float = 1.0,
) -> Cells:  # fmt: skip
    """Images as the network sees them. Raises DataError where none can be read."""
    import numpy as np

    from cytodiffusion.data.load import load_images
    from cytodiffusion.data.pixels import class_index
    from cytodiffusion.errors import DataError

    console.start()
    kept, labels = [], []
    for done, item in enumerate(load_images(samples, preprocess, margin, cores()), start=1):
        console.progress(f"reading {what}", done, len(samples), "cells")
        if item.pixels is None:
            console.not_read(f"{item.sample.name}: {item.problem}")
            continue
        kept.append(item)
        labels.append(class_index(item.sample.label, model.classes.names, model.taxonomy))
    if not kept:
        raise DataError(f"None of the {len(samples)} {what} could be read. Try: data check.")
    canvases = np.stack([item.pixels for item in kept if item.pixels is not None])
    edge = (canvases.shape[-1] - preprocess.size) // 2
    inner = slice(edge, edge + preprocess.size)
    return Cells(
        np.ascontiguousarray(canvases[:, :, inner, inner]), np.array(labels, dtype=np.int64),
        [item.sample.name for item in kept], [item.sha256 for item in kept], canvases,
    )  # fmt: skip


def _extractor(features: str, model: Model) -> Extractor:
    """Raises ModelError for a folder that holds no network, MissingExtra."""
    from cytodiffusion.evaluate.features import pretrained_features, trunk_features

    if features != "trunk":
        return pretrained_features(Path(features), str(model.classifier.device))
    from cytodiffusion.bundle import compact_network

    return trunk_features(*compact_network(model), model.classes.any)


# --- measuring -----------------------------------------------------------------------------------


def _independent(
    model: Model, training: Cells, settings: Any, out: Path, console: Console
) -> Baseline:
    """A classifier of the same classes, from OUT where it was trained before."""
    import torch

    from cytodiffusion.data.transforms import Augmentation
    from cytodiffusion.evaluate.baselines import Baseline, train_baseline
    from cytodiffusion.files import writing_to

    names, device = model.classes.names, str(model.classifier.device)
    key = digest_of((settings, model.preprocess, names, training.digests, training.labels.tolist()))
    folder = out / "classifiers" / f"{settings.kind}-{key}"
    if (folder / "baseline.json").exists():
        console.note(f"Independent classifier: trained before, see {folder}.")
        return Baseline.load(folder, device)
    torch.set_num_threads(1)  # the most work in a minute of the processor
    work = train_baseline(
        training.canvases, training.labels, names, model.preprocess, Augmentation(), settings,
        device=device,
    )  # fmt: skip
    found = console.follow(percent(work), "training the independent classifier", 100, "%")
    with writing_to(folder):
        found.save(folder)
    return found


def _agreement(model: Model, judge: Baseline, drawn: Cells, real: Cells) -> list[dict[str, Any]]:
    """What the model and the independent classifier name drawn and real cells."""
    import numpy as np

    from cytodiffusion.data.images import to_tensor
    from cytodiffusion.evaluate.fidelity import agreement

    names = model.classes.names
    rows = []
    for who, named in (("independent", judge.predict), (model.name, model.classifier.predict)):
        row: dict[str, Any] = {"judge": who}
        for kind, cells in (("drawn", drawn), ("real", real)):
            images = to_tensor(cells.pixels).to(model.classifier.device)
            told = np.array([names.index(name) for name in named(images).tolist()])
            row[kind] = agreement(cells.labels, told, names)
        rows.append(row)
    return rows


def _authentic(
    model: Model, pair: tuple[Cells, Cells], settings: Any, out: Path, device: str, console: Console
) -> dict[str, Any]:
    """How well a classifier tells real from drawn, from OUT where that was measured before."""
    import json

    from cytodiffusion.evaluate.fidelity import real_or_drawn
    from cytodiffusion.files import write_json

    drawn, real = pair
    about = (settings, model.preprocess, drawn.digests, real.digests)
    path = out / "measured" / f"real-or-drawn-{digest_of(about)}.json"
    if path.exists():
        console.note(f"Real or drawn: measured before, see {path}.")
        return dict(json.loads(path.read_text()))
    work = real_or_drawn(real.pixels, drawn.pixels, real.labels, settings, pick_device(device))
    found = console.follow(percent(work), "learning to tell real from drawn", 100, "%")
    write_json(path, found, "a measurement")
    return found


def _alike(
    pair: tuple[Cells, Cells], training: Cells, extractor: Extractor, model: Model, seed: int
) -> tuple[dict[str, Any], tuple[Nearest, Nearest]]:
    """Measures of both sets and of two real ones; nearest training cells of drawn and real cells."""
    from cytodiffusion.data.images import to_tensor
    from cytodiffusion.evaluate.fidelity import compare, matched, nearest_features

    device = model.classifier.device
    drawn, real, every = (extractor(to_tensor(c.pixels).to(device)) for c in (*pair, training))
    spread = every.std(0) + 1e-9  # features differ in scale, and distances should not
    drawn, real, every = (each / spread for each in (drawn, real, every))
    rows, others = matched(pair[1].labels, training.labels, seed)
    told = {
        "drawn": compare(real, drawn, seed),
        "real": compare(real[rows], every[others], seed),
    }
    return told, (nearest_features(drawn, every), nearest_features(real, every))


def _nearest_pixels(
    pair: tuple[Cells, Cells], training: Cells, console: Console
) -> tuple[Nearest, Nearest]:
    from cytodiffusion.evaluate.fidelity import nearest_pixels

    total = len(training.names)
    drawn, real = (
        console.follow(nearest_pixels(each.pixels, training.pixels), what, total, "training cells")
        for each, what in zip(pair, ("near drawn cells", "near real cells"), strict=True)
    )
    return drawn, real


def _copies(near: dict[str, tuple[Nearest, Nearest]]) -> dict[str, dict[str, Any]]:
    from cytodiffusion.evaluate.fidelity import copies

    return {name: copies(*each) for name, each in near.items()}


# --- what is shown -------------------------------------------------------------------------------


def _picture(drawn: Cells, training: Cells, near: Nearest, row: int) -> dict[str, Any]:
    """A drawn cell and its nearest training cell, for the report."""
    from cytodiffusion.data.sample import png
    from cytodiffusion.evaluate.report import data_uri

    which = int(near.which[row])
    images = {"drawn": drawn.pixels[row], "training": training.pixels[which]}
    return {
        **{name: data_uri(png(each.transpose(1, 2, 0).copy())) for name, each in images.items()},
        "path": drawn.names[row],
        "nearest": training.names[which],
        "distance": float(near.distance[row]),
        "ratio": float(near.ratio[row]),
    }


def _origin(model: Model) -> dict[str, Any]:
    from cytodiffusion.release import commit

    return {"model": model.name, "weights": model.weights_sha256[:12], "commit": commit()}


def _lines(results: dict[str, Any]) -> list[str]:
    """The main numbers for a terminal."""
    lines = [
        f"named as asked, {row['judge']:<14} {_share(row['drawn'], 'agreement')}"
        f"   real cells {row['real']['agreement']:.4f}"
        for row in results["agreement"]
    ]
    lines.append(f"real or drawn, accuracy       {_share(results['real_or_drawn'], 'accuracy')}")
    for name in ("fid", "kid", "precision", "recall", "density", "coverage"):
        pair = [results["alike"][kind][name] for kind in ("drawn", "real")]
        lines.append(f"{name:<30}{pair[0]:.4f}   real and real {pair[1]:.4f}")
    for where, row in results["copies"].items():
        lines.append(
            f"nearer than usual, in {where:<9}{_share(row, 'nearer')}   expected {row['expected']:.4f}"
        )
    return lines


def _share(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_ci95"]
    return f"{row[name]:.4f} [{low:.4f}, {high:.4f}] of {row[f'{name}_n']}"
