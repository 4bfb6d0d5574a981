"""Classification in parts, so that a stopped run can resume; both engines use this.

The folder OUTPUT.partial holds, until the output is complete:

- _list/part-NNNNNN.parquet: the paths of the images of each part;
- _list/run.json, written when all images are listed: what a resumed run must have in common;
- part-NNNNNN.parquet: the rows of a finished part. Such a file appears complete or not at all.
"""

import itertools
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow
from filelock import FileLock, Timeout
from pyarrow import parquet

from marsclf.classify.table import WRITERS, Row, count, read_rows, write_rows
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically, write_json

LIST, RUN = "_list", "run.json"


def partial_of(output: Path) -> Path:
    """Return the folder that holds the parts of an incomplete output."""
    return output.with_name(f"{output.name}.partial")


@contextmanager
def open_parts(
    output: Path, images: Iterator[str], settings: dict, size: int, resume: bool
) -> Iterator[Path]:
    """Yield the folder with the list of images in parts; only one process at a time can open it.

    Args:
        output: the file or folder to write.
        images: paths; not read if a stopped run is continued.
        settings: what a resumed run must have in common with the stopped one, as JSON.
        size: images per part.
        resume: continue a stopped run, if there is one.

    Raises MarsclfError if the output cannot be written, also within the `with` block; if another
    process writes it; and if OUTPUT.partial belongs to another run or to something else.
    """
    folder = partial_of(output)
    lock = output.with_name(f".{output.name}.lock")
    try:
        # FileLock takes a folder without write permission for one locked by another process.
        tempfile.TemporaryFile(dir=output.parent).close()
        with FileLock(lock, timeout=0):
            try:
                if not _can_continue(folder, settings, resume):
                    _list_images(folder, images, settings, size)
                yield folder
            finally:
                with suppress(OSError):  # Windows keeps the file while it is locked
                    lock.unlink()
    except Timeout:
        raise MarsclfError(f"Another process is writing {output}: wait until it ends.") from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        kept = f"; --resume continues from {folder}" if os.path.isdir(folder) else ""
        raise MarsclfError(f"{output} cannot be written ({reason}){kept}.") from None


def part_names(folder: Path) -> list[str]:
    """Return the names of all parts, in order."""
    return sorted(path.name for path in (folder / LIST).glob("part-*.parquet"))


def missing_parts(folder: Path) -> dict[str, int]:
    """Return the names of the parts that are not finished, with their numbers of images."""
    return {
        name: parquet.read_metadata(folder / LIST / name).num_rows
        for name in part_names(folder)
        if not (folder / name).exists()
    }


def read_paths(folder: Path, name: str) -> list[str]:
    """Return the paths of the images in a part."""
    column = parquet.read_table(folder / LIST / name)["path"]
    return [os.fsdecode(path) for path in column.to_pylist()]


def write_part(folder: Path, name: str, rows: Iterable[Row]) -> None:
    """Store the rows of a part."""
    with replace_atomically(folder / name) as temporary:
        write_rows(list(rows), temporary)


def finish(folder: Path, output: Path) -> Counter:
    """Turn the finished parts into the output and return the counts of its rows.

    An output with a suffix becomes one file, one without becomes a folder of the parts.
    """
    counts: Counter = Counter()

    def counted() -> Iterator[list[Row]]:
        for name in part_names(folder):
            try:
                rows = read_rows(folder / name)
            except (OSError, pyarrow.ArrowException, TypeError):
                raise MarsclfError(
                    f"{folder / name} is damaged: remove it and add --resume."
                ) from None
            counts.update(count(rows))
            yield rows

    if output.suffix:
        with replace_atomically(output) as temporary:
            WRITERS[output.suffix](counted(), temporary)
        shutil.rmtree(folder)
    else:
        for _ in counted():
            pass
        for leftover in folder.glob(".*"):  # from a process that was killed while it wrote a part
            shutil.rmtree(leftover, ignore_errors=True)
        folder.rename(output)
        shutil.rmtree(output / LIST)
    return counts


def _can_continue(folder: Path, settings: dict, resume: bool) -> bool:
    """Tell whether to continue from the list in `folder`; else the images are listed again."""
    if not os.path.lexists(folder):
        return False
    is_listed = (folder / LIST / RUN).exists()
    others = folder.is_dir() and [path for path in folder.iterdir() if path.name != LIST]
    if not folder.is_dir() or (others and not is_listed):
        raise MarsclfError(f"{folder} holds something else: move it, or rename the output.")
    if is_listed and resume:
        if json.loads((folder / LIST / RUN).read_text(encoding="utf-8")) != settings:
            raise MarsclfError(
                f"{folder} is from other images, or from another classifier or threshold: remove "
                "it, or repeat the paths, --model and --threshold of that run."
            )
        return True
    if others:
        raise MarsclfError(
            f"{folder} is from a run that was stopped: add --resume to continue it, or remove it."
        )
    return False  # no part is finished, and perhaps the list is not


def _list_images(folder: Path, images: Iterator[str], settings: dict, size: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        for number in itertools.count():
            # As bytes, because a file name need not be valid UTF-8.
            listed = [os.fsencode(path) for path in itertools.islice(images, size)]
            if not listed:
                break
            (folder / LIST).mkdir(parents=True, exist_ok=True)
            table = pyarrow.table({"path": pyarrow.array(listed, pyarrow.binary())})
            parquet.write_table(table, folder / LIST / f"part-{number:06d}.parquet")
        write_json(folder / LIST / RUN, settings)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
