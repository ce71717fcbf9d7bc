"""A self-contained model: a folder with everything that is needed to give the same answer elsewhere.

    config.json         which network, its shape, classes, name, version, where it came from
    model.safetensors   its weights, float16; those of its autoencoder too, where it has one
    preprocess.json     crop and size
    labels.yaml         taxonomy of the classes
    calibration.json    trials, the weights of every depth, when to stop, what held-out cells were told
    card.md, LICENSE, data_license.txt
    test_vectors.npz    inputs with the errors they must give
    checksums.json      sha256 of all of the above

No code and no pickles. A changed byte is refused. This is the one place that knows every network.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cytodiffusion.classify.as_json import calibration_from_json, calibration_to_json
from cytodiffusion.classify.classifier import Budget, Classifier, Reading
from cytodiffusion.classify.draws import standard_normal
from cytodiffusion.classify.evidence import DenoiserMeter, Meter
from cytodiffusion.data.images import Preprocess, decode, to_tensor
from cytodiffusion.data.match import fit_frames
from cytodiffusion.data.sample import FileBytes, Sample
from cytodiffusion.data.taxonomy import Taxonomy
from cytodiffusion.data.transforms import POSES
from cytodiffusion.diffusion.precondition import EDMDenoiser, NetworkDenoiser
from cytodiffusion.engines.engine import best_engine, make_engine
from cytodiffusion.errors import ChangedBundle, DataError, ModelError, OutputError
from cytodiffusion.networks.compact import CompactNetwork, CompactSettings
from cytodiffusion.networks.latent import LATENT, LatentNetwork, LatentShape, LatentSpace
from cytodiffusion.types import PIXELS, Classes, Space

FORMAT = 7
SAME_WEIGHTS = 4  # the first format whose weights and preprocessing are as they are now
FILES = (
    "config.json", "model.safetensors", "preprocess.json", "labels.yaml", "calibration.json",
    "card.md", "LICENSE", "data_license.txt", "test_vectors.npz",
)  # fmt: skip
CHECKSUMS = "checksums.json"
ZOO = Path(__file__).parent / "zoo"
DEMO = ZOO.parent / "demo"
DEFAULT_MODEL = "pbc8"
ABROAD_MODEL = "pbc8-far"  # in its place, for frames of other laboratories
VAE = "vae."  # before the names of an autoencoder's weights
VECTOR_SIGMAS = (0.1, 0.5, 2.0)
TOLERANCE = 2e-3  # relative difference allowed between two machines' errors


@dataclass(frozen=True, repr=False)
class Model:
    """A loaded bundle: names image files."""

    name: str
    folder: Path
    classifier: Classifier
    denoiser: NetworkDenoiser
    preprocess: Preprocess
    taxonomy: Taxonomy
    config: dict[str, Any]
    engine: str  # what computes the errors

    def __repr__(self) -> str:
        what = f"{len(self.classes)} classes, {self.form}, {self.preprocess.size} px, {self.engine}"
        return f"<Model {self.name}: {what}>"

    @property
    def classes(self) -> Classes:
        """Classes in the order of the columns."""
        return self.classifier.classes

    @property
    def space(self) -> Space:
        """Where noise is added: pixels, or latents."""
        return self.classifier.space

    @property
    def form(self) -> str:
        """What kind of network it is, in words for a card."""
        if self.config["network"] == "latent":
            return LATENT
        return f"compact U-Net, {self.config['settings']['form']}"

    @property
    def weights_sha256(self) -> str:
        """sha256 of model.safetensors, as released."""
        return weights_of(self.folder)

    @property
    def files_sha256(self) -> tuple[str, str]:
        """sha256 of the weights and of the calibration: what decides all answers."""
        listed = checksums(self.folder)
        return listed["model.safetensors"], listed["calibration.json"]

    def fitted(self, crop: float | None = None, light: bool = False) -> Preprocess:
        """The bundle's preprocessing, with another centre crop (1: the whole image), or light matched."""
        change: dict[str, Any] = {"crop": crop} if crop else {}
        change |= {"match": "light"} if light else {}
        return self.preprocess.model_copy(update=change)

    def prepare(
        self, data: bytes, crop: float | None = None, light: bool = False
    ) -> tuple[Float[Tensor, "c h w"], str]:
        """An image file's bytes -> the image at the model's size, and the file's sha256.

        Raises UnreadableImage.
        """
        pixels = self.fitted(crop, light).canvas(decode(data))
        return to_tensor(pixels), hashlib.sha256(data).hexdigest()

    def read(
        self, paths: Iterable[str | Path], budget: str = "balanced", crop: float | None = None,
        match: str = "auto", classes: Sequence[str] | None = None,
    ) -> Reading:  # fmt: skip
        """Everything that is said of these image files.

        `classes`: the only ones that can come up. `crop` and `match` as in `fit_frames`. Eight or more
        white cells show whether frames are those of another laboratory; what is then done to them is told
        in a warning, and the budget's twin is taken (`Classifier.abroad`). The command reads such frames
        with pbc8-far unless it is given a model: load that one here. Raises UnreadableImage,
        SettingsError, DataError, LabelError.
        """
        samples = [Sample(Path(path).name, None, source=FileBytes(Path(path))) for path in paths]
        if not samples:
            raise DataError("No image files were given.")
        fit = fit_frames(samples, self.preprocess, match, crop)
        told = fit.told
        if fit.abroad and (twin := self.classifier.abroad(budget)) != budget:
            told += f" Budget {twin} in place of {budget}: its weights were fitted for such frames."
            budget = twin
            if self.name == DEFAULT_MODEL:
                told += (
                    f" The command would take {ABROAD_MODEL}, trained for such frames: load that."
                )
        if told:
            warnings.warn(told, stacklevel=2)
        prepared = [self.prepare(sample.read(), fit.crop, fit.light) for sample in samples]
        images = torch.stack([image for image, _ in prepared])
        table = self.classifier.measure(images, [sha for _, sha in prepared], budget)
        return self.classifier.read(table, budget, answers=classes)

    def predict(
        self, paths: Iterable[str | Path], budget: str = "balanced", crop: float | None = None,
        match: str = "auto", classes: Sequence[str] | None = None,
    ) -> list[str]:  # fmt: skip
        """Names of the cells in these image files; as `read`."""
        reading = self.read(paths, budget, crop, match, classes)
        return [answer.predicted for answer in reading.answers()]


