"""Classes and seeds in, a folder of marked synthetic cells out.

    OUT/<class>/<seed>.png      one cell; what it is and where it came from is written into the file
    OUT/manifest.csv            path,label,seed and all of the request, a line a cell
    OUT/request.json            model, its weights, settings; cells made with others are not mixed in

All noise of a cell, at its start and on its way, comes from (seed, class, step) alone, and batches have
one size, filled up with copies: the same seed gives the same cell whatever was drawn beside it, on one
machine to the last bit. Cells that are there are not drawn again.

A bundle may have a drawing.json: by how much its denoiser misjudges noise (diffusion/gain.py), measured
on held-out cells. Without one its guesses are taken as they are, and what is drawn is grainy.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cytodiffusion.bundle import CHECKSUMS, Model, check_files, checksums
from cytodiffusion.classify.draws import standard_normal
from cytodiffusion.data.images import to_pixels
from cytodiffusion.data.mark import Mark, marked_png, read_mark
from cytodiffusion.data.transforms import POSES
from cytodiffusion.diffusion.gain import Gain
from cytodiffusion.diffusion.noise import karras_sigmas
from cytodiffusion.diffusion.precondition import VPDenoiser
from cytodiffusion.diffusion.sample import Guess, Sampler, guided, sample
from cytodiffusion.errors import OutputError, SettingsError
from cytodiffusion.files import write_file, writing_to
from cytodiffusion.types import PIXELS

BATCH = 8  # cells drawn at a time, always
CONDITIONAL = 1.5  # guidance of class-conditional networks; docs/log.md has the measurement
GAIN = "drawing.json"
MANIFEST = "manifest.csv"
REQUEST = "request.json"


@dataclass(frozen=True)
class Drawing:
    """How cells are drawn."""

    sampler: Sampler = "heun"
    steps: int = 20
    churn: float = 8.0  # noise added over all steps, as in EDM; forgives the denoiser's errors
    guidance: float = 1.0  # 1 leaves the class's own guess
    sigma_min: float = 0.07  # image units: of the last step
    sigma_max: float = 20.0
    looks: int = 8  # at the end: guesses under fresh noise, whose mean is the cell; 0: none
    look_sigma: float = 0.1  # of that noise, image units

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise SettingsError(
                f"The noise must fall from sigma_max ({self.sigma_max:g}) to a sigma_min between 0 and "
                f"that; {self.sigma_min:g} is none."
            )


def usual(model: Model) -> Drawing:
    """How a model's cells are drawn unless something else is asked for.

    The heads of one network were trained to differ and need no guidance; a class-conditional network,
    trained to draw alone, does. On latents there is no grain to look away, and noise ends where the
    schedule of the training does.
    """
    if isinstance(model.denoiser, VPDenoiser):
        low, high = float(model.denoiser.levels[0]), float(model.denoiser.levels[-1])
        return Drawing(
            "dpm++", churn=0, guidance=CONDITIONAL, sigma_min=low, sigma_max=high, looks=0
        )
    return Drawing() if model.classifier.together else Drawing(guidance=CONDITIONAL)


class Cell(NamedTuple):
    """One cell to be drawn."""

    label: str
    seed: int

    @property
    def path(self) -> str:
        """Where it goes, below OUT."""
        return f"{self.label.replace('/', '_')}/{self.seed:06}.png"


def read_gain(model: Model) -> Gain | None:
    """What the bundle says of its denoiser, if it does."""
    path = model.folder / GAIN
    return Gain.from_json(path.read_text()) if path.exists() else None


def save_gain(bundle: Path, gain: Gain) -> None:
    """Put the gain into a bundle, and its sha256 into the list. Raises ChangedBundle, OutputError."""
    check_files(bundle)
    listed = checksums(bundle)
    data = gain.to_json().encode()
    write_file(bundle / GAIN, data, "the gain")
    listed[GAIN] = hashlib.sha256(data).hexdigest()
    text = json.dumps(dict(sorted(listed.items())), indent=1) + "\n"
    write_file(bundle / CHECKSUMS, text.encode(), "the checksums")


def draw(model: Model, cells: Sequence[Cell], drawing: Drawing) -> Float[Tensor, "n 3 size size"]:
    """Drawn cells, in [-1, 1] where they are in range."""
    space, device = model.space, model.classifier.device
    shape = space.shape(model.preprocess.size)

    def noise(step: int) -> Tensor:
        each = [standard_normal(shape, c.seed, c.label, step) for c in cells]
        return torch.stack(each).to(device)

    labels = torch.tensor([model.classes.index(cell.label) for cell in cells], device=device)
    guess = guided(model.denoiser, labels, model.classes.any, drawing.guidance)
    guess = turning(guess) if space is PIXELS else guess
    gain = read_gain(model)
    guess = gain(guess) if gain else guess
    sigmas = karras_sigmas(drawing.steps, drawing.sigma_min, drawing.sigma_max).to(device)
    *_, drawn = sample(
        guess, noise(0), sigmas, sampler=drawing.sampler, churn=drawing.churn,
        fresh=lambda step: noise(1 + step),
    )  # fmt: skip
    if drawing.looks:
        level = torch.full((len(cells),), drawing.look_sigma, device=device)
        fresh = (noise(1 + drawing.steps + look) for look in range(drawing.looks))
        with torch.inference_mode():
            seen = [guess(drawn + drawing.look_sigma * each, level) for each in fresh]
        drawn = torch.stack(seen).mean(0)
    with torch.inference_mode():
        return space.decode(drawn).cpu()


def turning(guess: Guess) -> Guess:
    """The same guess, each time in another of the eight poses.

    A network that is not exactly equivariant errs along its grid; turned, the errors of successive
    steps do not add up.
    """
    asked = 0

    def turned(noisy: Tensor, sigma: Tensor) -> Tensor:
        nonlocal asked
        pose = POSES[asked % len(POSES)]
        asked += 1
        return pose.undo(guess(pose(noisy), sigma))

    return turned


def draw_all(
    model: Model, cells: Sequence[Cell], drawing: Drawing, workers: int
) -> Iterator[list[tuple[Cell, bytes]]]:
    """Marked PNG files, a batch at a time, in order; `workers` threads draw a batch each."""
    batches = [cells[i : i + BATCH] for i in range(0, len(cells), BATCH)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one for each worker
    try:
        with ThreadPoolExecutor(workers) as pool:
            for start in range(0, len(batches), workers):
                group = batches[start : start + workers]
                yield from pool.map(lambda batch: _files(model, batch, drawing), group)
    finally:
        torch.set_num_threads(threads)


def _files(model: Model, cells: Sequence[Cell], drawing: Drawing) -> list[tuple[Cell, bytes]]:
    full = [cells[i % len(cells)] for i in range(BATCH)]
    pixels = to_pixels(draw(model, full, drawing))[: len(cells)]
    return [(c, marked_png(p, mark_of(model, c))) for c, p in zip(cells, pixels, strict=True)]


def mark_of(model: Model, cell: Cell) -> Mark:
    """What the file of a cell says of itself."""
    return Mark(model.name, model.weights_sha256, cell.seed, cell.label)


class Folder:
    """The folder that cells are drawn into."""

    def __init__(self, path: Path, model: Model, drawing: Drawing) -> None:
        self.path, self.model = path, model
        self.about = {
            "model": model.name,
            "weights": model.weights_sha256,
            "gain": _sha256_of_gain(model),
        }
        self.about |= asdict(drawing)

    def begin(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells that are not there yet. Raises OutputError for a folder of something else."""
        stamp = self.path / REQUEST
        there = [path for path in self.path.glob("*") if not path.name.startswith(".")]
        if there and not stamp.exists():
            raise OutputError(
                f"{self.path} holds files that were not drawn by this program. Choose a new folder "
                "with -o, so that drawn and real cells cannot be mixed up."
            )
        if stamp.exists() and _read(stamp) != self.about:
            raise OutputError(
                f"{self.path} holds cells drawn by another model or with other settings (see {REQUEST} "
                "there). Choose another folder with -o, or delete that one."
            )
        write_file(stamp, (json.dumps(self.about, indent=1) + "\n").encode(), "the request")
        missing = [cell for cell in cells if not self._there(cell)]
        self.write_manifest()
        return missing

    def _there(self, cell: Cell) -> bool:
        path = self.path / cell.path
        return path.is_file() and read_mark(path.read_bytes()) == mark_of(self.model, cell)

    def add(self, files: Sequence[tuple[Cell, bytes]]) -> None:
        """Write drawn cells, and a line for each. Raises OutputError."""
        for cell, data in files:
            write_file(self.path / cell.path, data, "a drawn cell")
        with writing_to(self.path), (self.path / MANIFEST).open("a", encoding="utf-8") as file:
            file.write(self._lines([cell for cell, _ in files]))

    def write_manifest(self) -> int:
        """List what is there, sorted; returns how many cells that are."""
        labels = {Path(Cell(name, 0).path).parent.name: name for name in self.model.classes}
        found = [
            Cell(labels[path.parent.name], int(path.stem))
            for path in self.path.glob("*/*.png")
            if path.stem.isdecimal() and path.parent.name in labels
        ]
        cells = sorted(cell for cell in found if self._there(cell))  # and no other image
        heading = ",".join(("path", "label", "seed", *self.about)) + "\n"
        write_file(self.path / MANIFEST, (heading + self._lines(cells)).encode(), "the manifest")
        return len(cells)

    def _lines(self, cells: Sequence[Cell]) -> str:
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows((c.path, c.label, c.seed, *self.about.values()) for c in cells)
        return text.getvalue()


def _sha256_of_gain(model: Model) -> str:
    """Empty where there is none."""
    path = model.folder / GAIN
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None  # nothing that this program wrote
