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

app = typer.Typer(
    help="The paper's experiments, against other procedures and against people.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command("anomaly")(anomaly.anomaly)
app.command("augment")(augment.augment)
app.add_typer(authenticity.app, name="authenticity")
app.command("cost")(cost.cost)
app.command("explain")(faithful.faithful)
app.command("fidelity")(fidelity.fidelity)
app.command("low-data")(low_data.low_data)
app.command("report")(report.report)
app.command("shift")(shift.shift)
app.command("uncertainty")(uncertainty.uncertainty)
