"""Who may import whom: a table, and a walk over the code that holds it to the table."""

from __future__ import annotations

import ast
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cytodiffusion

SOURCE = Path(cytodiffusion.__file__).parent
CORE = "types errors"
BUNDLE = "networks classify train data diffusion engines"

# A part (a folder, or a file of the top level) and the parts it may import, besides itself.
# "__init__" is the front door; from within, nothing but the version is taken from it.
MAY = {
    "errors": "",
    "types": "errors",
    "files": "errors",
    "data": f"files {CORE}",
    "diffusion": CORE,
    "networks": f"diffusion {CORE}",
    "classify": f"diffusion {CORE}",
    "explain": f"classify data {CORE}",
    "evaluate": f"classify data files {CORE}",
    "train": f"data diffusion networks files {CORE}",
    "engines": f"networks diffusion classify {CORE}",
    "bundle": f"{BUNDLE} {CORE}",
    "predictions": f"bundle classify data files {CORE}",
    "synthesis": f"bundle classify data diffusion files {CORE}",
    "calibration": f"classify data {CORE}",
    "adaptation": f"bundle classify train data diffusion {CORE}",
    "release": f"calibration train classify data diffusion {CORE} __init__",
    "fleet": f"bundle predictions classify data {CORE} __init__",
    "review": f"data {CORE} __init__",
    "app": f"review bundle predictions explain data {CORE} __init__",
    "__init__": f"bundle {BUNDLE} evaluate explain {CORE}",
}
EVERYTHING = ("cli",)
SHOWS = {"typer", "rich", "matplotlib", "click", "tqdm"}
HEAVY = {"torch", "numpy", "pyarrow", "sklearn", "scipy", "diffusers", "matplotlib", "PIL",
         "safetensors", "accelerate", "pydantic", "jinja2"}  # fmt: skip


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path, nodes: Iterator[ast.AST]) -> Iterator[tuple[int, str]]:
    """Line and full name of every module that these nodes import; relative names are refused."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: write the whole name of the module"
            if node.module == "cytodiffusion":
                here = {name for name in MAY if name != "__init__"} | set(EVERYTHING)
                for alias in node.names:
                    yield node.lineno, "cytodiffusion" + f".{alias.name}" * (alias.name in here)
            else:
                yield node.lineno, str(node.module)


def parts_imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and part of every import of this package, inside functions and TYPE_CHECKING too."""
    for line, name in imported(path, ast.walk(ast.parse(path.read_text(encoding="utf-8")))):
        first, *rest = name.split(".")
        if first == "cytodiffusion":
            yield line, rest[0] if rest else "__init__"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_are_on_the_map(path: Path) -> None:
    own = part_of(path)
    if own in EVERYTHING:
        return
    assert own in MAY, f"{path} is a new part: give it a line in the table"
    for line, part in parts_imported(path):
        allowed = {own, *MAY[own].split()}
        assert part in allowed, f"{path}:{line}: {own} must not import {part}"


def test_the_map_has_no_way_back() -> None:
    """Left to right: parts can be put in an order in which each imports only earlier ones."""
    left, done = {part: set(may.split()) - {"__init__"} for part, may in MAY.items()}, set()
    while left:
        ready = {part for part, needs in left.items() if needs <= done}
        assert ready, f"a circle among {sorted(left)}"
        done |= ready
        left = {part: needs for part, needs in left.items() if part not in ready}


def test_the_walk_sees_hidden_imports(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "if TYPE_CHECKING:\n    from cytodiffusion.cli import main\n"
        "def f():\n    import cytodiffusion.bundle as b\n    from cytodiffusion import train\n"
        "from cytodiffusion import __version__\n"
    )
    assert set(parts_imported(file)) == {(2, "cli"), (4, "bundle"), (5, "train"), (6, "__init__")}


@pytest.mark.parametrize("part", ["classify", "diffusion", "networks", "data"])
def test_the_core_shows_nothing(part: str) -> None:
    for path in files():
        if part_of(path) == part:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found = {name.split(".")[0] for _, name in imported(path, ast.walk(tree))}
            assert not found & SHOWS, path
            prints = [node.lineno for node in ast.walk(tree)
                      if isinstance(node, ast.Name) and node.id == "print"]  # fmt: skip
            assert not prints, path


def at_once(nodes: list[ast.stmt]) -> Iterator[ast.AST]:
    """Statements that run when a module is imported."""
    for node in nodes:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield from ast.walk(node)


def test_the_command_line_imports_nothing_heavy_at_once() -> None:
    light = {"cytodiffusion", "cytodiffusion.errors"}
    for path in sorted((SOURCE / "cli").glob("*.py")):
        for line, name in imported(path, at_once(ast.parse(path.read_text()).body)):
            assert name.split(".")[0] not in HEAVY, f"{path}:{line}"
            if name.startswith("cytodiffusion"):
                ours = name in light or name.startswith("cytodiffusion.cli")
                assert ours, f"{path}:{line}: import {name} inside the command"


def test_help_of_every_verb_is_light() -> None:
    """One process asks for the help of every verb and says what it has imported."""
    script = (
        "import sys, json, contextlib, io, typer\n"
        "from cytodiffusion.cli import main\n"
        "def leaves(command, words):\n"
        "    inner = getattr(command, 'commands', None)\n"
        "    if inner is None: yield words\n"
        "    for name in inner or (): yield from leaves(inner[name], [*words, name])\n"
        "every = [[], *leaves(typer.main.get_command(main.app), [])]\n"
        "for words in every:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        main.app([*words, '--help'])\n"
        "print(json.dumps([len(every), sorted({name.split('.')[0] for name in sys.modules})]))\n"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    count, modules = json.loads(told.stdout)
    assert count >= 9
    assert HEAVY.intersection(modules) <= {"pydantic"}  # which typer itself may take


@pytest.mark.parametrize("verb", [[], ["predict"]], ids=str)
def test_help_answers_within_300_ms(verb: list[str]) -> None:
    """Processor time of the child, the best of at most ten: a busy machine only ever adds to it."""
    command = [sys.executable, "-m", "cytodiffusion.cli", *verb, "--help"]
    spent: list[float] = []
    while len(spent) < 10 and min(spent, default=1) >= 0.3:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        told = subprocess.run(command, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert "Usage" in told.stdout
    assert min(spent) < 0.3, spent


def test_promised_names_are_there() -> None:
    for name in cytodiffusion.__all__:
        assert getattr(cytodiffusion, name) is not None
    assert dir(cytodiffusion) == sorted(cytodiffusion.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = cytodiffusion.nonsense
