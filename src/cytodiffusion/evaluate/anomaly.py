"""Does a model notice what it has never seen?

Two sets of cells are scored: normal ones, of classes that the model knows, and strangers. A score is
good if strangers have the higher ones. Scores of a diffusion model, each alone, from errors E_ki of
class k in trial i and E_any,i of "any cell" (higher is stranger):

    zeta        the paper's: how little the best class stands out, its normality turned round
    pattern     class-conditional Mahalanobis distance of ln E_k - ln E_any and ln E_any
    margin      less the gap between the two highest logits
    doubt       -ln of the largest probability
    typicality  Mahalanobis distance of ln E_any over noise levels to known cells: in both tails
    features    the same of the trunk's features in the first trial
    distance    the same of both; `off` the plane of the class means, and `within` it (classify/anomaly.py)
    neighbours  mean distance of the features to the nearest known cells
    error       the smallest error min_k E_k itself, which does not work: smooth strangers are easy
    combined    what the model tells as `anomaly` after all its trials; `balanced`: and stopping early

`pattern`, `typicality`, `features` and `neighbours` are fitted here, on known cells that are not
scored; the rest is what the model was calibrated with. Where a network tells no features, there is no
`features` and no `neighbours`.

Source: Mahmood et al. 2021 (typicality over noise levels, MSMA), arXiv 2010.13132; Fawcett
2006 (ROC analysis).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from markupsafe import Markup
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from cytodiffusion.classify import sequential
from cytodiffusion.classify.anomaly import distances, doubt, pattern
from cytodiffusion.classify.classifier import ALARM, Budget, Classifier
from cytodiffusion.classify.draws import Draws, stratified
from cytodiffusion.classify.race import paper_weight, zeta
from cytodiffusion.data.images import to_tensor
from cytodiffusion.errors import DataError
from cytodiffusion.evaluate.intervals import binomial_interval, bootstrap, percentiles
from cytodiffusion.evaluate.report import fill
from cytodiffusion.files import write_arrays

LEVELS, LOW, HIGH = 8, 0.05, 5.0  # of the trials that are spread over noise levels
NEIGHBOURS = 5
KNOWN, NORMAL, OURS = "known", "normal", "ours"  # names of sets, and of our method
TOLD = "balanced"  # the score that `predict` tells, of frames in the light of training
Scored = Mapping[tuple[str, str], Mapping[str, np.ndarray]]  # (method, score) -> set -> cells


# --- what is measured ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """One set of images, at the model's size."""

    pixels: UInt8[np.ndarray, "n 3 h w"]
    labels: Int[np.ndarray, " n"]  # columns of their classes, -1 for strangers
    digests: list[str]


@dataclass(frozen=True)
class Measured:
    """What one model measured of a set of cells."""

    errors: Float[np.ndarray, "n t k1"]  # of the model's own trials, all of them
    ladder: Float[np.ndarray, "n l k1"]  # of trials spread over noise levels
    features: Float[np.ndarray, "n f"]

    def save(self, path: Path) -> None:
        """Write one NPZ file. Raises OutputError."""
        write_arrays(path, errors=self.errors, ladder=self.ladder, features=self.features)

    @classmethod
    def load(cls, path: Path) -> Measured:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            return cls(file["errors"], file["ladder"], file["features"])


def spread_trials(seed: int, scale: float = 1.0) -> Draws:
    """Trials over all noise levels, the same noise for every cell; `scale` is that of the space."""
    return stratified(LEVELS, LOW * scale, HIGH * scale, seed=seed, frozen=True)


def measure(
    classifier: Classifier, cells: Cells, workers: int = 1
) -> Generator[int, None, Measured]:
    """Yield how many cells are measured; returns the errors and features of all, in their order."""
    pixels = cells.pixels
    own = classifier.budget("full").draws
    draws = replace(own, trials=own.trials + spread_trials(own.seed, classifier.space.scale).trials)
    work = replace(classifier.measurement("full"), draws=draws, policy=None)

    def prepare(place: int) -> tuple[Tensor, str]:
        return to_tensor(pixels[place]).to(classifier.device), cells.digests[place]

    errors, features = yield from work.follow(classifier.meter, len(pixels), prepare, workers)
    return Measured(errors[:, : len(own)], errors[:, len(own) :], features)


# --- scores --------------------------------------------------------------------------------------


