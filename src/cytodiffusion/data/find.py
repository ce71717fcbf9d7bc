"""Where is the cell, and how large is it?

A white cell is the one with a purple nucleus. Purple is judged by optical density (stain.py), where
light and camera cancel: a nucleus holds back green much more than blue, a red cell both nearly alike.

    p       =  d_green - d_blue
    nucleus =  p above its Otsu threshold; lobes close to each other taken together; of such groups
               the one with the most purple, weighed by how near it is to the middle of the frame
    cell    =  rays from the nucleus outwards; each ends where it meets the background

The cell's centre and area are those of the polygon of the rays, cut at `REACH` times their median:
a ray that runs on into a touching neighbour counts for little, and one cell in contact on one side
keeps its size. Where the cytoplasm is as pale as the empty field, the cell is taken too small, but never
smaller than the convex hull of its nucleus: of the two diameters, the nucleus's is the steadier one.

Source: Otsu 1979, IEEE Trans. Syst. Man Cybern. 9, 62-66 (threshold).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.spatial import ConvexHull

from cytodiffusion.data.stain import Stain, background, measure_stain, optical_density

SIDE = 96  # px of the shorter side while looking: what is found does not depend on resolution
PURPLE = 0.25  # smallest mean p of a nucleus less that of the whole frame
SMALLEST, LARGEST = 0.005, 0.7  # area of a nucleus / that of the square frame
JOIN = 0.035  # lobes nearer to each other than twice this share of the frame are one nucleus
CENTRAL = 0.35  # std of the weight of the middle / frame
RIM = 3  # px about a nucleus that are blurred with it
RAYS = 72
REACH = 1.25  # a ray counts as at most this many times the median ray
EDGE = 0.35  # a ray ends where density is below this share of that of stained pixels


@dataclass(frozen=True)
class Found:
    """One white cell. Lengths are in pixels of the image, from its left upper corner."""

    x: float  # centre of the cell
    y: float
    cell: float  # diameter of the disc with the cell's area
    nucleus: float  # the same of the nucleus
    stain: Stain


def find_cell(image: Image.Image) -> Found | None:
    """The most central white cell of an RGB image, or None where nothing looks like a nucleus."""
    pixels = small_pixels(image)
    density = optical_density(pixels, background(pixels))
    nucleus = _nucleus(density[..., 1] - density[..., 2])
    if nucleus is None:
        return None
    x, y, cell = _cell(density.mean(2), nucleus)
    unit = min(image.size) / SIDE
    stain = measure_stain(pixels, nucleus)
    return Found(
        unit * (x + 0.5),
        unit * (y + 0.5),
        unit * cell,
        unit * _diameter(float(nucleus.sum())),
        stain,
    )


def small_pixels(image: Image.Image) -> Float[np.ndarray, "h w 3"]:
    """The image with its shorter side at `SIDE` px, a little smoothed; 0 to 255."""
    width, height = (round(SIDE * length / min(image.size)) for length in image.size)
    small = image.resize((width, height), Image.Resampling.BICUBIC)
    return ndimage.gaussian_filter(np.asarray(small, dtype=np.float64), (1, 1, 0))


def _nucleus(purple: Float[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"] | None:
    """Pixels of the most central nucleus; None where nothing is purple enough, or of a fit size."""
    above = purple > otsu(purple)
    if not above.any() or purple[above].mean() - purple.mean() < PURPLE:
        return None
    kernel = _disc(round(JOIN * SIDE))
    groups, count = ndimage.label(ndimage.binary_dilation(above, kernel))
    groups[~above] = 0
    middle = [(length - 1) / 2 for length in purple.shape]
    y, x = np.ogrid[: purple.shape[0], : purple.shape[1]]
    weight = np.exp(-((y - middle[0]) ** 2 + (x - middle[1]) ** 2) / (2 * (CENTRAL * SIDE) ** 2))
    worth = ndimage.sum_labels(np.where(above, purple, 0) * weight, groups, np.arange(1, count + 1))
    chosen = groups == 1 + int(np.argmax(worth))
    return chosen if SMALLEST < chosen.sum() / SIDE**2 < LARGEST else None


def _cell(
    density: Float[np.ndarray, "h w"], nucleus: Bool[np.ndarray, "h w"]
) -> tuple[float, float, float]:
    """Centre x, centre y and diameter of the cell around a nucleus, px."""
    outside = density[~ndimage.binary_dilation(nucleus, iterations=RIM)]
    stained = outside[outside > otsu(outside)] if len(outside) else outside
    edge = EDGE * np.median(stained) if len(stained) else 0.0
    inside = ndimage.binary_fill_holes(_hull(nucleus) | (density > edge))
    y, x = ndimage.center_of_mass(nucleus)
    ends = _rays(inside, x, y)
    x, y, _ = _polygon(ends)
    x, y, area = _polygon(_rays(inside, x, y))  # once more, from the middle of the cell
    return x, y, _diameter(area)


def _hull(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Every pixel between two of the mask: what lies between lobes is cell, however pale."""
    places = np.argwhere(mask)[:, ::-1]
    if len(places) < 3 or np.linalg.matrix_rank(places - places[0]) < 2:
        return mask  # a dot or a line
    corners = places[ConvexHull(places).vertices]
    canvas = Image.new("1", mask.shape[::-1])
    ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in corners.tolist()], fill=1)
    return np.asarray(canvas) | mask


def _rays(inside: Bool[np.ndarray, "h w"], x: float, y: float) -> Float[np.ndarray, "rays 2"]:
    """Where rays from (x, y) leave what is stained, or the frame; px, x first."""
    angle = np.linspace(0, 2 * np.pi, RAYS, endpoint=False)
    step = np.arange(0, 1.5 * max(inside.shape), 0.5)
    way = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    column, row = (
        np.rint(np.array([x, y]) + step[:, None] * way[:, None]).astype(int).transpose(2, 0, 1)
    )
    height, width = inside.shape
    within = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    still = within & inside[row.clip(0, height - 1), column.clip(0, width - 1)]
    length = step[np.argmin(still, axis=1)]
    length = np.minimum(length, REACH * np.median(length))
    return np.array([x, y]) + length[:, None] * way


def _polygon(corners: Float[np.ndarray, "n 2"]) -> tuple[float, float, float]:
    """Centre x, centre y and area of a polygon (shoelace formula)."""
    x, y = corners.T
    nx, ny = np.roll(corners, -1, axis=0).T
    cross = x * ny - nx * y
    area = cross.sum() / 2
    if area <= 0:
        return float(x.mean()), float(y.mean()), 0.0
    return (
        float(((x + nx) * cross).sum() / (6 * area)),
        float(((y + ny) * cross).sum() / (6 * area)),
        float(area),
    )


def otsu(values: np.ndarray) -> float:
    """Threshold that leaves the least variance within the two parts (256 bins)."""
    counts, edges = np.histogram(values, 256)
    middles = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)[:-1]
    above = counts.sum() - below
    sums = np.cumsum(counts * middles)
    mean_below = sums[:-1] / below.clip(min=1)
    mean_above = (sums[-1] - sums[:-1]) / above.clip(min=1)
    return float(edges[1:-1][np.argmax(below * above * (mean_below - mean_above) ** 2)])


def _diameter(area: float) -> float:
    return 2 * float(np.sqrt(area / np.pi))


def _disc(radius: int) -> Bool[np.ndarray, "k k"]:
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return x**2 + y**2 <= radius**2
