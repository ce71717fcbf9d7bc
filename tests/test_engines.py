"""Every engine gives what torch gives, to the bit from run to run, and keeps nothing it need not."""

from __future__ import annotations

import copy
import functools
import json
import os
import sys
import threading
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import cli, tiny_model
from torch import Tensor

from cytodiffusion.classify.evidence import DenoiserMeter, Meter
from cytodiffusion.diffusion.precondition import EDMDenoiser, VPDenoiser
from cytodiffusion.engines import engine as engines
from cytodiffusion.engines.engine import (
    ROWS,
    TOLERANCES,
    GraphMeter,
    best_engine,
    check_difference,
    difference,
    installed,
    make_engine,
)
from cytodiffusion.engines.export import About, export
from cytodiffusion.engines.graph import ErrorNetwork, discs, noisy_rows, onnx_graph, rounded
from cytodiffusion.errors import MissingExtra, ModelError, OutputError, SettingsError
from cytodiffusion.networks.compact import CompactNetwork, CompactSettings, Form

ENGINES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(not installed(name), reason=f"{name} is not installed"),
    )
    for name in TOLERANCES
    if name != "compile"
]
CLASSES = 3


@functools.cache
def denoiser(form: Form) -> EDMDenoiser:
    """A tiny network whose every weight counts: layers that begin at zero are drawn as well."""
    torch.manual_seed(1)
    settings = CompactSettings(
        classes=CLASSES, size=16, form=form, unshuffle=2, width=16, multipliers=(1, 2), blocks=1,
        attention=4, head_width=8,
    )  # fmt: skip
    network = CompactNetwork(settings)
    for weight in network.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.1)
    return EDMDenoiser(network).eval().requires_grad_(False)


