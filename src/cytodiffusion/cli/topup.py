"""The steps of `bench augment`: which cells, real and drawn, and one training on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cytodiffusion.cli.benches import digest_of
from cytodiffusion.cli.trainings import Told, kept, told_by_baseline

if TYPE_CHECKING:
    import numpy as np

    from cytodiffusion.data.images import Preprocess
    from cytodiffusion.data.mark import Mark
    from cytodiffusion.data.pixels import Pixels
    from cytodiffusion.data.sample import Sample
    from cytodiffusion.data.taxonomy import Taxonomy
    from cytodiffusion.evaluate.augment import Arm
    from cytodiffusion.evaluate.baselines import BaselineSettings, Kind

Choice = tuple[int, int]  # real cells of the rare class, and the repeat
PLACES = ("{labels}", "{repeat}")  # in the name of a folder of drawn cells


@dataclass(frozen=True)
class World:
    """What every job needs; sent to every process."""

    out: Path
    classes: tuple[str, ...]
    rare: int
    preprocess: Preprocess
    real: Pixels  # to train on
    drawn: dict[Choice, Pixels]  # of the rare class
    test: Pixels
    others: int | None  # cells of each other class at most; None: all
    drawn_cells: int | None  # None: until the class is as many as the others
    minutes: float | None
    steps: int | None
    seed: int
    device: str


@dataclass(frozen=True)
class Job:
    """One training."""

    count: int  # real cells of the rare class
    repeat: int
    kind: Kind
    arm: Arm

    def __str__(self) -> str:
        from cytodiffusion.evaluate.augment import WORDS

        return f"{self.count} real cells, repeat {self.repeat}, {self.kind}, {WORDS[self.arm]}"


# --- cells ---------------------------------------------------------------------------------------


def folders(pattern: str, choices: Sequence[Choice]) -> dict[Choice, Path]:
    """The folder of drawn cells of each choice. Raises SettingsError for half a pattern."""
    from cytodiffusion.errors import SettingsError

    there = [place in pattern for place in PLACES]
    if any(there) and not all(there):
        raise SettingsError(
            f"'{pattern}' names one of {{labels}} and {{repeat}}; give both, for cells of each choice."
        )
    return {
        choice: Path(pattern.replace(PLACES[0], str(choice[0])).replace(PLACES[1], str(choice[1])))
        for choice in choices
    }


def list_drawn(folder: Path, rare: str, labels: Taxonomy) -> tuple[list[Sample], set[Mark]]:
    """Drawn cells of the rare class, and what they say of where they are from (seed 0).

    Raises DataError where there are none, or one is not marked as synthetic.
    """
    from dataclasses import replace

    from cytodiffusion.data.mark import read_mark
    from cytodiffusion.data.readers import read_dataset
    from cytodiffusion.errors import DataError

    found = [s for s in labels.respell(read_dataset(folder)) if s.label == rare]
    if not found:
        raise DataError(
            f"{folder} holds no drawn cell of {rare}. Draw some: cytodiffusion generate --classes {rare} "
            f"--per-class 100 -o {folder}"
        )
    marks = set()
    for sample in found:
        mark = read_mark(sample.read())
        if mark is None:
            raise DataError(
                f"'{sample.name}' in {folder} is not marked as synthetic: real cells must not pass for "
                "drawn ones. Give what `generate` wrote."
            )
        marks.add(replace(mark, seed=0))
    return found, marks


def check_apart(marks: dict[Choice, set[Mark]]) -> None:
    """Raises DataError where one model drew for two choices: it was not trained on one alone."""
    from cytodiffusion.errors import DataError

    seen: dict[str, Choice] = {}
    for choice, found in marks.items():
        for mark in found:
            other = seen.setdefault(mark.weights, choice)
            if other != choice:
                raise DataError(
                    f"One model ({mark.model}, {mark.weights[:12]}) drew for {other[0]} cells, repeat "
                    f"{other[1]}, and for {choice[0]}, repeat {choice[1]}: it was not trained on the cells "
                    "of one choice alone. Give one folder, without {labels} and {repeat}."
                )


def names_of(samples: Iterable[Sample], cells: Pixels, classes: Sequence[str]) -> list[str]:
    """The names of the images that were read, in their order; copies of a file have one each."""
    from cytodiffusion.data.load import file_sha256

    found: dict[tuple[str, str | None], list[str]] = {}
    for sample in samples:
        found.setdefault((file_sha256(sample), sample.label), []).append(sample.name)
    pairs = zip(cells.digests, cells.labels, strict=True)
    return [found[digest, classes[label]].pop() for digest, label in pairs]


def write_choices(world: World, choices: Sequence[Choice], names: Sequence[str]) -> None:
    """OUT/choices/N-R.csv: the real cells of each choice, a split to train a drawing model on.

    Of each class a fifth, two at the least, to calibrate on. Raises OutputError.
    """
    import numpy as np

    from cytodiffusion.data.split import Row, write_split

    for count, repeat in choices:
        rows = chosen(world, count, repeat)
        order = np.random.default_rng((world.seed, repeat)).permutation(rows)
        lines = []
        for k, name in enumerate(world.classes):
            same = order[world.real.labels[order] == k]
            held = max(2, len(same) // 5)
            lines += [Row(names[i], name, "val" if at < held else "train")
                      for at, i in enumerate(same)]  # fmt: skip
        write_split(sorted(lines), world.out / "choices" / f"{count}-{repeat}.csv")


def chosen(world: World, count: int, repeat: int) -> np.ndarray:
    """Rows of the real cells of a choice."""
    from cytodiffusion.evaluate.augment import choose

    return choose(world.real.labels, world.rare, count, world.others, world.seed, repeat)


def added(world: World, count: int, repeat: int) -> int:
    """By how many cells the rare class is topped up. Raises DataError."""
    from cytodiffusion.evaluate.augment import missing

    if world.drawn_cells is not None:
        return world.drawn_cells
    return missing(world.real.labels[chosen(world, count, repeat)], world.rare)


def check_drawn(
    world: World, choices: Sequence[Choice], places: dict[Choice, Path]
) -> dict[Choice, int]:
    """How many drawn cells each choice needs.

    Raises DataError where fewer were drawn (if any were read), or where there is nothing to top up.
    """
    from cytodiffusion.errors import DataError

    needed = {choice: added(world, *choice) for choice in choices}
    for choice, cells in world.drawn.items():
        need, there = needed[choice], len(cells.labels)
        if there < need:
            name = world.classes[world.rare]
            raise DataError(
                f"{places[choice]} holds {there} drawn cells of {name} that can be read, not {need}. "
                f"Draw more (generate --classes {name} --per-class {need}), or give --drawn {there} or "
                "fewer --others."
            )
    return needed


# --- one training --------------------------------------------------------------------------------


def given_to(world: World, job: Job) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images that a job trains on, their labels and digests: real ones first."""
    import numpy as np

    rows = chosen(world, job.count, job.repeat)
    images, labels = world.real.images[rows], world.real.labels[rows]
    digests = [world.real.digests[i] for i in rows]
    if job.arm == "real":
        return images, labels, digests
    need = added(world, job.count, job.repeat)
    if job.arm == "drawn":
        source = world.drawn[job.count, job.repeat]
        rng = np.random.default_rng((world.seed, job.repeat))
        more = rng.permutation(len(source.labels))[:need]
    else:
        source, more = world.real, np.resize(rows[labels == world.rare], need)
    return (
        np.concatenate([images, source.images[more]]),
        np.concatenate([labels, np.full(need, world.rare)]),
        [*digests, *(source.digests[i] for i in more)],
    )


