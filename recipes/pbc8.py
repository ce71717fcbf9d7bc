"""The released models of eight classes of blood cells, from PBC's train split alone.

    python recipes/pbc8.py DATA/pbc                pbc8: 64 px, 2 cores, about 2 1/2 hours
    python recipes/pbc8.py DATA/pbc --gpu          pbc8-large: 96 px, 10 minutes of an H100 and 30 of a core
    python recipes/pbc8.py DATA/pbc --far          pbc8-far: for other microscopes, a core, 1 3/4 hours
    python recipes/pbc8.py DATA/pbc --release      and put it into the package

Two runs, one after the other: the first learns mostly to draw, the second, which begins with its weights,
to tell the classes apart: the weight of its classification term is ten times as high, and it sees less
noise. 96 px are all that PBC's frames of half size have of a cell. pbc8-far is one more run, begun with
the released pbc8: colours of half of the images are changed three times as far, and naming counts most.

pbc8 trains in two processes of one thread each, in bfloat16: 94 images a second where one process with two
threads in float32 does 58. On processors without AVX512-BF16 say --precision no.

Train on `train`, choose and calibrate on `val`, and only then measure `test`, once for each budget.
The numbers go into the card, and what OUT/note.md says, if it is there. Killed and run again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from cytodiffusion.bundle import ZOO, replace_texts, verify
from cytodiffusion.release import commit

ROOT = Path(__file__).parent.parent
BUDGETS = ("balanced", "fast", "full")
OPTIMIZER = "optimizer=adamw"  # of the released weights; Muon, the default now, is quicker (log 56)
# As the preset cpu was when pbc8 was made; now it names nearly as well after an hour (log 58).
NEAR = ("augmentation.affine=0.5", "augmentation.far=0")
FIRST = ("classification=0.2", "sigma_mean=-0.9", "sigma_std=1.3", "cooldown=0.3")
SECOND = ("classification=2", "sigma_mean=-1.2", "sigma_std=1.4", "cooldown=0.7", "warmup=100")
# The second run of gpu-large: zoom, light, blur and noise as in pbc8's; moves and far colours stay.
NEARER = ("zoom=0.15", "light=0", "blur=0.1", "noise=0.1")
FAR = ("classification=10", "sigma_mean=-1", "sigma_std=1.4", "cooldown=0.5", "warmup=100")
QUOTED = ("<!-- from the card of pbc8 -->", "<!-- until here -->")  # of the README
DATA_LICENSE = """PBC dataset, CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/).

Acevedo A, Merino A, Alferez S, Molina A, Boldu L, Rodellar J. A dataset of microscopic peripheral
blood cell images for development of automatic recognition systems. Data in Brief 30 (2020) 105474.
Mendeley Data, doi:10.17632/snkd93bnjr.1

