"""`bench explain`: do the maps of `explain` show what the classifier goes by?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cytodiffusion.cli.benches import digest_of, labelled_cells, load_baseline, write_results
from cytodiffusion.cli.console import (
    NOTICE,
    Console,
    Context,
    Crop,
    Device,
    Engine,
    Json,
    ModelName,
    Out,
    Seed,
    call_of,
    pick_device,
    threads,
)

if TYPE_CHECKING:
    from cytodiffusion.bundle import Model
    from cytodiffusion.data.sample import Sample
    from cytodiffusion.evaluate.attributes import Words
    from cytodiffusion.evaluate.baselines import Baseline
    from cytodiffusion.evaluate.faithful import Judge
    from cytodiffusion.explain.counterfactual import Map, Settings

Told = dict[str, Any]
START = 1.0  # noise level that the drawings begin with, image units
KIND = 3  # of what is kept of a cell: what was kept otherwise is measured anew


def faithful(
    context: Context,
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Labelled images.")],
    out: Out,
    model: ModelName = "pbc8",
    splits: Annotated[Path | None, typer.Option(help="CSV with path,label,split.")] = None,
    split: Annotated[str | None, typer.Option(help="Which split to measure on.")] = None,
    limit: Annotated[
        int, typer.Option(min=2, help="About this many cells, as many of each class.")
    ] = 80,
    attributes: Annotated[
        Path | None, typer.Option(help="WBCAtt's table: do maps look where its words say?")
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="Folder with the baseline.json of a ResNet or ConvNeXt, for Grad-CAM."),
    ] = None,
    crop: Crop = None,
    engine: Engine = "auto",
    json: Json = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Deletion and insertion against random, edge and centre maps, flips, stability over seeds.

    OUT/results.json and report.html. Run again, cells that were measured are not measured anew.
    """
    from cytodiffusion.bundle import load
    from cytodiffusion.evaluate.attributes import Words
    from cytodiffusion.evaluate.explained import render, summarise
    from cytodiffusion.evaluate.report import write_page
    from cytodiffusion.explain.counterfactual import Settings
    from cytodiffusion.release import commit

    console = Console(json)
    loaded = load(model, pick_device(device), engine)
    names = loaded.classes.names
    words = Words.read(attributes, names, loaded.taxonomy) if attributes else None
    other = load_baseline(baseline, loaded) if baseline else None
    console.note(NOTICE)
    work = Work(loaded, Settings(seed=seed), words, other, crop)
    samples, classes = labelled_cells(source, splits, split, loaded, limit, seed)
    cells = _measure(work, samples, classes, out, console)
    facts = {
        "command": call_of(context),
        "seed": seed,
        "model": loaded.name,
        "weights": loaded.weights_sha256[:12],
        "engine": loaded.engine,
        "commit": commit(),
    }
    values = summarise(cells, seed)
    write_results(out, values | facts)
    write_page(out / "report.html", render(f"Maps of {source.name}", values, facts))
    console.result(values | facts, "\n".join([*_lines(values), f"See {out}."]))
    if console.unread:
        raise typer.Exit(1)


