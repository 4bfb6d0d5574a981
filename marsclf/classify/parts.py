"""Classification in parts, so that a stopped run can resume.

The folder OUTPUT.partial holds, until the output is complete:

- _list/part-NNNNNN.parquet: the paths of the images of each part;
- _list/run.json: what a resumed run must have in common;
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

from marsclf.classify.table import WRITERS, Row, count, read_parquet, write_parquet
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically, write_json

LIST, RUN, PART = "_list", "run.json", "part-*.parquet"


def partial_of(output: Path) -> Path:
    """Return the folder that holds the parts of an incomplete output."""
    return output.with_name(f"{output.name}.partial")


@contextmanager
def open_parts(
    output: Path, images: Iterator[str], settings: dict, size: int, resume: bool
) -> Iterator[Path]:
    """Yield the folder with the list of images, `size` per part; one process at a time opens it.

    With `resume`, a stopped run whose `settings` (as JSON) are equal is continued, without reading
    `images`. Raises MarsclfError if the output cannot be written, also within the `with` block, if
    another process writes it, and if OUTPUT.partial belongs to another run or to something else.
    """
    folder = partial_of(output)
    lock = output.with_name(f".{output.name}.lock")
    try:
        # FileLock takes a folder without write permission for one locked by another process.
        tempfile.TemporaryFile(dir=output.parent).close()
        with FileLock(lock, timeout=0):
            try:
                _list_images(folder, images, settings, size, resume)
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


def missing_parts(folder: Path) -> dict[str, int]:
    """Return the names of the parts that are not finished, with their numbers of images."""
    return {
        path.name: parquet.read_metadata(path).num_rows
        for path in sorted((folder / LIST).glob(PART))
        if not (folder / path.name).exists()
    }


def read_paths(folder: Path, name: str) -> list[str]:
    """Return the paths of the images in a part."""
    column = parquet.read_table(folder / LIST / name)["path"]
    return [os.fsdecode(path) for path in column.to_pylist()]


def write_part(folder: Path, name: str, rows: Iterable[Row]) -> None:
    """Store the rows of a part."""
    with replace_atomically(folder / name) as temporary:
        write_parquet([list(rows)], temporary)


def finish(folder: Path, output: Path) -> Counter:
    """Turn the parts into the output and return the counts of its rows."""
    counts: Counter = Counter()

    def parts() -> Iterator[list[Row]]:
        for path in sorted(folder.glob(PART)):
            rows = read_parquet(path)
            counts.update(count(rows))
            yield rows

    with replace_atomically(output) as temporary:
        WRITERS[output.suffix](parts(), temporary)
    shutil.rmtree(folder)
    return counts


def _list_images(
    folder: Path, images: Iterator[str], settings: dict, size: int, resume: bool
) -> None:
    """Make the folder with the list of images, complete or not at all, unless it is to be kept."""
    record = folder / LIST / RUN
    if os.path.lexists(folder) and not record.exists():
        raise MarsclfError(f"{folder} holds something else: move it, or rename the output.")
    if any(folder.glob(PART)):
        if not resume:
            remedy = "add --resume to continue it, or remove it"
            raise MarsclfError(f"{folder} is from a run that was stopped: {remedy}.")
        if json.loads(record.read_text(encoding="utf-8")) != settings:
            raise MarsclfError(
                f"{folder} is from other images, or from another classifier or threshold: remove "
                "it, or repeat the paths, --model and --threshold of that run."
            )
        return
    with replace_atomically(folder) as temporary:
        (temporary / LIST).mkdir(parents=True)
        batches = iter(lambda: list(itertools.islice(images, size)), [])
        for number, batch in enumerate(batches):  # bytes, as a name need not be valid UTF-8
            table = pyarrow.table({"path": [os.fsencode(path) for path in batch]})
            parquet.write_table(table, temporary / LIST / f"part-{number:06d}.parquet")
        write_json(temporary / LIST / RUN, settings)
