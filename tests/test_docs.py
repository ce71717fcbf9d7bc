"""Prose that can go stale is run: README snippets, the CLI page, paths that documents name."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from cytodiffusion.bundle import ZOO
from cytodiffusion.train.settings import make_settings, setting_names

ROOT = Path(__file__).parent.parent
NAMES = (
    "README.md",
    "docs/map.md",
    "docs/log.md",
    "docs/drawn.md",
    "docs/input.md",
    "CHANGELOG.md",
)
PAGES = [ROOT / name for name in NAMES]


def blocks(page: Path, language: str) -> list[str]:
    """Code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def test_cli_page_is_current():
    """docs/cli.md is what `make docs` writes."""
    made = runpy.run_path(str(ROOT / "docs/make_cli.py"))["render"]()
    assert (ROOT / "docs/cli.md").read_text() == made, "run `make docs`"


def leaves(values, within=""):
    """Names of what is no table, a.b for those inside others."""
    for name, value in values.items():
        inner = isinstance(value, dict)
        yield from leaves(value, f"{within}{name}.") if inner else [within + name]


def test_every_setting_has_its_line():
    """Those of the presets of both kinds of network, each once, with a value and what it is."""
    presets = (make_settings(preset).model_dump() for preset in ("cpu", "paper-in-domain"))
    wanted = {name for preset in presets for name in leaves(preset)} - {"latent"}
    assert len(wanted) > 50
    assert set(setting_names()) == wanted
    section = (ROOT / "docs/cli.md").read_text().split("\n## Settings\n")[1]
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \| (.+) \|$", section, re.MULTILINE)
    assert sorted(name for name, *_ in rows) == sorted(wanted)
    assert "None" not in {told for *_, told in rows}
    values = {name: value for name, value, _ in rows}
    assert (values["steps"], values["network.width"]) == ("10000", "48")


def test_readme_python_runs():
    """Every Python block of the README runs in the checkout and prints something."""
    if not (ZOO / "pbc8").exists():
        pytest.skip("the model pbc8 is not in this checkout")
    for code in blocks(ROOT / "README.md", "python"):
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert "eosinophil" in run.stdout


def test_readme_commands_exist():
    """Every verb and option that the README shows is in the CLI page."""
    page = (ROOT / "docs/cli.md").read_text()
    lines = [
        line.split("#")[0].split()
        for block in blocks(ROOT / "README.md", "sh")
        for line in block.splitlines()
        if line.startswith("cytodiffusion ")
    ]
    assert len(lines) >= 8
    for words in lines:
        names = (" ".join(words[:k]) for k in (4, 3, 2))
        name = next((name for name in names if f"## {name}\n" in page), None)
        assert name, words
        section = page.split(f"## {name}\n")[1].split("\n## ")[0]
        for word in words:
            if word.startswith("-"):
                assert re.search(rf"(^|[\s,]){word}\b", section), f"{name} has no {word}"


@pytest.mark.parametrize("name", ["pbc8", "pbc8-large", "pbc8-far"])
def test_readme_numbers_are_those_of_the_card(name):
    """The line of each model has what its card says of the budget `balanced`."""
    if not (ZOO / name).exists():
        pytest.skip(f"the model {name} is not in this checkout")
    (line,) = re.findall(rf"^\| \[{name}\].*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    card = (ZOO / name / "card.md").read_text().split("## On the test split of PBC\n")[1]
    told = re.findall(r"^\| balanced \| .*$", card, re.MULTILINE)[0]
    figures = [cell.strip() for cell in told.split("|")[3:6]]  # after the passes
    assert [cell.strip() for cell in line.split("|")[3:6]] == figures


def test_readme_quotes_the_card_of_the_default():
    """What `recipes/pbc8.py --release` copied is still there, to the letter."""
    quoted = (ROOT / "README.md").read_text().split("<!-- from the card of pbc8 -->")[1]
    card = (ZOO / "pbc8" / "card.md").read_text().split("## On the test split of PBC\n")[1]
    assert quoted.split("<!-- until here -->")[0].strip() == card.split("\n## ")[0].strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Every relative link and every recipe that a page names is a file of the project."""
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    named = re.findall(r"\b(?:recipes|docs|examples|tests)/[\w/]+\.\w+", text)
    for link in links:
        assert (page.parent / link).exists(), link
    for name in named:
        assert (ROOT / name).exists(), name