def _measure(
    work: Work, samples: Sequence[Sample], classes: Sequence[int], out: Path, console: Console
) -> list[Told]:
    """What is measured of each cell, from OUT where that was measured before."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from cytodiffusion.errors import DataError
    from cytodiffusion.files import write_json, writing_to

    torch.set_num_threads(1)  # each of the workers has a core
    found, before = list[Told](), 0
    console.start()
    with writing_to(out / "measured"), ThreadPoolExecutor(threads(work.model)) as pool:
        tasks = pool.map(work.cell, samples, classes, [out] * len(samples))
        for done, (path, told) in enumerate(tasks, start=1):
            if "problem" in told:
                console.not_read(f"{told['path']}: {told['problem']}")
                continue
            before += path is None
            if path is not None:
                write_json(path, told, "what was measured")
            found.append(told)
            console.progress("measuring", done, len(samples), "cells", before=before)
    if before:
        console.note(f"{before:,} cells were measured before; see {out / 'measured'}.")
    if not found:
        raise DataError("None of the images can be read.")
    return found


@dataclass(frozen=True)
class Work:
    """How each cell is measured."""

    model: Model
    settings: Settings
    words: Words | None
    baseline: Baseline | None
    crop: float | None

    @cached_property
    def key(self) -> str:
        """What decides a measurement, apart from the image."""
        about = [KIND, self.model.files_sha256, self.settings, self.crop, self.model.engine]
        about += [self.words and self.words.shares, self.baseline and self.baseline.trained]
        return digest_of(about)

    def cell(self, sample: Sample, label: int, out: Path) -> tuple[Path | None, Told]:
        """Where to keep it, and what is measured of a cell; None where it is kept already."""
        import json

        from cytodiffusion.data.images import to_tensor
        from cytodiffusion.data.load import load_one

        preprocess = self.model.preprocess
        if self.crop:
            preprocess = preprocess.model_copy(update={"crop": self.crop})
        item = load_one(sample, preprocess)
        if item.pixels is None:
            return None, {"path": sample.name, "problem": item.problem}
        key = digest_of((self.key, self.words_of(sample.name)))
        path = out / "measured" / f"{item.sha256[:16]}-{key}.json"
        told = {"path": sample.name, "sha256": item.sha256, "label": label}
        if path.exists():  # what the cell is called may have changed since
            return None, json.loads(path.read_text()) | told
        image = to_tensor(item.pixels).to(self.model.classifier.device)
        return path, told | self.measure(image, item.sha256, sample.name)

    def measure(self, image: Any, digest: str, name: str) -> Told:
        """Everything that is measured of one cell, `image` being on the model's device."""
        import numpy as np

        from cytodiffusion.evaluate.explained import stability
        from cytodiffusion.evaluate.faithful import Judge
        from cytodiffusion.explain.counterfactual import measure

        judge, clean = Judge(self.model.classifier), image.cpu().numpy()
        order = np.argsort(-judge.probabilities([clean])[0], kind="stable").tolist()
        space = self.model.space
        found = measure(self.model.denoiser, image, digest, order, self.settings, space)
        maps = dict(zip(order[1:], found, strict=True))
        own, other = order[:2]
        settings = self.settings.model_copy(update={"seed": self.settings.seed + 1})
        (again,) = measure(
            self.model.denoiser, image, digest, [own, other], settings, self.model.space
        )
        first = maps[other]
        return {
            "own": self.model.classes.names[own],
            "other": self.model.classes.names[other],
            "curves": self.curves(judge, image, digest, first, own, other),
            "flips": self.flips(judge, image, digest, first, own, other),
            "stability": stability(first.light, first.light_error, again.light, again.light_error),
            "shown": float(first.shown.mean()),
            "attributes": self.look(clean, maps, name),
        }

    def curves(
        self, judge: Judge, image: Any, digest: str, found: Map, own: int, other: int
    ) -> dict[str, Any]:
        """Deletion and insertion for each reference and each ranking of the pixels."""
        import numpy as np

        from cytodiffusion.evaluate.faithful import blurred, curves, grad_cam, joined, rivals
        from cytodiffusion.explain.counterfactual import neutral

        seed, clean = self.settings.seed, image.cpu().numpy()
        rng = np.random.default_rng([seed, int(digest[:8], 16)])
        rankings = {"support": found.support, "change": found.strength, **rivals(clean, rng)}
        if self.baseline:
            rankings["Grad-CAM"] = grad_cam(self.baseline, clean, own, other)
        anyone = (
            neutral(self.model.denoiser, self.model.classes, image, digest, seed, self.model.space)
            .cpu()
            .numpy()
        )
        references = {"any cell": anyone, "blurred": blurred(clean)}
        return {
            name: {
                ranking: curve.tolist()
                for ranking, curve in joined(
                    curves(
                        clean, reference, rankings, lambda some: judge.log_odds(some, own, other)
                    )
                ).items()
            }
            for name, reference in references.items()
        }

    def flips(
        self, judge: Judge, image: Any, digest: str, found: Map, own: int, other: int
    ) -> dict[str, bool]:
        """Which images are named as the other class: see evaluate/explained.html.j2."""
        from cytodiffusion.explain.counterfactual import redraw

        settings = self.settings.model_copy(update={"starts": (START,)})
        drawn = (
            redraw(self.model.denoiser, image, digest, [own, other], settings, self.model.space)[0]
            .cpu()
            .numpy()
        )
        clean, difference = image.cpu().numpy(), drawn[1] - drawn[0]
        shown = {
            "drawn": drawn[1],
            "difference": clean + difference,
            "turned": clean + difference[:, ::-1, ::-1],
            "change": clean + found.change,
        }
        told = judge.probabilities([one.clip(-1, 1) for one in shown.values()])
        return dict(zip(shown, (told.argmax(1) == other).tolist(), strict=True))

    def words_of(self, name: str) -> Mapping[str, str] | None:
        """What pathologists say of a cell."""
        return self.words.cells.get(PurePosixPath(name).stem) if self.words else None

    def look(self, clean: Any, maps: dict[int, Map], name: str) -> list[Told] | None:
        """What the maps to the classes that have words do, beside what the words say they should."""
        from cytodiffusion.evaluate.attributes import look

        cell = self.words_of(name)
        if self.words is None or cell is None:
            return None
        names = self.model.classes.names
        changes = {names[k]: found.change for k, found in maps.items()
                   if names[k] in self.words.shares}  # fmt: skip
        return look(clean, changes, cell, self.words)


def _lines(values: dict[str, Any]) -> list[str]:
    """The results for a terminal."""
    from cytodiffusion.evaluate.explained import said

    lines = [
        f"{values['cells']} cells. By how much the order by support beats others, nats (95 %):"
    ]
    for reference, rivals in values["gains"].items():
        lines += [
            f"  {reference:<10}{name:<12}deletion {said(gain['deletion'])}  "
            f"insertion {said(gain['insertion'])}"
            for name, gain in rivals["support"].items()
        ]
    flips, stable = values["flips"], values["stability"]
    return [
        *lines,
        "Named as the other class: " + ", ".join(f"{k} {said(v)}" for k, v in flips.items()),
        f"Two seeds correlate {said(stable['correlation'])}, expected {said(stable['expected'])}",
    ]
