"""What a label means: one name for every spelling, the class it belongs to, its code.

`taxonomy.yaml` beside this file is a table that users can copy, edit and hand over instead. Labels
are compared by their key: lower case, one space between words, no plural s. A label that a model
does not tell apart is counted with its parent:

    resolve("BNE", ["neutrophil", "monocyte"])  =  "neutrophil"     (band_neutrophil -> neutrophil)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cytodiffusion.data.sample import Sample
from cytodiffusion.errors import LabelError

DEFAULT = Path(__file__).with_name("taxonomy.yaml")

LOINC_NOTICE = """\
# This material contains content from LOINC (http://loinc.org). LOINC is copyright (c) Regenstrief
# Institute, Inc. and the Logical Observation Identifiers Names and Codes (LOINC) Committee and is
# available at no cost under the license at http://loinc.org/license. LOINC(R) is a registered
# United States trademark of Regenstrief Institute, Inc.
"""


class CellClass(BaseModel):
    """One line of the table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, description="the name this package uses")
    synonyms: tuple[str, ...] = Field((), description="other spellings of the same class")
    parent: str | None = Field(None, description="class it is counted with when not told apart")
    loinc: str | None = Field(
        None, pattern=r"^\d+-\d$", description="LOINC code, per 100 leukocytes in blood"
    )
    counts_in_differential: bool = Field(
        True, description="whether it is in the denominator of a differential count"
    )


class _Table(BaseModel):
    """The whole file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    classes: tuple[CellClass, ...] = Field(min_length=1)
    panel_loinc: str | None = None


@dataclass(frozen=True)
class Taxonomy:
    """Every class by its name, and the name behind every spelling."""

    classes: dict[str, CellClass]
    names: dict[str, str]  # key of a label -> canonical name
    panel_loinc: str | None = None

    @classmethod
    def load(cls, path: Path | str | None = None) -> Taxonomy:
        """Read a taxonomy file; None is the one that ships with the package.

        Raises LabelError for a file that is missing or malformed, for a spelling claimed by two
        classes, for a parent that is not in the file, and for a circle of parents.
        """
        path = DEFAULT if path is None else Path(path)
        table = _parse(path)
        taxonomy = cls(
            {entry.name: entry for entry in table.classes}, _names(table, path), table.panel_loinc
        )
        _check_parents(taxonomy.classes, path)
        return taxonomy

    def canonical(self, label: str) -> str | None:
        """The name of the class that a label spells, or None if no class is spelled so."""
        return self.names.get(key(label))

    def respell(self, samples: Iterable[Sample]) -> list[Sample]:
        """The samples with the canonical names of their labels; unknown labels stay as they are."""
        return [
            replace(sample, label=self.canonical(sample.label) or sample.label)
            if sample.label is not None else sample
            for sample in samples
        ]  # fmt: skip

    def resolve(self, label: str, classes: Sequence[str]) -> str | None:
        """The one of `classes` that a label belongs to, or None.

        A label that is one of `classes` stays as it is, known here or not. Otherwise the class is
        looked up, then its parents, nearest first, until one of `classes` is met.
        """
        if (found := self.spelled(label, classes)) is not None:
            return found
        name = self.canonical(label)
        if name is None:
            return None
        offered = {self.canonical(choice): choice for choice in reversed(classes)}
        return next((offered[step] for step in self.ancestors(name) if step in offered), None)

    def spelled(self, label: str, classes: Sequence[str]) -> str | None:
        """The one of `classes` that a label spells or is a synonym of, or None."""
        if label in classes:
            return label
        found = {key(name): name for name in reversed(classes)}
        if key(label) in found:
            return found[key(label)]
        name = self.canonical(label)
        same = (choice for choice in classes if name and self.canonical(choice) == name)
        return next(same, None)

    def ancestors(self, name: str) -> tuple[str, ...]:
        """Parents of a class, nearest first. Raises LabelError for an unknown name."""
        found = []
        parent = self._class(name).parent
        while parent is not None:
            found.append(parent)
            parent = self.classes[parent].parent
        return tuple(found)

    def loinc(self, name: str) -> str | None:
        """LOINC code, or None where there is none. Raises LabelError for an unknown name."""
        return self._class(name).loinc

    def counts(self, name: str) -> bool:
        """Whether a class is in the denominator of a differential. Raises LabelError if unknown."""
        return self._class(name).counts_in_differential

    def dump(self) -> str:
        """The taxonomy as the text of a file that `load` reads back unchanged."""
        entries = [
            entry.model_dump(mode="json", exclude_defaults=True) for entry in self.classes.values()
        ]
        content: dict[str, Any] = {"classes": entries}
        if self.panel_loinc is not None:
            content = {"panel_loinc": self.panel_loinc, **content}
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None)
        return f"{LOINC_NOTICE}\n{text}"

    def _class(self, label: str) -> CellClass:
        name = self.canonical(label)
        if name is None:
            raise LabelError(
                f"The taxonomy does not know the class '{label}'. It knows: "
                f"{', '.join(self.classes)}. Add it to a copy of taxonomy.yaml and use that file."
            )
        return self.classes[name]


def key(label: str) -> str:
    """What is compared: lower case, words apart by one space, without the s of a plural."""
    words = re.split(r"[\s_\-]+", label.strip().casefold())
    return " ".join(_singular(word) for word in words if word)


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _parse(path: Path) -> _Table:
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise LabelError(
            f"The taxonomy {path} cannot be read ({error}). Give the path of a YAML file."
        ) from error
    except yaml.YAMLError as error:
        raise LabelError(
            f"The taxonomy {path} is not YAML ({' '.join(str(error).split())}). Compare it with "
            "the one that ships with the package."
        ) from error
    try:
        return _Table.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise LabelError(
            f"The taxonomy {path} is wrong at {place}: {first['msg']}. It needs a list `classes` "
            "of entries with name, synonyms, parent, loinc and counts_in_differential."
        ) from error


def _names(table: _Table, path: Path) -> dict[str, str]:
    names: dict[str, str] = {}
    listed: set[str] = set()
    for entry in table.classes:
        if entry.name in listed:
            raise LabelError(f"The taxonomy {path} has two classes '{entry.name}'. Keep one.")
        listed.add(entry.name)
        for spelling in (entry.name, *entry.synonyms):
            owner = names.setdefault(key(spelling), entry.name)
            if owner != entry.name:
                raise LabelError(
                    f"The taxonomy {path} gives '{spelling}' to both '{owner}' and "
                    f"'{entry.name}'. Keep it in one of them."
                )
    return names


def _check_parents(classes: dict[str, CellClass], path: Path) -> None:
    for entry in classes.values():
        seen = [entry.name]
        while (parent := classes[seen[-1]].parent) is not None:
            if parent not in classes:
                raise LabelError(
                    f"The taxonomy {path} gives '{seen[-1]}' the parent '{parent}', which it does "
                    "not have. Add that class or drop the parent."
                )
            seen.append(parent)
            if parent in seen[:-1]:
                raise LabelError(
                    f"The taxonomy {path} goes in a circle: {' -> '.join(seen)}. Drop one parent."
                )
