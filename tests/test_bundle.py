"""A bundle gives the same answer elsewhere, and refuses every byte that was changed."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CLASSES, Tiny, cli, contents, disc, tiny_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cytodiffusion import bundle as bundles
from cytodiffusion.bundle import (
    FILES,
    TOLERANCE,
    Model,
    Parts,
    check_files,
    check_place,
    find_bundle,
    load,
    replace_texts,
    save_bundle,
    verify,
)
from cytodiffusion.classify.as_json import calibration_from_json, calibration_to_json
from cytodiffusion.errors import ChangedBundle, LabelError, ModelError, OutputError
from cytodiffusion.types import PIXELS, ErrorTable

EVERY = (*FILES, "checksums.json")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_model(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Model:
    return load(tiny.bundle)


def images() -> torch.Tensor:
    pixels = np.stack([disc(name, 900 + i, 16) for name in CLASSES for i in range(2)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def parts(model: Model) -> Parts:
    """What `save_bundle` needs to write the same model again."""
    texts = [(model.folder / name).read_text() for name in ("card.md", "LICENSE")]
    return Parts(
        name=model.name, denoiser=model.denoiser, classes=model.classes,
        preprocess=model.preprocess, budgets=model.classifier.budgets, taxonomy=model.taxonomy,
        card=texts[0], license=texts[1], data_license="none", origin=model.config["origin"],
    )  # fmt: skip


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


# --- what it holds -------------------------------------------------------------------------------


def test_the_files_are_those_of_the_format(tiny: Tiny) -> None:
    assert set(contents(tiny.bundle)) == set(EVERY)
    assert set(json.loads((tiny.bundle / "checksums.json").read_text())) == set(FILES)


def test_no_code_and_no_pickles(tiny: Tiny) -> None:
    with zipfile.ZipFile(tiny.bundle / "test_vectors.npz") as archive:
        for name in archive.namelist():
            header = archive.read(name)[:200]
            assert name.endswith(".npy")
            assert b"'|O'" not in header  # an array of objects is a pickle
    for name, data in contents(tiny.bundle).items():
        if name != "test_vectors.npz":
            assert not zipfile.is_zipfile(tiny.bundle / name)
        assert not data.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")), name


def test_an_array_of_objects_is_not_unpickled(tiny: Tiny, tmp_path: Path) -> None:
    """Even with a matching checksum."""
    folder = tiny.copy(tmp_path / "b")
    evil = np.array([print], dtype=object)
    np.savez(folder / "test_vectors.npz", pixels=evil, errors=evil)
    bundles._write_checksums(folder)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        verify(folder)


def test_weights_are_float16(tiny: Tiny, model: Model) -> None:
    stored = load_file(tiny.bundle / "model.safetensors")
    assert {str(v.dtype) for v in stored.values() if v.is_floating_point()} == {"torch.float16"}
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.float32}
    for name, value in model.denoiser.network.state_dict().items():
        assert value.equal(stored[name].to(value.dtype)), name


def test_the_card_says_what_it_is_for(tiny: Tiny) -> None:
    card = (tiny.bundle / "card.md").read_text()
    assert "not for diagnosis" in card
    assert all(name in card for name in CLASSES)


# --- the same answer -----------------------------------------------------------------------------


def test_round_trip_gives_identical_answers(model: Model, tmp_path: Path) -> None:
    save_bundle(tmp_path / "again", parts(model))
    again = load(tmp_path / "again")
    assert (again.name, again.classes, again.preprocess, again.config) == (
        model.name, model.classes, model.preprocess, model.config,
    )  # fmt: skip
    assert again.taxonomy == model.taxonomy
    for budget in ("fast", "balanced", "full"):
        tables = [m.classifier.measure(images(), budget=budget) for m in (model, again)]
        assert np.array_equal(tables[0].errors, tables[1].errors, equal_nan=True)
        ours, theirs = (
            m.classifier.read(t, budget) for m, t in zip((model, again), tables, strict=True)
        )
        for name in ("probabilities", "sets", "anomaly", "anomaly_p", "trials", "passes"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
    same = {
        "calibration.json",
        "model.safetensors",
        "labels.yaml",
        "preprocess.json",
        "config.json",
    }
    one, other = contents(model.folder), contents(again.folder)
    assert all(one[name] == other[name] for name in same)


def test_the_bundle_answers_as_the_run_does(tiny: Tiny, model: Model) -> None:
    """float16 weights move the errors by less than what the test vectors allow."""
    from cytodiffusion.classify.evidence import DenoiserMeter
    from cytodiffusion.data.images import to_tensor
    from cytodiffusion.diffusion.precondition import EDMDenoiser
    from cytodiffusion.networks.compact import CompactNetwork

    (checkpoint,) = (tiny.run / "checkpoint").iterdir()
    best = load_file(checkpoint / "best.safetensors")
    network = CompactNetwork(model.denoiser.network.settings)
    prefix = "denoiser.network."
    network.load_state_dict({k.removeprefix(prefix): v for k, v in best.items() if prefix in k})
    full = EDMDenoiser(network, model.denoiser.sigma_data).eval()
    pixels = np.stack([disc(name, 900, 16) for name in CLASSES]).transpose(0, 3, 1, 2)
    found, half = (
        bundles._vector_errors(DenoiserMeter(d), PIXELS, "cpu", pixels, 4)
        for d in (full, model.denoiser)
    )
    assert to_tensor(pixels).shape[1:] == (3, 16, 16)
    np.testing.assert_allclose(found, half, rtol=TOLERANCE)


def test_a_saved_table_is_read_without_the_network(model: Model, tmp_path: Path) -> None:
    table = model.classifier.measure(images())
    table.save(tmp_path / "t.npz")
    loaded = ErrorTable.load(tmp_path / "t.npz")
    assert np.array_equal(table.errors, loaded.errors, equal_nan=True)
    for ours, theirs in zip(
        model.classifier.read(table).answers(),
        model.classifier.read(loaded).answers(),
        strict=True,
    ):
        assert ours.predicted == theirs.predicted
        assert ours.probabilities.tolist() == theirs.probabilities.tolist()


def test_budgets_round_trip(model: Model) -> None:
    """Plain JSON; and seven digits, once taken, stay."""
    budgets = model.classifier.budgets
    here = ["fast", "balanced", "full"]
    assert list(budgets) == [*here, *(f"{name}-abroad" for name in here), "race", "paper"]
    assert [len(budgets[name].draws) for name in budgets] == [8] * 6 + [200, 2000]
    plain = calibration_to_json(budgets)
    assert [plain["budgets"][name]["sequence"] for name in [*here, "full-abroad"]] == [0, 0, 0, 1]
    again = calibration_from_json(json.loads(json.dumps(plain)))
    assert calibration_to_json(again) == plain
    for name in budgets:
        assert again[name].draws == budgets[name].draws
        for key in ("truth", "probabilities", "anomaly"):
            assert np.array_equal(getattr(again[name].held, key), getattr(budgets[name].held, key))
    assert (again["paper"].policy.alpha, again["paper"].policy.least) == (2e-3, 20)
    for name in ("fast", "fast-abroad"):
        assert again[name].reader.depths[3].gate == budgets[name].reader.depths[3].gate


def test_calibration_in_the_file_is_the_one_that_was_fitted(model: Model) -> None:
    """To seven digits, also for very large and very small numbers."""
    budget = model.classifier.budgets["fast"]
    depth = budget.reader.depths[1]
    odd = replace(depth.posterior, scale=np.array([1.23456789e-9, 3.21987654e7]))
    depths = (budget.reader.depths[0], replace(depth, posterior=odd))
    spoilt = {"fast": replace(budget, reader=replace(budget.reader, depths=depths))}
    again = calibration_from_json(json.loads(json.dumps(calibration_to_json(spoilt))))
    np.testing.assert_allclose(again["fast"].reader.depths[1].posterior.scale, odd.scale, rtol=1e-6)


def test_read_and_predict_files(tiny: Tiny, model: Model) -> None:
    paths = [tiny.cells / name / "00.png" for name in CLASSES]
    assert model.predict(paths) == [answer.predicted for answer in model.read(paths).answers()]
    few = model.read(paths, classes=CLASSES[:2])
    assert few.classes.names == CLASSES[:2]
    assert few.probabilities.sum(1) == pytest.approx(1)
    assert set(model.predict(paths, classes=CLASSES[:2])) <= set(CLASSES[:2])
    with pytest.raises(LabelError, match="blast"):
        model.read(paths, classes=["blast"])
    tensor, sha = model.prepare(paths[0].read_bytes())
    assert tensor.shape == (3, 16, 16)
    assert len(sha) == 64
    assert not tensor.equal(model.prepare(paths[0].read_bytes(), crop=0.5)[0])


# --- a changed byte is refused -------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("place", [0, -2], ids=["first byte", "last byte but one"])
def test_one_changed_byte_is_refused(tiny: Tiny, tmp_path: Path, name: str, place: int) -> None:
    folder = tiny.copy(tmp_path / "b")
    flip(folder / name, place)
    with pytest.raises(ChangedBundle) as told:
        load(folder)
    assert str(folder) in str(told.value)
    assert "\n" not in str(told.value)
    if name != "checksums.json":
        assert f"{name} is not the file that was released" in str(told.value)


@pytest.mark.parametrize("name", EVERY)
def test_a_missing_file_is_refused(tiny: Tiny, tmp_path: Path, name: str) -> None:
    folder = tiny.copy(tmp_path / "b")
    (folder / name).unlink()
    with pytest.raises(ModelError if name == "config.json" else ChangedBundle):
        load(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_file_struck_off_the_list_is_refused(tiny: Tiny, tmp_path: Path, name: str) -> None:
    folder = tiny.copy(tmp_path / "b")
    (folder / name).unlink()
    bundles._write_checksums(folder)
    with pytest.raises(ChangedBundle, match=name):
        check_files(folder)


@pytest.mark.parametrize("name", ["evil.py", "sub/evil.py"])
def test_an_extra_file_is_refused(tiny: Tiny, tmp_path: Path, name: str) -> None:
    folder = tiny.copy(tmp_path / "b")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("print()")
    with pytest.raises(ChangedBundle, match="does not belong to it"):
        load(folder)


def test_what_finder_leaves_in_a_folder_is_passed_over(tiny: Tiny, tmp_path: Path) -> None:
    """A bundle with a .DS_Store is as released, and the file does not get on the list."""
    folder = tiny.copy(tmp_path / "b")
    before = (folder / "checksums.json").read_bytes()
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    load(folder)
    bundles._write_checksums(folder)
    assert (folder / "checksums.json").read_bytes() == before


def test_a_hidden_file_cannot_be_listed(tiny: Tiny, tmp_path: Path) -> None:
    """A list that names one asks for something that is not a bundle's."""
    folder = tiny.copy(tmp_path / "b")
    (folder / ".evil").write_text("print()")
    sums = json.loads((folder / "checksums.json").read_text()) | {".evil": "0" * 64}
    (folder / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(ChangedBundle, match=r"\.evil is missing"):
        load(folder)


@pytest.mark.parametrize("text", ["", "[", "[1]", "3", "null", "{}"])
def test_checksums_that_are_none(tiny: Tiny, tmp_path: Path, text: str) -> None:
    folder = tiny.copy(tmp_path / "b")
    (folder / "checksums.json").write_text(text)
    with pytest.raises(ChangedBundle):
        load(folder)


def test_the_command_line_refuses_with_one_line(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny.copy(tmp_path / "b")
    flip(folder / "calibration.json", 100)
    for words in (
        ["models", "verify", folder],
        ["models", "show", folder],
        ["predict", tiny.cells, "-m", folder, "-o", tmp_path / "out"],
        ["evaluate", tiny.cells, "-m", folder, "-o", tmp_path / "out"],
    ):
        told = cli(*words)
        assert (told.code, told.out) == (2, "")
        assert "calibration.json is not the file that was released" in told.complaint
    assert not (tmp_path / "out").exists()


def test_an_unknown_model_is_told_what_there_is(tiny: Tiny, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bundles, "ZOO", tmp_path)
    with pytest.raises(ModelError, match="Shipped: none"):
        find_bundle("nonsense")
    tiny.copy(tmp_path / "discs3")
    tiny.copy(tmp_path / "a-model")
    with pytest.raises(ModelError, match=r"no model 'nonsense'.*Shipped: a-model, discs3\."):
        find_bundle("nonsense")
    assert load("discs3").classes.names == CLASSES


@pytest.mark.parametrize(("key", "value"), [("format", bundles.FORMAT + 1), ("network", "other")])
def test_a_newer_format_is_refused(tiny: Tiny, tmp_path: Path, key: str, value: object) -> None:
    folder = tiny.copy(tmp_path / "b")
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    bundles._write_checksums(folder)
    with pytest.raises(ModelError, match="newer cytodiffusion"):
        load(folder)


# --- test vectors --------------------------------------------------------------------------------


def test_verify_passes(tiny: Tiny) -> None:
    assert verify(tiny.bundle) <= 1e-5


def test_verify_sees_other_weights(tiny: Tiny, tmp_path: Path) -> None:
    """Files that agree with their checksums, and a network that is not the released one."""
    folder = tiny.copy(tmp_path / "b")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v * 1.05 for k, v in weights.items()}, folder / "model.safetensors")
    bundles._write_checksums(folder)
    with pytest.raises(ModelError, match="does not give its test vectors"):
        verify(folder)


