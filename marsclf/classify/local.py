"""The command `predict`: classify files into a table that appears complete or not at all."""

import csv
import hashlib
import itertools
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from marsclf import paths
from marsclf.classify import classifier_file, on_ray, parts
from marsclf.classify.find import list_images
from marsclf.classify.table import COLUMNS, WRITERS, Row, check_threshold, count
from marsclf.errors import MarsclfError
from marsclf.evaluation.metrics import THRESHOLD
from marsclf.images.decode import ignore_decoder_warnings

if TYPE_CHECKING:  # takes seconds to load
    from marsclf.classify.classifier import Classifier

ALL_READ, SOME_NOT_READ, INTERRUPTED = 0, 3, 130
IMAGES_PER_PART = 1000  # about ten seconds of work, which a resumed run repeats at most
BATCH = 16  # images that are printed, or explained, at once


@dataclass(frozen=True)
class Job:
    """What to classify, and how.

    Attributes:
        sources: files, folders and patterns; "-" stands for a list on standard input.
        output: .csv or .parquet file, or for Ray a new folder of Parquet files; None prints CSV.
        threshold: confidence, 0 to 1, below which a prediction is marked as uncertain.
        model: classifier file; None is the published one.
        explain: folder for Grad-CAM overlays, or None.
        resume: continue the same job after it was stopped.
        engine: "local" or "ray".
        address: of a Ray cluster; None starts Ray on this machine.
    """

    sources: list[str]
    output: Path | None = None
    threshold: float = THRESHOLD
    model: Path | None = None
    explain: Path | None = None
    resume: bool = False
    engine: str = "local"
    address: str | None = None


def predict(job: Job) -> int:
    """Classify images; return 0, or 3 if some could not be read, or 130 after Ctrl-C.

    Raises MarsclfError if there is no image, and if an argument or the output cannot be used.
    """
    _check(job)
    output = job.output
    if job.resume and os.path.exists(output) and not os.path.exists(parts.partial_of(output)):
        print(f"{output} is complete: there is nothing to resume.", file=sys.stderr)
        return ALL_READ
    try:
        counts, done, seconds = _write_table(job, output) if output else _print_table(job)
    except KeyboardInterrupt:
        is_kept = output is not None and parts.partial_of(output).exists()
        kept = f"; --resume continues from {parts.partial_of(output)}" if is_kept else ""
        print(f"error: interrupted{kept}.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of standard output, such as `head`, has stopped
        return ALL_READ
    print(_report(counts, done, seconds), file=sys.stderr)
    if output is not None:
        print(f"Table: {output}", file=sys.stderr)
    return SOME_NOT_READ if counts["errors"] else ALL_READ


def _check(job: Job) -> None:
    """Raise MarsclfError for arguments that cannot be used; create the folder for overlays."""
    check_threshold(job.threshold)
    output, explain = job.output, job.explain
    if job.engine == "ray":
        on_ray.import_ray()
        if explain:
            raise MarsclfError("--explain needs the local engine: leave out --engine ray.")
        if output is None or output.suffix:
            raise MarsclfError("--engine ray writes a folder: name one without a dot by --output.")
        if os.path.exists(output) and not (job.resume and os.path.isdir(output)):
            raise MarsclfError(f"{output} exists already: name another folder, or remove it.")
    elif job.address:
        raise MarsclfError("--address is for a Ray cluster: add --engine ray.")
    elif output is None and job.resume:
        raise MarsclfError("--resume continues a file: name it with --output.")
    elif output and (output.suffix not in WRITERS or os.path.isdir(output)):
        raise MarsclfError(f"The output {output} must be a {' or '.join(WRITERS)} file.")
    if output and not os.path.isdir(output.parent):
        raise MarsclfError(f"The folder {output.parent} of the output does not exist: create it.")
    for target in filter(None, (output, explain)):
        if os.path.realpath(target) in map(os.path.realpath, job.sources):
            raise MarsclfError(f"{target} is one of the paths to classify: name another output.")
    if explain:
        try:
            explain.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MarsclfError(f"{explain} cannot be created ({error.strerror}).") from None


def _write_table(job: Job, output: Path) -> tuple[Counter, int, float]:
    """Write the output; return the counts of its rows, images classified now, and seconds."""
    images, size = list_images(job.sources, job.explain), IMAGES_PER_PART
    model = job.model or paths.CLASSIFIER
    if job.engine == "ray":  # its workers have another working directory
        output, images = output.absolute(), map(os.path.abspath, images)
        size = on_ray.IMAGES_PER_PART
    settings = {
        "sources": [s if s == "-" else os.path.abspath(s) for s in job.sources],
        "classifier": classifier_file.read(model)[2],
        "threshold": job.threshold,
        "columns": list(COLUMNS),
    }
    with parts.open_parts(output, images, settings, size, job.resume) as folder:
        missing, started = parts.missing_parts(folder), time.monotonic()
        if job.engine == "ray" and missing:
            with _quiet_libraries():
                on_ray.classify_parts(folder, [*missing], job.threshold, model, job.address)
        elif missing:
            waiting = (path for name in missing for path in parts.read_paths(folder, name))
            classifier, started = _load_classifier(job), time.monotonic()
            rows = _classify(classifier, waiting, job, total=sum(missing.values()))
            for name, number in missing.items():
                parts.write_part(folder, name, itertools.islice(rows, number))
        seconds = time.monotonic() - started
        return parts.finish(folder, output), sum(missing.values()), seconds


def _print_table(job: Job) -> tuple[Counter, int, float]:
    """Print the rows as CSV; return the same as _write_table."""
    counts: Counter = Counter()
    images = list_images(job.sources, job.explain)
    images = itertools.chain([next(images)], images)  # fails before the classifier is loaded
    classifier, started = _load_classifier(job), time.monotonic()
    sys.stdout.reconfigure(errors="backslashreplace")
    writer = csv.writer(sys.stdout, lineterminator="\n")
    try:
        writer.writerow(COLUMNS)
        rows = _classify(classifier, images, job)
        while batch := list(itertools.islice(rows, BATCH)):
            writer.writerows(batch)
            sys.stdout.flush()
            counts += count(batch)
    except OSError as error:
        # Python would fail again at exit, when it flushes the rest of the buffer.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise MarsclfError(
            f"Standard output cannot be written ({error.strerror}): the rows are incomplete."
        ) from None
    return counts, counts["images"], time.monotonic() - started


