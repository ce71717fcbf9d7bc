"""The results of several benches on one page, beside what the paper has published.

Results are recognised by what they hold. A question stands at the top once for each run that answers it,
with whether its figure can be laid beside the published one at all, and why not; below is a section for
each run, with its main rows and how it is run again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cytodiffusion.errors import DataError
from cytodiffusion.evaluate.findings import READERS, Findings
from cytodiffusion.evaluate.published import PUBLISHED, Figure
from cytodiffusion.evaluate.report import DASH, FORMATS, PERCENT, fill

TITLES = {
    "evaluate": "Naming cells",
    "cost": "What a name costs",
    "anomaly": "Strangers",
    "shift": "Other laboratories",
    "augment": "Drawn cells, in training",
    "low-data": "Few labels",
    "uncertainty": "Knowing when it is right",
    "authenticity": "Drawn cells, judged by people",
    "fidelity": "Drawn cells, measured",
    "explain": "What would have to change",
}

# What only results of this kind hold, on the top level or in the first of `rows`.
SIGNS = {
    "evaluate": {"confusion", "per_class", "balanced_accuracy"},
    "cost": {"procedures"},
    "anomaly": {"rows", "auroc", "score"},
    "shift": {"rows", "set", "accuracy"},
    "augment": {"summary", "gains", "rare_class"},
    "low-data": {"summary", "gains"},
    "uncertainty": {"curves"},
    "authenticity": {"readers", "pooled"},
    "fidelity": {"real_or_drawn", "copies"},
    "explain": {"flips", "stability"},
}

FACTS = ("model", "weights", "commit", "seed", "engine", "cores", "device")
ALWAYS = ("weights", "commit", "seed")  # said even where they were not recorded
UNKNOWN = "not recorded"
STYLES = FORMATS | {"points": lambda value: f"{100 * value:+.1f}"}


@dataclass(frozen=True)
class Experiment:
    """One run. `link`: of its own report, as seen from the page; None where that lies elsewhere."""

    kind: str
    folder: str
    link: str | None
    facts: Mapping[str, Any]
    findings: Findings

    @property
    def title(self) -> str:
        """What it is about."""
        return TITLES[self.kind]


def kind_of(values: Mapping[str, Any]) -> str | None:
    """Which bench has written this; None where it is none that is known."""
    rows = values.get("rows")
    first = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}
    keys = values.keys() | first.keys()
    return next((kind for kind, signs in SIGNS.items() if signs <= keys), None)


def experiment(values: Any, folder: str, link: str | None) -> Experiment:
    """What one folder's results say. Raises DataError for what is no bench's, or not whole."""
    kind = kind_of(values) if isinstance(values, dict) else None
    if kind is None:
        raise DataError(f"its results are of no kind that is known ({', '.join(SIGNS)})")
    try:
        found = READERS[kind](values)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"its results of `{kind}` are not as this version writes them ({error!r}); run it again"
        ) from error
    return Experiment(kind, folder, link, _facts(values), found)


def _facts(values: Mapping[str, Any]) -> dict[str, Any]:
    """How it is run again, in words; what was not recorded says so."""
    weights = values.get("weights") or values.get("weights_sha256", UNKNOWN)[:12]
    if isinstance(weights, dict):
        weights = ", ".join(f"{name} {digest}" for name, digest in weights.items())
    known = {**dict.fromkeys(ALWAYS, UNKNOWN), **values, "weights": weights}
    facts = {name: known[name] for name in FACTS if name in known}
    return facts | {"command": values.get("command")}


def in_order(experiments: Sequence[Experiment]) -> list[Experiment]:
    """As the page has them: kinds in the order of TITLES, within a kind as they came."""
    order = list(TITLES)
    return sorted(experiments, key=lambda each: order.index(each.kind))


def as_dict(experiments: Sequence[Experiment]) -> dict[str, Any]:
    """What results.json holds: a summary, a row for each question, and every run."""
    summary = [
        {
            "folder": each.folder, "bench": each.kind, "question": line.question,
            **{name: asdict(value) if (value := getattr(line, name)) else None
               for name in ("ours", "baseline", "published")},
            "comparable": line.comparable, "why": list(line.why),
        }
        for each in experiments
        for line in each.findings.lines
    ]  # fmt: skip
    runs = [
        {
            "folder": each.folder, "bench": each.kind, **each.facts,
            "heading": list(each.findings.heading),
            "rows": [[asdict(cell) if isinstance(cell, Figure) else cell for cell in row]
                     for row in each.findings.rows],
            "published": [asdict(one) for one in PUBLISHED[each.kind]],
        }
        for each in experiments
    ]  # fmt: skip
    return {"summary": summary, "experiments": runs}


def said(figure: Figure, interval: bool = True) -> str:
    """A figure in words, with its interval or without: 97.4 % (96.7 - 98.0 %)."""
    style = STYLES[figure.style]
    text = style(figure.value) + (f" {figure.unit}" if figure.unit else "")
    if figure.ci95 is None or not interval:
        return text
    low, high = (style(bound) for bound in figure.ci95)
    return f"{text} ({low.removesuffix(PERCENT)} {DASH} {high})"


def render(
    experiments: Sequence[Experiment], problems: Sequence[str], facts: Mapping[str, Any]
) -> str:
    """The page as text; `problems` are of folders that could not be read."""
    weights = {each.facts["weights"] for each in experiments} - {UNKNOWN}
    return fill(
        "joined.html.j2", title="Beside the paper", experiments=experiments, problems=problems,
        published=PUBLISHED, several=len(weights) > 1, facts=facts, said=said,
        is_figure=lambda cell: isinstance(cell, Figure),
    )  # fmt: skip
