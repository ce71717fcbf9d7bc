"""`bench ...`: the paper's experiments, one verb each."""

from __future__ import annotations

import typer

from cytodiffusion.cli import (
    anomaly,
    augment,
    authenticity,
    cost,
    faithful,
    fidelity,
    low_data,
    report,
    shift,
    uncertainty,
)
from cytodiffusion.cli.console import one_at_a_time

app = typer.Typer(
    help="The paper's experiments, against other procedures and against people.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command("anomaly")(one_at_a_time(anomaly.anomaly))
app.command("augment")(one_at_a_time(augment.augment))
app.add_typer(authenticity.app, name="authenticity")
app.command("cost")(one_at_a_time(cost.cost))
app.command("explain")(one_at_a_time(faithful.faithful))
app.command("fidelity")(one_at_a_time(fidelity.fidelity))
app.command("low-data")(one_at_a_time(low_data.low_data))
app.command("report")(report.report)
app.command("shift")(one_at_a_time(shift.shift))
app.command("uncertainty")(one_at_a_time(uncertainty.uncertainty))
