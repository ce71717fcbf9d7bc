"""What several benches share: baselines, numbers of cells, names of what is kept, written results."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from cytodiffusion.bundle import Model
    from cytodiffusion.cli.console import Console
    from cytodiffusion.data.images import Preprocess
    from cytodiffusion.data.sample import Sample
    from cytodiffusion.evaluate.baselines import Baseline, Kind

T = TypeVar("T")


def find_kinds(text: str) -> list[Kind]:
    """The baselines asked for. Raises SettingsError for one that there is not, MissingExtra."""
    from cytodiffusion.errors import SettingsError
    from cytodiffusion.evaluate.baselines import KINDS, library

    if text == "none":
        return []
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in KINDS:
            raise SettingsError(
                f"There is no baseline '{name}'. There are: {', '.join(KINDS)}; or none."
            )
    library()  # now, not after hours
    return [kind for kind in KINDS if kind in names]


def load_baseline(folder: Path, model: Model) -> Baseline:
    """Raises ModelError for one that does not see the same images and know the same classes."""
    from cytodiffusion.errors import ModelError
    from cytodiffusion.evaluate.baselines import Baseline

    if not (folder / "baseline.json").is_file():
        raise ModelError(f"{folder} is no baseline: it has no baseline.json.")
    found = Baseline.load(folder, str(model.classifier.device))
    if (found.preprocess, found.classes) != (model.preprocess, model.classes):
        raise ModelError(
            f"The baseline {folder} sees images of another size, crop or light, or knows other classes."
        )
    return found


def read_counts(text: str, least: int) -> list[int]:
    """Numbers of labelled cells, rising. Raises SettingsError for one that is none, or too small."""
    from cytodiffusion.errors import SettingsError

    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < least:
        raise SettingsError(
            f"--labels takes numbers from {least} on, as in 10,20,50; not '{text}'."
        )
    return counts


def percent(work: Generator[Any, None, T]) -> Generator[int, None, T]:
    """The progress of a baseline's training, in percent."""
    while True:
        try:
            yield round(100 * next(work).done)
        except StopIteration as end:
            return end.value


def code_digest() -> str:
    """sha256 of the code that decides what is measured, so that another's is not taken for it."""
    import hashlib

    here = Path(__file__).parents[1]
    parts = ("classify", "data", "diffusion", "engines", "networks")
    paths = [path for part in parts for path in sorted((here / part).glob("*.py"))]
    paths += [here / "evaluate" / "cost.py", here / "evaluate" / "views.py"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def tell_unread(
    samples: Sequence[Sample], digests: Sequence[str], preprocess: Preprocess, console: Console
) -> None:
    """Name the images that were not measured; `digests`: sha256 of the files that were."""
    from cytodiffusion.data.load import file_sha256, load_one

    there = set(digests)
    for sample in samples if len(digests) < len(samples) else ():
        if file_sha256(sample) not in there:
            console.not_read(f"{sample.name}: {load_one(sample, preprocess).problem}")


def tell_unmarked(drawn: Sequence[Sample], where: Path, console: Console) -> None:
    """Say how many cells do not say that they were drawn: another program's do not, real ones neither."""
    from cytodiffusion.data.mark import marked

    if bare := len(drawn) - len(marked(drawn)):
        console.note(
            f"{bare} of {len(drawn)} images in {where} are not marked as synthetic; they are taken as "
            "drawn all the same."
        )


def digest_of(about: object) -> str:
    """A short digest of all that decides what is kept under it."""
    import hashlib

    return hashlib.sha256(repr(about).encode()).hexdigest()[:12]


def labelled_cells(
    source: Path, splits: Path | None, split: str | None, model: Model, limit: int | None, seed: int
) -> tuple[list[Sample], list[int]]:
    """Labelled images and the columns of their classes; about `limit`, as many of each class.

    Raises DataError.
    """
    import numpy as np

    from cytodiffusion.classify.fit import balanced_subset
    from cytodiffusion.data.mark import refuse_marked
    from cytodiffusion.data.pixels import class_index
    from cytodiffusion.data.readers import read_dataset
    from cytodiffusion.errors import DataError

    found = [s for s in read_dataset(source, splits=splits, split=split) if s.label is not None]
    if not found:
        raise DataError(f"{source} has no labels. Put each class in a folder of its own.")
    names = model.classes.names
    truth = np.array([class_index(sample.label, names, model.taxonomy) for sample in found])
    rows = np.sort(balanced_subset(truth, limit, seed)) if limit else np.arange(len(found))
    chosen = [found[i] for i in rows]
    refuse_marked(chosen)
    return chosen, truth[rows].tolist()


def write_results(out: Path, values: dict[str, Any]) -> None:
    """OUT/results.json. Raises OutputError."""
    from cytodiffusion.files import write_json

    write_json(out / "results.json", values, "the results")
