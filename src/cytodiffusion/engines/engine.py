"""The same errors, quicker: engines that measure without making the guesses.

A classifier needs of each guess only how far it is from the clean image (graph.py). An engine runs
that graph in batches of one size, gives the same bits from run to run, and may be called from several
threads, each of which runs a batch of its own on one processor:

    engine              x torch   from torch   start, s   what it is
    torch                  1.0           0        0       `DenoiserMeter`: the reference
    compile                1.1        2e-6       20       torch.compile; needs a C++ compiler
    torch-bf16             1.7        2e-3      0.2       torch in bfloat16, where the processor has it
    onnxruntime            1.3        2e-6      0.5       ONNX Runtime
    openvino               1.3        2e-6      1.4       OpenVINO
    openvino-bf16          2.2        3e-3      1.4       OpenVINO in bfloat16, where the processor has it
    onnxruntime-int8       2.4        2e-2      0.6       ONNX Runtime, most convolutions on 8 bits
    openvino-int8          2.5        2e-2      2.6       OpenVINO, most convolutions on 8 bits

Rows a second and largest relative difference of an error, for the released network on one core of an
AMD EPYC 9004 with torch 2.13, and the processor time of a start when the graph is kept from an
earlier one; recipes/bench_engines.py measures them anew. ONNX Runtime goes before OpenVINO: what
little that is quicker, it spends on its start.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cytodiffusion.classify.evidence import DenoiserMeter, LookingMeter, Meter
from cytodiffusion.engines.graph import (
    EXTRAS,
    OPSET,
    ErrorNetwork,
    discs,
    need,
    noisy_rows,
    onnx_graph,
    rounded,
)
from cytodiffusion.errors import ModelError, SettingsError
from cytodiffusion.types import Denoiser

ROWS = 16  # rows of a batch
LEVELS = 0.1, 3.0  # lowest and highest sigma at which engines are held against torch
GRAPH = 3  # counts changes of the graphs, so that a cached one is not mistaken for today's

# Largest difference allowed between an engine's errors and torch's, relative to torch's.
TOLERANCES = {
    "torch": 1e-4, "compile": 1e-4, "torch-bf16": 1e-2, "onnxruntime": 1e-4, "openvino": 1e-4,
    "openvino-bf16": 1e-2, "onnxruntime-int8": 6e-2, "openvino-int8": 6e-2,
}  # fmt: skip
NEEDS = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}
EXACT = ("onnxruntime", "openvino", "torch")  # the best first; all agree to rounding
ROUNDED = ("onnxruntime-int8", "openvino-int8", *EXACT)

Told = tuple[Float[Tensor, "n j"], Float[Tensor, "n f"]]  # errors and features
Run = Callable[..., Told]  # (clean, noise, sigma[, label]) of ROWS rows -> what the graph tells


# --- kept on disk --------------------------------------------------------------------------------


def cache_folder() -> Path:
    """CYTODIFFUSION_CACHE, or ~/.cache/cytodiffusion. It may be deleted at any time."""
    return Path(os.environ.get("CYTODIFFUSION_CACHE") or Path.home() / ".cache" / "cytodiffusion")


def _key(network: ErrorNetwork, images: Tensor | None) -> str:
    """What a graph depends on: weights, shape, this version's graph, torch, images of the ranges."""
    about = (GRAPH, OPSET, torch.__version__, network.sigma_data, network.network.settings)
    digest = hashlib.sha256(repr(about).encode())
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().numpy().tobytes())
    if images is not None:
        digest.update(images.cpu().numpy().tobytes())
    return digest.hexdigest()


def _kept(name: str) -> bytes | None:
    with suppress(OSError, RuntimeError):  # RuntimeError: there is no home folder
        return (cache_folder() / name).read_bytes()
    return None


def _keep(name: str, graph: bytes) -> None:
    """Write into the cache, whole or not at all; where that fails, the next start is slower."""
    with suppress(OSError, RuntimeError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=folder, suffix=".part")
        try:
            with open(handle, "wb") as file:  # noqa: PTH123
                file.write(graph)
            Path(part).replace(folder / name)
        finally:
            Path(part).unlink(missing_ok=True)