def rows(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, noise, noise levels and two labels for each, among them "any cell"."""
    generator = torch.Generator().manual_seed(count)
    clean = torch.rand(count, 3, 16, 16, generator=generator) * 2 - 1
    noise = torch.randn(clean.shape, generator=generator)
    sigma = torch.rand(count, generator=generator) * 2 + 0.1
    labels = torch.stack([torch.arange(count) % CLASSES, torch.full((count,), CLASSES)], dim=1)
    return clean, noise, sigma, labels


@functools.cache
def engine(name: str, form: Form) -> Meter:
    """An engine that several tests may use."""
    return make_engine(name, denoiser(form), workers=2)


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("CYTODIFFUSION_CACHE", str(shared_cache))
    return shared_cache


# --- the same answer -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["heads", "conditional"])
def test_the_graph_is_the_denoiser(form: Form) -> None:
    network, (clean, noise, sigma, _) = ErrorNetwork(denoiser(form)), rows(5)
    every = torch.arange(CLASSES + 1).expand(5, -1)
    meter = DenoiserMeter(denoiser(form))
    wanted = meter(clean, noise, sigma, every)
    if form == "heads":
        found, features = network(clean, noise, sigma)
        told, seen = meter.look(clean, noise, sigma, every)
        assert told.equal(wanted)
        assert features.shape == (5, meter.features)
        torch.testing.assert_close(features, seen, rtol=1e-5, atol=1e-6)
    else:
        assert meter.features == 0
        found = torch.cat([network(clean, noise, sigma, label)[0] for label in every.T], dim=1)
    assert found.shape == (5, CLASSES + 1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", ["heads", "conditional"])
@pytest.mark.parametrize("name", ENGINES)
def test_engines_agree_with_torch(name: str, form: Form) -> None:
    meter = engine(name, form)
    found, wanted = meter(*rows(21)), DenoiserMeter(denoiser(form))(*rows(21))
    assert found.shape == (21, 2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=TOLERANCES[name], atol=0)
    if name == "torch":
        return
    few = [t[:7] for t in rows(21)]  # the same rows in other company: the same bits
    assert meter(*few).equal(found[:7])
    assert meter.features == DenoiserMeter(denoiser(form)).features
    if meter.features:
        errors, features = meter.look(*rows(21))
        assert errors.equal(found)
        assert meter.look(*few)[1].equal(features[:7])
        seen = DenoiserMeter(denoiser(form)).look(*rows(21))[1]
        torch.testing.assert_close(
            features, seen, rtol=0, atol=TOLERANCES[name] * float(seen.abs().max())
        )
    turned = [t.flip(0) for t in rows(21)]
    assert meter(*turned).flip(0).equal(found)


@pytest.mark.parametrize("wrong", [1.1, float("nan")])
@pytest.mark.parametrize("place", [0, 1], ids=["errors", "features"])
def test_an_engine_is_held_to_errors_and_features(place: int, wrong: float) -> None:
    """One number of either that is off, or none at all, is seen; right ones pass."""
    network = ErrorNetwork(denoiser("heads"))

    def spoilt(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        told = network(*inputs)
        largest = int(told[place].abs().argmax())
        told[place].view(-1)[largest] *= wrong
        return told

    features = network.network.features_told
    good, bad = (GraphMeter(run, heads=True, features=features) for run in (network, spoilt))
    assert difference(good, denoiser("heads"), discs(16)) < 1e-5
    with pytest.raises(ModelError, match="does not give this model's errors"):
        check_difference("onnxruntime-int8", difference(bad, denoiser("heads"), discs(16)))


@pytest.mark.parametrize("name", ENGINES)
def test_threads_and_restarts_change_no_bit(name: str) -> None:
    batches = [rows(ROWS), [t.flip(0) for t in rows(ROWS)]]
    meter, again = engine(name, "heads"), make_engine(name, denoiser("heads"), workers=1)
    alone = [again(*batch) for batch in batches]
    found: list[list[Tensor]] = [[], []]

    def work(i: int) -> None:
        found[i].extend(meter(*batches[i]) for _ in range(8))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(found[i]) == 8
        assert all(errors.equal(alone[i]) for errors in found[i])


def test_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the compiler itself, which takes 20 s."""
    given = []
    monkeypatch.setattr(torch, "compile", lambda network, **how: given.append(how) or network)
    meter = make_engine("compile", denoiser("heads"))
    wanted = DenoiserMeter(denoiser("heads"))(*rows(3))
    torch.testing.assert_close(meter(*rows(3)), wanted, rtol=TOLERANCES["compile"], atol=0)
    assert given == [{"dynamic": False}]


def test_engines_leave_the_denoiser_alone() -> None:
    mine = EDMDenoiser(CompactNetwork(CompactSettings(classes=2, size=16, width=16)))
    before = {name: w.stride() for name, w in mine.named_parameters()}
    mine.network.eval()  # and `mine` itself is in the mode for training
    make_engine("torch-bf16", mine)
    if installed("onnxruntime"):
        onnx_graph(ErrorNetwork(mine))
    assert {name: w.stride() for name, w in mine.named_parameters()} == before
    assert all(w.requires_grad for w in mine.parameters())
    assert mine.training
    assert not any(layer.training for layer in mine.network.modules())


# --- 8 bits --------------------------------------------------------------------------------------


def test_eight_bits_are_eight_bits() -> None:
    """Inputs take at most 256 values, weights 127; the first and the last layers stay as they were."""
    network = rounded(ErrorNetwork(denoiser("heads")), discs(16))
    inner = network.network.trunk.middle.block.conv1
    seen: list[Tensor] = []

    def conv2d(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
        seen.extend([x, weight])
        return torch.nn.functional.conv2d(x, weight, *rest)

    from cytodiffusion.engines import graph

    kept = graph.functional
    graph.functional = ModuleType("functional")
    graph.functional.conv2d = conv2d
    try:
        inner(torch.randn(4, inner.conv.in_channels, 8, 8))
    finally:
        graph.functional = kept
    assert 100 < len(seen[0].unique()) <= 256
    assert all(len(weight.unique()) <= 127 for weight in seen[1])
    assert type(network.network.stem) is torch.nn.Conv2d
    assert type(network.network.base) is torch.nn.Conv2d
    assert type(network.network.change.out) is torch.nn.Conv2d


def test_ranges_come_from_the_images() -> None:
    dark, pale = (
        rounded(ErrorNetwork(denoiser("heads")), torch.full((1, 3, 16, 16), v)) for v in (-1.0, 1.0)
    )
    steps = [net.network.trunk.middle.block.conv1.entering for net in (dark, pale)]
    assert steps[0] != steps[1]


# --- held against torch --------------------------------------------------------------------------


def test_a_wrong_engine_is_not_handed_out() -> None:
    good = make_engine("torch-bf16", denoiser("heads"))
    assert isinstance(good, GraphMeter)

    def spoilt(error: float, feature: float) -> float:
        def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            errors, features = good.run(*inputs)
            return error * errors, feature * features

        return difference(GraphMeter(run, True, good.features), denoiser("heads"), discs(16))

    found = spoilt(1.1, 1.0)
    assert found == pytest.approx(0.1, abs=0.02)
    assert spoilt(1.0, 1.3) == pytest.approx(0.3, abs=0.02)
    with pytest.raises(ModelError, match="does not give this model's errors"):
        check_difference("openvino-int8", found)
    with pytest.raises(ModelError):
        check_difference("openvino", float("nan"))


def test_an_engine_that_is_none() -> None:
    with pytest.raises(SettingsError, match=r"no engine 'tpu'.*openvino"):
        make_engine("tpu", denoiser("heads"))


def test_other_networks_run_on_torch_only() -> None:
    other = VPDenoiser(torch.nn.Identity(), torch.tensor([0.1, 1.0]))
    assert isinstance(make_engine("torch", other), DenoiserMeter)
    with pytest.raises(ModelError, match="Use the engine 'torch'"):
        make_engine("torch-bf16", other)


# --- extras --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "library", "extra"),
    [("onnxruntime", "onnxruntime", "onnx"), ("onnxruntime-int8", "onnx", "onnx"),
     ("openvino", "openvino", "openvino"), ("openvino-int8", "onnx", "openvino")],
)  # fmt: skip
def test_a_missing_library_names_the_pip_line(
    name: str, library: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in set(engines.NEEDS[name.split("-")[0]]) - {library}:
        there = ModuleType(other)
        there.__spec__ = ModuleSpec(other, None)
        monkeypatch.setitem(sys.modules, other, there)
    monkeypatch.setitem(sys.modules, library, None)
    assert not installed(name)
    with pytest.raises(MissingExtra, match=rf"{library}.*pip install 'cytodiffusion\[{extra}\]'"):
        make_engine(name, denoiser("heads"))


def test_the_best_engine_is_one_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"torch", "openvino", "openvino-int8"}
    monkeypatch.setattr(engines, "installed", lambda name: name in there)
    assert (best_engine(), best_engine(exact=False)) == ("openvino", "openvino-int8")
    there |= {"onnxruntime", "onnxruntime-int8"}
    assert (best_engine(), best_engine(exact=False)) == ("onnxruntime", "onnxruntime-int8")
    there = {"torch"}
    assert (best_engine(), best_engine(exact=False)) == ("torch", "torch")


@pytest.mark.skipif(not installed("openvino"), reason="openvino is not installed")
def test_openvino_does_not_call_home() -> None:
    make_engine("openvino", denoiser("heads"))
    assert sys.modules["openvino_telemetry"] is None


# --- the cache -----------------------------------------------------------------------------------

cached = pytest.mark.skipif(not installed("onnxruntime"), reason="onnxruntime is not installed")


@pytest.fixture
def count_graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    real = engines.onnx_graph

    def counting(network: ErrorNetwork) -> bytes:
        made.append(1)
        return real(network)

    monkeypatch.setattr(engines, "onnx_graph", counting)
    return made


@cached
def test_a_graph_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count_graphs: list[int]
) -> None:
    monkeypatch.setenv("CYTODIFFUSION_CACHE", str(tmp_path / "new" / "folder"))
    meters = [make_engine("onnxruntime", denoiser("heads")) for _ in range(2)]
    assert len(count_graphs) == 1
    assert meters[0](*rows(4)).equal(meters[1](*rows(4)))
    (kept,) = (tmp_path / "new" / "folder").iterdir()
    assert kept.suffix == ".onnx"
    other = EDMDenoiser(denoiser("heads").network, sigma_data=0.6)
    make_engine("onnxruntime", other)
    assert len(count_graphs) == 2  # another model: another graph


