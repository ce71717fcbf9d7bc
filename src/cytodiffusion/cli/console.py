"""What every verb shares: its options, the notice, and progress that suits where it is shown.

On a terminal progress is one line that is drawn over; elsewhere a plain line every ten seconds; with
--json a JSON object on standard error. Results go to standard output, everything else to standard
error.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Generator, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from cytodiffusion.errors import SettingsError

if TYPE_CHECKING:
    from cytodiffusion.bundle import Model
    from cytodiffusion.data.taxonomy import Taxonomy

if TYPE_CHECKING:
    Context = typer.Context
else:
    Context = typer.Context.__base__  # what typer really hands over; the tests check types

T = TypeVar("T")
NOTICE = "Research use only. Not a medical device; not for diagnosis."

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Seed = Annotated[
    int, typer.Option("--seed", min=0, help="Decides every random number, where there are any.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
ModelName = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="A bundle, the run it is in, or a shipped model: see models list."
    ),
]
ModelOrAuto = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="As in models list, or a bundle, or the run it is in. Without it pbc8, or pbc8-far where the "
        "frames are clearly of another laboratory.",
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for what is written.")]
Budget = Annotated[
    str,
    typer.Option(
        "--budget",
        help="Work for each cell: fast, balanced, full or paper; fast-abroad, balanced-abroad, full-abroad "
        "with weights fitted for frames of other laboratories.",
    ),
]
Engine = Annotated[
    str,
    typer.Option("--engine", help="What runs the network: auto, torch, onnxruntime, openvino, ..."),
]
Answers = Annotated[str | None, typer.Option("--classes", help="Restrict the answers: A,B,...")]
Crop = Annotated[
    float | None,
    typer.Option(
        "--crop",
        min=0.01,
        max=4,
        help="Side of the centre crop / shorter side of the image, instead of the model's own; "
        "1 takes the whole image.",
    ),
]
Match = Annotated[
    str,
    typer.Option(
        "--match",
        help="Bring images of white cells to the look of those the model was trained on: light, scale "
        "(one crop for all, from the size of their nuclei), light,scale or nothing. auto: what up to 32 "
        "of the images show to be needed, if 8 white cells or more are in them; it says so, and in another "
        "light takes the budget's twin -abroad. Cells that look smaller are left alone.",
    ),
]
Coverage = Annotated[float, typer.Option("--coverage", help="Of the conformal sets.")]
Sets = Annotated[
    str,
    typer.Option("--sets", help="Conformal sets that cover all cells taken together, or each class: "
                 "all or class."),
]  # fmt: skip
Prior = Annotated[
    str,
    typer.Option(
        "--prior",
        help="How often each class comes up where the cells are from: training (what the budget was fitted "
        "with: for -abroad, race and paper all alike), uniform, or a YAML file of class: share.",
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        "--taxonomy", help="YAML file that says which labels are one class, instead of our own."
    ),
]


def plain(text: str) -> str:
    """Text that stays on its line: a name can hold newlines and codes that move the cursor."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def call_of(context: Context, **other: object) -> str:
    """The running command with all that was given or left at a default, as a line for a shell.

    `other` puts values in the place of what was given, by the names of the parameters.
    """
    values = context.params | other
    words, options = list[str](), list[str]()
    within: Any = context
    while within.parent is not None:
        words.insert(0, str(within.info_name))
        within = within.parent
    words.insert(0, "cytodiffusion")
    for parameter in context.command.params:
        value, name = values[str(parameter.name)], parameter.opts[0]
        several = value if isinstance(value, list | tuple) else [value]
        if parameter.param_type_name == "argument":
            words += [f"./{one}" if str(one).startswith("-") else str(one) for one in several]
        elif isinstance(value, bool):
            options += [name] * value or parameter.secondary_opts
        else:
            options += [word for one in several if one is not None for word in (name, str(one))]
    return shlex.join([*words, *(word for word in options if word != "--json")])


