"""Zip and tar files, read where they lie: nothing is unpacked to disk.

A member is read when it is asked for, and never beyond MAX_BYTES, whatever its header claims. A
compressed tar has no way to jump to a member, so its files are held in memory, up to MAX_HELD.
"""

from __future__ import annotations

import lzma
import os
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from cytodiffusion.data.sample import MAX_BYTES, HeldBytes, Source, Tree
from cytodiffusion.errors import DataError, UnreadableImage, one_line

MAX_HELD = 4 * 2**30  # bytes of a compressed tar in memory
DAMAGED = (zlib.error, lzma.LZMAError, zipfile.BadZipFile)  # bzip2 says OSError
SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def is_archive(path: Path) -> bool:
    """Whether a file name says zip or tar."""
    return path.name.lower().endswith(SUFFIXES)


def open_archive(path: Path) -> Tree:
    """List an archive. A single folder that wraps everything is taken off the names.

    Raises DataError if it is damaged, holds names that leave it, or is too large to be held.
    """
    try:
        files = _zip_files(path) if path.suffix.lower() == ".zip" else _tar_files(path)
    except (OSError, EOFError, *DAMAGED, tarfile.TarError) as error:
        raise DataError(
            f"The archive {path} cannot be read ({one_line(error)}). It may be damaged or half "
            "downloaded: fetch it again, or unpack it and give the folder."
        ) from error
    return Tree(path, _unwrap(files))


@dataclass(frozen=True)
class ZipMember:
    """A file inside a zip."""

    path: Path
    member: str

    def __call__(self) -> bytes:
        try:
            changed = self.path.stat().st_mtime_ns
            with _open_zip(self.path, changed, os.getpid()).open(self.member) as file:
                data = file.read(MAX_BYTES + 1)
        except (OSError, EOFError, RuntimeError, KeyError, ValueError) as error:
            raise UnreadableImage(f"cannot be unpacked ({one_line(error)})") from error
        except DAMAGED as error:
            raise UnreadableImage(f"damaged in the archive ({one_line(error)})") from error
        if len(data) > MAX_BYTES:
            raise UnreadableImage(f"unpacks to more than {MAX_BYTES >> 20} MiB")
        return data


@dataclass(frozen=True)
class TarMember:
    """A file inside a tar that is not compressed: a stretch of its bytes."""

    path: Path
    offset: int
    size: int

    def __call__(self) -> bytes:
        if self.size > MAX_BYTES:
            raise UnreadableImage(f"larger than {MAX_BYTES >> 20} MiB")
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise UnreadableImage(f"the archive cannot be read ({one_line(error)})") from error
        if len(data) < self.size:
            raise UnreadableImage("the archive ends before this file does")
        return data


@lru_cache(maxsize=4)
def _open_zip(path: Path, changed: int, process: int) -> zipfile.ZipFile:
    """An open zip, kept for the next member: its directory takes long to read."""
    return zipfile.ZipFile(path)


def _zip_files(path: Path) -> dict[str, Source]:
    with zipfile.ZipFile(path) as archive:
        members = [info.filename for info in archive.infolist() if not info.is_dir()]
    files: dict[str, Source] = {}
    for member in members:
        name = _safe(member, path)
        if name in files:
            raise DataError(
                f"The archive {path} holds '{name}' twice. Pack the images again, each with a name "
                "of its own."
            )
        files[name] = ZipMember(path, member)
    return files


def _tar_files(path: Path) -> dict[str, Source]:
    plain = _is_plain_tar(path)
    files: dict[str, Source] = {}
    held = 0
    with tarfile.open(path, "r:" if plain else "r:*") as archive:
        for member in archive:
            if not member.isfile():
                continue
            name = _safe(member.name, path)
            if plain:
                files[name] = TarMember(path, member.offset_data, member.size)
                continue
            held += member.size
            _refuse_huge(held, path)
            content = archive.extractfile(member)
            files[name] = HeldBytes(content.read() if content else b"")
    return files


def _is_plain_tar(path: Path) -> bool:
    try:
        tarfile.open(path, "r:").close()
    except tarfile.ReadError:
        return False
    return True


def _refuse_huge(held: int, path: Path) -> None:
    if held > MAX_HELD:
        raise DataError(
            f"The compressed archive {path} holds more than {MAX_HELD >> 30} GiB. Unpack it and "
            "give the folder, or pack it as .zip or .tar."
        )


def _safe(member: str, path: Path) -> str:
    """The member's name with forward slashes, refused if it points out of the archive."""
    name = PurePosixPath(member.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or not name.parts or ":" in name.parts[0]:
        raise DataError(
            f"The archive {path} holds '{member}', a name that leaves the archive. Do not trust "
            "it; pack the images again with relative names."
        )
    return name.as_posix()


def _unwrap(files: dict[str, Source]) -> dict[str, Source]:
    """Take off a folder that wraps everything, if folders or a table are left to give labels."""
    seen = [name for name in files if not PurePosixPath(name).parts[0].startswith((".", "__MAC"))]
    tops = {name.partition("/")[0] for name in seen}
    inner = [name.partition("/")[2] for name in seen]
    if len(tops) != 1 or not all(inner) or not any("/" in name for name in inner):
        tables = {"manifest.csv", "manifest.jsonl"} & set(inner)
        if len(tops) != 1 or not tables:
            return files
    return {name.partition("/")[2]: files[name] for name in seen}
