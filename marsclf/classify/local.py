"""The command `predict`: classifies files into a table that appears whole or not at all.

While it runs, finished rows are appended to `OUTPUT.partial` beside the output, one JSON list a
line, after a first line that tells by which classifier and threshold, and of what, they were made.
A run that was stopped goes on from there with --resume. At the end the output is written from it.
"""

import csv
import fcntl
import hashlib
import itertools
import json
import os
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import pyarrow
from pyarrow import parquet
from tqdm import tqdm

from marsclf.classify.find import find_images, read_list
from marsclf.classify.table import COLUMNS, Row, check_threshold, count, shown
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically, sha256_of
from marsclf.images.decode import ignore_decoder_warnings

ALL_READ, SOME_NOT_READ, INTERRUPTED = 0, 3, 130
BATCH = 16  # rows that are written, and explained, at once
ROWS_A_GROUP = 10_000  # of a Parquet file; bounds the memory
SCHEMA = pyarrow.schema([(name, pyarrow.type_for_alias(alias)) for name, alias in COLUMNS.items()])


def predict(
    sources: list[str],
    output: Path | None,
    threshold: float,
    model: Path | None,
    explain: Path | None,
    resume: bool,
) -> int:
    """Classify the images that `sources` name; "-" stands for the names on standard input.

    Rows go to the file `output` (.csv or .parquet), or as CSV to standard output; all else that is
    said to standard error. Returns 0, or 3 if some files could not be read, or 130 after Ctrl-C.
    Raises MarsclfError where there is nothing to do and where the output cannot be written.
    """
    check_threshold(threshold)
    if output is not None:
        _check_output(output)
        if resume and os.path.exists(output) and not os.path.exists(partial_of(output)):
            print(f"{output} is whole already: there is nothing to go on with.", file=sys.stderr)
            return ALL_READ
    elif resume:
        raise MarsclfError("--resume goes on with a file: name it with --output.")
    if explain is not None:
        if os.path.realpath(explain) in map(os.path.realpath, sources):
            raise MarsclfError(f"{explain} holds the images: name another folder for --explain.")
        _make_folder(explain)
    paths = named_images(sources, output, explain)
    first = next(paths, None)
    if first is None:
        raise nothing_found(sources)

    print("Loading the classifier ...", file=sys.stderr)
    with quiet_libraries():
        # Only now, because they take up to some seconds to load.
        from marsclf.classify.classifier import load_classifier

        classifier = load_classifier(model)
        if explain is not None:
            from marsclf.classify.explain import save_overlays

            classifier.network()  # built here, where TensorFlow is not heard
    made_by = settings_of(classifier.digest, threshold, sources)
    table = _Printed(sys.stdout) if output is None else _Journal(output, made_by, resume)
    started, before = time.monotonic(), table.counts["images"]
    try:
        with table, warnings.catch_warnings(), _progress(table, sources, explain) as bar:
            ignore_decoder_warnings()
            pairs = classifier.rows(_new(itertools.chain([first], paths), table.done), threshold)
            while batch := list(itertools.islice(pairs, BATCH)):
                if explain is not None:
                    save_overlays(classifier, batch, explain)
                table.add([row for _, row in batch])
                bar.update(len(batch))
            table.finish()
    except KeyboardInterrupt:
        return interrupted(output)
    except BrokenPipeError:  # the reader of standard output, such as `head`, has seen enough
        return ALL_READ
    seconds = time.monotonic() - started
    print(report(table.counts, table.counts["images"] - before, seconds), file=sys.stderr)
    if output is not None:
        print(f"Table: {output}", file=sys.stderr)
    return exit_status(table.counts)


def interrupted(output: Path | None) -> int:
    """Say that Ctrl-C was pressed, and what is there; return the exit status."""
    there = output is not None and partial_of(output).exists()
    kept = f"; --resume goes on with {partial_of(output)}" if there else ""
    print(f"error: interrupted{kept}.", file=sys.stderr)
    return INTERRUPTED


def settings_of(classifier: str, threshold: float, sources: list[str]) -> dict:
    """Return what a run that was stopped must have in common with one that goes on with it."""
    whole = [source if source == "-" else os.path.abspath(source) for source in sources]
    return {
        "classifier": classifier,
        "threshold": threshold,
        "sources": sha256_of("\0".join(map(shown, whole)).encode()),
    }