class Console:
    """Prints results, notes and progress of one command."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.began = self.shown = time.monotonic()
        self.open_line = False
        self.problems = set[str]()  # inputs that could not be read, and why
        self.unread = 0  # how many, so far

    def note(self, text: str) -> None:
        """One line for the reader, on standard error."""
        self._close_line()
        if self.as_json:
            typer.echo(json.dumps({"note": text}), err=True)
        else:
            typer.echo(plain(text), err=True)

    def not_read(self, *problems: str) -> None:
        """Name inputs that could not be read, each with the reason; the command then ends with 1."""
        for problem in problems:
            if problem not in self.problems:  # some images are read more than once
                self.problems.add(problem)
                self.unread += 1
                self.note(f"Not read: {problem}")

    def result(self, values: dict[str, Any], text: str) -> None:
        """The result: JSON or text, on standard output."""
        self._close_line()
        typer.echo(json.dumps(values) if self.as_json else text)

    def start(self) -> None:
        """Begin the clock of a new stage."""
        self._close_line()
        self.began = self.shown = time.monotonic()

    def follow(self, work: Generator[int, None, T], stage: str, total: int, unit: str) -> T:
        """Show how far `work` is, by what it yields; returns what it returns."""
        self.start()
        while True:
            try:
                self.progress(stage, next(work), total, unit)
            except StopIteration as end:
                return end.value

    def progress(self, stage: str, done: int, total: int, unit: str, *, before: int = 0) -> None:
        """How far a stage is; `before` of `done` were there when it began."""
        now = time.monotonic()
        terminal = sys.stderr.isatty() and not self.as_json
        if done < total and now - self.shown < (0.2 if terminal else 10):
            return
        self.shown = now
        rate = (done - before) / max(now - self.began, 1e-9)
        left = (total - done) / rate if rate > 0 else None
        if self.as_json:
            state = {"stage": stage, "done": done, "total": total}
            speed = {"per_second": round(rate, 2), "seconds_left": left and round(left)}
            typer.echo(json.dumps(state | speed), err=True)
            return
        line = f"{stage}: {done:,} of {total:,} {unit}, {rate:.1f} {unit} a second"
        line += f", {clock(left)} left" if left and done < total else ""
        typer.echo(f"\r{line:<78}" if terminal else line, err=True, nl=not terminal)
        self.open_line = terminal

    def _close_line(self) -> None:
        if self.open_line:
            typer.echo("", err=True)
            self.open_line = False


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def one_at_a_time(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb that no two processes may be at with one OUT: what they write would be mixed."""

    @wraps(verb)
    def run(*args: Any, out: Path, **options: Any) -> None:
        from cytodiffusion.files import alone

        with alone(out):
            verb(*args, out=out, **options)

    return run


def pick_device(name: str) -> str:
    """The device to use. Raises SettingsError where the one asked for is not there."""
    import torch

    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.mps.is_available())}
    if name == "auto":
        return "cuda" if there["cuda"] else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:  # no name of a device at all
        device = torch.device("meta")
    if (device.index or 0) >= there.get(device.type, 0):
        usable = ", ".join(kind for kind, count in there.items() if count)
        raise SettingsError(f"There is no device '{name}' here. Usable: auto, {usable}.")
    return name if device.type == "cuda" else device.type


def read_answers(
    given: str | None, model: Model, labels: Taxonomy | None = None
) -> tuple[str, ...] | None:
    """The model's own names of the classes `A,B,...`; None for all. Raises LabelError, SettingsError."""
    if given is None:
        return None
    words = [word.strip() for word in given.split(",") if word.strip()]
    if not words:
        raise SettingsError(f"--classes names no class. There are: {', '.join(model.classes)}.")
    labels = labels or model.taxonomy
    spelled = [labels.spelled(word, model.classes.names) or word for word in words]
    names = tuple(model.classes.names[model.classes.index(name)] for name in spelled)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SettingsError(f"A class is named twice by --classes: {', '.join(twice)}.")
    return names


def read_prior(words: str, classes: Sequence[str]) -> tuple[float, ...] | None:
    """Share of each class, or None for that of training. Raises SettingsError."""
    if words == "training":
        return None
    if words == "uniform":
        return (1.0,) * len(classes)
    import yaml

    try:
        given = yaml.safe_load(Path(words).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"The prior '{words}' is not training, not uniform, and no readable YAML file ({error})."
        ) from error
    shares = given if isinstance(given, dict) else {}
    wrong = sorted(set(map(str, shares)) ^ set(classes))
    bad = [name for name, x in shares.items() if not isinstance(x, int | float) or not x > 0]
    if wrong or bad:
        raise SettingsError(
            f"{words} must give a positive share for each of the classes {', '.join(classes)}; missing, "
            f"unknown or not positive: {', '.join(map(str, [*wrong, *bad]))}."
        )
    return tuple(float(shares[name]) for name in classes)


def threads(model: Model) -> int:
    """Threads that use a model at a time: a network on latents fills a GPU by itself."""
    import torch

    from cytodiffusion.types import PIXELS

    on_gpu = torch.device(model.classifier.device).type != "cpu"
    return 1 if on_gpu and model.space is not PIXELS else cores()


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
