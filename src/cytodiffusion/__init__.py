"""CytoDiffusion names blood cells with a diffusion model.

>>> import cytodiffusion
>>> model = cytodiffusion.load("pbc8")  # a shipped model, or the folder of a bundle
>>> model.classes.names[:2]
('basophil', 'eosinophil')

Names are imported when they are first used, so that `import cytodiffusion` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "load": "cytodiffusion.bundle",
    "verify": "cytodiffusion.bundle",
    "Model": "cytodiffusion.bundle",
    "Classifier": "cytodiffusion.classify.classifier",
    "Answer": "cytodiffusion.types",
    "Classes": "cytodiffusion.types",
    "Denoiser": "cytodiffusion.types",
    "ErrorTable": "cytodiffusion.types",
    "Draws": "cytodiffusion.classify.draws",
    "stratified": "cytodiffusion.classify.draws",
    "log_evidence": "cytodiffusion.classify.evidence",
    "EDMDenoiser": "cytodiffusion.diffusion.precondition",
    "VPDenoiser": "cytodiffusion.diffusion.precondition",
    "sample": "cytodiffusion.diffusion.sample",
    "CompactNetwork": "cytodiffusion.networks.compact",
    "CompactSettings": "cytodiffusion.networks.compact",
    "GaussianWorld": "cytodiffusion.networks.exact",
    "Preprocess": "cytodiffusion.data.images",
    "Sample": "cytodiffusion.data.sample",
    "Taxonomy": "cytodiffusion.data.taxonomy",
    "read_dataset": "cytodiffusion.data.readers",
    "TrainSettings": "cytodiffusion.train.settings",
    "CytoDiffusionError": "cytodiffusion.errors",
}

__all__ = ["__version__", *_WHERE]

if TYPE_CHECKING:
    from cytodiffusion.bundle import Model, load, verify
    from cytodiffusion.classify.classifier import Classifier
    from cytodiffusion.classify.draws import Draws, stratified
    from cytodiffusion.classify.evidence import log_evidence
    from cytodiffusion.data.images import Preprocess
    from cytodiffusion.data.readers import read_dataset
    from cytodiffusion.data.sample import Sample
    from cytodiffusion.data.taxonomy import Taxonomy
    from cytodiffusion.diffusion.precondition import EDMDenoiser, VPDenoiser
    from cytodiffusion.diffusion.sample import sample
    from cytodiffusion.errors import CytoDiffusionError
    from cytodiffusion.networks.compact import CompactNetwork, CompactSettings
    from cytodiffusion.networks.exact import GaussianWorld
    from cytodiffusion.train.settings import TrainSettings
    from cytodiffusion.types import Answer, Classes, Denoiser, ErrorTable


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'cytodiffusion' has no attribute '{name}'")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
