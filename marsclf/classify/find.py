"""Finding the images to classify: files, folders, patterns, and lists of these."""

import glob
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from marsclf.errors import MarsclfError
from marsclf.images.decode import IMAGE_SUFFIXES


def list_images(sources: list[str], leave_out: Path | None = None) -> Iterator[str]:
    """Yield the path of each image once, as find_images does.

    The source "-" stands for standard input, one path per line. Raises MarsclfError if there is no
    image, and for a source that does not exist; a path on standard input may be missing.
    """
    for source in sources:
        exists = source == "-" or os.path.lexists(source)
        if not exists and not any(glob.iglob(source, recursive=True)):
            remedy = "check the spelling of this file, folder or pattern"
            raise MarsclfError(f"There is no {source}: {remedy}.")
    # One folder has no duplicates, so the paths of a large archive are not kept in memory.
    may_repeat = len(sources) > 1 or not os.path.isdir(sources[0])
    known, path = set(), None
    for path in find_images(_read_lists(sources), leave_out):
        if path not in known:
            yield path
        if may_repeat:
            known.add(path)
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
    visited = {os.path.realpath(leave_out)} if leave_out else set()
    for source in map(os.fspath, sources):
        exists = os.path.lexists(source)
        matches = [] if exists else sorted(glob.glob(source, recursive=True))
        for path in matches or [source]:
            if not os.path.isdir(path):
                yield path
            elif exists or "**" not in source:  # which also matches the files in this folder
                yield from _walk(path, visited)


def _read_lists(sources: list[str]) -> Iterator[str]:
    for source in sources:
        if source == "-":
            lines = (line.rstrip(b"\r\n") for line in sys.stdin.buffer)
            yield from (os.fsdecode(line) for line in lines if line)
        else:
            yield source


def _walk(top: str, visited: set[str]) -> Iterator[str]:
    unreadable = []
    for folder, folders, files in os.walk(top, onerror=unreadable.append, followlinks=True):
        if os.path.realpath(folder) in visited:
            folders.clear()  # do not enter them
            continue
        visited.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                yield os.path.join(folder, name)
    yield from (error.filename for error in unreadable)
