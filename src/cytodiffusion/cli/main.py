"""`cytodiffusion VERB ...`: puts the verbs together and turns errors into exit codes.

Exit codes: 0 done, 1 some inputs could not be read (the rest is done), 2 the call was wrong, 3 a fault
of the program.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Annotated, Any

import typer

from cytodiffusion import __version__
from cytodiffusion.cli import (
    adapt,
    bench,
    data,
    demo,
    doctor,
    evaluate,
    explain,
    generate,
    models,
    predict,
    train,
)
from cytodiffusion.cli.console import NOTICE, one_at_a_time, plain
from cytodiffusion.errors import CytoDiffusionError

WrongCall: Any = typer.BadParameter.__base__  # UsageError of whichever click typer brings

app = typer.Typer(
    name="cytodiffusion",
    help=f"Name blood cells with a diffusion model.\n\n{NOTICE}",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.add_typer(data.app, name="data")
app.command("train")(train.train)
app.command("adapt")(adapt.adapt)
app.command("predict")(predict.predict)
app.command("evaluate")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("explain")(one_at_a_time(explain.explain))
app.add_typer(bench.app, name="bench")
app.add_typer(models.app, name="models")
app.command("doctor")(doctor.doctor)


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit
    return wanted


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that come before a verb."""


def _as_json() -> bool:
    """Whether JSON was asked for, even by a call that cannot be understood."""
    return "--json" in sys.argv[1:]


def _say(problem: str, head: str = "Error: ") -> None:
    """Why nothing more is done, as the other lines are: JSON where that was asked for."""
    typer.echo(json.dumps({"error": problem}) if _as_json() else f"{head}{problem}", err=True)


def _is_full(error: Exception) -> bool:
    """Whether the memory of the machine or of the GPU is full, in the words of torch."""
    words = ("not enough memory", "allocate memory", "out of memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def run() -> None:
    """Do what the call asks for and exit with its code; a fault of the program is raised."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads must not hold a core
    try:
        sys.exit(app(standalone_mode=not _as_json()))  # by itself, typer says in text what is wrong
    except CytoDiffusionError as error:
        _say(plain(str(error)))
        sys.exit(2)
    except WrongCall as error:
        _say(plain(error.format_message()))
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not _is_full(error):
            raise
        _say("The memory is full. Try a smaller batch, fewer --jobs, or close other programs.")
        sys.exit(2)
    except SystemExit as end:
        if end.code == 130:  # as typer ends after Ctrl-C
            _say("Stopped. Run the same command again to go on.", head="")
        raise


def main() -> None:
    """Entry point of the `cytodiffusion` command."""
    try:
        run()
    except Exception as error:
        traceback.print_exc()
        _say(f"This is a fault of the program: {plain(f'{type(error).__name__}: {error}')}")
        sys.exit(3)