def scores(
    classifier: Classifier, known: Measured, truth: Int[np.ndarray, " m"], cells: Measured
) -> dict[str, Float[np.ndarray, " n"]]:
    """Every score of these cells. `known` cells, of the classes `truth`, are those of calibration."""
    full, scale = classifier.budget("full"), classifier.space.scale
    weights = paper_weight(spread_trials(0, scale).sigmas)
    assert isinstance(full.reader, sequential.Sequence)
    depth = full.reader.depths[-1]
    errors, classes = cells.errors, cells.errors[:, :, :-1]
    probabilities = full.reader.probabilities(errors)
    fitted, (off, within) = depth.posterior, depth.anomalies.distances(errors, cells.features)
    trunk = {
        "features": _distances(known.features, truth, cells.features),
        "neighbours": _nearest(known.features, cells.features),
    } if known.features.shape[1] else {}  # fmt: skip
    return {
        "zeta": -zeta(cells.ladder[:, :, :-1], weights),
        "pattern": _distances(pattern(known.errors), truth, pattern(cells.errors)),
        "distance": np.hypot(off, within),
        "off": off,
        "within": within,
        "margin": -sequential.gap(fitted.logits(classes)),
        "doubt": doubt(probabilities),
        "typicality": _distances(_logs(known), np.zeros_like(truth), _logs(cells)),
        **trunk,
        "error": cells.ladder[:, :, :-1].mean(1).min(1).astype(np.float64),
        "combined": full.reader.anomaly(errors, cells.features),
        TOLD: as_told(classifier.budget("balanced"), cells),
    }


def _logs(cells: Measured) -> Float[np.ndarray, "n l"]:
    return np.log(cells.ladder[:, :, -1].astype(np.float64).clip(1e-12))


def _distances(
    known: Float[np.ndarray, "m f"], truth: Int[np.ndarray, " m"], cells: Float[np.ndarray, "n f"]
) -> Float[np.ndarray, " n"]:
    """Mahalanobis distance to the nearest class mean, one shrunk covariance."""
    kinds, column = np.unique(truth, return_inverse=True)
    means = np.stack([known[truth == kind].mean(0) for kind in kinds]).astype(np.float64)
    precision = LedoitWolf().fit(known - means[column]).precision_
    return np.hypot(*distances(cells.astype(np.float64), means, precision))


def _nearest(
    known: Float[np.ndarray, "m f"], cells: Float[np.ndarray, "n f"]
) -> Float[np.ndarray, " n"]:
    """Mean distance to the nearest known cells, features in units of their spread."""
    spread = known.std(0).clip(1e-9)
    found = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(known))).fit(known / spread)
    return found.kneighbors(cells / spread)[0].mean(1).astype(np.float64)


def as_told(budget: Budget, cells: Measured) -> Float[np.ndarray, " n"]:
    """The anomaly of each cell under this budget, which stops when a cell is done."""
    reader, errors = budget.reader, cells.errors.copy()
    assert isinstance(reader, sequential.Sequence)
    alive = np.ones(errors[:, 0, :-1].shape, dtype=bool)
    for depth in range(1, errors.shape[1]):
        running = alive.sum(1) > 1
        alive[running] &= reader(errors[running, :depth], cells.features[running])
        errors[:, depth, :-1][~alive] = np.nan
        errors[~alive.all(1), depth, -1] = np.nan
        errors[alive.sum(1) <= 1, depth] = np.nan
    return reader.anomaly(errors, cells.features)


def p_values(classifier: Classifier, cells: Measured) -> dict[str, Float[np.ndarray, " n"]]:
    """`anomaly_p` of each cell, by the score it belongs to."""
    budgets = {"combined": classifier.budget("full"), TOLD: classifier.budget("balanced")}
    return {name: b.held.p_value(as_told(b, cells)) for name, b in budgets.items()}


# --- how good a score is -------------------------------------------------------------------------


class Ranking:
    """Scores of normal and strange cells, and what a threshold on them does. Ties count half."""

    def __init__(self, normal: Float[np.ndarray, " n"], strange: Float[np.ndarray, " s"]) -> None:
        """Raises DataError where there are none of a kind, or a score is no number."""
        both = np.concatenate([normal, strange])
        if not len(normal) or not len(strange) or not np.isfinite(both).all():
            raise DataError(
                f"{len(normal)} normal and {len(strange)} strange cells cannot be ranked: it takes "
                "some of each, with finite scores."
            )
        self.strange = np.arange(len(both)) >= len(normal)
        values, self.place = np.unique(both, return_inverse=True)
        self.values = len(values)
        self._last: tuple[np.ndarray, Any] | None = None  # all measures see the same resamples

    def shares(
        self, sample: Int[np.ndarray, "draws m"]
    ) -> tuple[Float[np.ndarray, "draws v"], Float[np.ndarray, "draws v"]]:
        """Shares of the normal and of the strange cells that score at least each value."""
        if self._last is None or self._last[0] is not sample:
            self._last = sample, tuple(self._beyond(sample))
        return self._last[1]

    def _beyond(self, sample: np.ndarray) -> Iterator[np.ndarray]:
        rows = np.arange(len(sample))[:, None] * self.values + self.place[sample]
        for kind in (False, True):
            chosen = rows[self.strange[sample] == kind]
            counts = np.bincount(chosen, minlength=len(sample) * self.values)
            beyond = counts.reshape(len(sample), -1)[:, ::-1].cumsum(1)[:, ::-1]
            yield beyond / beyond[:, :1]

    def auroc(self, sample: Int[np.ndarray, "draws m"]) -> Float[np.ndarray, " draws"]:
        """Chance that a stranger scores higher than a normal cell."""
        alarms, caught = (_closed(share) for share in self.shares(sample))
        return ((caught[:, 1:] + caught[:, :-1]) / 2 * -np.diff(alarms, axis=1)).sum(1)

    def average_precision(self, sample: Int[np.ndarray, "draws m"]) -> Float[np.ndarray, " draws"]:
        """Mean precision over the strangers, each taken as the threshold."""
        alarms, caught = self.shares(sample)
        strange = self.strange[sample].sum(1)[:, None]
        precision = (
            caught * strange / (caught * strange + alarms * (sample.shape[1] - strange)).clip(1e-12)
        )
        return (precision * -np.diff(_closed(caught), axis=1)).sum(1)

    def sensitivity(
        self, sample: Int[np.ndarray, "draws m"], specificity: float
    ) -> Float[np.ndarray, " draws"]:
        """Largest share of strangers caught while so many of the normal cells are left alone."""
        alarms, caught = self.shares(sample)
        return np.where(1 - alarms >= specificity - 1e-9, caught, 0).max(1)

    def specificity(
        self, sample: Int[np.ndarray, "draws m"], sensitivity: float
    ) -> Float[np.ndarray, " draws"]:
        """Largest share of normal cells left alone while so many strangers are caught."""
        alarms, caught = self.shares(sample)
        return np.where(caught >= sensitivity - 1e-9, 1 - alarms, 0).max(1)

    def measures(self) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        """What a row states, by its key."""
        return {
            "auroc": self.auroc,
            "average_precision": self.average_precision,
            "sensitivity_at_95": lambda sample: self.sensitivity(sample, 0.95),
            "sensitivity_at_99": lambda sample: self.sensitivity(sample, 0.99),
            "specificity_at_95": lambda sample: self.specificity(sample, 0.95),
        }

    def curve(self) -> tuple[list[float], list[float]]:
        """ROC: share of normal cells flagged, share of strangers caught."""
        alarms, caught = (_closed(s)[0] for s in self.shares(np.arange(len(self.place))[None]))
        return alarms[::-1].tolist(), caught[::-1].tolist()


