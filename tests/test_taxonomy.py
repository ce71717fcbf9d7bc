"""Known spellings, codes and parents; every way a taxonomy file can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from cytodiffusion.data.sample import Sample
from cytodiffusion.data.taxonomy import Taxonomy
from cytodiffusion.errors import LabelError

EIGHT = (
    "basophil",
    "eosinophil",
    "erythroblast",
    "immature_granulocyte",
    "lymphocyte",
    "monocyte",
    "neutrophil",
    "platelet",
)
TAXONOMY = Taxonomy.load()


@pytest.mark.parametrize(
    ("prefix", "coarse"),
    [
        ("BA", "basophil"),
        ("EO", "eosinophil"),
        ("ERB", "erythroblast"),
        ("PMY", "immature_granulocyte"),
        ("MY", "immature_granulocyte"),
        ("MMY", "immature_granulocyte"),
        ("IG", "immature_granulocyte"),
        ("LY", "lymphocyte"),
        ("MO", "monocyte"),
        ("BNE", "neutrophil"),
        ("SNE", "neutrophil"),
        ("PLATELET", "platelet"),
    ],
)
def test_pbc_prefixes(prefix: str, coarse: str) -> None:
    assert TAXONOMY.resolve(prefix, EIGHT) == coarse
    assert TAXONOMY.resolve(prefix.lower(), EIGHT) == coarse


def test_samples_get_the_canonical_names() -> None:
    labels = ["EOS", "eosinophils", "BNE", None, "martian"]
    found = TAXONOMY.respell([Sample(str(i), label) for i, label in enumerate(labels)])
    assert [s.label for s in found] == [
        "eosinophil", "eosinophil", "band_neutrophil", None, "martian",
    ]  # fmt: skip
    assert [s.name for s in found] == list("01234")


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("NEUTROPHIL", "neutrophil"),
        ("Neutrophils", "neutrophil"),
        (" band-neutrophils ", "band_neutrophil"),
        ("Neutrophil Band", "band_neutrophil"),
        ("Immature Granulocytes", "immature_granulocyte"),
        ("NRBC", "erythroblast"),
        ("normoblasts", "erythroblast"),
        ("Nucleated_Red-Blood cells", "erythroblast"),
        ("Smudge cells", "smudge_cell"),
        ("artifacts", "artefact"),
        ("Atypical lymphocyte", "variant_lymphocyte"),
        ("thrombocytes", "platelet"),
        ("spaceship", None),
        ("", None),
    ],
)
def test_canonical(label: str, name: str | None) -> None:
    assert TAXONOMY.canonical(label) == name


def test_the_eight_are_their_own_names() -> None:
    assert [TAXONOMY.canonical(name) for name in EIGHT] == list(EIGHT)


def test_resolve_walks_up_and_never_down() -> None:
    assert TAXONOMY.resolve("SNE", ["segmented_neutrophil", "neutrophil"]) == "segmented_neutrophil"
    assert TAXONOMY.resolve("neutrophil", ["segmented_neutrophil", "band_neutrophil"]) is None
    assert TAXONOMY.resolve("myeloblast", EIGHT) is None
    assert TAXONOMY.resolve("myeloblast", ["blast"]) == "blast"


def test_spelled_walks_nowhere() -> None:
    assert TAXONOMY.spelled("Neutrophils", ["basophil", "NEUTROPHIL"]) == "NEUTROPHIL"
    assert TAXONOMY.spelled("SNE", ["segmented_neutrophil"]) == "segmented_neutrophil"
    assert TAXONOMY.spelled("SNE", ["neutrophil"]) is None
    assert TAXONOMY.spelled("spaceship", ["neutrophil"]) is None


def test_resolve_answers_in_the_callers_spelling() -> None:
    assert TAXONOMY.resolve("PMY", ["IG", "NEUTROPHIL"]) == "IG"
    assert TAXONOMY.resolve("sne", ["IG", "NEUTROPHIL"]) == "NEUTROPHIL"


def test_an_exact_class_wins_though_unknown() -> None:
    assert TAXONOMY.resolve("spaceship", ["spaceship"]) == "spaceship"
    assert TAXONOMY.resolve("Space-Ships", ["space_ship"]) == "space_ship"
    assert TAXONOMY.resolve("BNE", ["BNE", "band_neutrophil"]) == "BNE"
    assert TAXONOMY.resolve("space-ship", ["Space Ships", "space-ship"]) == "space-ship"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("basophil", "30180-4"),
        ("eosinophil", "26450-7"),
        ("monocyte", "26485-3"),
        ("lymphocyte", "26478-8"),
        ("variant_lymphocyte", "13046-8"),
        ("neutrophil", "26511-6"),
        ("segmented_neutrophil", "26505-8"),
        ("band_neutrophil", "26508-2"),
        ("metamyelocyte", "28541-1"),
        ("myelocyte", "26498-6"),
        ("promyelocyte", "26524-9"),
        ("blast", "26446-5"),
        ("myeloblast", "30445-1"),
        ("lymphoblast", "34922-5"),
        ("plasma_cell", "13047-6"),
        ("smudge_cell", "34992-8"),
        ("other", "26471-3"),
        ("platelet", None),
    ],
)
def test_loinc(name: str, code: str | None) -> None:
    assert TAXONOMY.loinc(name) == code


def test_panel_and_denominator() -> None:
    assert TAXONOMY.panel_loinc == "69738-3"
    outside = {name for name in TAXONOMY.classes if not TAXONOMY.counts(name)}
    assert outside == {"erythroblast", "platelet", "smudge_cell", "artefact"}
    assert TAXONOMY.ancestors("BNE") == ("neutrophil",)


def test_unknown_name_is_an_error() -> None:
    for ask in (TAXONOMY.loinc, TAXONOMY.counts, TAXONOMY.ancestors):
        with pytest.raises(LabelError, match="does not know the class 'spaceship'"):
            ask("spaceship")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("classes: [", "not YAML"),
        ("- a\n- b", "wrong at the file"),
        ("classes: []", "wrong at classes"),
        ("classes: [{name: a, colour: red}]", "colour"),
        ("classes: [{name: a, loinc: nonsense}]", "loinc"),
        ("classes: [{name: a}, {name: a}]", "two classes 'a'"),
        ("classes: [{name: a, synonyms: [X-Y]}, {name: b, synonyms: [x y]}]", "both 'a' and 'b'"),
        ("classes: [{name: a, parent: z}]", "parent 'z'"),
        ("classes: [{name: a, parent: a}]", r"circle: a -> a\."),
        ("classes: [{name: a, parent: b}, {name: b, parent: a}]", r"circle: a -> b -> a\."),
        ("classes: [{name: c, parent: a}, {name: a, parent: b}, {name: b, parent: a}]", "circle"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(LabelError, match=message) as caught:
        Taxonomy.load(path)
    assert "\n" not in str(caught.value)
    assert "mine.yaml" in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="cannot be read"):
        Taxonomy.load(tmp_path / "none.yaml")


def test_dump_loads_back(tmp_path: Path) -> None:
    path = tmp_path / "labels.yaml"
    path.write_text(TAXONOMY.dump(), encoding="utf-8")
    assert Taxonomy.load(path) == TAXONOMY
    assert "Regenstrief" in path.read_text(encoding="utf-8")


def test_own_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("classes: [{name: red cell, synonyms: [RBC], counts_in_differential: false}]")
    mine = Taxonomy.load(path)
    assert mine.canonical("rbcs") == "red cell"
    assert not mine.counts("RBC")