def exit_status(counts: Counter) -> int:
    """Return the command's exit status: 0, or 3 if some files could not be read."""
    return SOME_NOT_READ if counts["errors"] else ALL_READ


def named_images(
    sources: list[str], output: Path | None = None, explain: Path | None = None
) -> Iterator[str]:
    """Yield what find_images does, once for each path; "-" stands for names on standard input.

    Raises MarsclfError where the output is among the images. What is in `explain` is left out.
    """
    listed = (
        name
        for source in sources
        for name in (read_list(sys.stdin.buffer) if source == "-" else [source])
    )
    # A folder by itself names nothing twice; an archive's millions of names are then not kept.
    may_repeat = not (len(sources) == 1 and os.path.isdir(sources[0]))
    seen: set[bytes] = set()
    for path in find_images(listed, leave_out=explain):
        if (
            output is not None
            and path.endswith(output.suffix)
            and os.path.realpath(path) == os.path.realpath(output)
        ):
            raise MarsclfError(f"The output {output} is one of the images: name another file.")
        if may_repeat:
            key = _key(path)
            if key in seen:
                continue
            seen.add(key)
        yield path


def nothing_found(sources: list[str]) -> MarsclfError:
    """Return the error for sources without an image."""
    named = ["standard input" if source == "-" else source for source in sources]
    return MarsclfError(f"There is no image in {', '.join(named)}.")


def report(counts: Counter, done: int, seconds: float) -> str:
    """Return the summary: how many images, how fast, how many of each class."""
    counts = counts.copy()
    images, errors, uncertain = (counts.pop(k, 0) for k in ("images", "errors", "uncertain"))
    lines = [
        f"{images:,} images: {images - errors - uncertain:,} certain, {uncertain:,} uncertain, "
        f"{errors:,} could not be read. "
        f"{done:,} took {seconds:.1f} s, {done / max(seconds, 1e-9):.0f} images a second."
    ]
    lines += [f"{number:>12,}  {name}" for name, number in counts.most_common()]
    return "\n".join(lines)


def partial_of(output: Path) -> Path:
    """Return the path of what is there of `output` while it is not whole."""
    return output.with_name(f"{output.name}.partial")


def _check_output(output: Path) -> None:
    if output.suffix not in WRITERS:
        raise MarsclfError(f"The output {output} must end in {' or '.join(WRITERS)}.")
    if os.path.isdir(output):
        raise MarsclfError(f"The output {output} is a folder: name a file.")
    if not os.path.isdir(output.parent):
        raise MarsclfError(f"The folder {output.parent} of the output is not there: make it first.")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MarsclfError(f"The folder {folder} cannot be made ({error.strerror}).") from None


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep off the terminal what TensorFlow or Ray tell past Python's own standard error."""
    sys.stderr.flush()
    terminal, python = os.dup(2), sys.stderr
    with Path(os.devnull).open("wb") as nowhere, os.fdopen(terminal, "w", buffering=1) as kept:
        os.dup2(nowhere.fileno(), 2)
        # What Python says, such as a warning, is still seen.
        sys.stderr = kept if python is sys.__stderr__ else python
        try:
            yield
        finally:
            sys.stderr = python
            os.dup2(terminal, 2)


def _key(path: str) -> bytes:
    """Return what stands for a path in a set; of millions of paths only this is kept."""
    return hashlib.blake2b(shown(path).encode(), digest_size=16).digest()


def _new(paths: Iterable[str], done: set[bytes]) -> Iterator[str]:
    return (path for path in paths if not done or _key(path) not in done)


def _progress(table: "_Printed | _Journal", sources: list[str], explain: Path | None) -> tqdm:
    """Return a bar on the terminal; how much there is to do is counted while the work goes on."""
    mixed = isinstance(table, _Printed) and sys.stdout.isatty()
    bar = tqdm(
        desc="classifying", unit="image", disable=mixed or None, initial=table.counts["images"]
    )
    if not bar.disable and "-" not in sources:

        def find_total() -> None:
            bar.total = sum(1 for _ in named_images(sources, explain=explain))

        threading.Thread(target=find_total, daemon=True).start()
    return bar


