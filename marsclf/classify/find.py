"""Finding the images that are meant: files, folders, patterns, and lists of these."""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from marsclf.images.decode import IMAGE_SUFFIXES

CHUNK_BYTES = 2**16


def find_images(sources: Iterable[str | Path], leave_out: Path | None = None) -> Iterator[str]:
    """Yield the path of each image, in order: files as they are named, folders sorted by name.

    A folder gives the images beneath it at any depth, by their suffix; hidden files are left out,
    and so is the folder `leave_out`. Links are followed, but no folder is entered twice, so a loop
    of links ends. A name that is no file but has one of `*?[` is a pattern (`**` goes through
    folders). What does not exist, and a folder that cannot be listed, is yielded as it is named,
    for the reader to say so.
    """
    visited: set[tuple[int, int]] = set()
    if leave_out is not None and leave_out.is_dir():
        visited.add(_identity(leave_out))
    for source in map(os.fspath, sources):
        if os.path.isdir(source):
            yield from _walk(source, visited)
        elif not os.path.lexists(source) and glob.has_magic(source):
            matches = sorted(glob.glob(source, recursive=True))
            for match in matches or [source]:
                if not os.path.isdir(match):
                    yield match
                elif "**" not in source:  # which matches what is in the folders, too
                    yield from _walk(match, visited)
        else:
            yield source


def read_list(stream: BinaryIO) -> Iterator[str]:
    """Yield the paths in a stream: one a line, or, as from `find -print0`, one before each NUL."""
    rest = stream.read(CHUNK_BYTES)
    separator = b"\0" if b"\0" in rest else b"\n"
    while rest:
        *whole, rest = rest.split(separator)
        for line in whole:
            if name := os.fsdecode(line if separator == b"\0" else line.removesuffix(b"\r")):
                yield name
        more = stream.read(CHUNK_BYTES)
        if not more:
            if rest:
                yield os.fsdecode(rest)
            return
        rest += more


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _walk(folder: str, visited: set[tuple[int, int]]) -> Iterator[str]:
    left = [(folder, True)]  # not by recursion, which ends at a depth of a thousand
    while left:
        path, is_folder = left.pop()
        if not is_folder:
            yield path
            continue
        try:
            identity = _identity(path)
            if identity in visited:
                continue
            visited.add(identity)
            with os.scandir(path) as entries:
                found = [(entry.name, _is_folder(entry)) for entry in entries]
        except OSError:
            yield path
            continue
        left += [
            (os.path.join(path, name), is_folder)
            for name, is_folder in sorted(found, reverse=True)
            if not name.startswith(".") and (is_folder or name.lower().endswith(IMAGE_SUFFIXES))
        ]


def _is_folder(entry: os.DirEntry) -> bool:
    # A link's target may be missing, or the link itself; isdir never fails.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
