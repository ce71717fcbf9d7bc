"""Pictures of an explanation: the cell, where it would change, and what it would be.

    cell          the map over a grey cell             counterfactual            the difference alone
    drawn as A    from each of the noise levels
    drawn as B    from the same noise
    counterfactual: the cell, and what B's drawing differs by from A's

Purple is darker, orange is lighter: a scale that colour-blind readers can tell apart. What is no clearer
than noise stays grey. The same arrays give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cytodiffusion.explain.counterfactual import Explanation

SCALE = "PuOr_r"
PERCENT = 50.0  # image units -> percent of full brightness
PANEL = 1.75  # inches
DOTS = 110  # an inch
TEXT = 6.5  # points


def figure(each: Explanation, drawn_as: Sequence[str], named: Sequence[str], best: int) -> Figure:
    """All panels.

    `drawn_as` and `named` say what each drawing as B, and each counterfactual, is named by the model;
    counterfactual `best` is in the first row.
    """
    columns = max(4, len(each.starts))
    drawn = Figure(figsize=(PANEL * columns + 0.6, 4.75 * PANEL), layout="constrained")
    axes = drawn.subplots(4, columns)
    for place in axes.flat:
        place.set_axis_off()
    _image(axes[0, 0], each.image, f"the cell\n{each.own}")
    _map(drawn, axes[0, 1], each)
    _image(axes[0, 2], each.counterfactual[best], f"the cell + difference\n{named[best]}")
    _difference(drawn, axes[0, 3], each.difference[best].mean(0))
    for i, start in enumerate(each.starts):
        _image(axes[1, i], each.as_own[i], f"drawn as {each.own}\nfrom noise {start:g}")
        _image(axes[2, i], each.as_other[i], f"drawn as {each.other}\n{drawn_as[i]}")
        _image(axes[3, i], each.counterfactual[i], f"the cell + difference\n{named[i]}")
    return drawn


def png(drawn: Figure) -> bytes:
    """The figure as a PNG file."""
    return _saved(drawn, "png", dpi=DOTS, metadata={"Software": None})


def svg(drawn: Figure) -> bytes:
    """The figure as an SVG file, its text as text."""
    with mpl.rc_context({"svg.hashsalt": "explanation", "svg.fonttype": "none"}):
        return _saved(drawn, "svg", metadata={"Date": None, "Creator": None})


def _saved(drawn: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    drawn.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def _image(axes: Axes, image: Float[np.ndarray, "c h w"], title: str) -> None:
    axes.imshow(((image.clip(-1, 1) + 1) / 2).transpose(1, 2, 0), interpolation="nearest")
    axes.set_title(title, fontsize=TEXT)


def _map(drawn: Figure, axes: Axes, each: Explanation) -> None:
    """The change of brightness over the cell in grey, where it is more than noise."""
    grey = (each.image.mean(0) + 1) / 2
    axes.imshow(0.35 + 0.65 * grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    share = 100 * each.map.shown.mean()
    title = f"{share:.0f} % of pixels would change\nto be {each.other}"
    _scale(drawn, axes, np.ma.masked_where(~each.map.shown, each.map.light), title, alpha=0.85)


def _difference(drawn: Figure, axes: Axes, light: Float[np.ndarray, "h w"]) -> None:
    _scale(drawn, axes, light, "the difference\nof the drawings")


def _scale(drawn: Figure, axes: Axes, light: np.ndarray, title: str, alpha: float = 1.0) -> None:
    """A signed map with its legend, in percent of full brightness."""
    percent = PERCENT * light
    top = max(float(np.quantile(np.abs(np.ma.filled(percent, 0.0)), 0.995)), 1e-3)
    shown = axes.imshow(
        percent, cmap=SCALE, vmin=-top, vmax=top, alpha=alpha, interpolation="nearest"
    )
    axes.set_title(title, fontsize=TEXT)
    bar = drawn.colorbar(shown, ax=axes, fraction=0.05, pad=0.02)
    bar.ax.tick_params(labelsize=6)
    bar.set_label("brightness, % of white", fontsize=6)
