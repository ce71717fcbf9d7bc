"""What is wrong with a data set, before anyone trains on it.

Exact duplicates have the same bytes, or the same pixels in different files. Near duplicates are one
picture stored twice with other compression, size or brightness, turned by quarters or mirrored, or cut
out with a shift of a few percent. They are found in two steps, for each of the eight poses:

    candidates  the 64-bit dHash (is each of 8 x 8 grey patches brighter than the one left of
                it?) differs in at most `max_bits` bits
    proof       the correlation of the 32 x 32 grey thumbnails, at the best shift of up to 2 of
                their pixels, is at least `min_correlation`, for turned ones TURNED

The hash alone would pair thousands of different cells. Among the 14,140 cells of PBC the proof
leaves one pair, the same cell cut out with a shift, at 0.995; the next candidate that is not turned
reaches 0.88.

Source of dHash: N. Krawetz 2013, Kind of Like That, hackerfactor.com.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from PIL import Image

from cytodiffusion.data.images import decode
from cytodiffusion.data.mark import read_mark
from cytodiffusion.data.sample import Sample
from cytodiffusion.data.split import connected
from cytodiffusion.errors import UnreadableImage

MAX_BITS = 12  # of 64: re-encoding and resizing change up to 6, a shift of 2 % up to 12
MIN_CORRELATION = 0.97  # re-encoded and resized copies reach 0.993
TURNED = 0.985  # of turned copies at least: small round cells reach 0.979 (docs/log.md 57)
TINY = 10  # images: a class with fewer cannot be split and measured
SIDE = 32  # px of a thumbnail
SHIFT = 2  # px of a thumbnail
BLANK = 2.0  # grey levels: a thumbnail that varies less shows nothing


@dataclass(frozen=True)
class Look:
    """What is noted of one image; `reason` says why it could not be read."""

    sample: Sample
    reason: str | None = None
    pixel_digest: str = ""  # sha256 of size and RGB pixels
    size: tuple[int, int] | None = None  # width, height in px
    mode: str = ""  # as stored: L, RGB, RGBA, P, ...
    thumbnail: np.ndarray | None = None  # uint8, (SIDE, SIDE), grey
    bits: int = 0  # dHash
    synthetic: bool = False  # says so itself (mark.py)


@dataclass(frozen=True)
class Pair:
    """Two images that are nearly the same."""

    names: tuple[str, str]
    labels: tuple[str | None, str | None]
    correlation: float  # of the thumbnails at the best shift; 1 is the same picture
    bits: int  # that differ in the hash; 0 is the same picture


@dataclass(frozen=True)
class Report:
    """What was found. All lists are sorted by name, and empty is good."""

    images: int
    unreadable: list[tuple[str, str]]  # name, reason
    exact: list[list[str]]  # names with the same bytes or pixels
    near: list[Pair]
    two_labels: list[list[str]]  # the exact groups whose labels differ
    across_splits: list[list[str]]  # copies, exact or near, that are in different splits
    blank: list[str]  # images that show nothing
    synthetic: list[str]  # images that are marked as such: good for training, not for testing
    classes: dict[str, int]
    tiny: dict[str, int]  # classes below the threshold
    unlabelled: int
    sizes: dict[str, int]  # 'width x height' -> images, most frequent first
    modes: dict[str, int]
    labels: dict[str, str | None]  # of the images named above

    def duplicate_groups(self) -> list[list[str]]:
        """Names that must stay on one side of a split: copies of each other, through any chain."""
        ties: list[Sequence[str]] = [*self.exact, *(pair.names for pair in self.near)]
        names = sorted({name for tie in ties for name in tie})
        return connected(names, ties)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "images": self.images,
            "unreadable": [{"name": name, "reason": why} for name, why in self.unreadable],
            "exact_duplicates": self.exact,
            "near_duplicates": [
                {"names": list(pair.names), "correlation": round(pair.correlation, 4)}
                for pair in self.near
            ],
            "two_labels": [
                {name: self.labels[name] for name in names} for names in self.two_labels
            ],
            "across_splits": self.across_splits,
            "blank": self.blank,
            "synthetic": self.synthetic,
            "classes": self.classes,
            "tiny_classes": self.tiny,
            "unlabelled": self.unlabelled,
            "sizes": self.sizes,
            "modes": self.modes,
        }

    def lines(self) -> list[str]:
        """The report as plain text."""
        return [
            f"{self.images} images in {len(self.classes)} classes, {self.unlabelled} unlabelled",
            *(f"  {label}: {count}" for label, count in self.classes.items()),
            *_section("unreadable", [f"{name}: {why}" for name, why in self.unreadable]),
            *_section("exact duplicates", [self._named(names) for names in self.exact]),
            *_section("near duplicates", [self._named(pair.names) for pair in self.near]),
            *_section("one image under two labels", [self._named(n) for n in self.two_labels]),
            *_section("copies in different splits", [" = ".join(n) for n in self.across_splits]),
            *_section("images that show nothing", self.blank),
            *_section("synthetic images, not to be tested on", self.synthetic),
            *_section("tiny classes", [f"{label}: {n}" for label, n in self.tiny.items()]),
            f"sizes: {_counts(self.sizes)}",
            f"modes: {_counts(self.modes)}",
        ]

    def _named(self, names: Sequence[str]) -> str:
        return " = ".join(f"{name} ({self.labels[name] or 'no label'})" for name in names)


def _section(title: str, entries: Sequence[str]) -> list[str]:
    return [f"{title}: {len(entries) or 'none'}", *(f"  {entry}" for entry in entries)]


def _counts(counts: dict[str, int], shown: int = 8) -> str:
    text = ", ".join(f"{name} ({count})" for name, count in list(counts.items())[:shown])
    rest = len(counts) - shown
    return (text or "not looked at") + (f" and {rest} more" if rest > 0 else "")


def check(
    samples: Iterable[Sample],
    *,
    tiny: int = TINY,
    max_bits: int = MAX_BITS,
    min_correlation: float = MIN_CORRELATION,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Look at every image once and report. `progress` is told how many are done."""
    looks = []
    for look in examine(samples):
        looks.append(look)
        if progress is not None:
            progress(len(looks))
    return summarise(looks, tiny=tiny, max_bits=max_bits, min_correlation=min_correlation)