# --- writing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """What a bundle is made of."""

    name: str
    denoiser: NetworkDenoiser
    classes: Classes
    preprocess: Preprocess
    budgets: dict[str, Budget]
    taxonomy: Taxonomy
    card: str
    license: str
    data_license: str
    origin: dict[str, Any]  # recipe, commit, seed, data: what the card states, for machines
    space: Space = PIXELS  # where noise is added
    radius: float | None = None  # of the disc within which errors count, pixels of the space
    others: dict[str, bytes] = field(default_factory=dict)  # more files, as drawing.json


def save_bundle(folder: Path, parts: Parts) -> None:
    """Write a bundle, whole or not at all. Raises OutputError.

    The one that it replaces lies beside it, under another name, until the new one has its place.
    """
    folder = folder.absolute()
    part, old = (folder.with_name(folder.name + end) for end in (".part", ".old"))
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        _write(part, parts)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.replace(old)
        part.replace(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OutputError(
            f"The bundle cannot be written to {folder} ({error}). Free some space "
            "or choose another folder."
        ) from error


def _write(folder: Path, parts: Parts) -> None:
    network, space = parts.denoiser.network, parts.space
    weights, shape = _half(network.state_dict()), dict[str, Any]()
    if isinstance(network, CompactNetwork):
        shape = {"network": "compact", "settings": network.settings.model_dump(mode="json")}
    elif isinstance(network, LatentNetwork) and isinstance(space, LatentSpace):
        settings = LatentShape.of(network, space, parts.radius)
        shape = {"network": "latent", "settings": settings.model_dump(mode="json")}
        weights |= _half({f"{VAE}{name}": v for name, v in space.vae.state_dict().items()})
    else:
        raise ModelError(
            f"A {type(network).__name__} in this space cannot be saved: a network on latents needs its "
            "LatentSpace, Parts(space=...)."
        )
    if isinstance(parts.denoiser, EDMDenoiser):
        shape["sigma_data"] = parts.denoiser.sigma_data
    save_file(weights, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    config = {
        "format": FORMAT,
        "name": parts.name,
        **shape,
        "classes": list(parts.classes),
        "origin": parts.origin,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "preprocess.json").write_text(parts.preprocess.model_dump_json(indent=1) + "\n")
    calibration = json.dumps(calibration_to_json(parts.budgets), separators=(",", ":"))
    (folder / "calibration.json").write_text(calibration + "\n")
    (folder / "labels.yaml").write_text(parts.taxonomy.dump())
    (folder / "card.md").write_text(parts.card)
    (folder / "LICENSE").write_text(parts.license)
    (folder / "data_license.txt").write_text(parts.data_license)
    for name, content in parts.others.items():
        (folder / name).write_bytes(content)
    read = _network(config, weights)
    _write_vectors(folder / "test_vectors.npz", read, parts.preprocess.size, parts.classes)
    _write_checksums(folder)


def _half(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: (value.half() if value.is_floating_point() else value).cpu().contiguous()
        for name, value in weights.items()
    }


def recalibrated(
    folder: Path, model: Model, preprocess: Preprocess, budgets: dict[str, Budget], card: str,
    origin: dict[str, Any],
) -> None:  # fmt: skip
    """Write a model with other preprocessing and budgets, and all else that it holds, whole or not at all.

    The folder may be the model's own. Raises OutputError.
    """
    texts = {name: (model.folder / name).read_text() for name in ("LICENSE", "data_license.txt")}
    others = [path for path in _visible(model.folder) if path.name not in (*FILES, CHECKSUMS)]
    save_bundle(
        folder,
        Parts(
            name=model.name, denoiser=model.denoiser, classes=model.classes,
            preprocess=preprocess, budgets=budgets, taxonomy=model.taxonomy, card=card,
            license=texts["LICENSE"], data_license=texts["data_license.txt"], origin=origin,
            space=model.space, radius=getattr(model.classifier.meter, "radius", None),
            others={path.name: path.read_bytes() for path in others},
        ),
    )  # fmt: skip


def check_place(folder: Path) -> None:
    """Raises OutputError for what is no place for a bundle: a file, or a folder with other files in it."""
    try:
        present = {path.name for path in _visible(folder)} if folder.exists() else set()
        listed = checksums(folder) if CHECKSUMS in present else {}
    except (OSError, ValueError) as error:
        raise OutputError(
            f"No bundle can be written to {folder} ({error}). Choose another."
        ) from error
    if folder.resolve() == Path.cwd():
        raise OutputError(
            f"{folder} is the working folder: a bundle takes one of its own. Name another."
        )
    if not present <= {CHECKSUMS, *listed}:
        raise OutputError(
            f"{folder} has other files in it, in whose place the bundle would be. Choose a new folder."
        )


def replace_texts(folder: Path, texts: dict[str, str]) -> None:
    """Write the card or the licences of a bundle anew, and its checksums.

    Raises ModelError for a file that is not one of these: nothing else of a bundle may change.
    """
    check_files(folder)
    for name, text in texts.items():
        if name not in ("card.md", "LICENSE", "data_license.txt"):
            raise ModelError(
                f"{name} is no text of a bundle; card.md, LICENSE, data_license.txt are."
            )
        (folder / name).write_text(text)
    _write_checksums(folder)


def _write_checksums(folder: Path) -> None:
    names = sorted(path for path in _visible(folder) if path.name != CHECKSUMS)
    listed = {path.name: _sha256(path) for path in names}
    (folder / CHECKSUMS).write_text(json.dumps(listed, indent=1) + "\n")


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _vector_errors(
    meter: Meter, space: Space, device: torch.device | str, pixels: np.ndarray, columns: int
) -> Float[np.ndarray, "n t k"]:
    """Errors of a few images at a few noise levels, with fixed noise."""
    images = space.encode(to_tensor(pixels).to(device))
    noise = standard_normal(tuple(images.shape), 0, "test vectors", 0).to(device)
    labels = torch.arange(columns, device=device).expand(len(images), -1)
    with torch.inference_mode():
        found = [
            meter(images, noise, torch.full((len(images),), sigma, device=device), labels)
            for sigma in VECTOR_SIGMAS
        ]
    return torch.stack(found, dim=1).cpu().numpy()


def _write_vectors(path: Path, network: Network, size: int, classes: Classes) -> None:
    """Discs of several colours on a pale ground: shapes of no one's cells."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    discs = [np.hypot(x, y) < radius for radius in (0.2, 0.3, 0.4)]
    colours = np.array([[120, 60, 150], [160, 120, 180], [90, 40, 110]])
    pixels = np.stack(
        [np.where(d, c[:, None, None], 220) for d, c in zip(discs, colours, strict=True)]
    )
    pixels = pixels.astype(np.uint8)
    errors = _vector_errors(network.meter, network.space, "cpu", pixels, len(classes) + 1)
    np.savez(path, pixels=pixels, errors=errors)


# --- reading -------------------------------------------------------------------------------------


def find_bundle(model: str | Path) -> Path:
    """Folder of a bundle, of the run it is in, or of a shipped model by name.

    Raises ModelError naming what there is.
    """
    for folder in (Path(model), Path(model) / "bundle", ZOO / str(model)):
        if (folder / "config.json").is_file():
            return folder
    raise ModelError(
        f"There is no model '{model}': it is neither a bundle folder (one with config.json) nor a "
        f"shipped model. Shipped: {', '.join(shipped()) or 'none'}."
    )


def shipped() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in ZOO.glob("*/config.json"))


def checksums(folder: Path) -> dict[str, str]:
    """sha256 of every file of a bundle, as released. Raises OSError, ValueError."""
    listed = json.loads((folder / CHECKSUMS).read_text())
    if not isinstance(listed, dict):
        raise ValueError(f"{CHECKSUMS} is no list of files")
    return listed


def weights_of(folder: Path) -> str:
    """sha256 of model.safetensors, as released."""
    return checksums(folder)["model.safetensors"]


def check_files(folder: Path) -> None:
    """Raises ChangedBundle if a file is missing, changed, or not listed.

    Names that begin with a dot, as of .DS_Store, are passed over: nothing reads them.
    """
    try:
        listed = checksums(folder)
    except (OSError, ValueError) as error:
        raise ChangedBundle(
            f"{folder} has no readable {CHECKSUMS}, so it cannot be trusted. Copy the bundle again."
        ) from error
    present = {path.name for path in _visible(folder)} - {CHECKSUMS}
    for name in sorted(listed.keys() | present | set(FILES)):
        if name not in present:
            problem = "is missing"
        elif name not in listed:
            problem = "does not belong to it"
        elif _sha256(folder / name) != listed[name]:
            problem = "is not the file that was released"
        else:
            continue
        raise ChangedBundle(f"{folder}: {name} {problem}. Copy the whole bundle again.")


def read_weights(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of a compact network by name, and the classes. Raises ChangedBundle, ModelError."""
    check_files(folder)
    config = json.loads((folder / "config.json").read_text())
    if config["network"] != "compact":
        raise ModelError(
            f"{folder} has its class vectors folded and cannot be trained on. Begin with the run that it "
            "was made by, or with latent.start."
        )
    return load_file(folder / "model.safetensors"), config["classes"]


@dataclass(frozen=True)
class Network:
    """What a bundle's weights make: a denoiser, where its noise is added, and its errors by torch."""

    denoiser: NetworkDenoiser
    space: Space
    meter: DenoiserMeter
    together: bool

    def to(self, device: torch.device | str) -> Network:
        """On a device; large networks in half precision where that is a GPU."""
        self.denoiser.to(device)
        if isinstance(self.space, LatentSpace):
            self.space.to(device)
            if torch.device(device).type != "cpu":
                self.denoiser.network.half()
                self.space.to(torch.float16)
        return self


def _network(config: dict[str, Any], weights: dict[str, Tensor]) -> Network:
    plain = {name: value.float() for name, value in weights.items()}
    denoiser: NetworkDenoiser
    if config["network"] == "compact":
        settings = CompactSettings.model_validate(config["settings"])
        compact = CompactNetwork(settings)
        compact.load_state_dict(plain)
        denoiser = EDMDenoiser(compact, config["sigma_data"]).eval().requires_grad_(False)
        return Network(denoiser, PIXELS, DenoiserMeter(denoiser), settings.form == "heads")
    shape = LatentShape.model_validate(config["settings"])
    latent, space = shape.build()
    vae = {name: plain.pop(name) for name in [*plain] if name.startswith(VAE)}
    space.vae.load_state_dict({name.removeprefix(VAE): value for name, value in vae.items()})
    latent.load_state_dict(plain)
    denoiser = latent.denoiser().eval().requires_grad_(False)
    return Network(denoiser, space, DenoiserMeter(denoiser, shape.disc), together=False)


def load(
    model: str | Path = DEFAULT_MODEL, device: str | torch.device = "cpu", engine: str = "auto",
    calibrated: bool = True,
) -> Model:  # fmt: skip
    """Load a bundle folder, or a shipped model by name.

    `engine` computes the errors (engines/engine.py); "auto" is CYTODIFFUSION_ENGINE or, on the
    processor, the quickest one that is installed. Not `calibrated`: without budgets, to be calibrated
    anew; so may be a bundle of an older format whose weights are as today's. Raises ModelError when
    there is no such model, ChangedBundle when a file is not as it was released, SettingsError for an
    engine that is not one.
    """
    folder = find_bundle(model)
    check_files(folder)
    config = json.loads((folder / "config.json").read_text())
    known = range(FORMAT if calibrated else SAME_WEIGHTS, FORMAT + 1)
    if config.get("format") in range(1, known[0]):
        anew = "Calibrate it anew with `models calibrate`, or run its `train` again, which calibrates a "
        anew += "finished run."
        raise ModelError(
            f"{folder} has format {config['format']}, of an older cytodiffusion; this version reads format "
            f"{FORMAT}. {anew if config['format'] >= SAME_WEIGHTS else 'Train it anew with `train`.'}"
        )
    if config.get("format") not in known or config.get("network") not in ("compact", "latent"):
        raise ModelError(
            f"{folder} has format {config.get('format')} and network '{config.get('network')}'; this "
            f"version reads format {FORMAT} with 'compact' or 'latent'. Install a newer cytodiffusion."
        )
    network = _network(config, load_file(folder / "model.safetensors")).to(device)
    calibration = json.loads((folder / "calibration.json").read_text())
    if engine == "auto":
        small = config["network"] == "compact" and torch.device(device).type == "cpu"
        engine = os.environ.get("CYTODIFFUSION_ENGINE") or (best_engine() if small else "torch")
    classifier = Classifier(
        network.denoiser,
        Classes(tuple(config["classes"])),
        calibration_from_json(calibration) if calibrated else {},
        POSES,
        together=network.together,
        name=config["name"],
        device=device,
        meter=network.meter
        if engine == "torch"
        else make_engine(engine, network.denoiser, images=_cells(config)),
        space=network.space,
    )
    preprocess = Preprocess.model_validate_json((folder / "preprocess.json").read_text())
    taxonomy = Taxonomy.load(folder / "labels.yaml")
    return Model(
        config["name"], folder, classifier, network.denoiser, preprocess, taxonomy, config, engine
    )


def compact_network(model: Model) -> tuple[CompactNetwork, float]:
    """The network whose trunk gives features, and its sigma_data. Raises ModelError for another."""
    network = model.denoiser.network
    if not isinstance(network, CompactNetwork) or not isinstance(model.denoiser, EDMDenoiser):
        raise ModelError(
            f"'{model.name}' has no compact network, whose trunk gives features. Use a model that has one."
        )
    return network, model.denoiser.sigma_data


def _cells(config: dict[str, Any]) -> Float[Tensor, "n c h w"] | None:
    """The demo cells, where this model is one of their size: they set the ranges of 8-bit engines."""
    paths = sorted(DEMO.glob("*.png"))
    size = config["settings"].get("size")
    shown = [np.array(decode(path.read_bytes())).transpose(2, 0, 1) for path in paths]
    return to_tensor(np.stack(shown)) if shown and shown[0].shape[1] == size else None


def verify(model: str | Path, device: str | torch.device = "cpu") -> float:
    """Recompute the test vectors; returns the largest relative difference found.

    Raises ChangedBundle for a changed file, ModelError where the difference is over TOLERANCE.
    """
    loaded = load(model, device, engine="torch")
    with np.load(loaded.folder / "test_vectors.npz", allow_pickle=False) as vectors:
        pixels, wanted = vectors["pixels"], vectors["errors"]
    meter, columns = loaded.classifier.meter, len(loaded.classes) + 1
    found = _vector_errors(meter, loaded.space, device, pixels, columns)
    worst = float(np.abs(found / wanted - 1).max())
    if not worst <= TOLERANCE:  # also where it is no number
        raise ModelError(
            f"{loaded.folder} does not give its test vectors here: errors differ by {worst:.2g} of "
            f"their value ({TOLERANCE:.2g} allowed). Try `cytodiffusion doctor`."
        )
    return worst
