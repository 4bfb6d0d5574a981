"""Classification in parts, so that a stopped run can resume; both engines use this.

The folder OUTPUT.partial holds, until the output is complete:

- _list/part-NNNNNN.parquet: the paths of the images, a fixed number per part;
- _list/run.json, written last: the number of images, and what a resumed run must have in common;
- part-NNNNNN.parquet: the rows of a finished part. Such a file appears complete or not at all.
"""

import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow
from filelock import FileLock, Timeout
from pyarrow import parquet

from marsclf.classify.table import WRITERS, Row, count, read_rows, write_rows
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically, write_json

LIST, RUN = "_list", "run.json"


@dataclass(frozen=True)
class Parts:
    """The parts of one run.

    Attributes:
        folder: OUTPUT.partial.
        images: number of images in all parts.
        size: number of images in each part but the last.
    """

    folder: Path
    images: int
    size: int

    @property
    def names(self) -> list[str]:
        """The file names of all parts, in order."""
        return [_part_name(number) for number in range(-(-self.images // self.size))]

    def missing(self) -> dict[str, int]:
        """Return the name of each part that is not finished, with its number of images."""
        return {
            name: min(self.size, self.images - number * self.size)
            for number, name in enumerate(self.names)
            if not (self.folder / name).exists()
        }

    def paths(self, name: str) -> list[str]:
        """Return the paths of the images in a part."""
        column = parquet.read_table(self.folder / LIST / name)["path"]
        return [os.fsdecode(path) for path in column.to_pylist()]

    def write(self, name: str, rows: Iterable[Row]) -> None:
        """Store the rows of a part."""
        with replace_atomically(self.folder / name) as temporary:
            write_rows(list(rows), temporary)

    def finish(self, output: Path) -> Counter:
        """Make the output of the finished parts and return the counts of its rows.

        An output with a suffix becomes one file, one without becomes a folder of the parts.
        """
        counts: Counter = Counter()

        def counted() -> Iterator[list[Row]]:
            for name in self.names:
                try:
                    rows = read_rows(self.folder / name)
                except (OSError, pyarrow.ArrowException, TypeError):
                    raise MarsclfError(
                        f"{self.folder / name} is damaged: remove it and add --resume."
                    ) from None
                counts.update(count(rows))
                yield rows

        if output.suffix:
            with replace_atomically(output) as temporary:
                WRITERS[output.suffix](counted(), temporary)
            shutil.rmtree(self.folder)
        else:
            for _ in counted():
                pass
            for leftover in self.folder.glob(".*"):  # from a process killed while it wrote a part
                shutil.rmtree(leftover, ignore_errors=True)
            self.folder.rename(output)
            shutil.rmtree(output / LIST)
        return counts


def partial_of(output: Path) -> Path:
    """Return the folder that holds the parts of an incomplete output."""
    return output.with_name(f"{output.name}.partial")


@contextmanager
def open_parts(
    output: Path, images: Iterator[str], settings: dict, size: int, resume: bool
) -> Iterator[Parts]:
    """Yield the parts of `output`; no other process can open them meanwhile.

    Args:
        output: the file or folder to write.
        images: paths; read only if this run does not continue a stopped one.
        settings: what a resumed run must have in common with the stopped one, as JSON.
        size: images per part.
        resume: whether to continue a stopped run, if there is one.

    Raises MarsclfError if the output cannot be written, also within the `with` block; if another
    process writes it; and if OUTPUT.partial belongs to another run or to something else.
    """
    folder = partial_of(output)
    lock = output.with_name(f".{output.name}.lock")
    try:
        with FileLock(lock, timeout=0):
            try:
                run = _stopped_run(folder, settings, resume)
                run = run or _list_images(folder, images, settings, size)
                yield Parts(folder, run["images"], run["size"])
            finally:
                with suppress(OSError):  # Windows keeps the file while it is locked
                    lock.unlink()
    except Timeout:
        raise MarsclfError(f"Another process is writing {output}: wait until it ends.") from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        kept = f"; --resume continues from {folder}" if Path.is_dir(folder) else ""
        raise MarsclfError(f"{output} cannot be written ({reason}){kept}.") from None


def _stopped_run(folder: Path, settings: dict, resume: bool) -> dict | None:
    """Return what RUN says about a stopped run to continue, or None to list the images again."""
    if not os.path.lexists(folder):
        return None
    is_listed = (folder / LIST / RUN).exists()
    others = folder.is_dir() and [path for path in folder.iterdir() if path.name != LIST]
    if not folder.is_dir() or (others and not is_listed):
        raise MarsclfError(f"{folder} holds something else: move it, or rename the output.")
    if is_listed and resume:
        run = json.loads((folder / LIST / RUN).read_text(encoding="utf-8"))
        if run["settings"] != settings:
            raise MarsclfError(
                f"{folder} is from other images, or from another classifier or threshold: remove "
                "it, or repeat the paths, --model and --threshold of that run."
            )
        return run
    if others:
        raise MarsclfError(
            f"{folder} is from a run that was stopped: add --resume to continue it, or remove it."
        )
    return None  # no part is finished, and perhaps the list is not


def _list_images(folder: Path, images: Iterator[str], settings: dict, size: int) -> dict:
    """List the images in parts and return what is written to RUN."""
    shutil.rmtree(folder, ignore_errors=True)
    run = {"settings": settings, "images": 0, "size": size}
    try:
        for number in itertools.count():
            # As bytes, because a file name need not be valid UTF-8.
            listed = [os.fsencode(path) for path in itertools.islice(images, size)]
            if not listed:
                break
            (folder / LIST).mkdir(parents=True, exist_ok=True)
            table = pyarrow.table({"path": pyarrow.array(listed, pyarrow.binary())})
            parquet.write_table(table, folder / LIST / _part_name(number))
            run["images"] += len(listed)
        write_json(folder / LIST / RUN, run)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return run


def _part_name(number: int) -> str:
    return f"part-{number:06d}.parquet"