def _closed(share: Float[np.ndarray, "draws v"]) -> Float[np.ndarray, "draws w"]:
    """With a threshold that no cell reaches."""
    return np.pad(share, ((0, 0), (0, 1)))


def row(
    normal: Float[np.ndarray, " n"], strange: Float[np.ndarray, " s"], seed: int = 0
) -> dict[str, Any]:
    """How well a score tells strangers, with bootstrap 95 % intervals over cells of each kind."""
    ranking = Ranking(normal, strange)
    measures, every = ranking.measures(), np.arange(len(ranking.place))[None]
    drawn = bootstrap(ranking.strange.astype(int), measures, seed=seed)
    told: dict[str, Any] = {"normal": len(normal), "strange": len(strange)}
    for name, value in measures.items():
        told |= {name: float(value(every)[0]), f"{name}_ci95": percentiles(drawn[name])}
    return told


def flag_row(normal: Float[np.ndarray, " n"], strange: Float[np.ndarray, " s"]) -> dict[str, Any]:
    """Shares that are called anomalous, from p-values, with exact intervals: false alarms, catches."""
    told: dict[str, Any] = {"alarm": ALARM}
    for name, p in (("normal_flagged", normal), ("strange_flagged", strange)):
        hits = int((p <= ALARM).sum())
        told |= {name: hits / len(p), f"{name}_ci95": list(binomial_interval(hits, len(p)))}
    return told


def compare(scored: Scored, told: Scored, seed: int = 0) -> list[dict[str, Any]]:
    """A row for each set of strangers, method and score.

    `scored` has the set `normal` as well; `told` has the p-values of those scores that decide on flags.
    """
    rows = []
    for strangers in next(iter(scored.values())):
        for (method, score), sets in scored.items():
            if strangers == NORMAL:
                continue
            found = {"set": strangers, "method": method, "score": score, "repeat": seed}
            found |= row(sets[NORMAL], sets[strangers], seed)
            if (method, score) in told:
                p = told[method, score]
                found |= flag_row(p[NORMAL], p[strangers])
            rows.append(found)
    return rows


def render(
    title: str,
    rows: Sequence[dict[str, Any]],
    scored: Scored,
    pictures: Mapping[str, Sequence[tuple[str, str]]],
    facts: dict[str, Any],
) -> str:
    """The page as text. `pictures[set]` are data URIs and captions of the strangers best hidden."""
    from cytodiffusion.evaluate import plots  # matplotlib takes a while

    sets = list(dict.fromkeys(each["set"] for each in rows))
    shown = [key for key in scored if key[0] != OURS or key[1] == TOLD]
    curves = {
        name: [Ranking(scored[key][NORMAL], scored[key][name]).curve() for key in shown]
        for name in sets
    }
    figures = {
        name: Markup(plots.roc_curves(curves[name], name=f"roc{i}")) for i, name in enumerate(sets)
    }
    keys = [(f"{method}, {score}", plots.key(i)) for i, (method, score) in enumerate(shown)]
    return fill(
        "anomaly.html.j2", title=title, sets=sets, rows=rows, figures=figures, keys=keys,
        pictures=pictures, facts=facts,
    )  # fmt: skip
