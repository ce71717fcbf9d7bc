"""Write docs/cli.md from the commands' own help: python docs/make_cli.py"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import typer.main
import yaml
from pydantic.fields import FieldInfo
from typer.testing import CliRunner

from cytodiffusion.cli.main import app
from cytodiffusion.train.settings import make_settings, setting_names

PAGE = Path(__file__).with_name("cli.md")
HEAD = """# The command line

Made by `make docs` from the commands' own help; do not edit.

Exit codes: 0 done; 1 some inputs could not be read (the rest is done, and each is named); 2 the call
was wrong, or could not be gone on with, such as a full disk: what was written until then stays; 3 a
fault of the program.
"""

SETTINGS = """## Settings

Of `train --set NAME=VALUE` and of the other verbs that train; the values are those of the preset
`cpu`, under `latent` those of Stable Diffusion's shape (the presets `paper-...`).

| setting | value | what it is |
|---|---|---|"""


def render() -> str:
    """The page as text, the same on every terminal."""
    os.environ.update(COLUMNS="100", TERMINAL_WIDTH="100")
    group = typer.main.get_command(app)
    return "\n".join([HEAD, _help([]), *map(_help, _verbs(group, [])), _settings()])


def _verbs(command: object, words: list[str]) -> Iterator[list[str]]:
    """The words of every command that has none below it."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield words
    for name in inner or ():
        yield from _verbs(inner[name], [*words, name])


def _help(words: list[str]) -> str:
    found = CliRunner().invoke(
        app, [*words, "--help"], prog_name="cytodiffusion", terminal_width=100
    )
    text = "\n".join(line.rstrip() for line in found.stdout.strip().splitlines())
    return f"## cytodiffusion {' '.join(words)}".rstrip() + f"\n\n```\n{text}\n```\n"


def _settings() -> str:
    """The settings of `train`, from the fields' own descriptions."""
    rows = [
        f"| `{name}` | {_as_yaml(_value(name, field))} | {field.description} |"
        for name, field in setting_names().items()
    ]
    return "\n".join([SETTINGS, *rows, ""])


def _value(name: str, field: FieldInfo) -> object:
    """Of a setting in the preset `cpu`, or what it is elsewhere where that has none."""
    found: object = make_settings("cpu")
    for part in name.split("."):
        if found is None:
            return field.get_default(call_default_factory=True)
        found = getattr(found, part)
    return found


def _as_yaml(value: object) -> str:
    """As --set takes it."""
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True).removesuffix("\n...\n").strip()


if __name__ == "__main__":
    PAGE.write_text(render())
