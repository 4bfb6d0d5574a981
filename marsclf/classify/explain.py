"""Grad-CAM overlays of classified files: where in each image its class was seen."""

import hashlib
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image

from marsclf.classify.classifier import Classifier
from marsclf.classify.table import Row
from marsclf.data.msl import CLASS_NAMES
from marsclf.errors import MarsclfError
from marsclf.figures.results import heatmap_overlay
from marsclf.networks.gradcam import gradcam


def save_overlays(classifier: Classifier, batch: list[tuple[str, Row]], folder: Path) -> None:
    """Save an overlay as JPEG for each file of the batch that was read; the class is in the name.

    The name also has eight digits that stand for the whole path, because files in several folders
    may share a name. Of a classifier that looks at several zooms the first look is explained.
    Raises MarsclfError where `folder` cannot be written.
    """
    read = []
    for path, row in batch:
        if row.predicted is not None:
            try:
                read.append((path, row, classifier.views(path)[0]))
            except MarsclfError:
                continue  # gone since it was classified
    if not read:
        return
    views = np.stack([view for _, _, view in read])
    classes = np.array([CLASS_NAMES.index(row.predicted) for _, row, _ in read])
    for (path, row, view), heat in zip(
        read, gradcam(classifier.network(), views, classes), strict=True
    ):
        place = folder / _overlay_name(path, row.predicted)
        try:
            Image.fromarray(heatmap_overlay(view, heat)).save(place, quality=90)
        except OSError as error:
            raise MarsclfError(f"{place} cannot be written ({error.strerror}).") from None


def _overlay_name(path: str, predicted: str) -> str:
    """Return the file name of a path's overlay, such as `rover.1f2e3d4c.drill.jpg`."""
    digits = hashlib.blake2b(os.fsencode(path), digest_size=4).hexdigest()
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(path).stem)[:100]
    return f"{stem}.{digits}.{predicted.replace(' ', '_')}.jpg"
