"""Duplicates that were put there on purpose, and those of a real set."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from cytodiffusion.data.check import candidates, check, correlation, dhash
from cytodiffusion.data.readers import read_dataset
from cytodiffusion.data.sample import HeldBytes, Sample

DATA = Path(os.environ.get("CYTODIFFUSION_DATA") or Path(__file__).parents[2] / "shared" / "data")
PBC = DATA / "pbc"
real = pytest.mark.skipif(
    not (PBC / "splits.csv").exists(),
    reason=f"no real cells at {DATA}; set CYTODIFFUSION_DATA to the folder that holds pbc/",
)


def picture(seed: int, size: int = 96) -> Image.Image:
    """A smooth random picture, unlike those of other seeds."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)


def stored(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sample(name: str, data: bytes, label: str | None = "a", split: str | None = None) -> Sample:
    return Sample(name, label, split=split, source=HeldBytes(data))


def test_a_clean_set_has_nothing_to_report() -> None:
    report = check([sample(f"{i}", stored(picture(i))) for i in range(12)])
    assert (report.unreadable, report.exact, report.near, report.blank) == ([], [], [], [])
    assert (report.tiny, report.unlabelled, report.synthetic) == ({}, 0, [])
    assert report.duplicate_groups() == []
    assert report.sizes == {"96 x 96": 12}
    assert report.modes == {"RGB": 12}
    assert report.classes == {"a": 12}


def test_the_same_bytes_and_the_same_pixels_are_exact() -> None:
    one = picture(1)
    report = check(
        [
            sample("png", stored(one)),
            sample("copy", stored(one)),
            sample("bmp", stored(one, "BMP"), label="b"),
            sample("else", stored(picture(2))),
        ]
    )
    assert report.exact == [["bmp", "copy", "png"]]
    assert report.two_labels == [["bmp", "copy", "png"]]
    assert report.near == []


def shifted(by: int) -> tuple[Image.Image, Image.Image]:
    wide = picture(1, 200)
    return wide.crop((0, 0, 180, 180)), wide.crop((by, 0, 180 + by, 180))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (picture(1), stored(picture(1), "JPEG", quality=60)),
        (picture(1), stored(picture(1), "WEBP", quality=60)),
        (picture(1), stored(picture(1).resize((60, 60)))),
        (picture(1), stored(picture(1).resize((200, 200)))),
        (picture(1), stored(ImageEnhance.Brightness(picture(1)).enhance(0.95))),
        (shifted(3)[0], stored(shifted(3)[1])),
    ],
    ids=["jpeg", "webp", "smaller", "larger", "darker", "shifted"],
)
def test_a_changed_copy_is_near(one: Image.Image, other: bytes) -> None:
    samples = [sample("one", stored(one)), sample("two", other)]
    samples += [sample(f"{i}", stored(picture(i + 10))) for i in range(20)]
    report = check(samples)
    assert [pair.names for pair in report.near] == [("one", "two")]
    assert report.exact == []
    assert report.duplicate_groups() == [["one", "two"]]


def test_near_copies_of_exact_copies_form_one_group() -> None:
    one = stored(picture(1))
    near = stored(picture(1), "JPEG", quality=70)
    report = check([sample("x", one), sample("y", one), sample("z", near), sample("w", near)])
    assert report.duplicate_groups() == [["w", "x", "y", "z"]]
    assert len(report.near) == 1


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_turned_and_mirrored_copies_are_copies(turns: int, mirror: bool) -> None:
    """As augmented sets have them; the network sees every cell in all eight poses."""
    pixels = np.asarray(picture(1))
    turned = np.rot90(pixels[:, ::-1] if mirror else pixels, turns)
    images = {"whole": picture(1), "turned": Image.fromarray(turned.copy())}
    images |= {f"other {i}": picture(i) for i in (2, 3, 4)}
    report = check([sample(name, stored(image)) for name, image in images.items()])
    assert report.duplicate_groups() == [["turned", "whole"]]


def test_copies_in_different_splits_are_named() -> None:
    one, near = stored(picture(1)), stored(picture(1), "JPEG", quality=70)
    report = check([sample("x", one, split="train"), sample("y", near, split="test")])
    assert report.across_splits == [["x", "y"]]
    report = check([sample("x", one, split="test"), sample("y", near, split="test")])
    assert report.across_splits == []


def test_blank_pictures_are_named_and_are_no_copies_of_each_other() -> None:
    greys = [Image.new("L", (40, 40), shade) for shade in (0, 128, 255)]
    report = check([sample(f"{i}", stored(grey)) for i, grey in enumerate(greys)])
    assert report.blank == ["0", "1", "2"]
    assert report.near == []
    assert report.modes == {"L": 3}


