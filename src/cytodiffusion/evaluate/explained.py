"""Maps of many cells: how much better than others, how often they change the name, how steady.

Two maps of one cell from two seeds correlate as well as their standard errors say they should: with
m the map, s the standard error and v the variance over pixels,

    expected correlation  =  (v(m) - mean s^2) / v(m),       z  =  (m_1 - m_2) / sqrt(s_1^2 + s_2^2)

and z has a mean square near 1 where all scatter is chance. It is below 1 here: the scatter of the trials
that the standard errors are made of is also that between views, which are the same for every seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from cytodiffusion.evaluate.attributes import DIRECTIONS, rank_agreement
from cytodiffusion.evaluate.faithful import areas, gains, interval
from cytodiffusion.evaluate.intervals import binomial_interval, bootstrap, percentiles
from cytodiffusion.evaluate.report import fill

Told = Mapping[str, Any]
OURS = ("support", "change")


def stability(
    first: Float[np.ndarray, "h w"], error: Float[np.ndarray, "h w"],
    second: Float[np.ndarray, "h w"], other_error: Float[np.ndarray, "h w"],
) -> dict[str, float]:  # fmt: skip
    """How alike two maps are, and how alike their standard errors say they should be."""
    noise = np.square(error) + np.square(other_error)
    spread = first.var() + second.var()
    return {
        "correlation": float(np.corrcoef(first.ravel(), second.ravel())[0, 1]),
        "expected": float((spread - noise.mean()) / spread),
        "z_square": float((np.square(first - second) / noise.clip(1e-20)).mean()),
    }


def summarise(cells: Sequence[Told], seed: int) -> dict[str, Any]:
    """All numbers, with 95 % intervals over cells within classes."""
    labels = np.array([cell["label"] for cell in cells])
    stable = {
        name: np.array([cell["stability"][name] for cell in cells])
        for name in ("correlation", "expected", "z_square")
    }
    shown = np.array([cell["shown"] for cell in cells])
    return {
        "cells": len(cells),
        **_areas(cells, labels, seed),
        "flips": {
            name: _share(np.array([cell["flips"][name] for cell in cells]))
            for name in cells[0]["flips"]
        },
        "stability": {name: interval(value, labels, seed) for name, value in stable.items()},
        "shown": interval(shown, labels, seed),
        "attributes": _attributes(cells, seed),
    }


def _areas(cells: Sequence[Told], labels: Int[np.ndarray, " n"], seed: int) -> dict[str, Any]:
    """Mean areas of every ranking, and by how much ours are better, for each reference."""
    means, better = dict[str, Any](), dict[str, Any]()
    for reference, rankings in cells[0]["curves"].items():
        found = {
            name: np.stack([areas(np.array(cell["curves"][reference][name])) for cell in cells])
            for name in rankings
        }
        means[reference] = {
            name: dict(zip(("deletion", "insertion"), value.mean(0).tolist(), strict=True))
            for name, value in found.items()
        }
        better[reference] = {
            ours: {name: gains(found[ours], value, labels, seed)
                   for name, value in found.items() if name not in OURS}
            for ours in OURS
        }  # fmt: skip
    return {"areas": means, "gains": better}


def _share(happened: Bool[np.ndarray, " n"]) -> dict[str, Any]:
    events, n = int(happened.sum()), len(happened)
    return {"mean": events / n, "ci95": list(binomial_interval(events, n))}


def _attributes(cells: Sequence[Told], seed: int) -> dict[str, Any] | None:
    """Agreement with the words of pathologists; None where there are none."""
    told = [cell for cell in cells if cell["attributes"]]
    if not told:
        return None
    labels = np.array([cell["label"] for cell in told])
    ranks = np.array([rank_agreement(cell["attributes"]) for cell in told], dtype=float)
    known = np.isfinite(ranks)
    enriched = [np.mean([m["enrichment"] for m in cell["attributes"]]) for cell in told]
    directions = {
        name: [[m["directions"][name] for m in cell["attributes"] if name in m["directions"]]
               for cell in told]
        for name in DIRECTIONS
    }  # fmt: skip
    pointed = [[m["in_cell"] for m in cell["attributes"]] for cell in told]
    return {
        "cells": len(told),
        "in_cell": _ratio(pointed, labels, seed),
        "enrichment": interval(np.array(enriched), labels, seed),
        "kind": interval(ranks[known], labels[known], seed),
        "directions": {name: _ratio(right, labels, seed) for name, right in directions.items()},
    }


def _ratio(
    right: Sequence[Sequence[bool]], labels: Int[np.ndarray, " n"], seed: int
) -> dict[str, Any]:
    """Share of maps that are right; cells, not maps, are drawn for the interval."""
    hits, maps = (np.array([f(cell) for cell in right], dtype=float) for f in (sum, len))
    if not maps.sum():
        return {"mean": None, "ci95": None, "maps": 0}

    def share(rows: np.ndarray) -> np.ndarray:
        return hits[rows].sum(1) / np.maximum(maps[rows].sum(1), 1)

    drawn = bootstrap(labels, {"share": share}, seed=seed)["share"]
    return {
        "mean": float(hits.sum() / maps.sum()),
        "ci95": percentiles(drawn),
        "maps": int(maps.sum()),
    }


def said(value: Mapping[str, Any], digits: int = 2) -> str:
    """A mean with its interval, for people."""
    if value["mean"] is None:
        return "none"
    text = f"{value['mean']:.{digits}f}"
    if value["ci95"] is None:
        return text
    low, high = value["ci95"]
    return f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def render(title: str, values: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The page as text; `facts` are printed as they are."""
    return fill("explained.html.j2", title=title, values=values, facts=facts, said=said)
