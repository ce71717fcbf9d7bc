"""`explain`: what would have to change for these cells to be of another class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cytodiffusion.cli.benches import digest_of
from cytodiffusion.cli.console import (
    NOTICE,
    Budget,
    Console,
    Context,
    Crop,
    Device,
    Engine,
    Json,
    Match,
    ModelOrAuto,
    Out,
    Seed,
    call_of,
    pick_device,
    threads,
)

if TYPE_CHECKING:
    from cytodiffusion.bundle import Model
    from cytodiffusion.data.images import Preprocess
    from cytodiffusion.data.load import Loaded
    from cytodiffusion.data.sample import Sample
    from cytodiffusion.explain.counterfactual import Explanation, Settings

Row = dict[str, Any]
Found = tuple[Any, Row]  # an Explanation, and what is said of it
GROUP = 64  # cells at a time
EMBEDDED = 100  # pictures on the page; the others are beside it
KIND = 2  # of the rows below: one that was written otherwise is made anew


def explain(
    context: Context,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Images, or folders of them.")
    ],
    out: Out,
    model: ModelOrAuto = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="CLASS",
            help="What the cell would be; give it again for more. Without it: the runner-up.",
        ),
    ] = None,
    faithful: Annotated[
        bool,
        typer.Option(
            "--faithful/--no-faithful", help="Check each map by deletion and insertion of pixels."
        ),
    ] = True,
    budget: Budget = "balanced",
    crop: Crop = None,
    match: Match = "auto",
    engine: Engine = "auto",
    json: Json = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Show where, and in which direction, cells would have to change to be of another class.

    For each cell and class a PNG, an SVG and the arrays as NPZ; OUT/report.html has those of this call. Run
    again, cells that were explained in the same way are not explained anew.
    """
    from cytodiffusion.bundle import DEFAULT_MODEL, load
    from cytodiffusion.cli.frames import Asked, take
    from cytodiffusion.data.readers import read_dataset
    from cytodiffusion.explain.counterfactual import Settings
    from cytodiffusion.predictions import Request

    console = Console(json)
    samples = [sample for path in images for sample in read_dataset(path)]
    loaded = load(model or DEFAULT_MODEL, pick_device(device), engine)
    loaded.classifier.budget(budget)
    taken = take(Asked(match, crop, budget, model), loaded, samples, console)
    loaded = taken.model
    work = Work(
        loaded, Settings(seed=seed), _classes(loaded, against or []), taken.budget,
        Request(crop=taken.fit.crop, light=taken.fit.light).preprocess(loaded), faithful,
    )  # fmt: skip
    console.note(NOTICE)
    rows = _run(work, samples, out, console)
    values = {"cells": len(samples) - console.unread, "explanations": rows, "out": str(out)}
    lines = [*map(_line, rows), "Nothing was explained."]
    if rows:
        _page(work, rows, out, call_of(context, model=model or taken.model.name))
        lines[-1] = f"See {out / 'report.html'}."
    console.result(values, "\n".join(lines))
    if console.unread:
        raise typer.Exit(1)