These weights were trained on its images (half size, split as in the project's docs/data.md).
"""
LIMITS = """
## Limits

* One hospital, one analyser (CellaVision DM96), one stain (May-Gruenwald-Giemsa). On cells from
  other microscopes and stains accuracy is much lower; measure it on your own cells first.
* PBC carries no patient ids: cells of one patient may be in both train and test. One cell of test
  (EO_800344) is also in train (EO_464387), cut out with a shift; 17 further pairs of identical
  files, one of them under two labels, are all in train.
* Eight classes, no blasts. What is none of them must be caught by the column `anomaly`, whose power
  has not been measured for blasts.
* The cell must lie in the centre 55 % of the frame, as in PBC; use `--crop` for other frames.
"""


def command(*words: object, processes: int = 1) -> None:
    """Run one verb of the command line; stop if it fails."""
    several = ["torch.distributed.run", "--nproc_per_node", str(processes), "-m"]
    start = [sys.executable, "-m", *(several if processes > 1 else []), "cytodiffusion.cli"]
    subprocess.run([*start, *map(str, words)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="folder of PBC, with splits.csv")
    parser.add_argument("-o", "--out", type=Path, help="default: runs/ and the name")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--gpu", action="store_true", help="pbc8-large, on one GPU")
    which.add_argument("--far", action="store_true", help="pbc8-far, begun with pbc8")
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16")
    parser.add_argument("--release", action="store_true", help="copy the bundle into the package")
    args = parser.parse_args()
    name = "pbc8-large" if args.gpu else "pbc8-far" if args.far else "pbc8"
    args.out = args.out or Path("runs") / name
    if args.release and args.out.name != name:
        parser.error(f"what is released is called {name}: give --out a folder of that name")
    splits, bundle, first = args.root / "splits.csv", args.out / "bundle", args.out / "first"
    nearer = [f"augmentation.{change}" for change in NEARER]
    preset, device, processes, runs = {
        "pbc8": ("cpu", "cpu", 2, [
            (first, None, ["steps=15000", *FIRST, *NEAR]),
            (args.out, first, ["steps=5000", *SECOND, *NEAR]),
        ]),
        "pbc8-large": ("gpu-large", "cuda", 1, [
            (first, None, ["steps=3300", "cooldown=0.1"]),
            (args.out, first, ["steps=2900", *SECOND, *nearer]),
        ]),
        "pbc8-far": ("cpu-far", "cpu", 1, [(args.out, "pbc8", ["steps=15000", *FAR])]),
    }[name]  # fmt: skip

    for out, start, changes in runs:
        if not bundle.exists() and not (out / "bundle").exists():
            begun = ["--from", start] if start else []
            values = (f"precision={args.precision}", OPTIMIZER, *changes)
            command("train", args.root, "-o", out, "--splits", splits, "--preset", preset,
                    "--device", device, *(word for v in values for word in ("--set", v)), *begun,
                    processes=processes)  # fmt: skip
    for budget in BUDGETS:
        command("evaluate", args.root, "-m", bundle, "-o", args.out / f"test-{budget}",
                "--splits", splits, "--split", "test", "--budget", budget)  # fmt: skip
    write_card(args.out)
    print(f"test vectors agree to {verify(bundle):.1e}")
    if args.release:
        if name == "pbc8":  # the default; the README has a line of each other model
            quote_card(bundle / "card.md")
        shutil.rmtree(ZOO / name, ignore_errors=True)
        shutil.copytree(bundle, ZOO / name)


def write_card(out: Path) -> None:
    """Put the test results, the limits and the licences into the bundle."""
    found = {b: json.loads((out / f"test-{b}" / "metrics.json").read_text()) for b in BUDGETS}
    rows = [
        f"| {budget} | {m['passes_per_cell']:.2f} | {interval(m, 'balanced_accuracy')} | "
        f"{interval(m, 'accuracy')} | {interval(m, 'ece')} | {interval(m, 'auroc_correct')} |"
        for budget, m in found.items()
    ]
    first = found["balanced"]
    covered = [
        f"| {row['sets']} | {row['asked']:.0%} | {row['coverage']:.2%} | {row['furthest']['class']} "
        f"{row['furthest']['coverage']:.1%} | {row['mean_set_size']:.3f} |"
        for row in first["conformal"]
    ]
    recalls = [
        f"| {name} | {c['n']} | {c['recall']:.3f} [{c['recall_ci95'][0]:.3f}, {c['recall_ci95'][1]:.3f}] |"
        for name, c in first["per_class"].items()
    ]
    note = out / "note.md"  # what is special about this training
    card = (out / "bundle" / "card.md").read_text().split("\n## On the test split")[0].rstrip()
    card += f"""

## On the test split of PBC

{first["n"]:,} real cells that took no part in training, choice or calibration; 95 % intervals.
Measured by recipes/pbc8.py at commit {commit()}, seed {first["seed"]}; sha256 of the data begins with
{first["data_sha256"][:12]}.

| budget | passes | balanced accuracy | accuracy | ECE | AUROC right from wrong |
|---|---|---|---|---|---|
{chr(10).join(rows)}

| class | cells | recall, `balanced` |
|---|---|---|
{chr(10).join(recalls)}

Conformal sets, `balanced`:

| sets | asked | covered | class furthest from it | mean size |
|---|---|---|---|---|
{chr(10).join(covered)}
{note.read_text() if note.is_file() else ""}{LIMITS}
## Licences

Weights: Apache-2.0. Trained on PBC, CC BY 4.0; see data_license.txt for the citation.
"""
    texts = {"card.md": card, "data_license.txt": DATA_LICENSE}
    replace_texts(out / "bundle", texts | {"LICENSE": (ROOT / "LICENSE").read_text()})


def quote_card(card: Path) -> None:
    """Copy the test results of the card into the README; a test holds the two together."""
    readme, (begin, end) = ROOT / "README.md", QUOTED
    before, rest = readme.read_text().split(begin)
    after = rest.split(end, 1)[1]
    numbers = card.read_text().split("## On the test split of PBC\n")[1].split("\n## ")[0].strip()
    readme.write_text(f"{before}{begin}\n{numbers}\n{end}{after}")


def interval(metrics: dict, name: str) -> str:
    """A measure with its 95 % interval."""
    between = metrics.get(f"{name}_ci95")
    told = f" [{between[0]:.4f}, {between[1]:.4f}]" if between else ""
    return f"{metrics[name]:.4f}{told}"


if __name__ == "__main__":
    main()
