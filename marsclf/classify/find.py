"""Finding the images to classify: files, folders, patterns, and lists of these."""

import glob
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from marsclf.errors import MarsclfError
from marsclf.images.decode import IMAGE_SUFFIXES


def list_images(sources: list[str], leave_out: Path | None = None) -> Iterator[str]:
    """Yield the path of each image once, as find_images does.

    The source "-" stands for standard input, one path per line. Raises MarsclfError if there is no
    image.
    """
    names = (
        name
        for source in sources
        for name in (_read_list(sys.stdin.buffer) if source == "-" else [source])
    )
    # One folder has no duplicates, so the paths of a large archive are not kept in memory.
    may_repeat = not (len(sources) == 1 and os.path.isdir(sources[0]))
    known: set[bytes] = set()
    path = None
    for path in find_images(names, leave_out):
        if may_repeat:
            digest = hashlib.blake2b(os.fsencode(path), digest_size=16).digest()
            if digest in known:
                continue
            known.add(digest)
        yield path
    if path is None:
        named = ", ".join("standard input" if source == "-" else source for source in sources)
        raise MarsclfError(f"There is no image in {named}.")


def find_images(sources: Iterable[str | Path], leave_out: Path | None = None) -> Iterator[str]:
    """Yield the path of each image: files as named, and the images in folders.

    A folder stands for the images at any depth in it, sorted, recognized by suffix, except hidden
    files and the folder `leave_out`. Links are followed, but no folder is entered twice, so loops
    of links end. A name that does not exist and contains `*`, `?` or `[` is a pattern (`**` matches
    folders at any depth). A missing file and a folder that cannot be listed are yielded as named,
    so that reading them reports the error.
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
                elif "**" not in source:  # which also matches the files in this folder
                    yield from _walk(match, visited)
        else:
            yield source


def _read_list(stream: BinaryIO) -> Iterator[str]:
    for line in stream:
        if path := line.rstrip(b"\r\n"):
            yield os.fsdecode(path)


def _walk(top: str, visited: set[tuple[int, int]]) -> Iterator[str]:
    unreadable: list[str] = []
    for folder, folders, files in os.walk(
        top, followlinks=True, onerror=lambda error: unreadable.append(error.filename)
    ):
        identity = _identity(folder)
        if identity in visited:
            folders.clear()  # do not enter them
            continue
        visited.add(identity)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                yield os.path.join(folder, name)
    yield from unreadable


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
