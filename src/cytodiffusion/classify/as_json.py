"""Budgets as plain data, for calibration.json: numbers with seven significant digits.

sequences  trials that several budgets share, and how each depth of them is read
budgets    which sequence each runs, when it stops, or the rules of its race; what held-out cells were told
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from cytodiffusion.classify.anomaly import AnomalyModel
from cytodiffusion.classify.calibrate import HeldOut, PrefixPosterior
from cytodiffusion.classify.classifier import Budget, RaceReader
from cytodiffusion.classify.draws import Draws, Trial
from cytodiffusion.classify.race import BettingRace, PaperRace, paper_draws
from cytodiffusion.classify.sequential import Agreement, Depth, Rule, Sequence


def _numbers(array: np.ndarray) -> Any:
    """Nested lists with seven significant digits."""
    return np.vectorize(lambda x: float(f"{x:.7g}"), otypes=[float])(array).tolist()


def calibration_to_json(budgets: dict[str, Budget]) -> dict[str, Any]:
    """Budgets as plain data. Those that run one list of trials share it, and its depths."""
    shared: list[dict[str, Any]] = []
    written: dict[str, Any] = {}
    for name, budget in budgets.items():
        written[name] = _budget_to_json(budget)
        if isinstance(budget.reader, Sequence):
            sequence = {
                "seed": budget.draws.seed,
                "frozen": budget.draws.frozen,
                "trials": [[t.sigma, t.draw, t.sign, t.pose] for t in budget.draws.trials],
                "depths": [_depth_to_json(depth) for depth in budget.reader.depths],
            }
            if sequence not in shared:
                shared.append(sequence)
            written[name]["sequence"] = shared.index(sequence)
    return {"sequences": shared, "budgets": written}


def _depth_to_json(depth: Depth) -> dict[str, Any]:
    posterior, anomalies = depth.posterior, depth.anomalies
    return {
        "scale": _numbers(posterior.scale),
        "weight": _numbers(posterior.weight),
        "bias": _numbers(posterior.bias),
        "gate": list(depth.gate),
        "anomaly": {
            "means": _numbers(anomalies.means),
            "precision": _numbers(anomalies.precision),
            "units": _numbers(anomalies.units),
            "limit": anomalies.limit,
        },
    }


def _budget_to_json(budget: Budget) -> dict[str, Any]:
    held = {
        "truth": budget.held.truth.tolist(),
        "probabilities": _numbers(budget.held.probabilities),
        "anomaly": _numbers(budget.held.anomaly),
    }
    if isinstance(budget.reader, Sequence):
        said = budget.agreement and asdict(budget.agreement)
        return {"rule": asdict(budget.reader.rule), "agreement": said, "held": held}
    race = budget.policy
    assert isinstance(budget.reader, RaceReader)
    assert isinstance(race, PaperRace | BettingRace)
    temperature = budget.reader.temperature
    common = {"alpha": race.alpha, "seed": race.draws.seed, "temperature": temperature}
    if isinstance(race, BettingRace):
        bets = {
            "trials": [[t.sigma, t.draw, t.sign, t.pose] for t in race.draws.trials],
            "weights": _numbers(race.weights),
            "sweep": race.sweep,
        }
        return {"bets": common | bets, "held": held}
    rules = {"most": len(race.draws), "least": race.least, "every": race.every}
    return {"race": common | rules, "held": held}


def calibration_from_json(data: dict[str, Any]) -> dict[str, Budget]:
    """The inverse of `calibration_to_json`."""
    shared = [
        (
            Draws(tuple(Trial(*trial) for trial in one["trials"]), one["seed"], one["frozen"]),
            tuple(_depth_from_json(values) for values in one["depths"]),
        )
        for one in data["sequences"]
    ]
    return {name: _budget_from_json(values, shared) for name, values in data["budgets"].items()}


def _depth_from_json(values: dict[str, Any]) -> Depth:
    posterior = PrefixPosterior(*(np.array(values[key]) for key in ("scale", "weight", "bias")))
    parts = values["anomaly"]
    means, precision, units = (np.array(parts[key]) for key in ("means", "precision", "units"))
    anomalies = AnomalyModel(means, precision, units, parts["limit"])
    return Depth(posterior, tuple(values["gate"]), anomalies)


def _budget_from_json(
    values: dict[str, Any], shared: list[tuple[Draws, tuple[Depth, ...]]]
) -> Budget:
    parts = values["held"]
    held = HeldOut(*(np.array(parts[key]) for key in ("truth", "probabilities", "anomaly")))
    if "race" in values:
        rules = values["race"]
        draws = paper_draws(rules["most"], rules["seed"])
        paper = PaperRace(draws, rules["least"], rules["every"], rules["alpha"])
        return Budget(draws, RaceReader(paper.weights, rules["temperature"]), held, policy=paper)
    if "bets" in values:
        rules = values["bets"]
        draws = Draws(tuple(Trial(*trial) for trial in rules["trials"]), rules["seed"])
        bets = BettingRace(draws, np.array(rules["weights"]), rules["sweep"], rules["alpha"])
        return Budget(draws, RaceReader(bets.weights, rules["temperature"]), held, policy=bets)
    draws, depths = shared[values["sequence"]]
    sequence, said = Sequence(depths, Rule(**values["rule"])), values["agreement"]
    agreed = Agreement(**said) if said else None
    return Budget(draws, sequence, held, policy=sequence, agreement=agreed)
