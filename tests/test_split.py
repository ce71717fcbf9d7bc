"""Splits with a known answer: proportions, groups on one side, and what a small class gets."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import pytest
from helpers import cli, disc
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from cytodiffusion.data.readers import read_dataset
from cytodiffusion.data.sample import Sample, png
from cytodiffusion.data.split import Row, connected, read_split, split, write_split
from cytodiffusion.errors import DataError, OutputError, SettingsError


def cells(counts: dict[str, int]) -> list[Sample]:
    return [Sample(f"{label}/{i:04}.png", label) for label, n in counts.items() for i in range(n)]


def sides(result: object, value: dict[str, str]) -> dict[str, set[str]]:
    """Which splits each group is in."""
    found: dict[str, set[str]] = {}
    for row in result:  # type: ignore[attr-defined]
        found.setdefault(value[row.name], set()).add(row.split)
    return found


def test_each_class_is_dealt_in_proportion() -> None:
    result = split(cells({"a": 1000, "b": 50, "c": 10}), seed=1)
    counts = Counter((row.label, row.split) for row in result)
    assert [counts["a", s] for s in ("train", "val", "test")] == [800, 100, 100]
    assert [counts["b", s] for s in ("train", "val", "test")] == [40, 5, 5]
    assert [counts["c", s] for s in ("train", "val", "test")] == [8, 1, 1]
    assert result.grouped_by is None


def test_order_of_the_listing_changes_nothing_and_the_seed_does() -> None:
    samples = cells({"a": 60, "b": 40})
    mixed = random.Random(0).sample(samples, len(samples))
    assert split(samples, seed=3).rows == split(mixed, seed=3).rows
    assert split(samples, seed=3).rows != split(samples, seed=4).rows


def test_the_first_images_are_not_favoured() -> None:
    rows = split(cells({"a": 1000}), seed=0).rows
    train = [i for i, row in enumerate(rows) if row.split == "train"]
    assert abs(sum(train) / len(train) - 499.5) < 30  # five standard errors


@limits(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 12), st.sampled_from("ab")), min_size=1, max_size=80))
def test_a_patient_is_on_one_side(drawn: list[tuple[int, str]]) -> None:
    samples = [Sample(f"{i}", label, patient=f"p{who}") for i, (who, label) in enumerate(drawn)]
    result = split(samples)
    assert len(result) == len(samples)
    patients = {sample.name: str(sample.patient) for sample in samples}
    assert all(len(found) == 1 for found in sides(result, patients).values())
    assert result.grouped_by == "patient"


def test_many_patients_still_give_the_fractions() -> None:
    rng = random.Random(0)
    samples = [Sample(f"{i:05}", rng.choice("abc"), patient=f"p{i // 20}") for i in range(4000)]
    counts = Counter(row.split for row in split(samples))
    assert abs(counts["train"] / 4000 - 0.8) < 0.02
    assert abs(counts["val"] / 4000 - 0.1) < 0.02


def test_slides_of_images_without_a_patient_stay_together() -> None:
    """Slides may be numbered anew for each patient: those of named patients tie nothing."""
    named = [Sample(f"p{i}", "a", patient=f"p{i % 10}", slide="1") for i in range(40)]
    bare = [Sample(f"s{i}", "a", slide=f"s{i % 12}") for i in range(60)]
    lone = [Sample("x", "a")]
    result = split([*named, *bare, *lone])
    assert result.grouped_by == "patient and slide"
    sides = {row.name: row.split for row in result}
    for group in ("patient", "slide"):
        for value in {getattr(s, group) for s in bare + named} - {None, "1"}:
            assert len({sides[s.name] for s in bare + named if getattr(s, group) == value}) == 1
    assert set(sides.values()) == {"train", "val", "test"}
    assert "1 images name no patient or slide and are dealt one by one." in result.notes


def test_patient_wins_over_slide() -> None:
    samples = [Sample(f"{i}", "a", patient=f"p{i % 7}", slide=f"s{i % 3}") for i in range(70)]
    assert split(samples).grouped_by == "patient"
    by_slide = split(samples, group="slide")
    assert by_slide.grouped_by == "slide"
    slides = {sample.name: str(sample.slide) for sample in samples}
    assert all(len(found) == 1 for found in sides(by_slide, slides).values())
    assert split([Sample("1", "a", slide="s")]).grouped_by == "slide"
    assert split(samples, group=None).grouped_by is None


def test_copies_stay_together_through_any_chain() -> None:
    samples = cells({"a": 40, "b": 40})
    names = [sample.name for sample in samples]
    chain = [names[0:2], names[1:3], [names[2], names[50]], ["not/here.png", names[4]]]
    for seed in range(20):
        side = {row.name: row.split for row in split(samples, seed=seed, duplicates=chain)}
        assert len({side[names[i]] for i in (0, 1, 2, 50)}) == 1


def test_copies_join_two_patients() -> None:
    samples = [Sample(f"{i:03}", "a", patient=f"p{i // 5}") for i in range(100)]
    for seed in range(10):
        result = split(samples, seed=seed, duplicates=[["000", "099"]])
        side = {row.name: row.split for row in result}
        assert len({side[f"{i:03}"] for i in (0, 4, 95, 99)}) == 1


def test_a_small_class_is_a_note() -> None:
    result = split(cells({"many": 100, "rare": 2}))
    note = next(note for note in result.notes if "'rare'" in note)
    assert "2 images in 2 independent groups" in note
    assert "none in val, test" in note
    assert not any("'many'" in note for note in result.notes)


def test_images_without_a_patient_are_a_note() -> None:
    samples = [Sample("1", "a", patient="p"), Sample("2", "a"), Sample("3", "a")]
    assert any("2 images name no patient" in note for note in split(samples).notes)


@pytest.mark.parametrize(
    "fractions", [{}, {"train": 1.2}, {"train": 0.5, "test": 0.4}, {"train": 1.0, "test": 0.0}]
)
def test_bad_fractions(fractions: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match="add up to 1"):
        split(cells({"a": 5}), fractions)


def test_bad_samples() -> None:
    with pytest.raises(DataError, match="no images"):
        split([])
    with pytest.raises(DataError, match="1 images have no label, first: 'x'"):
        split([Sample("x", None)])
    with pytest.raises(DataError, match="listed 2 times"):
        split([Sample("x", "a"), Sample("x", "a")])
    with pytest.raises(DataError, match="no image names its patient"):
        split(cells({"a": 5}), group="patient")


def test_connected() -> None:
    assert connected("abcdef", ["ab", "cd", "bd"]) == [["a", "b", "c", "d"], ["e"], ["f"]]


def test_a_file_comes_back(tmp_path: Path) -> None:
    rows = [*split(cells({"a": 9})).rows, Row('odd, "name"\u00e9.png', "b", "test")]
    path = tmp_path / "new" / "splits.csv"
    write_split(rows, path)
    assert path.read_text(encoding="utf-8").startswith("path,label,split\na/0000.png,a,")
    assert read_split(path) == rows
    assert [file.name for file in path.parent.iterdir()] == ["splits.csv"]


@pytest.mark.parametrize(
    "text",
    [
        "path;label;split\na/0.png;a;train\na/1.png;a;val\nb/2.png;b;test\n",
        "Path,LABEL,Split\na/0.png,a,Train\na/1.png,a,VALID\nb/2.png,b,Test\n",
        "path, label, split\na/0.png, a, train\na/1.png , a, validation\nb/2.png,b , test \n",
        "\ufeffsplit\tpath\tlabel\tnote\r\ntrain\ta/0.png\ta\t\r\nVal\ta\\1.png\ta\tx\r\ntest\t./b/2.png\tb\t\r\n",
        'path,label,split\n"a/0.png","a","train"\n"a/1.png","a","valid"\n"b/2.png","b","test"',
    ],
    ids=["semicolons", "capitals", "spaces", "tabs", "quotes"],
)
def test_files_of_other_programs(tmp_path: Path, text: str) -> None:
    path = tmp_path / "s.csv"
    path.write_bytes(text.encode())
    assert read_split(path) == [
        Row("a/0.png", "a", "train"), Row("a/1.png", "a", "val"), Row("b/2.png", "b", "test"),
    ]  # fmt: skip


def test_a_word_of_ones_own_stays(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text("path,label,split\n0.png,a,Fold 2\n")
    assert read_split(path) == [Row("0.png", "a", "Fold 2")]


def test_what_data_split_writes_is_found_again(tmp_path: Path) -> None:
    """Names with a backslash, with bytes that are no text, and with what divides columns."""
    odd = [b"back\\slash.png", b"caf\xe9.png", b'a, "b"; c\td.png', "größe.png".encode()]
    odd += [b" blanks .png"]
    for folder, first in (("neutrophil", 0), ("lymphocyte", 20)):
        (tmp_path / "in" / folder).mkdir(parents=True)
        for i in range(first, first + 12):
            name = os.fsdecode(odd[i - first]) if i - first < len(odd) else f"{i}.png"
            (tmp_path / "in" / folder / name).write_bytes(png(disc(folder, i)))
    out = tmp_path / "s.csv"
    assert cli("data", "split", tmp_path / "in", "-o", out).code == 0
    there = {sample.name: sample for sample in read_dataset(tmp_path / "in")}
    again = read_dataset(tmp_path / "in", splits=out)
    assert len(again) == 24
    assert {sample.name for sample in again} == set(there)
    for sample in again:
        assert sample.read() == there[sample.name].read()
        assert sample.label == there[sample.name].label
    assert {sample.split for sample in again} == {"train", "val", "test"}
    assert cli("data", "split", tmp_path / "in", "-o", out).code == 0  # it says the same


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "splits.csv"
    write_split([Row("x", "a", "train")], path)
    old = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        write_split([Row("y", "a", "train")], path)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["splits.csv"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no images"),
        ("a;b\n1;2\n", "lacks the columns label, path, split"),
        ("path,label\nx,a\n", "lacks the columns split"),
        ("path,label,split\n", "lists no images"),
        ("path,label,split\nx,a\n", "Line 2"),
        ("path,label,split\nx,a,train\n,a,test\n", "Line 3"),
        ("path,label,split\nx,a,train\n./x,a,test\n", "'x' twice"),
    ],
)
def test_bad_split_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "splits.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_split(path)


def test_unreadable_split_files(tmp_path: Path) -> None:
    (tmp_path / "bytes.csv").write_bytes(b"path,label,split\n\xff\xfe,a,b\n")
    for name in ("none.csv", "bytes.csv"):
        with pytest.raises(DataError, match="cannot be read"):
            read_split(tmp_path / name)