def _classes(model: Model, names: Sequence[str]) -> list[str]:
    """The model's own names of the classes asked for. Raises LabelError."""
    found = [model.taxonomy.resolve(name, model.classes.names) or name for name in names]
    for name in found:
        model.classes.index(name)
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Work:
    """How each cell is explained."""

    model: Model
    settings: Settings
    against: list[str]
    budget: str
    preprocess: Preprocess
    faithful: bool

    @cached_property
    def key(self) -> str:
        """What decides an explanation, apart from the image and the class."""
        about = (KIND, self.model.files_sha256, self.settings, self.against, self.budget,
                 self.preprocess, self.faithful, self.model.engine)  # fmt: skip
        return digest_of(about)

    def load(self, sample: Sample) -> Loaded:
        """The image as `predict` shows it to the network."""
        from cytodiffusion.data.load import load_one

        return load_one(sample, self.preprocess)

    def others(self, probabilities: Any) -> tuple[str, list[str]]:
        """The name of a cell, and the classes to explain it against."""
        import numpy as np

        names = self.model.classes.names
        first, second = np.argsort(-probabilities, kind="stable")[:2]
        wanted = self.against or [names[second]]
        return names[first], [name for name in wanted if name != names[first]]

    def explain(self, item: Loaded) -> list[Found]:
        """Everything about one cell, without pictures."""
        from cytodiffusion.data.images import to_tensor
        from cytodiffusion.explain.counterfactual import explain

        assert item.pixels is not None
        image = to_tensor(item.pixels).to(self.model.classifier.device)
        told = self.named(item, [image.cpu().numpy()])[0]
        own, others = self.others(told)
        found = explain(
            self.model.denoiser, self.model.classes, image, item.sha256, own, others, self.settings,
            self.model.space,
        ) if others else []  # fmt: skip
        return [(each, self.row(item, each, told)) for each in found]

    def named(self, item: Loaded, images: Sequence[Any]) -> Any:
        """Probabilities of each class, as `predict` gives them; the noise is that of the cell."""
        import numpy as np
        import torch

        classifier = self.model.classifier
        shown = torch.from_numpy(np.stack(images)).float()
        table = classifier.measure(shown, [item.sha256] * len(images), self.budget)
        return classifier.read(table, self.budget).probabilities

    def row(self, item: Loaded, each: Explanation, told: Any) -> Row:
        """What is said of one explanation in numbers."""
        names = self.model.classes.names
        own, other = names.index(each.own), names.index(each.other)
        drawn = self._starts(item, each.starts, each.as_other)
        changed = self._starts(item, each.starts, each.counterfactual)
        flipped = [one["start"] for one in changed if one["named"] == each.other]
        return {
            "path": item.sample.name,
            "sha256": item.sha256,
            "predicted": each.own,
            "confidence": float(told[own]),
            "against": each.other,
            "probability": float(told[other]),
            "shown": float(each.map.shown.mean()),
            "drawn": drawn,
            "counterfactuals": changed,
            "flipped_from": min(flipped, default=None),
            "faithful": self.check(item, each, own, other) if self.faithful else None,
        }

    def _starts(self, item: Loaded, starts: Any, images: Any) -> list[dict[str, Any]]:
        """What the images made from each starting level are named."""
        found = self.named(item, list(images.clip(-1, 1)))
        names = [self.model.classes.names[k] for k in found.argmax(1)]
        rows = zip(starts.tolist(), names, found.max(1).tolist(), strict=True)
        return [dict(zip(("start", "named", "probability"), row, strict=True)) for row in rows]

    def check(self, item: Loaded, each: Explanation, own: int, other: int) -> dict[str, Any]:
        """Areas of deletion and insertion, in nats, of our maps and of those that know nothing."""
        import numpy as np
        import torch

        from cytodiffusion.classify.classifier import ABROAD
        from cytodiffusion.evaluate.faithful import Judge, areas, curves, joined, rivals
        from cytodiffusion.explain.counterfactual import neutral

        model, seed = self.model, self.settings.seed
        image = torch.from_numpy(each.image).to(model.classifier.device)
        blank = neutral(model.denoiser, model.classes, image, item.sha256, seed, model.space)
        reference = blank.cpu().numpy()
        rng = np.random.default_rng([seed, int(item.sha256[:8], 16)])
        rankings = {
            "support": each.map.support,
            "change": each.map.strength,
            **rivals(each.image, rng),
        }
        abroad = self.budget.endswith(ABROAD)
        judge = Judge(model.classifier, model.classifier.abroad("full") if abroad else "full")
        found = curves(
            each.image, reference, rankings, lambda shown: judge.log_odds(shown, own, other)
        )
        return {
            name: dict(zip(("deletion", "insertion"), areas(curve).tolist(), strict=True))
            for name, curve in joined(found).items()
        }


# --- many cells ----------------------------------------------------------------------------------


