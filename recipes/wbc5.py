"""`wbc5`: five classes of white cells, from three laboratories: PBC, Raabin and BCCD.

    python recipes/wbc5.py DATA -o runs/wbc5              2 cores, under 2 hours
    python recipes/wbc5.py DATA -o runs/wbc5 --gpu        one GPU, under 30 minutes

DATA holds pbc/ (with splits.csv), raabin/ and bccd/. All frames are brought to one light (white balance)
and one scale (the nuclei of each set), and small sets come up several times; what is left of a set after
a fifth was held out is trained on. Nothing here is tested on cells of these three laboratories that
it has seen: measure it elsewhere, and with `bench shift --leave-one-out` to see what the sets are worth.
In Raabin class and slide nearly coincide, and labels of BCCD are noisy. Killed and run again, it goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cytodiffusion.cli.console import Console
from cytodiffusion.cli.labs import Bench, join, list_labs
from cytodiffusion.cli.train import run_training, write_bundle
from cytodiffusion.data.taxonomy import Taxonomy
from cytodiffusion.train.settings import make_settings

FOREIGN = ("raabin", "bccd")
STEPS = 15_000  # of 32, at 94 images a second (two processes in bfloat16): 1 h 25 min


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="folder of pbc/, raabin/ and bccd/")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/wbc5"))
    parser.add_argument("--gpu", action="store_true", help="the preset for one GPU")
    parser.add_argument("--steps", type=int, help="another number of optimiser steps")
    args = parser.parse_args()
    preset, device = ("gpu", "cuda") if args.gpu else ("cpu", "cpu")
    changes = [] if args.gpu else [f"steps={STEPS}"]
    changes += [f"steps={args.steps}"] if args.steps else []
    settings = make_settings(preset, changes)
    labels, console = Taxonomy.load(), Console(as_json=False)
    bench = Bench(args.out, settings, labels, settings.seed, device, "auto", console).matched()
    foreign = [args.root / name for name in FOREIGN]
    pbc = args.root / "pbc"
    labs, _ = list_labs(bench, pbc, foreign, pbc / "splits.csv", None)
    run, held = run_training(join(bench, labs), args.out, bench.settings, device, labels, console)
    if run is not None:
        origin = {"recipe": "recipes/wbc5.py", "data": "PBC, Raabin-WBC and BCCD", "preset": preset}
        write_bundle(run, held, args.out / "bundle", "wbc5", origin, labels, console)


if __name__ == "__main__":
    main()
