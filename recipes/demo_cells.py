"""Draw the synthetic cells that `cytodiffusion demo` names.

    python recipes/demo_cells.py -m pbc8 -o src/cytodiffusion/demo

As `cytodiffusion generate` draws them, in one flat folder. manifest.csv names the class that was asked
for.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from pathlib import Path

from cytodiffusion.bundle import load
from cytodiffusion.cli.console import cores
from cytodiffusion.synthesis import Cell, Drawing, draw_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", default="pbc8")
    parser.add_argument("-o", "--out", type=Path, default=Path("src/cytodiffusion/demo"))
    parser.add_argument("--per-class", type=int, default=6)
    args = parser.parse_args()
    model = load(args.model, engine="torch")
    cells = [
        Cell(name, 1000 * column + i)
        for column, name in enumerate(model.classes)
        for i in range(args.per_class)
    ]
    drawn = [pair for batch in draw_all(model, cells, Drawing(), cores()) for pair in batch]
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    rows = []
    for cell, data in drawn:
        file = f"{cell.label}_{cell.seed:04}.png"
        (args.out / file).write_bytes(data)
        rows.append({"path": file, "label": cell.label})
    with (args.out / "manifest.csv").open("w", newline="") as table:
        writer = csv.DictWriter(table, ["path", "label"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"Drew {len(rows)} cells into {args.out}.")


if __name__ == "__main__":
    main()