def test_verify_does_not_take_nan_for_agreement(tiny: Tiny, monkeypatch) -> None:
    monkeypatch.setattr(bundles, "_vector_errors", lambda *_: np.float32(np.nan))
    with pytest.raises(ModelError, match="test vectors"):
        verify(tiny.bundle)


# --- whole or not at all -------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("full")])
@pytest.mark.parametrize("step", ["save_file", "_write_vectors", "_write_checksums"])
def test_save_is_whole_or_nothing(
    model: Model, tmp_path: Path, monkeypatch, step: str, error: Exception
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(bundles, step, refuse)
    with pytest.raises(OutputError, match="cannot be written") as told:
        save_bundle(tmp_path / "new", parts(model))
    assert "\n" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_bundle(
    tiny: Tiny, model: Model, tmp_path: Path, monkeypatch
) -> None:
    folder = tiny.copy(tmp_path / "old")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundles, "_write_vectors", refuse)
    with pytest.raises(OutputError):
        save_bundle(folder, parts(model))
    assert contents(folder) == contents(tiny.bundle)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_killed_while_one_bundle_takes_the_place_of_another(
    tiny: Tiny, model: Model, tmp_path: Path, monkeypatch
) -> None:
    """Both are there under other names."""
    folder, move = tiny.copy(tmp_path / "b"), Path.replace

    def killed(path: Path, target: Path) -> Path:
        if path.suffix == ".part":
            raise KeyboardInterrupt
        return move(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save_bundle(folder, parts(model))
    assert contents(tmp_path / "b.old") == contents(tiny.bundle)
    check_files(tmp_path / "b.part")
    save_bundle(folder, parts(model))
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_save_into_a_file_is_refused(model: Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        save_bundle(tmp_path / "file" / "b", parts(model))


@pytest.mark.parametrize("way", [".", "../b", "b"])
def test_the_working_folder_is_no_place_for_a_bundle(
    tiny: Tiny, tmp_path: Path, monkeypatch, way: str
) -> None:
    """It would be replaced while it is worked in. One clear line; what it holds stays."""
    folder = tiny.copy(tmp_path / "b")
    monkeypatch.chdir(folder)
    place = folder if way == "b" else Path(way)
    with pytest.raises(OutputError, match="working folder") as told:
        check_place(place)
    assert "\n" not in str(told.value)
    said = cli("models", "calibrate", tiny.cells, "-m", tiny.bundle, "-o", place, "--device", "cpu")
    assert said.code == 2
    assert "working folder" in said.complaint
    assert contents(folder) == contents(tiny.bundle)


def test_a_bundle_beside_the_working_folder_is_saved_by_any_name(
    model: Model, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for way in (Path("b"), Path("../b"), Path("./c/")):
        check_place(way)
        save_bundle(way, parts(model))
        check_files(way)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.glob("*")) == ["b", "here"]
    assert sorted(path.name for path in Path().iterdir()) == ["b", "c"]


def test_a_run_is_the_bundle_in_it(tiny: Tiny, tmp_path: Path) -> None:
    assert find_bundle(tiny.run) == find_bundle(tiny.bundle) == tiny.bundle
    assert find_bundle(str(tiny.run)) == tiny.bundle
    image = tiny.cells / "neutrophil" / "00.png"
    told = cli("predict", image, "-m", tiny.run, "-o", tmp_path / "out", "--device", "cpu")
    assert told.code == 0, told.err
    assert cli("models", "verify", tiny.run, "--device", "cpu").code == 0
    (tmp_path / "bare").mkdir()
    with pytest.raises(ModelError, match="no model"):
        find_bundle(tmp_path / "bare")


def test_save_takes_the_place_of_what_a_killed_save_left(model: Model, tmp_path: Path) -> None:
    (tmp_path / "b.part").mkdir()
    (tmp_path / "b.part" / "half").write_text("x")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "old").write_text("x")
    save_bundle(tmp_path / "b", parts(model))
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    check_files(tmp_path / "b")


def test_only_texts_can_be_replaced(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny.copy(tmp_path / "b")
    replace_texts(folder, {"card.md": "# New\n"})
    assert load(folder).name == "run"
    assert (folder / "card.md").read_text() == "# New\n"
    with pytest.raises(ModelError, match="no text of a bundle"):
        replace_texts(folder, {"config.json": "{}"})
    flip(folder / "model.safetensors", -1)
    with pytest.raises(ChangedBundle):
        replace_texts(folder, {"card.md": "# New\n"})


def test_a_model_is_shown_in_one_line(model: Model) -> None:
    assert repr(model).startswith(f"<Model {model.name}: ")
    assert len(repr(model)) < 100
