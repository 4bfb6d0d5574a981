"""The classifier: images in, a table of predictions out."""

import functools
import itertools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from marsclf import paths
from marsclf.classify import classifier_file
from marsclf.classify.find import find_images
from marsclf.classify.table import DECIMALS, FAMILIAR, Row, check_threshold, printable, table
from marsclf.data.product_id import parse_product_id
from marsclf.errors import MarsclfError
from marsclf.evaluation.calibration import pool, with_temperature
from marsclf.evaluation.metrics import THRESHOLD
from marsclf.images.decode import ignore_decoder_warnings, read_rgb
from marsclf.images.views import Condition, fit_view
from marsclf.networks.engine import Predictor, make_predictor, predict_each, stored_predictor

if TYPE_CHECKING:  # Keras takes seconds to load
    import keras

NETWORK_VERSION = 1  # increase it when equal classifier files give another network


@dataclass(frozen=True)
class Classifier:
    """A network with its weights, ready to classify."""

    image_size: int  # side of the network's input, pixels
    zooms: tuple[float, ...]  # an image is classified at each, and the predictions are pooled
    temperature: float  # the logits are divided by it (Guo et al. 2017)
    classes: tuple[str, ...]  # names of the outputs
    training: dict  # where the weights come from
    # RGB pixels 0-255 (n, size, size, 3) to probabilities (n, classes), not calibrated, and perhaps
    # one more column, the familiarity.
    engine: Predictor = field(repr=False)
    # Returns the Keras model, images to probabilities, built on the first call.
    network: Callable[[], "keras.Model"] = field(repr=False)

    def predict(
        self,
        images: str | Path | np.ndarray | Iterable[str | Path | np.ndarray],
        threshold: float = THRESHOLD,
    ) -> pd.DataFrame:
        """Classify images and return a table with one row per image, in order; columns as in Row.

        Args:
            images: one or more paths of files, folders (all images in them) or patterns such as
                `*.jpg`, or uint8 arrays (height, width) or (height, width, 3), RGB.
            threshold: confidence, 0 to 1, below which a row is marked as uncertain.

        Raises MarsclfError for arrays of another shape or type. A file that cannot be read has the
        reason in the column `error`.
        """
        check_threshold(threshold)
        # One array of (height, width) or (height, width, 3) is one image, (n, ...) are several.
        if isinstance(images, str | Path) or (isinstance(images, np.ndarray) and images.ndim < 4):
            images = [images]
        items = itertools.chain.from_iterable(
            [_rgb(image)] if isinstance(image, np.ndarray) else find_images([image])
            for image in images
        )
        return table(row for _, row in self.rows(items, threshold))

    def rows(
        self, items: Iterable[str | np.ndarray], threshold: float
    ) -> Iterator[tuple[str | np.ndarray, Row]]:
        """Yield each item, a path or a uint8 array (height, width, 3), with its Row, in order.

        Items are read about a hundred ahead. A prediction does not depend on the other items.
        """
        errors: dict[int, str] = {}

        def load(numbered: tuple[int, str | np.ndarray]) -> np.ndarray:
            number, item = numbered
            try:
                return self.views(item)
            except Exception as error:  # one file must not stop the others
                errors[number] = str(error) or type(error).__name__
                return np.zeros((len(self.zooms), self.image_size, self.image_size, 3), np.uint8)

        loading, waiting = itertools.tee(enumerate(items))
        outputs = predict_each(loading, load, self._predict_views)
        with warnings.catch_warnings():
            ignore_decoder_warnings()
            for output, (number, item) in zip(outputs, waiting, strict=True):
                yield item, self._row(item, output, errors.pop(number, None), threshold)

    def views(self, source: str | np.ndarray) -> np.ndarray:
        """Return the network's inputs for an image, one per zoom: uint8 (zooms, size, size, 3)."""
        image = source if isinstance(source, np.ndarray) else read_rgb(source)
        return np.stack([fit_view(image, self.image_size, Condition(zoom=z)) for z in self.zooms])

    def _predict_views(self, views: np.ndarray) -> np.ndarray:
        """Return pooled probabilities (n, classes) for the views (n, zooms, size, size, 3).

        One more column is the familiarity of the first zoom, if the engine gives it.
        """
        outputs = self.engine(views.reshape(-1, *views.shape[2:])).reshape(*views.shape[:2], -1)
        probabilities, familiarity = np.split(outputs, [len(self.classes)], axis=-1)
        return np.concatenate([pool(probabilities, axis=1), familiarity[:, 0]], axis=-1)

    def _row(self, item: object, output: np.ndarray, error: str | None, threshold: float) -> Row:
        """Return the row of an item: its error, or else what its pooled output says."""
        row = Row(printable(item) if isinstance(item, str) else None)
        with suppress(MarsclfError):  # not a product id
            product = parse_product_id(f"{Path(row.path or '').stem}.JPG")
            row = row._replace(sol=product.sol, camera=product.camera)
        if error:
            return row._replace(error=printable(error))
        probabilities, familiarity = np.split(output.astype(np.float64), [len(self.classes)])
        probabilities = with_temperature(probabilities, self.temperature)
        second, first = np.argsort(probabilities, kind="stable")[-2:]
        # Round first, so that the flags agree with the numbers in the table.
        confidence, other, *known = (
            round(float(value), DECIMALS)
            for value in (probabilities[first], probabilities[second], *familiarity)
        )
        return row._replace(
            predicted=self.classes[first],
            confidence=confidence,
            runner_up=self.classes[second],
            runner_up_confidence=other,
            uncertain=confidence < threshold,
            familiarity=known[0] if known else None,
            unfamiliar=known[0] < FAMILIAR if known else None,
        )


def load_classifier(model: str | Path = "parts", cache: Path = paths.CACHE) -> Classifier:
    """Return one of the library's classifiers, "parts" or "content", or that of a file.

    The first call for a file exports its network into `cache` for the fast engine, which takes some
    seconds. Later calls find it there and do not load Keras; they do not look for a GPU either.
    Raises MarsclfError if the file is missing or invalid. The file need not be trusted.
    """
    file = paths.CLASSIFIERS.get(str(model), Path(model))
    weights, metadata, digest = classifier_file.read(file)

    @functools.cache
    def networks() -> tuple["keras.Model", "keras.Model"]:
        return classifier_file.build_network(file, weights, metadata)

    name, size = f"classifier-{digest[:32]}-{NETWORK_VERSION}", metadata["image_size"]
    engine = stored_predictor(name, cache)
    if engine is None:
        from rich.console import Console

        text = "Preparing the network for this processor, once: about 10 s"
        # Nothing elsewhere: a kernel's environment asks for colors as if it had a terminal.
        terminal = Console(stderr=True, force_terminal=sys.stderr.isatty(), force_jupyter=False)
        with terminal.status(text):
            engine = make_predictor(networks()[1], cache, name=name)
    return Classifier(
        image_size=size,
        zooms=tuple(metadata["zooms"]),
        temperature=metadata["calibration"]["temperature"],
        classes=tuple(metadata["classes"]),
        training=metadata["training"],
        engine=engine,
        network=lambda: networks()[0],
    )


def _rgb(image: np.ndarray) -> np.ndarray:
    """Return a grayscale or RGB array as RGB; raise MarsclfError for any other."""
    fits = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
    if image.dtype != np.uint8 or not fits or not image.size:
        raise MarsclfError(
            "An image must be a uint8 array (height, width) or (height, width, 3), not "
            f"{image.dtype} {image.shape}."
        )
    return image if image.ndim == 3 else np.stack([image] * 3, axis=2)