@cached
def test_weights_that_hardly_differ_have_a_graph_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count_graphs: list[int]
) -> None:
    """As after a little fine-tuning: the kept graph would pass for theirs, within the tolerance."""
    monkeypatch.setenv("CYTODIFFUSION_CACHE", str(tmp_path))
    make_engine("onnxruntime", denoiser("heads"))
    near = copy.deepcopy(denoiser("heads"))
    for weight in near.parameters():
        weight.mul_(1 + 1e-6)
    make_engine("onnxruntime", near)
    assert count_graphs == [1, 1]
    assert len(list(tmp_path.iterdir())) == 2


@cached
@pytest.mark.parametrize("spoil", ["cut", "nonsense", "of another model"])
def test_a_spoilt_graph_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count_graphs: list[int], spoil: str
) -> None:
    monkeypatch.setenv("CYTODIFFUSION_CACHE", str(tmp_path))
    good = make_engine("onnxruntime", denoiser("heads"))
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    other = EDMDenoiser(denoiser("heads").network, sigma_data=0.7)
    wrong = engines.onnx_graph(ErrorNetwork(other)) if spoil == "of another model" else b"no graph"
    kept.write_bytes(whole[:-100] if spoil == "cut" else wrong)
    count_graphs.clear()
    assert make_engine("onnxruntime", denoiser("heads"))(*rows(3)).equal(good(*rows(3)))
    assert count_graphs == [1]
    assert kept.read_bytes() == whole