def examine(samples: Iterable[Sample]) -> Iterator[Look]:
    """Read and note the images one by one."""
    for sample in samples:
        try:
            yield _look(sample, sample.read())
        except UnreadableImage as error:
            yield Look(sample, reason=str(error))


def _look(sample: Sample, data: bytes) -> Look:
    image = decode(data)
    with Image.open(io.BytesIO(data)) as stored:
        mode = stored.mode
    grey = image.convert("L")
    thumbnail = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX))
    size = f"{image.width} {image.height} ".encode()
    return Look(
        sample,
        synthetic=read_mark(data) is not None,
        pixel_digest=_sha256(size + image.tobytes()),
        size=image.size,
        mode=mode,
        thumbnail=thumbnail,
        bits=dhash(grey),
    )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def dhash(grey: Image.Image) -> int:
    """64 bits, row by row: is a patch of the 9 x 8 means brighter than the one left of it?"""
    patches = np.asarray(grey.resize((9, 8), Image.Resampling.BOX))
    bits = np.packbits(patches[:, 1:] > patches[:, :-1])
    return int.from_bytes(bits.tobytes(), "big")


def summarise(
    looks: Sequence[Look],
    *,
    tiny: int = TINY,
    max_bits: int = MAX_BITS,
    min_correlation: float = MIN_CORRELATION,
) -> Report:
    """The report on images that were looked at."""
    read = sorted((look for look in looks if look.reason is None), key=lambda x: x.sample.name)
    exact = _same([(look.pixel_digest, look.sample.name) for look in read])
    near = _near(read, max_bits, min_correlation)
    labels = {look.sample.name: look.sample.label for look in looks}
    splits = {look.sample.name: look.sample.split for look in looks}
    copies = connected(sorted(labels), [*exact, *(pair.names for pair in near)])
    classes = Counter(look.sample.label for look in looks if look.sample.label is not None)
    return Report(
        images=len(looks),
        unreadable=sorted((x.sample.name, x.reason) for x in looks if x.reason is not None),
        exact=exact,
        near=near,
        two_labels=[names for names in exact if len({labels[name] for name in names}) > 1],
        across_splits=[names for names in copies if len({splits[name] for name in names}) > 1],
        blank=[look.sample.name for look in read if _is_blank(look)],
        synthetic=[look.sample.name for look in read if look.synthetic],
        classes=dict(sorted(classes.items())),
        tiny={label: count for label, count in sorted(classes.items()) if count < tiny},
        unlabelled=sum(look.sample.label is None for look in looks),
        sizes=_histogram(f"{x.size[0]} x {x.size[1]}" for x in read if x.size is not None),
        modes=_histogram(look.mode for look in read if look.mode),
        labels=labels,
    )