def _run(work: Work, samples: Sequence[Sample], out: Path, console: Console) -> list[Row]:
    """Explain what is not explained yet; every row, in the order of the samples."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from cytodiffusion.files import writing_to

    torch.set_num_threads(1)  # each of the workers has a core
    rows, before = list[Row](), 0
    console.start()
    with writing_to(out), ThreadPoolExecutor(threads(work.model)) as pool:
        for start in range(0, len(samples), GROUP):
            some = samples[start : start + GROUP]
            for done, (item, told) in enumerate(pool.map(_task(work, out), some), start + 1):
                before += isinstance(told, Path)
                rows += _take(work, item, told, out, console)
                console.progress("explaining", done, len(samples), "cells", before=before)
    if before:
        console.note(f"{before:,} of {len(samples):,} cells were explained before.")
    return rows


def _task(work: Work, out: Path) -> Callable[[Sample], tuple[Loaded, Path | list[Found]]]:
    """For one sample: where it was explained before, or what there is to say of it."""

    def task(sample: Sample) -> tuple[Loaded, Path | list[Found]]:
        item = work.load(sample)
        if item.pixels is None:
            return item, []
        path = out / "cells" / f"{_stem(item)}.json"
        return item, path if _rows_of(path, work.key) is not None else work.explain(item)

    return task


def _take(
    work: Work, item: Loaded, told: Path | list[Found], out: Path, console: Console
) -> list[Row]:
    """The rows of one cell, written with their pictures if they are new."""
    from cytodiffusion.files import write_json

    name = item.sample.name
    if item.pixels is None:
        console.not_read(f"{name}: {item.problem}")
        return []
    if isinstance(told, Path):
        rows = _rows_of(told, work.key) or []
    else:
        rows = [_write(item, each, row, out) for each, row in told]
        record = {"key": work.key, "rows": rows}
        write_json(out / "cells" / f"{_stem(item)}.json", record, "an explanation")
    if not rows:
        console.note(f"{name}: it is named {' or '.join(work.against)} already.")
    return [row | {"path": name} for row in rows]


def _rows_of(path: Path, key: str) -> list[Row] | None:
    """What a file says, if it was made in the way that `key` stands for and its pictures are there."""
    import json

    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        rows, same = list(record["rows"]), record["key"] == key
        pictures = [path.parent.parent / f"{row['files']}.png" for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or not ours
    return rows if same and all(picture.is_file() for picture in pictures) else None


def _write(item: Loaded, each: Explanation, row: Row, out: Path) -> Row:
    """The arrays and pictures of one explanation; the row says how they are called."""
    from cytodiffusion.explain import picture
    from cytodiffusion.files import whole, write_file

    as_other, named = ([_said(c["named"], c["probability"]) for c in row[kind]]
                       for kind in ("drawn", "counterfactuals"))  # fmt: skip
    drawn = picture.figure(each, as_other, named, _best(row))
    path = out / "cells" / f"{_stem(item)}-{_safe(each.other)}"
    write_file(path.with_name(path.name + ".png"), picture.png(drawn), "a picture")
    write_file(path.with_name(path.name + ".svg"), picture.svg(drawn), "a picture")
    with whole(path.with_name(path.name + ".npz")) as part:
        each.save(part)
    return row | {"files": f"cells/{path.name}"}


def _best(row: Row) -> int:
    """The counterfactual to show: the first that is named as asked, else the last."""
    starts = [c["start"] for c in row["counterfactuals"]]
    return starts.index(row["flipped_from"]) if row["flipped_from"] else len(starts) - 1


def _said(name: str, probability: float) -> str:
    return f"{name} {100 * probability:.0f} %"


def _stem(item: Loaded) -> str:
    """The name of a cell's files: its own, and enough of its sha256 to tell it from others."""
    from pathlib import PurePosixPath

    return f"{_safe(PurePosixPath(item.sample.name).stem)}-{item.sha256[:8]}"


def _safe(name: str) -> str:
    import re

    return re.sub(r"[^\w.-]+", "_", name)[:60]


# --- what is shown -------------------------------------------------------------------------------


def _page(work: Work, rows: Sequence[Row], out: Path, call: str) -> None:
    """OUT/report.html, with the first pictures inside."""
    import base64

    from cytodiffusion.evaluate.report import fill, write_page

    pictures = {}
    for row in rows[:EMBEDDED]:
        data = (out / f"{row['files']}.png").read_bytes()
        pictures[row["files"]] = "data:image/png;base64," + base64.b64encode(data).decode()
    facts = {"command": call, "model": work.model.name, "weights": work.model.weights_sha256[:12],
             "noise levels of the maps": ", ".join(map(str, work.settings.levels)),
             "passes for a map": len(work.settings.draws), "seed": work.settings.seed}  # fmt: skip
    title = "What would have to change"
    page = fill("explain.html.j2", title=title, rows=rows, pictures=pictures, facts=facts,
                discovery=work.settings.discovery)  # fmt: skip
    write_page(out / "report.html", page)


def _line(row: Row) -> str:
    """One explanation for a terminal."""
    told = f"{row['path']}: {_said(row['predicted'], row['confidence'])}; to be {row['against']}: "
    start = row["flipped_from"]
    told += (
        f"named so at noise level {start:g} (the lowest)"
        if start
        else "not named so at any noise level"
    )
    if row["faithful"]:
        gone = ", ".join(f"{name} {area['deletion']:.1f}" for name, area in row["faithful"].items())
        told += (
            f"; log-odds once the shown pixels are gone (deletion, nats; lower is better): {gone}"
        )
    return told
