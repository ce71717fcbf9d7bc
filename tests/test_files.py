"""A file is there whole, or what was there before is; nothing half-written stays."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cytodiffusion.errors import OutputError
from cytodiffusion.files import alone, whole, write_arrays, write_file, writing_to


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_the_new_file_takes_the_place_of_the_old(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        write_file(tmp_path / "new" / "x.json", content, "the results")
        assert (tmp_path / "new" / "x.json").read_bytes() == content
    assert names(tmp_path / "new") == ["x.json"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError()]
)
def test_cut_half_way_the_old_file_stays_alone(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "x.csv").write_text("old")

    def half_way() -> None:
        with whole(tmp_path / "x.csv") as part:
            part.write_text("ne")
            assert part.name.startswith(".")  # which no reader takes for an image
            raise error

    with pytest.raises(type(error)):
        half_way()
    assert (names(tmp_path), (tmp_path / "x.csv").read_text()) == (["x.csv"], "old")


def test_arrays_come_back(tmp_path: Path) -> None:
    rows, words = np.arange(6.0).reshape(2, 3), np.array(["é", "b"])
    for shift in (0, 1):
        write_arrays(tmp_path / "new" / "x.npz", rows=rows + shift, words=words, steps=7)
        with np.load(tmp_path / "new" / "x.npz") as found:
            assert set(found.files) == {"rows", "words", "steps"}
            np.testing.assert_array_equal(found["rows"], rows + shift)
            assert (found["words"].tolist(), int(found["steps"])) == (["é", "b"], 7)
    assert names(tmp_path / "new") == ["x.npz"]


@pytest.mark.parametrize("there", [True, False])
def test_arrays_are_written_whole_or_not_at_all(tmp_path: Path, there: bool) -> None:
    """The second array cannot be written, after the first was."""

    class Broken:
        def __array__(self, *_: object, **__: object) -> np.ndarray:
            raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "x.npz"
    if there:
        write_arrays(path, rows=np.zeros(3))
    before = path.read_bytes() if there else None
    with pytest.raises(OutputError, match="No space left on device"):
        write_arrays(path, rows=np.ones(1000), others=Broken())
    assert names(tmp_path) == ["x.npz"] * there
    assert (path.read_bytes() if there else None) == before


def test_a_disk_that_fills_up_is_told_in_one_line(tmp_path: Path) -> None:
    """No simulation: the system lets no file grow past 100 bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OutputError, match=r"Cannot write the table .*x\.csv: File too large\."):
            write_file(tmp_path / "x.csv", b"0" * 1000, "the table")
        with pytest.raises(OutputError, match="File too large"), writing_to(tmp_path / "new"):
            (tmp_path / "new" / "x.csv").write_bytes(b"0" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["new"]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="Give a folder"):
        write_file(tmp_path / "out" / "x.csv", b"", "the table")
    with pytest.raises(OutputError, match="cannot be written to"), writing_to(tmp_path / "out"):
        pass
    assert (tmp_path / "out").read_text() == "mine"


HOLD = """
import sys
from pathlib import Path
from cytodiffusion.files import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match="Another process is at work") as told, alone(folder):
            pass
        assert "\n" not in str(told.value)
        with monkeypatch.context() as patch:
            patch.setenv("RANK", "1")
            with alone(folder):  # a helper shares what its first process holds
                pass
        other.kill()
    with alone(folder):  # held no longer, however it ended
        pass
    assert list(folder.iterdir()) == []
    with alone(tmp_path / "new"):
        pass
    with alone(tmp_path / "used"):
        (tmp_path / "used" / "file").touch()
    assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["file"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError()]
)
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """As some network drives have none: work is done all the same."""

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("cytodiffusion.files.FileLock.acquire", refuse)
    with alone(tmp_path):
        (tmp_path / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
