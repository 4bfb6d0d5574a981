"""The command `predict`: classify files into a table that appears complete or not at all."""

import csv
import hashlib
import itertools
import os
import re
import sys
import time
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import numpy as np
from tqdm import tqdm

from marsclf.classify import classifier_file
from marsclf.classify.classifier import Classifier, load_classifier
from marsclf.classify.find import list_images
from marsclf.classify.partial import append, finish, locked, partial_of, skip_finished
from marsclf.classify.table import COLUMNS, WRITERS, Row, check_threshold, kind
from marsclf.errors import MarsclfError

BATCH = 16  # images that are explained and stored at once


def predict(options: Namespace) -> int:
    """Classify images; return 0, or 3 if some could not be read, or 130 after Ctrl-C.

    `options` are those of `python -m marsclf predict`, see marsclf.cli. Raises MarsclfError if
    there is no image, and if an option or the output cannot be used.
    """
    _check(options)
    started, output = time.monotonic(), options.output
    partial = output and partial_of(output)
    if options.resume and os.path.exists(output) and not os.path.exists(partial):
        print(f"{output} is complete: there is nothing to resume.", file=sys.stderr)
        return 0
    try:
        with _quiet_libraries():
            images = list_images(options.sources, options.explain)
            images = itertools.chain([next(images)], images)  # fails before anything is written
            counts, done = (_write_table if output else _print_table)(images, options)
    except KeyboardInterrupt:
        if not (partial and os.path.exists(partial)):
            raise
        print(f"error: interrupted; --resume continues from {partial}.", file=sys.stderr)
        return 130
    _summarize(counts, done, time.monotonic() - started)
    if output:
        print(f"Table: {output}", file=sys.stderr)
    return 3 if counts[None, None, None] else 0


def _check(options: Namespace) -> None:
    """Raise MarsclfError for arguments that cannot be used; create the folder for overlays."""
    check_threshold(options.threshold)
    output, explain = options.output, options.explain
    if output is None and options.resume:
        raise MarsclfError("--resume continues a file: name it with --output.")
    if output and (output.suffix not in WRITERS or os.path.isdir(output)):
        raise MarsclfError(f"The output {output} must be a {' or '.join(WRITERS)} file.")
    for target in filter(None, (output, explain)):
        if os.path.realpath(target) in map(os.path.realpath, options.sources):
            raise MarsclfError(f"{target} is one of the paths to classify: name another output.")
    if explain:
        explain.mkdir(parents=True, exist_ok=True)


def _write_table(images: Iterator[str], options: Namespace) -> tuple[Counter, int]:
    """Write the output; return the counts of its rows, and how many images were classified now."""
    output, partial = options.output, partial_of(options.output)
    settings = {
        "sources": [s if s == "-" else os.path.abspath(s) for s in options.sources],
        "explain": options.explain and os.path.abspath(options.explain),
        "classifier": classifier_file.read(options.model)[2],
        "threshold": options.threshold,
        "columns": list(COLUMNS),
    }
    with locked(output):
        before = skip_finished(partial, settings, images, options.resume)
        for rows in _classify(images, options, before):
            append(partial, settings, rows)
        counts = finish(partial, output)
    return counts, counts.total() - before


def _print_table(images: Iterator[str], options: Namespace) -> tuple[Counter, int]:
    """Print the rows as CSV; return the same as _write_table."""
    counts: Counter = Counter()
    sys.stdout.reconfigure(errors="backslashreplace")
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(COLUMNS)
    for rows in _classify(images, options):
        writer.writerows(rows)
        sys.stdout.flush()
        counts.update(map(kind, rows))
    return counts, counts.total()


def _classify(images: Iterator[str], options: Namespace, before: int = 0) -> Iterator[list[Row]]:
    """Yield the rows of a few images at a time, save their overlays, and show the progress."""
    print("Loading the classifier ...", file=sys.stderr)
    classifier = load_classifier(options.model)
    if options.explain:
        classifier.network()  # loads TensorFlow
    rows = classifier.rows(images, options.threshold)
    hide = not sys.stderr.isatty() or (options.output is None and sys.stdout.isatty())
    total = None
    if not hide and "-" not in options.sources:
        total = sum(1 for _ in list_images(options.sources, options.explain))
    pairs = iter(tqdm(rows, "classifying", total, unit="image", initial=before, disable=hide))
    while batch := list(itertools.islice(pairs, BATCH)):
        if options.explain:
            _save_overlays(classifier, batch, options.explain)
        yield [row for _, row in batch]


def _save_overlays(classifier: Classifier, batch: list[tuple[str, Row]], folder: Path) -> None:
    """Save each image that was read, at its first zoom, beside Grad-CAM's overlay, as JPEG."""
    from marsclf.figures.results import EVIDENCE, gallery, heatmap_overlay, set_style
    from marsclf.networks.gradcam import gradcam

    read = [(path, row) for path, row in batch if row.predicted]
    if not read:
        return
    set_style()
    views = np.stack([classifier.views(path)[0] for path, _ in read])
    classes = np.array([classifier.classes.index(row.predicted) for _, row in read])
    heatmaps = gradcam(classifier.network(), views, classes)
    for (path, row), view, heatmap in zip(read, views, heatmaps, strict=True):
        # Files in several folders may share a name, and a class may have a name that no file can.
        digits = hashlib.blake2b(os.fsencode(path), digest_size=4).hexdigest()
        names = [re.sub(r"[^A-Za-z0-9_-]+", "_", s)[:100] for s in (Path(path).stem, row.predicted)]
        target = folder / f"{names[0]}.{digits}.{names[1]}.jpg"
        pictures = {"the image": view, "the evidence": heatmap_overlay(view, heatmap)}
        title = f"{row.predicted}, {row.confidence:.2f}"
        figure = gallery([*pictures.values()], [*pictures], 2, title, scale=EVIDENCE)
        try:
            with warnings.catch_warnings(action="ignore"):  # no font has every script
                figure.savefig(target, dpi=100)
        except OSError as error:
            raise MarsclfError(f"{target} cannot be written ({error.strerror}).") from None


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Hide what TensorFlow prints below Python; what Python itself prints is still seen."""
    sys.stderr.flush()
    with open(os.devnull, "wb") as nowhere, os.fdopen(os.dup(2), "w", buffering=1) as terminal:
        os.dup2(nowhere.fileno(), 2)
        try:
            with redirect_stderr(terminal if sys.stderr is sys.__stderr__ else sys.stderr):
                yield
        finally:
            os.dup2(terminal.fileno(), 2)


def _summarize(counts: Counter, done: int, seconds: float) -> None:
    """Print how many images there are of each kind and class, and how fast they were."""
    classes: Counter = Counter()
    for (name, *_), number in counts.items():
        classes[name] += number
    images, errors = classes.total(), classes.pop(None, 0)
    uncertain = sum(number for (_, flag, _), number in counts.items() if flag)
    unfamiliar = sum(number for (_, _, flag), number in counts.items() if flag)
    text = (
        f"{images:,} images: {images - errors - uncertain:,} certain, {uncertain:,} uncertain, "
        f"{errors:,} could not be read."
    )
    if any(flag is not None for _, _, flag in counts):
        text += f" {unfamiliar:,} are unfamiliar."
    speed = f"{done:,} took {seconds:.1f} s, {done / seconds:.0f} images per second."
    print(text, speed, file=sys.stderr)
    for name, number in classes.most_common():
        print(f"{number:>12,}  {name}", file=sys.stderr)