class _Printed:
    """The table as CSV on a stream, line by line."""

    def __init__(self, stream: TextIO) -> None:
        self.counts: Counter = Counter()
        self.done: set[bytes] = set()
        self.stream = stream
        stream.reconfigure(errors="backslashreplace")

    def __enter__(self) -> None:
        self._write([COLUMNS])

    def __exit__(self, *_: object) -> None:
        pass

    def add(self, rows: list[Row]) -> None:
        self._write(rows)
        self.counts += count(rows)

    def finish(self) -> None:
        pass

    def _write(self, lines: Iterable[Iterable]) -> None:
        try:
            csv.writer(self.stream, lineterminator="\n").writerows(lines)
            self.stream.flush()
        except OSError as error:
            # What is left in the buffer would fail once more when Python ends.
            with Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())
            if isinstance(error, BrokenPipeError):
                raise
            raise MarsclfError(
                f"Standard output cannot be written ({error.strerror}); the rows end there."
            ) from None


class _Journal:
    """The rows that are done, in a file that is only ever added to, and at the end the table."""

    def __init__(self, output: Path, made_by: dict, resume: bool) -> None:
        self.counts: Counter = Counter()
        self.done: set[bytes] = set()
        self.output, self.path = output, partial_of(output)
        self.head = json.dumps({"table": list(COLUMNS)} | made_by).encode() + b"\n"
        with self._failing_clearly():
            self.file = self.path.open("a+b")
        try:
            self._take_up(resume)
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if not self.counts:  # a file without a row would only be in the way of the next run
            self.path.unlink(missing_ok=True)
        self._close()

    def add(self, rows: list[Row]) -> None:
        lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        with self._failing_clearly():
            self.file.write(lines)
            self.file.flush()
        self.counts += count(rows)

    def finish(self) -> None:
        """Write the table and remove the journal."""
        with self._failing_clearly(), replace_atomically(self.output) as temporary:
            WRITERS[self.output.suffix](self._rows(), temporary)
        self.path.unlink()

    def _take_up(self, resume: bool) -> None:
        """Read what is there, but for a line that a kill cut off."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MarsclfError(f"Another run is writing {self.output}: let it end.") from None
        self.file.seek(0)
        head = self.file.readline()
        # New, or stopped before there was a row.
        if not head.endswith(b"\n") and self.head.startswith(head):
            with self._failing_clearly():
                self.file.truncate(0)
                self.file.write(self.head)
                self.file.flush()
            return
        if not resume:
            raise MarsclfError(
                f"{self.path} is left from a run that was stopped: go on with it by --resume, or "
                "remove it."
            )
        if head != self.head:
            raise MarsclfError(
                f"{self.path} is of other images, or of another classifier or threshold: remove "
                "it, or give the same paths, --model and --threshold as before."
            )
        for row in self._rows():
            self.done.add(_key(row.path))
            self.counts += count([row])
        self.file.truncate(self.whole)

    def _rows(self) -> Iterator[Row]:
        self.file.seek(len(self.head))
        self.whole = len(self.head)
        for line in self.file:
            if not line.endswith(b"\n"):
                return
            try:
                yield Row(*json.loads(line))
            except (ValueError, TypeError):
                raise MarsclfError(f"{self.path} is damaged: remove it and start anew.") from None
            self.whole += len(line)

    def _close(self) -> None:
        # On a full disk it tries, once more in vain, to write what it could not before.
        with suppress(OSError):
            self.file.close()

    @contextmanager
    def _failing_clearly(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = f"; {self.path} keeps what is done, for --resume" if self.counts else ""
            raise MarsclfError(
                f"{self.output} cannot be written ({error.strerror or error}){kept}."
            ) from None


def _write_csv(rows: Iterator[Row], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)


def _write_parquet(rows: Iterator[Row], path: Path) -> None:
    with parquet.ParquetWriter(path, SCHEMA) as writer:
        while group := list(itertools.islice(rows, ROWS_A_GROUP)):
            writer.write_table(arrow_table(group))


def arrow_table(rows: list[Row]) -> pyarrow.Table:
    """Return rows as an Arrow table with the columns of Row."""
    return pyarrow.Table.from_pylist([row._asdict() for row in rows], SCHEMA)


WRITERS: dict[str, Callable[[Iterator[Row], Path], None]] = {
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}