@cached
def test_a_cache_that_cannot_be_written_is_no_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CYTODIFFUSION_CACHE", str(tmp_path / "file" / "below"))
    make_engine("onnxruntime", denoiser("heads"))
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    monkeypatch.setenv("CYTODIFFUSION_CACHE", str(closed))
    make_engine("onnxruntime", denoiser("heads"))
    if os.geteuid():  # root may write anywhere
        assert list(closed.iterdir()) == []

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("CYTODIFFUSION_CACHE", str(tmp_path / "full"))
    monkeypatch.setattr(Path, "replace", full)
    make_engine("onnxruntime", denoiser("heads"))
    assert list((tmp_path / "full").iterdir()) == []  # no half file stays


# --- export and verify ---------------------------------------------------------------------------

ABOUT = About("discs", ("a", "b", "c"), "the centre square", "Apache-2.0", "made up")


@cached
@pytest.mark.parametrize("form", ["heads", "conditional"])
def test_export_round_trip(form: Form, tmp_path: Path) -> None:
    import onnxruntime

    worst = export(tmp_path / "out", denoiser(form), discs(16), ABOUT)
    assert worst <= TOLERANCES["onnxruntime"]
    folder = tmp_path / "out"
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    assert {p.name for p in folder.iterdir()} == {"model.onnx", "test_vectors.npz", "README.md"}
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    with np.load(folder / "test_vectors.npz", allow_pickle=False) as vectors:
        inputs = {entry.name: vectors[entry.name] for entry in session.get_inputs()}
        outputs = ["errors", "features"]
        assert [entry.name for entry in session.get_outputs()] == outputs
        vectors = {name: vectors[name] for name in (*outputs, "tolerance")}
    wanted, tolerance = vectors["errors"], float(vectors["tolerance"])
    assert list(inputs) == ["clean", "noise", "sigma", *(["label"] * (form == "conditional"))]
    for count in (len(wanted), 1, 5):  # any number of rows
        found, seen = session.run(None, {name: v[:count] for name, v in inputs.items()})
        np.testing.assert_allclose(found, wanted[:count], rtol=tolerance)
        atol = tolerance * np.abs(vectors["features"]).max()
        np.testing.assert_allclose(seen, vectors["features"][:count], rtol=0, atol=atol)
    labels = (
        torch.arange(4).expand(16, -1)
        if form == "heads"
        else torch.tensor(inputs["label"])[:, None]
    )
    parts = [torch.from_numpy(inputs[name]) for name in ("clean", "noise", "sigma")]
    reference = DenoiserMeter(denoiser(form))(*parts, labels)
    np.testing.assert_allclose(wanted, reference.numpy(), rtol=1e-5)
    told = (folder / "README.md").read_text()
    for word in (
        *inputs,
        "errors",
        "0 a, 1 b, 2 c, 3 any cell",
        "Apache-2.0",
        "127.5",
        "the centre square",
        "16 px",
        "not for diagnosis",
    ):
        assert word in told, word
    assert "{" not in told


@cached
def test_export_is_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="has other files in it"):
        export(tmp_path / "mine", denoiser("heads"), discs(16), ABOUT)
    export(tmp_path / "out", denoiser("heads"), discs(16), ABOUT)
    export(tmp_path / "out", denoiser("heads"), discs(16), ABOUT)  # takes the place of an export

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OutputError, match="cannot be written"):
        export(tmp_path / "new", denoiser("heads"), discs(16), ABOUT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]


def test_export_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtra, match=r"pip install 'cytodiffusion\[onnx\]'"):
        export(tmp_path / "out", denoiser("heads"), discs(16), ABOUT)
    assert list(tmp_path.iterdir()) == []


@cached
def test_the_command_line(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CYTODIFFUSION_ENGINE")
    bundle = tiny_model(tmp_path_factory.getbasetemp()).bundle
    told = cli("models", "export", bundle, "-o", tmp_path / "graph", "--json")
    assert told.code == 0, told.err
    assert told.json["largest_difference"] <= told.json["tolerance"]
    assert (tmp_path / "graph" / "model.onnx").is_file()
    for name in ("torch", "onnxruntime"):
        told = cli("models", "verify", bundle, "--engine", name, "--json")
        assert told.code == 0, told.err
        assert told.json["engine"] == name
        assert told.json["engine_difference"] <= told.json["engine_tolerance"]
    told = cli("models", "verify", bundle, "--json")
    assert json.loads(told.out)["engine"] == best_engine()
    told = cli("models", "verify", bundle, "--engine", "tpu")
    assert told.code == 2
    assert "no engine 'tpu'" in told.complaint


def test_rows_for_checks_are_always_the_same() -> None:
    one, other = (
        noisy_rows(discs(16), 6, 0.1, 3.0, ErrorNetwork(denoiser("conditional"))) for _ in range(2)
    )
    assert all(a.equal(b) for a, b in zip(one, other, strict=True))
    assert one[2].min() == pytest.approx(0.1)
    assert one[2].max() == pytest.approx(3.0)
    assert one[3].tolist() == [0, 1, 2, 3, 0, 1]
