"""Files appear whole or not at all, and a system that refuses to write is told in one line.

A file is written under another name beside its place and renamed at the end. That name begins with a
dot: should the machine itself stop half-way, no reader takes what is left for an image.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from cytodiffusion.errors import OutputError


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what is to become `path`: at the end it takes that place, or is gone."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def write_file(path: Path, content: bytes, what: str) -> None:
    """Write a file whole or not at all. Raises OutputError, which names it and `what` it is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as part:
            part.write_bytes(content)
    except OSError as error:
        raise OutputError(
            f"Cannot write {what} {path}: {error.strerror or error}. "
            "Give a folder that can be written and has room."
        ) from error


def write_json(path: Path, values: Any, what: str) -> None:
    """The same of numbers and text, as JSON. Raises OutputError; ValueError for NaN."""
    text = json.dumps(values, indent=1, allow_nan=False) + "\n"
    write_file(path, text.encode(), what)


def write_arrays(path: Path, **arrays: Any) -> None:
    """An NPZ file, whole or not at all. Raises OutputError."""
    with writing_to(path.parent), whole(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn the system's refusals to write into one clear line: OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if folder.is_file():
            raise OutputError(
                f"{folder} cannot be written to: it is a file. Name a folder."
            ) from error
        raise OutputError(
            f"{folder} cannot be written to ({error.strerror or error}). What was done so far is "
            "kept; free some space or choose another folder with -o, and run again to go on."
        ) from error


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Work in a folder in which no other process may: OutputError where one does.

    The helpers of a run over several processes share what its first process holds. Where the file system
    knows no locks nothing is held.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    lock, new = FileLock(folder / ".lock"), not folder.exists()
    with writing_to(folder), contextlib.suppress(NotImplementedError):
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise OutputError(
                f"Another process is at work in {folder}. Wait until it is done, or choose another folder "
                "with -o."
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / ".lock").unlink()
            if new:
                folder.rmdir()  # where nothing was written to it
        lock.release()