# --- engines -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GraphMeter:
    """A `Meter` that runs a graph on batches of ROWS rows, the last one filled up with copies."""

    run: Run
    heads: bool
    features: int = 0  # how many are of use: none where they hang on the label

    @torch.inference_mode()
    def __call__(
        self,
        clean: Float[Tensor, "n c h w"],
        noise: Float[Tensor, "n c h w"],
        sigma: Float[Tensor, " n"],
        labels: Int[Tensor, "n k"],
    ) -> Float[Tensor, "n k"]:
        if self.heads:
            return self.look(clean, noise, sigma, labels)[0]
        each = [t.repeat_interleave(labels.shape[1], dim=0) for t in (clean, noise, sigma)]
        return self._all(*each, labels.flatten())[0].view(labels.shape)

    @torch.inference_mode()
    def look(
        self,
        clean: Float[Tensor, "n c h w"],
        noise: Float[Tensor, "n c h w"],
        sigma: Float[Tensor, " n"],
        labels: Int[Tensor, "n k"],
    ) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n f"]]:
        """The errors and the features, from one pass of a graph with heads."""
        errors, features = self._all(clean, noise, sigma)
        return errors.gather(1, labels), features

    def _all(self, *inputs: Tensor) -> Told:
        count = len(inputs[0])
        if count == ROWS:
            return self.run(*inputs)
        found = []
        for start in range(0, count, ROWS):
            rows = torch.arange(start, start + ROWS, device=inputs[0].device).clamp_max(count - 1)
            found.append(self.run(*(t[rows] for t in inputs)))
        errors, features = (torch.cat(each)[:count] for each in zip(*found, strict=True))
        return errors, features


def installed(name: str) -> bool:
    """Whether the libraries of an engine are there."""
    modules = NEEDS.get(name.split("-")[0], ())
    return all(importlib.util.find_spec(module) is not None for module in modules)


def best_engine(*, exact: bool = True) -> str:
    """The first installed engine of EXACT or, where 8 bits will do, of ROUNDED."""
    return next(name for name in (EXACT if exact else ROUNDED) if installed(name))


def make_engine(
    name: str,
    denoiser: Denoiser,
    *,
    images: Float[Tensor, "n c h w"] | None = None,
    workers: int | None = None,
) -> Meter:
    """An engine for a denoiser, held against it before it is handed out.

    `images` set the ranges of the 8-bit engines: cells do better than the discs that serve without.
    `workers` is the number of threads that will call it at a time, by default the processors there
    are. With "torch" and "compile" one thread a call is the caller's to set (torch.set_num_threads).

    Raises SettingsError for an engine that is not one or a device it cannot use, MissingExtra where
    its library is not installed, ModelError for a network it cannot run or errors unlike torch's.
    """
    if name not in TOLERANCES:
        raise SettingsError(f"There is no engine '{name}'. There are: {', '.join(TOLERANCES)}.")
    if name == "torch":
        return DenoiserMeter(denoiser)
    network = copy.deepcopy(ErrorNetwork(denoiser)).eval().requires_grad_(False)
    device = next(network.parameters()).device.type
    if device != "cpu" and name != "compile":
        raise SettingsError(
            f"The engine '{name}' runs on the processor, and the model is on '{device}'. "
            "Use the engine 'torch', or the device 'cpu'."
        )
    if name == "compile":
        return _checked(name, network, denoiser, torch.compile(network, dynamic=False))
    if name == "torch-bf16":
        return _checked(name, network, denoiser, _bfloat16(network))
    backend, _, kind = name.partition("-")
    sys.modules.setdefault(
        "openvino_telemetry", cast(Any, None)
    )  # it calls home when it is imported
    library = [need(module, EXTRAS[backend]) for module in NEEDS[backend]][-1]
    side = network.network.settings.size
    ranges = None if kind != "int8" else discs(side) if images is None else images
    file = f"{_key(network, ranges)}.{'int8' if kind == 'int8' else 'float32'}.onnx"

    def start(graph: bytes) -> Meter:
        if backend == "onnxruntime":
            return _checked(name, network, denoiser, run_onnxruntime(library, graph, network))
        run = run_openvino(library, graph, network, kind == "bf16", workers or _processors())
        return _checked(name, network, denoiser, run)

    if graph := _kept(file):
        with suppress(Exception):  # spoilt: made anew below
            return start(graph)
    graph = onnx_graph(network if ranges is None else rounded(network, ranges))
    meter = start(graph)
    _keep(file, graph)
    return meter


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _bfloat16(network: ErrorNetwork) -> Run:
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def run(*inputs: Tensor) -> Told:
        with torch.autocast("cpu", torch.bfloat16):
            return network(*inputs)

    return run