def _load_classifier(job: Job) -> "Classifier":
    print("Loading the classifier ...", file=sys.stderr)
    with _quiet_libraries():
        from marsclf.classify.classifier import load_classifier

        classifier = load_classifier(job.model)
        if job.explain:
            classifier.network()  # loads TensorFlow
    return classifier


def _classify(
    classifier: "Classifier", images: Iterable[str], job: Job, total: int | None = None
) -> Iterator[Row]:
    """Yield the rows of images, after saving their overlays, and show the progress."""
    hide = job.output is None and sys.stdout.isatty()
    with (
        tqdm(desc="classifying", unit="image", total=total, disable=hide or None) as bar,
        warnings.catch_warnings(),
    ):
        ignore_decoder_warnings()
        pairs = classifier.rows(images, job.threshold)
        while batch := list(itertools.islice(pairs, BATCH)):
            if job.explain:
                _save_overlays(classifier, batch, job.explain)
            yield from (row for _, row in batch)
            bar.update(len(batch))


def _save_overlays(classifier: "Classifier", batch: list[tuple[str, Row]], folder: Path) -> None:
    """Save a Grad-CAM overlay of the first zoom as JPEG for each image that was read.

    The file name contains the class, and eight digits for the path, because files in several
    folders may share a name.
    """
    import numpy as np
    from PIL import Image

    from marsclf.data.msl import CLASS_NAMES
    from marsclf.figures.results import heatmap_overlay
    from marsclf.networks.gradcam import gradcam

    read = []
    for path, row in batch:
        with suppress(MarsclfError):  # deleted since it was classified
            if row.predicted:
                read.append((path, row.predicted, classifier.views(path)[0]))
    if not read:
        return
    views = np.stack([view for _, _, view in read])
    classes = np.array([CLASS_NAMES.index(name) for _, name, _ in read])
    heatmaps = gradcam(classifier.network(), views, classes)
    for (path, predicted, view), heatmap in zip(read, heatmaps, strict=True):
        digits = hashlib.blake2b(os.fsencode(path), digest_size=4).hexdigest()
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(path).stem)[:100]
        target = folder / f"{stem}.{digits}.{predicted.replace(' ', '_')}.jpg"
        try:
            Image.fromarray(heatmap_overlay(view, heatmap)).save(target, quality=90)
        except OSError as error:
            raise MarsclfError(f"{target} cannot be written ({error.strerror}).") from None


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Hide what TensorFlow and Ray print below Python; what Python itself prints is still seen."""
    sys.stderr.flush()
    terminal, python = os.dup(2), sys.stderr
    with open(os.devnull, "wb") as nowhere, os.fdopen(terminal, "w", buffering=1) as kept:
        os.dup2(nowhere.fileno(), 2)
        sys.stderr = kept if python is sys.__stderr__ else python
        try:
            yield
        finally:
            sys.stderr = python
            os.dup2(terminal, 2)


def _report(counts: Counter, done: int, seconds: float) -> str:
    """Return the summary: how many images, how fast, how many of each class."""
    counts = counts.copy()
    images, errors, uncertain = (counts.pop(k, 0) for k in ("images", "errors", "uncertain"))
    lines = [
        f"{images:,} images: {images - errors - uncertain:,} certain, {uncertain:,} uncertain, "
        f"{errors:,} could not be read. "
        f"{done:,} took {seconds:.1f} s, {done / max(seconds, 1e-9):.0f} images per second."
    ]
    lines += [f"{number:>12,}  {name}" for name, number in counts.most_common()]
    return "\n".join(lines)