def test_faint_pictures_are_blank_however_alike() -> None:
    faint = np.tile(np.arange(40, dtype=np.uint8) // 10, (40, 1))
    other = faint.copy()
    other[0, 0] = 1
    report = check(
        [sample(f"{i}", stored(Image.fromarray(x))) for i, x in enumerate((faint, other))]
    )
    assert report.blank == ["0", "1"]
    assert report.near == []


def test_the_same_hash_is_no_proof() -> None:
    ramp = np.linspace(0, 1, 96)
    curves = [np.tile(255 * ramp**power, (96, 1)).astype(np.uint8) for power in (0.5, 1, 3)]
    samples = [sample(f"{i}", stored(Image.fromarray(curve))) for i, curve in enumerate(curves)]
    assert dhash(Image.fromarray(curves[0])) == dhash(Image.fromarray(curves[1])) == 2**64 - 1
    assert {name for pair in check(samples).near for name in pair.names} <= {"0", "1"}
    assert len(check(samples, min_correlation=0).near) == 3


def test_unreadable_tiny_and_unlabelled() -> None:
    whole = stored(picture(1), "JPEG", quality=90)
    samples = [
        sample("cut", whole[:400]),
        sample("empty", b""),
        sample("text", b"hello", label=None),
        sample("good", stored(picture(2)), label="b"),
        Sample("missing", "a"),
    ]
    report = check(samples)
    assert [name for name, _ in report.unreadable] == ["cut", "empty", "missing", "text"]
    assert all(reason for _, reason in report.unreadable)
    assert report.tiny == {"a": 3, "b": 1}
    assert check(samples, tiny=2).tiny == {"b": 1}
    assert report.unlabelled == 1


def test_order_changes_nothing() -> None:
    samples = [sample(f"{i}", stored(picture(i % 4), "JPEG", quality=90 - i)) for i in range(12)]
    assert check(samples).as_dict() == check(samples[::-1]).as_dict()


def test_report_is_plain() -> None:
    one = stored(picture(1))
    report = check([sample("x", one), sample("y", one, "b"), sample("z", b"")])
    again = json.loads(json.dumps(report.as_dict()))
    assert again["exact_duplicates"] == [["x", "y"]]
    assert again["two_labels"] == [{"x": "a", "y": "b"}]
    assert again["unreadable"] == [{"name": "z", "reason": "the file is empty"}]
    text = "\n".join(report.lines())
    assert "one image under two labels: 1\n  x (a) = y (b)" in text
    assert "near duplicates: none" in text


def test_progress_counts() -> None:
    told: list[int] = []
    check([sample(f"{i}", stored(picture(i))) for i in range(3)], progress=told.append)
    assert told == [1, 2, 3]


def test_dhash_of_ramps() -> None:
    ramp = np.tile(np.arange(90, dtype=np.uint8) * 2, (80, 1))
    assert dhash(Image.fromarray(ramp)) == 2**64 - 1
    assert dhash(Image.fromarray(ramp[:, ::-1])) == 0
    ramp[:10] = 0  # the first row of patches is flat
    assert dhash(Image.fromarray(ramp)) == 2**56 - 1


def test_candidates_against_every_pair() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**10, 300, dtype=np.uint64)
    found = {
        (int(i), int(j)): int(bits)
        for left, right, distances in candidates(hashes, hashes, 2, block=64, batch=100)
        for i, j, bits in zip(left, right, distances, strict=True)
    }
    expected = {
        (i, j): bits
        for i in range(300)
        for j in range(i + 1, 300)
        if (bits := (int(hashes[i]) ^ int(hashes[j])).bit_count()) <= 2
    }
    assert found == expected


def test_correlation_is_pearsons_at_the_best_shift() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 256, (2, 5, 32, 32)).astype(np.uint8)
    by_hand = [
        max(
            np.corrcoef(a[2:-2, 2:-2].ravel(), b[y : y + 28, x : x + 28].ravel())[0, 1]
            for y in range(5)
            for x in range(5)
        )
        for a, b in zip(one, other, strict=True)
    ]
    assert correlation(one, other) == pytest.approx(by_hand, abs=1e-5)
    assert correlation(one, np.roll(one, (2, -1), (1, 2))) == pytest.approx(1, abs=1e-5)
    assert correlation(np.zeros_like(one), one) == pytest.approx(0, abs=1e-5)


@real
def test_the_copies_of_pbc() -> None:
    """17 pairs of identical files, one cell cut out twice, and nothing else in any of eight poses."""
    report = check(read_dataset(PBC, splits=PBC / "splits.csv"))
    assert (report.images, report.unreadable) == (14140, [])
    assert len(report.exact) == 17
    assert {len(names) for names in report.exact} == {2}
    assert report.two_labels == [["eosinophil/EO_225902.webp", "neutrophil/BNE_191112.webp"]]
    names = ("eosinophil/EO_464387.webp", "eosinophil/EO_800344.webp")
    assert [pair.names for pair in report.near] == [names]
    assert report.near[0].correlation > 0.99
    assert report.across_splits == [list(names)]  # one in train, one in test