def _same(digests: Iterable[tuple[str, str]]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for digest, name in digests:
        groups.setdefault(digest, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _histogram(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _is_blank(look: Look) -> bool:
    return look.thumbnail is not None and float(look.thumbnail.std()) < BLANK


def _near(read: Sequence[Look], max_bits: int, min_correlation: float) -> list[Pair]:
    """Pairs of pictures that nearly agree. Exact copies count once, blank pictures not at all."""
    first = {x.pixel_digest: x for x in reversed(read) if not _is_blank(x)}
    looks = sorted(first.values(), key=lambda look: look.sample.name)
    if len(looks) < 2:
        return []
    hashes = np.array([look.bits for look in looks], dtype=np.uint64)
    thumbnails = np.stack([look.thumbnail for look in looks if look.thumbnail is not None])
    pairs = dict[tuple[str, str], Pair]()
    for turns, mirror in product(range(4), (False, True)):
        turned = np.rot90(thumbnails[:, :, ::-1] if mirror else thumbnails, turns, (1, 2))
        others = hashes
        if turns or mirror:
            others = np.array([dhash(Image.fromarray(t)) for t in turned], dtype=np.uint64)
        for left, right, bits in candidates(hashes, others, max_bits):
            similar = correlation(thumbnails[left], turned[right])
            least = max(min_correlation, TURNED) if turns or mirror else min_correlation
            for i in np.flatnonzero(similar >= least):
                a, b = looks[left[i]].sample, looks[right[i]].sample
                pair = Pair((a.name, b.name), (a.label, b.label), float(similar[i]), int(bits[i]))
                known = pairs.get(pair.names, pair)
                pairs[pair.names] = max(known, pair, key=lambda each: each.correlation)
    return [pairs[names] for names in sorted(pairs)]


def candidates(
    hashes: np.ndarray, others: np.ndarray, max_bits: int, block: int = 256, batch: int = 4096
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """All pairs i < j for which hash i and other hash j differ in at most max_bits, as (i, j, bits).

    Every pair is compared: n^2 / 2 popcounts, about a second for 20,000 images, in little memory.
    """
    for start in range(0, len(hashes), block):
        rows = hashes[start : start + block]
        bits = np.bitwise_count(rows[:, None] ^ others[None, start:])
        left, right = np.nonzero(bits <= max_bits)
        keep = left < right
        left, right = left[keep], right[keep]
        for at in range(0, len(left), batch):
            i, j = left[at : at + batch], right[at : at + batch]
            yield i + start, j + start, bits[i, j]


def correlation(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Pearson correlation of thumbnails (n SIDE SIDE), pair by pair, at the best shift; -1 to 1."""
    middle = _normal(left[:, SHIFT:-SHIFT, SHIFT:-SHIFT])
    window = SIDE - 2 * SHIFT
    best = np.full(len(left), -1.0)
    for y in range(2 * SHIFT + 1):
        for x in range(2 * SHIFT + 1):
            moved = _normal(right[:, y : y + window, x : x + window])
            best = np.maximum(best, (middle * moved).sum((1, 2)))
    return best


def _normal(patch: np.ndarray) -> np.ndarray:
    """Mean 0 and length 1 for each patch; a flat patch becomes 0, which correlates with nothing."""
    patch = patch.astype(np.float32)
    patch = patch - patch.mean((1, 2), keepdims=True)
    length = np.sqrt((patch**2).sum((1, 2), keepdims=True))
    normal: np.ndarray = patch / np.maximum(length, 1e-6)
    return normal