def run_onnxruntime(library: Any, graph: bytes, network: ErrorNetwork) -> Run:
    """A session runs in the thread that calls it, and may be called from several."""
    options = library.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    session = library.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Told:
        feed = {n: t.contiguous().numpy() for n, t in zip(network.inputs, inputs, strict=True)}
        errors, features = map(torch.from_numpy, session.run(None, feed))
        return errors, features

    return run


def run_openvino(
    library: Any, graph: bytes, network: ErrorNetwork, half: bool, workers: int
) -> Run:
    """A stream for each worker, a request for each thread. Raises SettingsError without bfloat16."""
    core = library.Core()
    if half and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise SettingsError("This processor has no bfloat16. Use the engine 'openvino'.")
    model = core.read_model(graph)
    side = network.network.settings.size
    pixels, number = [ROWS, 3, side, side], [ROWS]
    shapes = {"clean": pixels, "noise": pixels, "sigma": number, "label": number}
    model.reshape({name: shapes[name] for name in network.inputs})
    how = {
        "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",  # left out, it is what is quickest
        "NUM_STREAMS": workers,
        "INFERENCE_NUM_THREADS": workers,
        "ENABLE_CPU_PINNING": False,
    }
    compiled, mine = core.compile_model(model, "CPU", how), threading.local()

    def run(*inputs: Tensor) -> Told:
        if not hasattr(mine, "request"):
            mine.request = compiled.create_infer_request()
        feed = {n: t.contiguous().numpy() for n, t in zip(network.inputs, inputs, strict=True)}
        found = mine.request.infer(feed)
        errors, features = (torch.from_numpy(found[place].copy()) for place in range(2))
        return errors, features

    return run


# --- held against torch --------------------------------------------------------------------------


def difference(meter: Meter, denoiser: Denoiser, images: Float[Tensor, "m c h w"]) -> float:
    """Largest difference of what an engine tells from what torch does, on these images: see `apart`."""
    network = ErrorNetwork(denoiser)
    clean, noise, sigma = (
        t.to(next(network.parameters()).device)
        for t in noisy_rows(images, ROWS, *LEVELS, network)[:3]
    )
    labels = torch.arange(network.network.settings.classes + 1, device=clean.device)
    labels = labels.expand(len(clean), -1)
    with torch.inference_mode():
        rows, torchs = (clean, noise, sigma, labels), DenoiserMeter(denoiser)
        if isinstance(meter, LookingMeter) and meter.features:
            return apart(meter.look(*rows), torchs.look(*rows))
        return float((meter(*rows) / torchs(*rows) - 1).abs().max())


def apart(found: Told, wanted: Told) -> float:
    """Largest difference of errors, relative to each; or of features, relative to the largest."""
    errors = (found[0] / wanted[0] - 1).abs().max()
    features = (found[1] - wanted[1]).abs().max() / wanted[1].abs().max()
    return float(torch.maximum(errors, features))  # no number where either is none


def check_difference(name: str, found: float) -> float:
    """Raises ModelError where an engine's errors differ from torch's by more than it may."""
    if not found <= TOLERANCES[name]:  # also where it is no number
        raise ModelError(
            f"The engine '{name}' does not give this model's errors here: they, or its features, differ "
            f"from torch's by {found:.2g} of their value ({TOLERANCES[name]:.2g} allowed). Use the engine "
            "'torch'."
        )
    return found


def _checked(name: str, network: ErrorNetwork, denoiser: Denoiser, run: Run) -> Meter:
    meter = GraphMeter(run, network.heads, network.network.features_told)
    check_difference(name, difference(meter, denoiser, discs(network.network.settings.size)))
    return meter
