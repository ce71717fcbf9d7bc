"""Pictures of a set of answers, as SVG text to put into a page.

The reliability diagram asks whether "90 % sure" is right nine times in ten; the risk-coverage
curve, how many mistakes are left when only the most certain cells are answered; the psychometric
curves, how accuracy grows with the confidence of a model and of people.

The colours are names (`currentColor`, `var(--accent)`) that the page gives a value, so that one
picture serves light, dark and paper. The text is text. The same numbers give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cytodiffusion.evaluate.answers import Judged
from cytodiffusion.evaluate.metrics import (
    Probabilities,
    ReliabilityBin,
    Truth,
    reliability,
    risk_coverage,
)
from cytodiffusion.evaluate.psychometric import GRID, Analysis

# What matplotlib draws with, and what the page is told instead.
INK, FAINT, ACCENT, WARM, GOLD = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
NAMES = {INK: "currentColor", FAINT: "var(--line)", ACCENT: "var(--accent)",
         WARM: "var(--warm)", GOLD: "var(--gold)"}  # fmt: skip
COLOURS, DASHES, MARKERS = (ACCENT, WARM, GOLD, INK), ("solid", "dashed", "dotted"), "osD^"
POINTS = 400  # of a curve: more cannot be seen


def reliability_diagram(truth: Truth, probabilities: Probabilities) -> str:
    """Share right against confidence, with exact 95 % intervals; below it, cells in each bin."""
    bins = reliability(truth, probabilities)
    figure = Figure(figsize=(4.4, 4.6))
    top, bottom = figure.subplots(2, height_ratios=(4, 1), sharex=True)
    _diagonal(top, bins)
    widths = [0.9 * (b.high - b.low) for b in bins]
    bottom.bar([(b.low + b.high) / 2 for b in bins], [b.n for b in bins], widths, color=ACCENT)
    bottom.set(xlabel="confidence", ylabel="cells", xlim=(0, 1.02), yscale="log")
    bottom.set_ylim(0.5, None)
    return _svg(figure, "reliability")


def _diagonal(axes: Axes, bins: list[ReliabilityBin]) -> None:
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (4, 4)), alpha=0.5)
    _points(axes, bins, ACCENT, "o")
    axes.set(ylabel="share right", ylim=(-0.02, 1.02))


def _points(axes: Axes, bins: list[ReliabilityBin], colour: str, marker: str) -> None:
    confidence, share = [b.confidence for b in bins], [b.accuracy for b in bins]
    low = [max(0.0, b.accuracy - b.accuracy_ci95[0]) for b in bins]
    high = [max(0.0, b.accuracy_ci95[1] - b.accuracy) for b in bins]
    axes.errorbar(confidence, share, [low, high], fmt="none", ecolor=colour, alpha=0.5)
    axes.plot(confidence, share, color=colour, marker=marker, markersize=5, linestyle="none")


def risk_coverage_curve(truth: Truth, probabilities: Probabilities) -> str:
    """Share wrong among the most certain cells, against the share of cells that are answered."""
    answered, wrong = risk_coverage(truth, probabilities)
    kept = np.unique(np.linspace(0, len(answered) - 1, POINTS).round().astype(int))
    figure = Figure(figsize=(4.4, 4.6))
    axes = figure.subplots()
    axes.plot(answered[kept], 100 * wrong[kept], color=ACCENT, linewidth=2)
    axes.fill_between(answered[kept], 100 * wrong[kept], color=ACCENT, alpha=0.15, linewidth=0)
    axes.set(xlabel="share of cells answered", ylabel="wrong among them, %", xlim=(0, 1.02))
    axes.set_ylim(0, max(1.0, 110 * float(wrong.max())))
    return _svg(figure, "risk")


def psychometric_curves(
    shown: Sequence[tuple[Judged, Analysis | None]], *, first: int = 0, name: str = "psychometric"
) -> str:
    """Curves with their 95 % bands, over the share right in bins with exact 95 % intervals.

    Answers to which no curve was fitted are shown as bins alone. Line i looks as `key(first + i)`
    says. Pictures on one page need different `name`s.
    """
    figure = Figure(figsize=(4.4, 3.9))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (4, 4)), alpha=0.5)
    for i, (judged, analysis) in enumerate(shown, start=first):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        _points(axes, judged.bins(), colour, marker)
        if analysis is not None:
            axes.fill_between(GRID, *analysis.band, color=colour, alpha=0.15, linewidth=0)
            axes.plot(GRID, analysis.fit.curve(GRID), color=colour, linewidth=2, linestyle=_dash(i))
    axes.set(xlabel="confidence", ylabel="share right", xlim=(0, 1.02), ylim=(-0.02, 1.02))
    return _svg(figure, name)


def cost_curves(curves: Sequence[tuple[list[float], list[float]]]) -> str:
    """Balanced accuracy against network passes a cell, (passes, accuracy) of each procedure."""
    figure = Figure(figsize=(6.4, 4.2))
    axes = figure.subplots()
    for i, (passes, accuracy) in enumerate(curves):
        axes.plot(
            passes, accuracy, color=COLOURS[i % len(COLOURS)], linewidth=2, linestyle=_dash(i)
        )
        axes.plot(passes[-1:], accuracy[-1:], color=COLOURS[i % len(COLOURS)], marker="o")
    axes.set(xlabel="network passes a cell", ylabel="balanced accuracy", xscale="log")
    return _svg(figure, "cost")


def label_curves(
    curves: Sequence[Sequence[tuple[int, float, Sequence[float] | None]]],
    *,
    x: str = "labels a class",
    y: str = "balanced accuracy",
) -> str:
    """A measure against labels a class: (labels, mean, interval) of each method.

    Line i looks as `key(i)` says; lines are moved aside a little, so that intervals can be told apart.
    """
    figure = Figure(figsize=(6.4, 4.2))
    axes = figure.subplots()
    for i, curve in enumerate(curves):
        colour, aside = COLOURS[i % len(COLOURS)], 1.02 ** (i - len(curves) / 2)
        labels = [aside * n for n, *_ in curve]
        axes.plot(labels, [mean for _, mean, _ in curve], color=colour, linewidth=2, marker="o",
                  markersize=4, linestyle=_dash(i))  # fmt: skip
        for place, (_, _, bounds) in zip(labels, curve, strict=True):
            if bounds is not None:
                axes.plot([place, place], bounds, color=colour, alpha=0.5)
    every = sorted({n for curve in curves for n, *_ in curve})
    axes.set(xlabel=x, ylabel=y, xscale="log")
    axes.set_xticks(every, [str(n) for n in every])
    return _svg(figure, "labels")


def roc_curves(curves: Sequence[tuple[list[float], list[float]]], *, name: str = "roc") -> str:
    """Share of strangers caught against share of normal cells flagged, a curve for each score.

    Line i looks as `key(i)` says. Pictures on one page need different `name`s.
    """
    figure = Figure(figsize=(4.4, 3.9))
    axes = figure.subplots()
    for i, (flagged, caught) in enumerate(curves):
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(flagged, caught, color=colour, linewidth=2, linestyle=_dash(i))
    axes.set(xlabel="normal cells flagged", ylabel="strangers caught", ylim=(0, 1.02))
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set(xlim=(0, 1), xticks=[0, 0.01, 0.1, 1], xticklabels=["0", "0.01", "0.1", "1"])
    return _svg(figure, name)


def key(i: int) -> str:
    """How line i of `psychometric_curves` looks, as a CSS border; twelve differ."""
    return f"3px {_dash(i)} {NAMES[COLOURS[i % len(COLOURS)]]}"


def _dash(i: int) -> str:
    return DASHES[i // len(COLOURS) % len(DASHES)]


def _svg(figure: Figure, name: str) -> str:
    """One <svg> element. Every id starts with `name`, so that two pictures can share a page."""
    for axes in figure.axes:
        _calm(axes)
    figure.patch.set_visible(False)
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.set_layout_engine("constrained")
        figure.savefig(text, format="svg")
    return _for_page(text.getvalue(), name)


def _calm(axes: Axes) -> None:
    axes.patch.set_visible(False)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.minorticks_off()
    axes.tick_params(color=FAINT, labelcolor=INK, labelsize=9)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=10)


def _for_page(svg: str, name: str) -> str:
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'( id="|"#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, value in NAMES.items():
        svg = svg.replace(colour, value)
    return svg.replace("<svg ", '<svg aria-hidden="true" ', 1)
