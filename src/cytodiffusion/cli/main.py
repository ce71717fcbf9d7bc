"""`cytodiffusion VERB ...`: puts the verbs together and turns errors into exit codes.

Exit codes: 0 done, 1 some inputs could not be read (the rest is done), 2 the call was wrong.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

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
from cytodiffusion.cli.console import NOTICE, plain
from cytodiffusion.errors import CytoDiffusionError

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
app.command("explain")(explain.explain)
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


def run() -> None:
    """Entry point of the `cytodiffusion` command."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads must not hold a core
    try:
        app()
    except CytoDiffusionError as error:
        typer.echo(f"Error: {plain(str(error))}", err=True)
        sys.exit(2)
    except SystemExit as end:
        if end.code == 130:  # so typer ends after Ctrl-C
            typer.echo("Stopped. Run the same command again to go on.", err=True)
        raise
