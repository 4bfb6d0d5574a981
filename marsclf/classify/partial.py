"""The rows of a run of `predict` that has not ended, so that a stopped run can resume.

OUTPUT.partial holds lines of JSON: the settings of the run, then a row for each image, in order.
Each row begins with the line break, which thus ends what a killed process has left incomplete.
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from marsclf.classify.table import WRITERS, Row, kind, printable
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically


def partial_of(output: Path) -> Path:
    """Return the file that holds the rows of an incomplete output."""
    return output.with_name(f"{output.name}.partial")


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Let no other process write `output`.

    Raises MarsclfError if one does, and for each OSError in the `with` block.
    """
    lock, partial = output.with_name(f".{output.name}.lock"), partial_of(output)
    try:
        # FileLock takes a folder without write permission for one locked by another process.
        tempfile.TemporaryFile(dir=output.parent).close()
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                with suppress(OSError):  # Windows keeps the file while it is locked
                    lock.unlink()
    except Timeout:
        raise MarsclfError(f"Another process is writing {output}: wait until it ends.") from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        kept = f"; --resume continues from {partial}" if os.path.isfile(partial) else ""
        raise MarsclfError(f"{output} cannot be written ({reason}){kept}.") from None


def skip_finished(partial: Path, settings: dict, images: Iterator[str], resume: bool) -> int:
    """Advance `images` past those that have a row in `partial`, and return their number.

    Raises MarsclfError if the file exists, but `resume` is false, or if it is not from a run with
    these settings and images.
    """
    if not os.path.lexists(partial):
        return 0
    if not resume:
        remedy = "add --resume to continue it, or remove it"
        raise MarsclfError(f"{partial} is from a run that was stopped: {remedy}.")
    with partial.open(encoding="utf-8", errors="replace") as file:
        if not json.dumps(settings).startswith(file.readline().rstrip("\n")):
            raise MarsclfError(
                f"{partial} is from other paths, or from another classifier or threshold: remove "
                "it, or repeat the paths, --explain, --model and --threshold of that run."
            )
    number = 0
    for row in _read(partial):
        if printable(next(images, "")) != row.path:
            remedy = "remove it, and start again without --resume"
            raise MarsclfError(f"The images have changed since {partial} was written: {remedy}.")
        number += 1
    return number


def append(partial: Path, settings: dict, rows: Iterable[Row]) -> None:
    """Store rows, after the settings if they are the first."""
    with partial.open("a", encoding="utf-8") as file:
        if not file.tell():
            file.write(json.dumps(settings))
        file.writelines(f"\n{json.dumps(row)}" for row in rows)


def finish(partial: Path, output: Path) -> Counter:
    """Turn the rows into the output, and return how many there are of each kind."""
    with replace_atomically(output) as temporary:
        WRITERS[output.suffix](_read(partial), temporary)
    counts = Counter(map(kind, _read(partial)))
    partial.unlink()
    return counts


def _read(partial: Path) -> Iterator[Row]:
    """Yield the rows; a line that is incomplete does not count."""
    with partial.open(encoding="utf-8", errors="replace") as file:
        file.readline()
        for line in file:
            with suppress(ValueError):
                yield Row(*json.loads(line))