def place(world: World, job: Job) -> Path:
    """Where what it says is kept."""
    _, labels, digests = given_to(world, job)
    cells = list(zip(digests, labels.tolist(), strict=True))
    about = (_settings(world, job), world.preprocess, world.classes, cells, world.test.sha256)
    name = f"{job.count}-{job.repeat}-{job.kind}-{job.arm}-{digest_of(about)}"
    return world.out / "told" / f"{name}.npz"


def work(world: World, job: Job) -> Told:
    """Train and test, or read where that was done before."""
    return kept(place(world, job), lambda: _train(world, job))


def _train(world: World, job: Job) -> Told:
    from cytodiffusion.data.transforms import Augmentation
    from cytodiffusion.evaluate.augment import mirrored

    images, labels, _ = given_to(world, job)
    light = Augmentation()
    return told_by_baseline(
        mirrored(images, light.margin), labels, world.classes, world.preprocess, light,
        _settings(world, job), world.test, world.device,
    )  # fmt: skip


def _settings(world: World, job: Job) -> BaselineSettings:
    from cytodiffusion.evaluate.augment import RATE
    from cytodiffusion.evaluate.baselines import BaselineSettings

    return BaselineSettings(
        kind=job.kind, minutes=world.minutes, steps=world.steps, learning_rates=(RATE,),
        seed=world.seed + job.repeat,
    )  # fmt: skip
